// Few queries, many keys: the next token of a text. Each key and each value is read once for all query heads that share
// it; a piece of work is a stretch of the keys, and the stretches are merged by their log-sum-exp.
//
// Here keys lie in the lanes: a row's scores are dot products over the dimension, folded lanes × lanes at a time.
constexpr int64_t most_rows = 64;  // query heads of a group × queries
constexpr int64_t columns_in_stretch = 8, stretch = columns_in_stretch * tile;  // long reads: memory is what limits here

// A row is query `row % queries` of the group's head `row / queries`. Its part: base, sum of weights, sum of values.
static int64_t part_floats(const Call& call) { return 2 + padded(call.value_dim); }
static inline int64_t rows_in_group(const Call& call) { return call.heads / call.key_heads * call.queries; }

static int64_t decode_bytes(const Call& call) {
    const int64_t rows = rows_in_group(call);
    return 4 * (rows * (padded(call.dim) + stretch) + tile * (padded(call.dim) + padded(call.value_dim)));  // merge needs less
}

// bfloat16 is read as it lies: each lane holds two numbers, and either is a float32 without the other. What meets it, q and
// the sums of values, keeps for every two vectors the numbers at even places first and then those at odd places.
struct Halves {
    Floats even, odd;
};
static inline Halves halves_of(const uint16_t* p) {
    const Ints both = bits_of(load(reinterpret_cast<const float*>(p)));
    return {floats_of(both << 16), floats_of(both & static_cast<int32_t>(0xffff0000))};
}
static inline int64_t place_in_halves(int64_t d) { return d / (2 * lanes) * (2 * lanes) + d % 2 * lanes + d % (2 * lanes) / 2; }

static inline bool reads_halves(const Call& call) {
    return call.dtype == Dtype::bfloat16 && call.dim % (2 * lanes) == 0 && call.value_dim % (2 * lanes) == 0;
}

// A processor fetches ahead by itself, but not from one page of memory into another.
constexpr int64_t ahead = 16;  // rows
template <typename Number>
static inline void fetch(const Number* row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(Number))) __builtin_prefetch(row + d, 0, 2);
}

// scores[row][key] for some rows and `lanes / rows` keys; q has whole vectors, zeros beyond the dimension.
template <int rows>
static inline void dots(const float* q, int64_t q_row, const float* k, int64_t k_row, int64_t dim, float* scores) {
    constexpr int keys = lanes / rows;
    Floats sum[lanes];
#pragma GCC unroll 16
    for (int n = 0; n < lanes; ++n) sum[n] = Floats{};
    int64_t d = 0;
    for (; d + lanes <= dim; d += lanes)
#pragma GCC unroll 16
        for (int key = 0; key < keys; ++key) {
            const Floats one = load(k + key * k_row + d);
#pragma GCC unroll 4
            for (int row = 0; row < rows; ++row) sum[row * keys + key] += one * load(q + row * q_row + d);
        }
    if (d < dim)
#pragma GCC unroll 16
        for (int key = 0; key < keys; ++key) {
            const Floats one = load_some(k + key * k_row + d, dim - d);
#pragma GCC unroll 4
            for (int row = 0; row < rows; ++row) sum[row * keys + key] += one * load(q + row * q_row + d);
        }
    float found[lanes];
    store(found, sums_of(sum));
    for (int row = 0; row < rows; ++row) memcpy(scores + row * stretch, found + row * keys, sizeof(float) * keys);
}

template <int rows>
static inline void dots(const float* q, int64_t q_row, const uint16_t* k, int64_t k_row, int64_t dim, float* scores) {
    constexpr int keys = lanes / rows;
    Floats sum[lanes];
#pragma GCC unroll 16
    for (int n = 0; n < lanes; ++n) sum[n] = Floats{};
    for (int64_t d = 0; d < dim; d += 2 * lanes)
#pragma GCC unroll 16
        for (int key = 0; key < keys; ++key) {
            const Halves one = halves_of(k + key * k_row + d);
#pragma GCC unroll 4
            for (int row = 0; row < rows; ++row) {
                sum[row * keys + key] += one.even * load(q + row * q_row + d);
                sum[row * keys + key] += one.odd * load(q + row * q_row + d + lanes);
            }
        }
    float found[lanes];
    store(found, sums_of(sum));
    for (int row = 0; row < rows; ++row) memcpy(scores + row * stretch, found + row * keys, sizeof(float) * keys);
}

static inline Floats parts_of_dot(const float* q, const float* k, int64_t dim) {
    Floats sum{};
    for (int64_t d = 0; d < dim; d += lanes) sum += load(q + d) * load_some(k + d, dim - d);
    return sum;
}
static inline Floats parts_of_dot(const float* q, const uint16_t* k, int64_t dim) {
    Floats sum{};
    for (int64_t d = 0; d < dim; d += 2 * lanes) {
        const Halves one = halves_of(k + d);
        sum += one.even * load(q + d) + one.odd * load(q + d + lanes);
    }
    return sum;
}

template <int rows, typename Number>
static void dots_of_rows(const float* q, int64_t q_row, const Number* k, int64_t k_row, int64_t keys, int64_t dim, float* scores) {
    constexpr int step = lanes / rows;
    int64_t key = 0;
    for (; key + step <= keys; key += step) {
        for (int64_t n = 0; n < step; ++n) fetch(k + (key + n + ahead) * k_row, dim);
        dots<rows>(q, q_row, k + key * k_row, k_row, dim, scores + key);
    }
    for (; key < keys; ++key)  // the last few: one at a time
        for (int row = 0; row < rows; ++row) scores[row * stretch + key] = sum_of(parts_of_dot(q + row * q_row, k + key * k_row, dim));
}

template <typename Number>
static void dots_of_tile(const float* q, int64_t rows, int64_t q_row, const Number* k, int64_t k_row, int64_t keys, int64_t dim,
                         float* scores) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) dots_of_rows<4>(q + row * q_row, q_row, k, k_row, keys, dim, scores + row * stretch);
    for (; row + 2 <= rows; row += 2) dots_of_rows<2>(q + row * q_row, q_row, k, k_row, keys, dim, scores + row * stretch);
    if (row < rows) dots_of_rows<1>(q + row * q_row, q_row, k, k_row, keys, dim, scores + row * stretch);
}

// out[row] += Σ_key weights[row][key] · v[key], for a few rows.
template <int rows>
static inline void add_halves(const float* weights, const uint16_t* v, int64_t v_row, int64_t keys, int64_t value_dim,
                              float* out, int64_t out_row) {
    for (int64_t d = 0; d < value_dim; d += 2 * lanes) {
        Halves sum[rows];
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) sum[row] = {Floats{}, Floats{}};
        for (int64_t key = 0; key < keys; ++key) {
            if (d == 0) fetch(v + (key + ahead) * v_row, value_dim);
            const Halves one = halves_of(v + key * v_row + d);
#pragma GCC unroll 4
            for (int row = 0; row < rows; ++row) {
                const Floats weight = spread(weights[row * stretch + key]);
                sum[row].even += weight * one.even;
                sum[row].odd += weight * one.odd;
            }
        }
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) {
            float* place = out + row * out_row + d;
            store(place, load(place) + sum[row].even);
            store(place + lanes, load(place + lanes) + sum[row].odd);
        }
    }
}

static void add_values(const float* weights, int64_t rows, const uint16_t* v, int64_t v_row, int64_t keys, int64_t value_dim,
                       float* out, int64_t out_row) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4)
        add_halves<4>(weights + row * stretch, v, v_row, keys, value_dim, out + row * out_row, out_row);
    for (; row + 2 <= rows; row += 2)
        add_halves<2>(weights + row * stretch, v, v_row, keys, value_dim, out + row * out_row, out_row);
    if (row < rows) add_halves<1>(weights + row * stretch, v, v_row, keys, value_dim, out + row * out_row, out_row);
}

// Which of 64 keys a query sees, as bits; `mine` has been moved to the column or past it.
static uint64_t seen_by(const Call& call, const Columns& mine, int64_t query, int64_t column) {
    if (call.offsets) {
        if (mine.done() || mine.column() != column) return 0;
        return call.partial[mine.at] < 0 ? ~0ull : call.bits[call.partial[mine.at] * tile + query];
    }
    const int64_t first = column * tile;
    const int64_t from = call.left < 0 ? 0 : most(query - mine.low - first, 0);
    const int64_t to = least(least(call.right < 0 ? tile : query + mine.high + 1 - first, mine.length - first), tile);
    if (from >= to) return 0;
    return (to == tile ? ~0ull : (1ull << to) - 1) & ~((1ull << from) - 1);
}

// The scores of one row against one tile: scaled, capped, biased.
static void adjust_row(const Call& call, int64_t batch, int64_t head, int64_t query, int64_t first_key, int64_t keys,
                       float* scores) {
    for (int64_t n = 0; n < tile; n += lanes) {
        Floats score = load(scores + n) * spread(call.scale);
        if (call.softcap != 0) score = spread(call.softcap) * tangent(score / spread(call.softcap));
        store(scores + n, score);
    }
    if (call.distances) {
        const float* last = call.distances + batch * call.distance_batch + head * call.distance_head + call.keys - 1 + query;
        for (int64_t key = 0; key < keys; ++key) scores[key] += last[-(first_key + key)];
    }
    if (call.bias) {
        const int64_t* steps = call.bias_strides;
        const float* bias = call.bias + batch * steps[0] + head * steps[1] + query * steps[2] + first_key * steps[3];
        for (int64_t key = 0; key < keys; ++key) {
            const float added = bias[key * steps[3]];
            scores[key] = added == -INFINITY ? added : scores[key] + added;
        }
    }
}

// A weight of 0 hides its value, whatever that holds.
static void guarded_rows(const Rows& v, int64_t keys, int64_t value_dim, const float* weights, int64_t rows, float* out,
                         int64_t out_row, bool halves) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t key = 0; key < keys; ++key) {
            const float weight = weights[row * stretch + key];
            for (int64_t d = 0; d < value_dim && weight != 0; ++d)
                out[row * out_row + (halves ? place_in_halves(d) : d)] += weight * v.data[key * v.stride + d];
        }
}

// How many keys from `first` on, at most `count`, lie one after the other.
static inline int64_t keys_together(const Call& call, int64_t first, int64_t count) {
    return call.pages ? least(count, call.page_size - first % call.page_size) : count;
}
static inline const uint16_t* halves_at(const Call& call, const View& view, int64_t batch, int64_t head, int64_t n) {
    return static_cast<const uint16_t*>(view.data) + place_of(call, view, batch, head, n, call.pages);
}

static void decode(const Call& call, int64_t batch, int64_t key_head, int64_t first, int64_t end, float* part,
                   char* scratch) {
    const int64_t dim = call.dim, wide = padded(dim), value_dim = call.value_dim, value_wide = padded(value_dim);
    const int64_t group = call.heads / call.key_heads, rows = rows_in_group(call), floats = part_floats(call);
    const bool adjusted = adjusts(call);
    const float binary = binary_of(call);
    const bool halves = reads_halves(call);
    // Other half precision is widened a few keys at a time, so that it stays in the first cache.
    const int64_t few = call.dtype == Dtype::float32 ? tile : 16;
    float* q = reinterpret_cast<float*>(scratch);
    float* scores = q + rows * wide;
    float* wide_k = scores + rows * stretch;
    float* wide_v = wide_k + tile * wide;
    Columns columns[most_rows];
    memset(q, 0, sizeof(float) * rows * wide);
    for (int64_t g = 0; g < group; ++g) {
        const int64_t head = key_head * group + g;
        const Rows from = rows_of(call, call.q, batch, head, 0, call.queries, dim, wide_k);
        for (int64_t n = 0; n < call.queries; ++n) {
            float* row = q + (g * call.queries + n) * wide;
            if (!halves) memcpy(row, from.data + n * from.stride, sizeof(float) * dim);
            for (int64_t d = 0; d < dim && halves; ++d) row[place_in_halves(d)] = from.data[n * from.stride + d];
        }
        columns[g] = columns_of(call, batch, head, 0);
    }
    for (int64_t row = 0; row < rows; ++row) {
        part[row * floats] = -INFINITY, part[row * floats + 1] = 0;
        memset(part + row * floats + 2, 0, sizeof(float) * value_wide);
    }
    for (int64_t from = first; from < end; from += columns_in_stretch) {
        const int64_t count = least(end - from, columns_in_stretch);
        uint64_t some[columns_in_stretch] = {}, all[columns_in_stretch];  // of a column: a row sees, every row sees
        for (int64_t c = 0; c < count; ++c) {
            const int64_t column = from + c, first_key = column * tile, keys = keys_at(call, batch, first_key);
            const uint64_t inside = keys == tile ? ~0ull : (1ull << keys) - 1;
            uint64_t seen[most_rows];
            all[c] = inside;
            for (int64_t g = 0; g < group; ++g) {
                columns[g].seek(column);
                for (int64_t n = 0; n < call.queries; ++n) {
                    const uint64_t word = seen_by(call, columns[g], n, column) & inside;
                    seen[g * call.queries + n] = word;
                    some[c] |= word, all[c] &= word;
                }
            }
            if (!some[c]) continue;
            all[c] = all[c] == inside && !call.bias;  // a bias may hide too
            float* here = scores + c * tile;
            for (int64_t key = 0, some_keys; key < keys; key += some_keys) {
                if (halves) {
                    some_keys = keys_together(call, first_key + key, keys - key);
                    const uint16_t* k = halves_at(call, call.k, batch, key_head, first_key + key);
                    dots_of_tile(q, rows, wide, k, call.k.row, some_keys, dim, here + key);
                } else {
                    some_keys = least(few, keys - key);
                    const Rows k = keys_of(call, batch, key_head, first_key + key, some_keys, wide_k, few);
                    dots_of_tile(q, rows, wide, k.data, k.stride, some_keys, dim, here + key);
                }
            }
            for (int64_t row = 0; row < rows; ++row) {
                float* score = here + row * stretch;
                for (int64_t key = keys; key < tile; ++key) score[key] = 0;
                if (adjusted)
                    adjust_row(call, batch, key_head * group + row / call.queries, row % call.queries, first_key, keys, score);
                for (int n = 0; n < tile && ~seen[row]; n += lanes)
                    store(score + n, pick(seen[row] >> n, load(score + n), spread(-INFINITY)));
            }
        }
        for (int64_t row = 0; row < rows; ++row) {
            float* score = scores + row * stretch;
            Floats top = spread(-INFINITY), sum{};
            for (int64_t c = 0; c < count; ++c)
                for (int n = 0; n < tile && some[c]; n += lanes) top = larger(load(score + c * tile + n), top);
            float highest = -INFINITY;
            for (int lane = 0; lane < lanes; ++lane) highest = top[lane] > highest ? top[lane] : highest;
            float* mine = part + row * floats;
            if ((highest - mine[0]) * binary > slack) {
                const Floats shrink = power_of_two(spread((mine[0] - highest) * binary));
                mine[1] *= shrink[0];
                for (int64_t d = 0; d < value_wide; d += lanes) store(mine + 2 + d, load(mine + 2 + d) * shrink);
                mine[0] = highest;
            }
            const Floats base = spread(mine[0] == -INFINITY ? 0.0f : mine[0]);
            for (int64_t c = 0; c < count; ++c) {
                if (!some[c]) continue;
                for (float* place = score + c * tile; place < score + (c + 1) * tile; place += lanes) {
                    const Floats weight = power_of_two((load(place) - base) * spread(binary));
                    store(place, weight);
                    sum += weight;
                }
            }
            mine[1] += sum_of(sum);
        }
        for (int64_t c = 0; c < count; ++c) {
            if (!some[c]) continue;
            const int64_t first_key = (from + c) * tile, keys = keys_at(call, batch, first_key);
            for (int64_t key = 0, some_keys; key < keys; key += some_keys) {
                const float* weights = scores + c * tile + key;
                if (halves && all[c]) {
                    some_keys = keys_together(call, first_key + key, keys - key);
                    const uint16_t* v = halves_at(call, call.v, batch, key_head, first_key + key);
                    add_values(weights, rows, v, call.v.row, some_keys, value_dim, part + 2, floats);
                    continue;
                }
                some_keys = least(few, keys - key);
                const Rows v = values_of(call, batch, key_head, first_key + key, some_keys, wide_v, few);
                if (!halves && (all[c] || finite(v, some_keys, value_dim))) {
                    const Rows whole = whole_vectors(v, some_keys, value_dim, wide_v);
                    products<false, Into::added>(weights, rows, stretch, whole.data, whole.stride, some_keys,
                                                 value_wide / lanes, part + 2, floats);
                } else {
                    guarded_rows(v, some_keys, value_dim, weights, rows, part + 2, floats, halves);
                }
            }
        }
    }
    for (int64_t row = 0; row < rows && halves; ++row) {
        float* mine = part + row * floats + 2;
        memcpy(wide_v, mine, sizeof(float) * value_dim);
        for (int64_t d = 0; d < value_dim; ++d) mine[d] = wide_v[place_in_halves(d)];
    }
}

// The parts of all stretches become the results of one group of heads.
static void merge(const Call& call, int64_t batch, int64_t key_head, const float* parts, int64_t count, int64_t step,
                  char* scratch) {
    const int64_t value_wide = padded(call.value_dim), floats = part_floats(call), group = call.heads / call.key_heads;
    const float binary = binary_of(call);
    float* out = reinterpret_cast<float*>(scratch);
    for (int64_t row = 0; row < rows_in_group(call); ++row) {
        const int64_t head = key_head * group + row / call.queries, query = row % call.queries;
        const float* mine = parts + row * floats;
        float top = -INFINITY, total = 0;
        for (int64_t n = 0; n < count; ++n) top = mine[n * step] > top ? mine[n * step] : top;
        const float base = top == -INFINITY ? 0.0f : top;
        memset(out, 0, sizeof(float) * value_wide);
        for (int64_t n = 0; n < count; ++n) {
            const float share = exp2f((mine[n * step] - base) * binary);
            total += mine[n * step + 1] * share;
            for (int64_t d = 0; d < value_wide && share != 0; d += lanes)
                store(out + d, load(out + d) + load(mine + n * step + 2 + d) * spread(share));
        }
        const float factor = leave_sum(call, head, number_of(call, batch, head, query), top, total);
        for (int64_t d = 0; d < value_wide; d += lanes) store(out + d, load(out + d) * spread(factor));
        leave_row(call, batch * call.out.batch + head * call.out.head + query * call.out.row, out);
    }
}
