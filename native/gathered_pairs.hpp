// Chosen keys in bfloat16 on the matrix unit: the forward pass of gathered.hpp, with products of pairs.
//
//   scores[key][row]  = K rows as they are, 16 keys at a time · queries in pairs, one column for each row of the group
//   out[row][…]       = weights, a row of 64 keys for each row of the group · values in pairs of keys, woven as they come
//
// A group has 1, 2, 4, 8 or 16 rows here, some of them empty: in a vector of scores, lane n is of row n % rows.
#if defined(FOVEATE_AMX)

constexpr int64_t most_gathered_pairs = 16;  // rows of a group

static bool gathers_pairs(const Call& call) {
    return call.dtype == Dtype::bfloat16 && shared_rows(call) <= most_gathered_pairs;
}
static int64_t unit_rows(const Call& call) {
    int64_t rows = 1;
    while (rows < shared_rows(call)) rows *= 2;
    return rows;
}

// Tiles 0–3: scores of 16 keys each. 4: 16 rows of keys, or of pairs of values. 5: queries. 6: sums of values. 7: weights.
struct GatherUnit {
    const int64_t rows;  // 0: left alone

    explicit GatherUnit(int64_t rows) : rows(rows) {
        if (!rows) return;
        struct __attribute__((packed)) {
            uint8_t palette, start, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } shape;
        memset(&shape, 0, sizeof shape);
        shape.palette = 1;
        for (int n = 0; n < 8; ++n) {
            shape.bytes[n] = static_cast<uint16_t>(n < 4 || n == 5 ? 4 * rows : 64);
            shape.rows[n] = static_cast<uint8_t>(n < 6 ? 16 : rows);
        }
        written();
        _tile_loadconfig(&shape);
    }
    ~GatherUnit() {
        if (rows) _tile_release();
    }
};

// The queries of a tile in pairs: number j of row r of query t at (t · pairs + j) · rows + r.
static void lay_queries(const Call& call, const Band& band, int64_t shared, int64_t rows, int64_t pairs, uint32_t* to) {
    memset(to, 0, sizeof(uint32_t) * static_cast<size_t>(band.count * pairs * rows));
    const uint16_t* data = static_cast<const uint16_t*>(call.q.data);
    for (int64_t t = 0; t < band.count; ++t)
        for (int64_t row = 0; row < shared; ++row) {
            const int64_t head = band.head * shared + row;
            const uint16_t* from = data + band.batch * call.q.batch + head * call.q.head + (band.first + t) * call.q.row;
            for (int64_t d = 0; d < call.dim; ++d)
                to[(t * pairs + d / 2) * rows + row] |= static_cast<uint32_t>(from[d]) << (d % 2 * 16);
        }
}

// Values of 64 picked keys in pairs of keys; those past the last one are 0.
static void weave_picked(const Call& call, int64_t place, const Picked& picked, int64_t wide, uint32_t* to) {
    const uint16_t* data = static_cast<const uint16_t*>(call.v.data) + place;
    alignas(64) uint16_t low[32], high[32];
    for (int n = 0; n < 32; ++n) low[n] = static_cast<uint16_t>(n % 2 * 32 + n / 2), high[n] = static_cast<uint16_t>(low[n] + 16);
    const __m512i lower = _mm512_load_si512(low), upper = _mm512_load_si512(high);
    const int64_t pairs = blocks(picked.count, 32) * 16;
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const bool one = 2 * pair < picked.count, two = 2 * pair + 1 < picked.count;
        const uint16_t* a = data + (one ? picked.key[2 * pair] : 0) * call.v.row;
        const uint16_t* b = data + (two ? picked.key[2 * pair + 1] : 0) * call.v.row;
        uint32_t* row = to + pair * wide;
        for (int64_t d = 0; d < wide; d += 32) {
            const int64_t left = call.value_dim - d;
            const __mmask32 some = left >= 32 ? 0xffffffffu : (1u << left) - 1;
            const __m512i first = _mm512_maskz_loadu_epi16(one ? some : 0, a + d);
            const __m512i second = _mm512_maskz_loadu_epi16(two ? some : 0, b + d);
            _mm512_storeu_si512(row + d, _mm512_permutex2var_epi16(first, lower, second));
            _mm512_storeu_si512(row + d + 16, _mm512_permutex2var_epi16(first, upper, second));
        }
    }
}

// Raw scores [key][row] of the picked keys, 16 keys at a time. Keys that follow one another are read where they are.
static void picked_scores(const Call& call, int64_t place, const Picked& picked, const uint32_t* q, int64_t rows,
                          uint16_t* scratch, float* scores) {
    const uint16_t* data = static_cast<const uint16_t*>(call.k.data) + place;
    const int64_t stride = pair_stride(call.dim), groups = blocks(picked.count, 16);
    const uint16_t* from[4];
    int64_t step[4];
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * 16, count = least(16, picked.count - first);
        if (count == 16 && call.dim % 32 == 0 && picked.key[first + 15] == picked.key[first] + 15) {
            from[g] = data + picked.key[first] * call.k.row, step[g] = 2 * call.k.row;
            continue;
        }
        uint16_t* to = scratch + first * stride;
        from[g] = to, step[g] = 2 * stride;
        for (int64_t n = 0; n < count; ++n) {
            const uint16_t* row = data + picked.key[first + n] * call.k.row;
            for (int64_t d = 0; d < stride; d += 32) {
                const int64_t left = call.dim - d;
                const __mmask32 some = left >= 32 ? 0xffffffffu : (1u << left) - 1;
                _mm512_storeu_si512(to + n * stride + d, _mm512_maskz_loadu_epi16(some, row + d));
            }
        }
        memset(to + count * stride, 0, static_cast<size_t>(2 * (16 - count) * stride));
    }
    written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < stride; d += 32) {
        _tile_loadd(5, q + d / 2 * rows, 4 * rows);
        _tile_loadd(4, from[0] + d, step[0]);
        _tile_dpbf16ps(0, 4, 5);
        if (groups > 1) {
            _tile_loadd(4, from[1] + d, step[1]);
            _tile_dpbf16ps(1, 4, 5);
        }
        if (groups > 2) {
            _tile_loadd(4, from[2] + d, step[2]);
            _tile_dpbf16ps(2, 4, 5);
        }
        if (groups > 3) {
            _tile_loadd(4, from[3] + d, step[3]);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, scores, 4 * rows);
    _tile_stored(1, scores + 16 * rows, 4 * rows);
    _tile_stored(2, scores + 32 * rows, 4 * rows);
    _tile_stored(3, scores + 48 * rows, 4 * rows);
}

// Weights [key][row] of 64 keys, rounded, become [row][key].
template <int rows>
static void turn_weights(const float* weights, uint16_t* to) {
    constexpr int keys = 32 / rows;  // of two vectors
    alignas(64) uint16_t order[32], turned[32];
    for (int n = 0; n < 32; ++n) order[n] = static_cast<uint16_t>(n % keys * rows + n / keys);
    const __m512i by_row = _mm512_load_si512(order);
    for (int64_t key = 0; key < tile; key += keys) {
        const float* from = weights + key * rows;
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
        _mm512_store_si512(turned, _mm512_permutexvar_epi16(by_row, (__m512i)both));
        for (int row = 0; row < rows; ++row) memcpy(to + row * tile + key, turned + row * keys, sizeof(uint16_t) * keys);
    }
}

// What scores become beside their scale, for the rows in the lanes.
template <int rows>
static void adjust_picked(const Call& call, const Band& band, int64_t shared, int64_t t, const Picked& picked, float* scores) {
    for (int64_t n = 0; n < tile * rows; n += lanes) {
        Floats score = load(scores + n) * spread(call.scale);
        if (call.softcap != 0) score = spread(call.softcap) * tangent(score / spread(call.softcap));
        store(scores + n, rounded(score));
    }
    for (int64_t row = 0; row < shared && call.distances; ++row) {
        const int64_t head = band.head * shared + row;
        const float* last = call.distances + band.batch * call.distance_batch + head * call.distance_head + call.keys - 1 + band.first + t;
        for (int64_t key = 0; key < picked.count; ++key) scores[key * rows + row] += last[-picked.key[key]];
    }
}

static int64_t gathered_pair_bytes(const Call& call) {
    const int64_t height = gathered_height(call), value_wide = pair_stride(call.value_dim), rows = most_gathered_pairs;
    const int64_t own = rows * (tile + tile / 2 + value_wide);
    return 4 * (gathered_floats(call, height) + own + height * (rows * (pair_stride(call.dim) / 2 + value_wide) + 2 * lanes));
}

template <int rows>
static void gathered_rows_of_pairs(const Call& call, const Band& band, char* scratch) {
    float* next = reinterpret_cast<float*>(scratch);
    const auto room = [&next](int64_t floats) { return next += floats, next - floats; };
    const Gathering piece(call, band, room);
    const int64_t shared = piece.rows, pairs = pair_stride(call.dim) / 2, value_wide = pair_stride(call.value_dim);
    const int64_t stretch = stretch_of(call, false);
    const bool adjusted = adjusts(call);
    const float binary = binary_of(call);
    uint32_t* q = reinterpret_cast<uint32_t*>(room(band.count * pairs * rows));
    float *out = room(band.count * rows * value_wide), *base = room(band.count * lanes), *total = room(band.count * lanes);
    float *scores = room(tile * rows), *fresh = room(rows * value_wide);
    uint16_t* weights = reinterpret_cast<uint16_t*>(room(tile * rows / 2));
    uint16_t* key_rows = reinterpret_cast<uint16_t*>(piece.keys.scratch);
    uint32_t* woven = reinterpret_cast<uint32_t*>(piece.values.scratch);
    lay_queries(call, band, shared, rows, pairs, q);
    memset(out, 0, sizeof(float) * static_cast<size_t>(band.count * rows * value_wide));
    for (int64_t n = 0; n < band.count * lanes; ++n) base[n] = -INFINITY, total[n] = 0;
    const GatherUnit unit(rows);
    Picked picked;
    for (int64_t at; (at = next_stretch(piece.wishes, band.count, stretch)) >= 0;)
        for (int64_t t = 0; t < band.count; ++t) {
            int64_t inside = 0;
            piece.ask(band, at + 1, stretch, t);
            while (pick_keys(call, piece.wishes[t], inside, (at + 1) * stretch, picked)) {
                picked_scores(call, piece.keys.place, picked, q + t * pairs * rows, rows, key_rows, scores);
                weave_picked(call, piece.values.place, picked, value_wide, woven);
                if (adjusted) adjust_picked<rows>(call, band, shared, t, picked, scores);
                float *bases = base + t * lanes, *sums = out + t * rows * value_wide;
                Floats top = spread(-INFINITY), sum{};
                for (int64_t n = picked.count * rows; n < tile * rows; ++n) scores[n] = -INFINITY;
                for (int64_t n = 0; n < tile * rows; n += lanes) top = larger(load(scores + n), top);
                if (any((top - load(bases)) * spread(binary) > spread(slack))) {
                    float highest[lanes], shrink[lanes];
                    for (int lane = 0; lane < lanes; ++lane) highest[lane] = bases[lane];
                    for (int lane = 0; lane < lanes; ++lane)
                        if (top[lane] > highest[lane % rows]) highest[lane % rows] = top[lane];
                    for (int lane = 0; lane < lanes; ++lane) {
                        const float mine = highest[lane % rows];
                        shrink[lane] = mine == bases[lane] ? 1.0f : exp2f((bases[lane] - mine) * binary);
                    }
                    for (int lane = 0; lane < lanes; ++lane) bases[lane] = highest[lane % rows];
                    store(total + t * lanes, load(total + t * lanes) * load(shrink));
                    for (int64_t row = 0; row < rows; ++row)
                        for (int64_t d = 0; d < value_wide; d += lanes)
                            store(sums + row * value_wide + d, load(sums + row * value_wide + d) * spread(shrink[row]));
                }
                const Floats mine = load(bases), ground = mine == spread(-INFINITY) ? Floats{} : mine;
                for (int64_t n = 0; n < tile * rows; n += lanes) {
                    const Floats weight = power_of_two((load(scores + n) - ground) * spread(binary));
                    store(scores + n, weight);
                    sum += weight;
                }
                store(total + t * lanes, load(total + t * lanes) + sum);
                turn_weights<rows>(scores, weights);
                const bool both = picked.count > 32;
                written();
                for (int64_t d = 0; d < value_wide; d += 16) {
                    _tile_zero(6);
                    _tile_loadd(7, weights, 2 * tile);
                    _tile_loadd(4, woven + d, 4 * value_wide);
                    _tile_dpbf16ps(6, 7, 4);
                    if (both) {
                        _tile_loadd(7, weights + 32, 2 * tile);
                        _tile_loadd(4, woven + 16 * value_wide + d, 4 * value_wide);
                        _tile_dpbf16ps(6, 7, 4);
                    }
                    _tile_stored(6, fresh + d, 4 * value_wide);
                }
                for (int64_t n = 0; n < rows * value_wide; n += lanes) store(sums + n, load(sums + n) + load(fresh + n));
            }
        }
    leave_gathered(
        call, band, shared, [&](int64_t t, int64_t row) { return base[t * lanes + row]; },
        [&](int64_t t, int64_t row) {
            float whole = 0;
            for (int64_t lane = row; lane < lanes; lane += rows) whole += total[t * lanes + lane];
            return whole;
        },
        [&](int64_t t, int64_t row) { return out + (t * rows + row) * value_wide; });
}

static void gathered_pairs(const Call& call, const Band& band, char* scratch) {
    switch (unit_rows(call)) {
        case 1: return gathered_rows_of_pairs<1>(call, band, scratch);
        case 2: return gathered_rows_of_pairs<2>(call, band, scratch);
        case 4: return gathered_rows_of_pairs<4>(call, band, scratch);
        case 8: return gathered_rows_of_pairs<8>(call, band, scratch);
        default: gathered_rows_of_pairs<16>(call, band, scratch);
    }
}
#endif
