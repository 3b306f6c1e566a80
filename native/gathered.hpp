// Attention to chosen keys: every query has a list of keys, or of blocks of keys, that the heads of its group share.
//
//   query 0:  7 · 12 · 90 …      rows (heads of the group) × its keys: a small product, and every key that is read
//   query 1:  3 · 12 · 13 …      serves all rows. Nothing else is read, so the cost is that of the chosen keys.
//
// A piece of work is a tile of queries. Their lists are made ready once: what is outside the call, or hidden by the reach
// beside the selection, falls out, and bits in a map put the rest in order, each of them once. Then the keys are gone
// through by stretches that stay in the second cache, in which every query of the tile visits what it has chosen.
constexpr int64_t gathered_queries = 128;  // most of a tile


// Query heads that share a list and their keys: a unit. Lists and key heads each serve neighbours.
static inline int64_t shared_rows(const Call& call) {
    int64_t a = call.heads / call.key_heads, b = call.heads / call.chosen.heads;
    while (b) {
        const int64_t rest = a % b;
        a = b, b = rest;
    }
    return a;
}
static inline int64_t gathered_units(const Call& call) { return call.heads / shared_rows(call); }

static inline int64_t entries_of(const Call& call) { return (call.keys + call.chosen.block - 1) / call.chosen.block; }

// Queries of a tile: so many that their rows and sums fill a quarter of the second cache, and long lists a few megabytes.
static int64_t gathered_height(const Call& call) {
    const int64_t floats = shared_rows(call) * (padded(call.dim) + padded(call.value_dim) + 2);
    const int64_t listed = most(1, least(call.chosen.count, entries_of(call)));
    return most(1, least(gathered_queries, least(131072 / most(1, floats), (1 << 20) / listed)));
}

// Entries of a stretch: keys and values of another quarter. Where few are chosen it is longer, or a visit would find none.
static int64_t stretch_of(const Call& call, bool bounded) {
    const int64_t floats = padded(call.dim) + padded(call.value_dim), entries = entries_of(call);
    const int64_t near = most(1, 131072 / most(1, floats * call.chosen.block));
    const int64_t wanted = entries * 32 / most(1, call.chosen.count * call.chosen.block);
    return most(1, least(entries, bounded ? near : most(near, wanted)));
}

// Whole numbers below a bound, read back in ascending order: a bit for each, and a bit for each word that has one.
struct Marks {
    uint64_t *words, *used;
    int64_t count;  // of `used`

    static int64_t bytes(int64_t bound) { return 8 * ((bound / 64 + 64) / 64 * 65 + 64); }
    Marks(char* memory, int64_t bound) : count((bound / 64 + 64) / 64) {
        used = reinterpret_cast<uint64_t*>(memory), words = used + count;
        memset(memory, 0, static_cast<size_t>(8 * 65 * count));
    }
    void add(int64_t n) {
        words[n >> 6] |= 1ull << (n & 63);
        used[n >> 12] |= 1ull << (n >> 6 & 63);
    }
    int64_t drain(int32_t* to) {
        int64_t found = 0;
        for (int64_t u = 0; u < count; ++u) {
            for (uint64_t some = used[u]; some; some &= some - 1) {
                const int64_t word = u * 64 + __builtin_ctzll(some);
                for (uint64_t bits = words[word]; bits; bits &= bits - 1)
                    to[found++] = static_cast<int32_t>(word * 64 + __builtin_ctzll(bits));
                words[word] = 0;
            }
            used[u] = 0;
        }
        return found;
    }
};

// What one query has chosen: entries in ascending order, and the keys of them that it may see.
struct Wish {
    int32_t* list;
    int64_t at, end, from, to;
};

template <typename Index>
static bool marked(const Call& call, const Index* list, int64_t first, int64_t end, Marks& marks) {
    const int64_t entries = entries_of(call);
    bool any = false, outside = false;
    for (int64_t n = 0; n < call.chosen.count; ++n) {
        const int64_t entry = list[n];
        outside |= entry < -1 || entry >= entries;
        if (entry < first || entry >= end) continue;
        marks.add(entry), any = true;
    }
    if (outside) __atomic_store_n(call.chosen.outside, 1, __ATOMIC_RELAXED);
    return any;
}

static void make_wishes(const Call& call, const Band& band, int64_t rows, int32_t* lists, Marks marks, Wish* wishes) {
    const Selection& chosen = call.chosen;
    const int64_t head = band.head * rows / (call.heads / chosen.heads);
    const int64_t start = start_of(call, band.batch), capacity = least(chosen.count, entries_of(call));
    const int64_t length = call.lengths ? least(call.lengths[band.batch], call.keys) : call.keys;
    for (int64_t t = 0; t < band.count; ++t) {
        const int64_t query = band.first + t, position = query + start;
        Wish& wish = wishes[t];
        wish = {lists + t * capacity, 0, 0, call.left < 0 ? 0 : most(0, position - call.left),
                call.right < 0 ? length : least(length, position + call.right + 1)};
        const bool some = wish.from < wish.to;
        const int64_t first = some ? wish.from / chosen.block : 0, end = some ? (wish.to - 1) / chosen.block + 1 : 0;
        const int64_t at = band.batch * chosen.strides[0] + head * chosen.strides[1] + query * chosen.strides[2];
        const bool any = chosen.wide ? marked(call, static_cast<const int64_t*>(chosen.indices) + at, first, end, marks)
                                     : marked(call, static_cast<const int32_t*>(chosen.indices) + at, first, end, marks);
        if (any) wish.end = marks.drain(wish.list);
    }
}

// The stretch that comes next for any query of the tile; −1 at the end.
static int64_t next_stretch(const Wish* wishes, int64_t count, int64_t entries) {
    int64_t first = INT64_MAX;
    for (int64_t t = 0; t < count; ++t)
        if (wishes[t].at < wishes[t].end) first = least(first, wishes[t].list[wishes[t].at]);
    return first == INT64_MAX ? -1 : first / entries;
}

// Up to 64 keys of one query, with pointers to whole vectors of their keys and values.
struct Picked {
    int64_t count;
    int64_t key[tile];
    const float *k[tile], *v[tile];
};

// Where the rows of one head lie, and where those go that have to be copied first.
struct Source {
    const Call* call;
    const View* view;
    int64_t place, dim;  // of row 0, in elements
    float* scratch;

    // Whole vectors of these rows, in place where they are some.
    void rows(const int64_t* key, int64_t count, const float** to) const {
        const float* data = static_cast<const float*>(view->data) + place;
        const uint16_t* halves = static_cast<const uint16_t*>(view->data) + place;
        const int64_t step = view->row, wide = padded(dim);
        if (call->dtype == Dtype::float32 && dim % lanes == 0) {
            for (int64_t n = 0; n < count; ++n) to[n] = data + key[n] * step;
            return;
        }
        for (int64_t n = 0; n < count; ++n) {
            float* row = scratch + n * wide;
            if (call->dtype == Dtype::float32)
                memcpy(row, data + key[n] * step, sizeof(float) * static_cast<size_t>(dim));
            else
                widen_row(halves + key[n] * step, row, dim, call->dtype == Dtype::bfloat16);
            for (int64_t d = dim; d < wide; ++d) row[d] = 0;
            to[n] = row;
        }
    }

    // Memory is asked for rows that will be read.
    void ask(int64_t first, int64_t end) const {
        const int64_t size = call->dtype == Dtype::float32 ? 4 : 2;
        for (int64_t n = first; n < end; ++n) {
            const char* row = static_cast<const char*>(view->data) + size * (place + n * view->row);
            for (int64_t byte = 0; byte < size * dim; byte += 64) __builtin_prefetch(row + byte, 0, 2);
        }
    }
};

// The next keys of a query before entry `end`; `inside`: keys of its current block that are done.
static bool pick_keys(const Call& call, Wish& wish, int64_t& inside, int64_t end, Picked& picked) {
    int64_t n = 0;
    while (n < tile && wish.at < wish.end && wish.list[wish.at] < end) {
        const int64_t block = wish.list[wish.at] * call.chosen.block;
        const int64_t first = most(block, wish.from) + inside, last = least(block + call.chosen.block, wish.to);
        const int64_t some = least(last - first, tile - n);
        for (int64_t key = 0; key < some; ++key) picked.key[n + key] = first + key;
        n += some;
        if (first + some < last) {
            inside += some;
        } else {
            ++wish.at, inside = 0;
        }
    }
    picked.count = n;
    return n;
}

// The same, with whole vectors of their keys and values.
static bool pick_next(const Call& call, Wish& wish, int64_t& inside, int64_t end, const Source& keys, const Source& values, Picked& picked) {
    if (!pick_keys(call, wish, inside, end, picked)) return false;
    const int64_t n = picked.count;
    keys.rows(picked.key, n, picked.k), values.rows(picked.key, n, picked.v);
    // The last few keys are worked on as many at a time as all others are.
    for (int64_t at = n; at < (n + lanes - 1) / lanes * lanes; ++at) picked.k[at] = picked.k[n - 1], picked.v[at] = picked.v[n - 1];
    return true;
}

// out[row][key] for some rows and `lanes / rows` keys, whole vectors of each.
template <int rows>
static inline void dots_at(const float* a, int64_t a_row, const float* const* b, int64_t wide, float* out) {
    constexpr int keys = lanes / rows;
    Floats sum[lanes];
#pragma GCC unroll 16
    for (int n = 0; n < lanes; ++n) sum[n] = Floats{};
    for (int64_t d = 0; d < wide; d += lanes)
#pragma GCC unroll 16
        for (int key = 0; key < keys; ++key) {
            const Floats one = load(b[key] + d);
#pragma GCC unroll 4
            for (int row = 0; row < rows; ++row) sum[row * keys + key] += one * load(a + row * a_row + d);
        }
    float found[lanes];
    store(found, sums_of(sum));
    for (int row = 0; row < rows; ++row) memcpy(out + row * tile, found + row * keys, sizeof(float) * keys);
}

template <int rows>
static void dots_of_rows(const float* a, int64_t a_row, const float* const* b, int64_t count, int64_t wide, float* out) {
    for (int64_t key = 0; key < count; key += lanes / rows) dots_at<rows>(a, a_row, b + key, wide, out + key);
}

static void gathered_dots(const float* a, int64_t rows, int64_t wide, const float* const* b, int64_t count, float* out) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) dots_of_rows<4>(a + row * wide, wide, b, count, wide, out + row * tile);
    for (; row + 2 <= rows; row += 2) dots_of_rows<2>(a + row * wide, wide, b, count, wide, out + row * tile);
    if (row < rows) dots_of_rows<1>(a + row * wide, wide, b, count, wide, out + row * tile);
}

// out[row] += Σ_j weights[row][j] · b[j]: a fresh sum, added once.
template <int rows, int vectors>
static inline void mix(const float* weights, const float* const* b, int64_t count, int64_t d, float* out, int64_t out_row) {
    Floats sum[rows][vectors];
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) sum[row][n] = Floats{};
    for (int64_t key = 0; key < count; ++key) {
        Floats one[vectors];
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) one[n] = load(b[key] + d + n * lanes);
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) {
            const Floats weight = spread(weights[row * tile + key]);
#pragma GCC unroll 4
            for (int n = 0; n < vectors; ++n) sum[row][n] += weight * one[n];
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) {
            float* place = out + row * out_row + d + n * lanes;
            store(place, load(place) + sum[row][n]);
        }
}

// rows[j] += Σ_i weights[i][j] · a[i], for rows of a tile's own sums.
template <int rows, int vectors>
static inline void scatter(const float* weights, const float* a, int64_t a_row, float* const* to, int64_t count, int64_t d) {
    Floats mine[rows][vectors];
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) mine[row][n] = load(a + row * a_row + d + n * lanes);
    for (int64_t key = 0; key < count; ++key) {
        Floats sum[vectors];
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) sum[n] = Floats{};
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) {
            const Floats weight = spread(weights[row * tile + key]);
#pragma GCC unroll 4
            for (int n = 0; n < vectors; ++n) sum[n] += weight * mine[row][n];
        }
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) store(to[key] + d + n * lanes, load(to[key] + d + n * lanes) + sum[n]);
    }
}

constexpr int mixed = vectors < 4 ? vectors : 4;  // vectors of a register tile of four rows

template <int rows>
static void mix_rows(const float* weights, const float* const* b, int64_t count, int64_t wide, float* out) {
    int64_t d = 0;
    for (; d + mixed * lanes <= wide; d += mixed * lanes) mix<rows, mixed>(weights, b, count, d, out, wide);
    for (; d < wide; d += lanes) mix<rows, 1>(weights, b, count, d, out, wide);
}

static void gathered_mix(const float* weights, int64_t rows, const float* const* b, int64_t count, int64_t wide, float* out) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) mix_rows<4>(weights + row * tile, b, count, wide, out + row * wide);
    for (; row + 2 <= rows; row += 2) mix_rows<2>(weights + row * tile, b, count, wide, out + row * wide);
    if (row < rows) mix_rows<1>(weights + row * tile, b, count, wide, out + row * wide);
}

template <int rows>
static void scatter_rows(const float* weights, const float* a, float* const* to, int64_t count, int64_t wide) {
    int64_t d = 0;
    for (; d + mixed * lanes <= wide; d += mixed * lanes) scatter<rows, mixed>(weights, a, wide, to, count, d);
    for (; d < wide; d += lanes) scatter<rows, 1>(weights, a, wide, to, count, d);
}

static void gathered_scatter(const float* weights, int64_t rows, const float* a, float* const* to, int64_t count, int64_t wide) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) scatter_rows<4>(weights + row * tile, a + row * wide, to, count, wide);
    for (; row + 2 <= rows; row += 2) scatter_rows<2>(weights + row * tile, a + row * wide, to, count, wide);
    if (row < rows) scatter_rows<1>(weights + row * tile, a + row * wide, to, count, wide);
}

// Raw scores of one row become those that are weighed; `slopes`: what the cap lets through of a gradient.
static void adjust_chosen(const Call& call, int64_t batch, int64_t head, int64_t query, const Picked& picked, float* scores,
                          float* slopes) {
    const bool adjusted = adjusts(call);
    const float* distances = call.distances;
    if (distances) distances += batch * call.distance_batch + head * call.distance_head + call.keys - 1 + query;
    for (int64_t n = 0; n < picked.count && adjusted; n += lanes) {
        Floats score = load(scores + n) * spread(call.scale);
        if (call.softcap != 0) {
            const Floats bent = tangent(score / spread(call.softcap));
            score = spread(call.softcap) * bent;
            if (slopes) store(slopes + n, spread(1.0f) - bent * bent);
        }
        store(scores + n, rounded(score));
    }
    for (int64_t key = 0; key < picked.count && distances; ++key) scores[key] += distances[-picked.key[key]];
    for (int64_t key = picked.count; key < (picked.count + lanes - 1) / lanes * lanes; ++key) scores[key] = -INFINITY;
}

// The rows of a tile as whole vectors, query by query, the heads of each side by side.
static void fetch(const Call& call, const View& view, const Band& band, int64_t rows, int64_t dim, float* to) {
    for (int64_t t = 0; t < band.count; ++t)
        for (int64_t row = 0; row < rows; ++row, to += padded(dim)) {
            const int64_t at = band.batch * view.batch + (band.head * rows + row) * view.head + (band.first + t) * view.row;
            if (call.dtype == Dtype::float32)
                memcpy(to, static_cast<const float*>(view.data) + at, sizeof(float) * static_cast<size_t>(dim));
            else
                widen_row(static_cast<const uint16_t*>(view.data) + at, to, dim, call.dtype == Dtype::bfloat16);
            for (int64_t d = dim; d < padded(dim); ++d) to[d] = 0;
        }
}

// Lists, maps of bits and rows that have to be copied: what both passes have.
static int64_t gathered_floats(const Call& call, int64_t height) {
    const int64_t lists = (height * least(call.chosen.count, entries_of(call)) + 15) / 16 * 16;
    const int64_t marks = (Marks::bytes(entries_of(call)) + 63) / 64 * 16;
    const int64_t wishes = (height * static_cast<int64_t>(sizeof(Wish)) + 63) / 64 * 16;
    return lists + marks + wishes + tile * (padded(call.dim) + padded(call.value_dim)) + 3 * shared_rows(call) * tile;
}

static int64_t gathered_bytes(const Call& call) {
    const int64_t height = gathered_height(call), rows = height * shared_rows(call);
    return 4 * (gathered_floats(call, height) + rows * (padded(call.dim) + padded(call.value_dim) + 1 + lanes));
}

// One piece of work, made ready.
struct Gathering {
    const Call& call;
    int64_t rows, wide, value_wide;
    Wish* wishes;
    float *scores, *d_scores, *slopes;
    Source keys, values;

    template <typename Room>
    Gathering(const Call& call, const Band& band, Room room)
        : call(call), rows(shared_rows(call)), wide(padded(call.dim)), value_wide(padded(call.value_dim)) {
        const int64_t height = gathered_height(call), key_head = band.head * rows / (call.heads / call.key_heads);
        char* marks = reinterpret_cast<char*>(room((Marks::bytes(entries_of(call)) + 63) / 64 * 16));
        wishes = reinterpret_cast<Wish*>(room((height * static_cast<int64_t>(sizeof(Wish)) + 63) / 64 * 16));
        int32_t* lists = reinterpret_cast<int32_t*>(room((height * least(call.chosen.count, entries_of(call)) + 15) / 16 * 16));
        keys = {&call, &call.k, band.batch * call.k.batch + key_head * call.k.head, call.dim, room(tile * wide)};
        values = {&call, &call.v, band.batch * call.v.batch + key_head * call.v.head, call.value_dim, room(tile * value_wide)};
        scores = room(rows * tile), d_scores = room(rows * tile), slopes = room(rows * tile);
        make_wishes(call, band, rows, lists, Marks(marks, entries_of(call)), wishes);
    }

    // While query t of the tile works on one stretch, its share of the next one is fetched, if most of it will be read.
    void ask(const Band& band, int64_t next, int64_t stretch, int64_t t) const {
        const int64_t size = stretch * call.chosen.block, first = next * size, end = least(first + size, call.keys);
        if (band.count * call.chosen.count < 2 * entries_of(call)) return;
        const int64_t each = (size + band.count - 1) / band.count, from = first + t * each, to = least(from + each, end);
        if (to <= wishes[band.count - 1].to) keys.ask(from, to), values.ask(from, to);
    }
};

// The rows of a tile leave, head by head. Of row `row` of query t there are base(t, row), total(t, row) and sums(t, row).
template <typename Base, typename Total, typename Sums>
static void leave_gathered(const Call& call, const Band& band, int64_t rows, Base base, Total total, Sums sums) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t first = 0; first < band.count; first += tile) {
            const int64_t head = band.head * rows + row, query = band.first + first, count = least(tile, band.count - first);
            float bases[tile], totals[tile]{}, factors[tile];
            for (int64_t n = 0; n < count; ++n) bases[n] = base(first + n, row), totals[n] = total(first + n, row);
            leave_sums(call, head, number_of(call, band.batch, head, query), {bases, nullptr, totals, nullptr}, count, factors);
            for (int64_t n = 0; n < count; ++n) {
                float* out = sums(first + n, row);
                for (int64_t d = 0; d < call.value_dim; d += lanes) store(out + d, load(out + d) * spread(factors[n]));
                leave_row(call, band.batch * call.out.batch + head * call.out.head + (query + n) * call.out.row, out);
            }
        }
}

static void gathered(const Call& call, const Band& band, char* scratch) {
    float* next = reinterpret_cast<float*>(scratch);
    const auto room = [&next](int64_t floats) { return next += floats, next - floats; };
    const Gathering piece(call, band, room);
    const int64_t rows = piece.rows, wide = piece.wide, value_wide = piece.value_wide, stretch = stretch_of(call, false);
    const float binary = binary_of(call);
    float *q = room(band.count * rows * wide), *out = room(band.count * rows * value_wide);
    float *base = room(band.count * rows), *total = room(band.count * rows * lanes);  // of the keys of each lane
    fetch(call, call.q, band, rows, call.dim, q);
    memset(out, 0, sizeof(float) * static_cast<size_t>(band.count * rows * value_wide));
    for (int64_t n = 0; n < band.count * rows; ++n) {
        base[n] = -INFINITY;
        store(total + n * lanes, Floats{});
    }
    Picked picked;
    for (int64_t at; (at = next_stretch(piece.wishes, band.count, stretch)) >= 0;)
        for (int64_t t = 0; t < band.count; ++t) {
            int64_t inside = 0;
            piece.ask(band, at + 1, stretch, t);
            while (pick_next(call, piece.wishes[t], inside, (at + 1) * stretch, piece.keys, piece.values, picked)) {
                gathered_dots(q + t * rows * wide, rows, wide, picked.k, picked.count, piece.scores);
                for (int64_t row = 0; row < rows; ++row) {
                    float *score = piece.scores + row * tile, *sums = out + (t * rows + row) * value_wide;
                    adjust_chosen(call, band.batch, band.head * rows + row, band.first + t, picked, score, nullptr);
                    float &mine = base[t * rows + row], *totals = total + (t * rows + row) * lanes;
                    Floats top = spread(-INFINITY), sum{};
                    for (int64_t n = 0; n < picked.count; n += lanes) top = larger(load(score + n), top);
                    if (any((top - spread(mine)) * spread(binary) > spread(slack))) {
                        float highest = -INFINITY;
                        for (int lane = 0; lane < lanes; ++lane) highest = top[lane] > highest ? top[lane] : highest;
                        const Floats shrink = power_of_two(spread((mine - highest) * binary));
                        store(totals, load(totals) * shrink);
                        for (int64_t d = 0; d < value_wide; d += lanes) store(sums + d, load(sums + d) * shrink);
                        mine = highest;
                    }
                    const Floats ground = spread(mine == -INFINITY ? 0.0f : mine);
                    for (int64_t n = 0; n < picked.count; n += lanes) {
                        const Floats weight = power_of_two((load(score + n) - ground) * spread(binary));
                        store(score + n, weight);
                        sum += weight;
                    }
                    store(totals, load(totals) + sum);
                }
                gathered_mix(piece.scores, rows, picked.v, picked.count, value_wide, out + t * rows * value_wide);
            }
        }
    leave_gathered(
        call, band, rows, [&](int64_t t, int64_t row) { return base[t * rows + row]; },
        [&](int64_t t, int64_t row) { return sum_of(load(total + (t * rows + row) * lanes)); },
        [&](int64_t t, int64_t row) { return out + (t * rows + row) * value_wide; });
}
