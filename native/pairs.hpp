// Products of bfloat16 in pairs, where a machine has instructions for them: a sum takes two products at a time.
//
//     out[i][n] = Σ_j a[i][2j] · b[j][n].low + a[i][2j + 1] · b[j][n].high
//
// `a` has rows of bfloat16, `b` rows of pairs: one 32-bit word for each lane. Queries and weights are laid across the
// lanes in pairs; keys are read in place, and values are turned once for all tiles of rows of a band.
#if defined(FOVEATE_PAIRS)

constexpr int pair_block = 16;  // rows of a, pairs and lanes are padded to whole blocks of this, with zeros

static inline int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

#if defined(FOVEATE_AMX)

// What was written is in memory when the matrix unit reads it: g++ does not know that its instructions read there.
static inline void written() { asm volatile("" ::: "memory"); }

// Eight tiles of 16 rows of 64 bytes; released at the end, or every switch of threads would have to save them.
struct PairUnit {
    PairUnit() {
        struct __attribute__((packed)) {
            uint8_t palette, start, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } shape;
        memset(&shape, 0, sizeof shape);
        shape.palette = 1;
        for (int n = 0; n < 8; ++n) shape.bytes[n] = 64, shape.rows[n] = 16;
        written();
        _tile_loadconfig(&shape);
    }
    ~PairUnit() { _tile_release(); }
};

template <bool second_row, bool second_column, int64_t step>
static inline void pair_square(const uint16_t* a, int64_t a_row, const uint32_t* b, int64_t inner, float* out, bool add) {
    constexpr int64_t down = 16 * step;
    if (add) {
        _tile_loadd(0, out, 4 * step);
        if (second_column) _tile_loadd(1, out + 16, 4 * step);
        if (second_row) _tile_loadd(2, out + down, 4 * step);
        if (second_row && second_column) _tile_loadd(3, out + down + 16, 4 * step);
    } else {
        _tile_zero(0);
        if (second_column) _tile_zero(1);
        if (second_row) _tile_zero(2);
        if (second_row && second_column) _tile_zero(3);
    }
    for (int64_t j = 0; j < inner; ++j) {
        _tile_loadd(4, a + j * 32, 2 * a_row);
        _tile_loadd(6, b + j * 16 * step, 4 * step);
        _tile_dpbf16ps(0, 4, 6);
        if (second_column) {
            _tile_loadd(7, b + j * 16 * step + 16, 4 * step);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (second_row) {
            _tile_loadd(5, a + 16 * a_row + j * 32, 2 * a_row);
            _tile_dpbf16ps(2, 5, 6);
            if (second_column) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, 4 * step);
    if (second_column) _tile_stored(1, out + 16, 4 * step);
    if (second_row) _tile_stored(2, out + down, 4 * step);
    if (second_row && second_column) _tile_stored(3, out + down + 16, 4 * step);
}

// `rows`, `inner` and `width` in blocks; `step` from one row of b or out to the next.
template <int64_t step = tile>
static void pair_products(const uint16_t* a, int64_t rows, int64_t a_row, const uint32_t* b, int64_t inner, int64_t width,
                          float* out, bool add) {
    written();
    for (int64_t n = 0; n < width; n += 2)
        for (int64_t i = 0; i < rows; i += 2) {
            const uint16_t* from = a + i * 16 * a_row;
            float* to = out + i * 16 * step + n * 16;
            if (i + 1 < rows && n + 1 < width)
                pair_square<true, true, step>(from, a_row, b + n * 16, inner, to, add);
            else if (i + 1 < rows)
                pair_square<true, false, step>(from, a_row, b + n * 16, inner, to, add);
            else if (n + 1 < width)
                pair_square<false, true, step>(from, a_row, b + n * 16, inner, to, add);
            else
                pair_square<false, false, step>(from, a_row, b + n * 16, inner, to, add);
        }
}

#else

struct PairUnit {
    PairUnit() {}
    ~PairUnit() {}
};

template <int count, int wide, int64_t step>
static inline void pair_product(const uint16_t* a, int64_t a_row, const uint32_t* b, int64_t inner, float* out, bool add) {
    Floats sum[count][wide];
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
        for (int n = 0; n < wide; ++n) sum[i][n] = add ? load(out + i * step + n * lanes) : Floats{};
    for (int64_t j = 0; j < inner; ++j) {
        __m512bh column[wide];
#pragma GCC unroll 4
        for (int n = 0; n < wide; ++n) column[n] = (__m512bh)_mm512_loadu_si512(b + j * step + n * lanes);
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i) {
            int32_t two;
            memcpy(&two, a + i * a_row + 2 * j, 4);
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
            for (int n = 0; n < wide; ++n) {
                __m512 next = _mm512_dpbf16_ps(reinterpret_cast<__m512&>(sum[i][n]), pair, column[n]);
                sum[i][n] = reinterpret_cast<Floats&>(next);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
        for (int n = 0; n < wide; ++n) store(out + i * step + n * lanes, sum[i][n]);
}

template <int64_t step = tile>
static void pair_products(const uint16_t* a, int64_t rows, int64_t a_row, const uint32_t* b, int64_t inner, int64_t width,
                          float* out, bool add) {
    int64_t n = 0;
    for (; n + 4 <= width; n += 4) {
        int64_t i = 0;
        for (; i + 6 <= rows * 16; i += 6) pair_product<6, 4, step>(a + i * a_row, a_row, b + n * 16, inner * 16, out + i * step + n * 16, add);
        for (; i + 2 <= rows * 16; i += 2) pair_product<2, 4, step>(a + i * a_row, a_row, b + n * 16, inner * 16, out + i * step + n * 16, add);
    }
    for (; n < width; ++n)
        for (int64_t i = 0; i < rows * 16; i += 8)
            pair_product<8, 1, step>(a + i * a_row, a_row, b + n * 16, inner * 16, out + i * step + n * 16, add);
}

#endif

static inline bool finite_pairs(const uint16_t* row, int64_t count) {
    Ints bad{};
    const Ints low = Ints{} + 0x00007f80, high = Ints{} + 0x7f800000;
    int64_t d = 0;
    for (; d + 2 * lanes <= count; d += 2 * lanes) {
        const Ints two = bits_of(load(reinterpret_cast<const float*>(row + d)));
        bad |= ((two & low) == low) | ((two & high) == high);
    }
    bool found = any(bad);
    for (; d < count; ++d) found |= (row[d] & 0x7f80) == 0x7f80;
    return !found;
}

// Rows of bfloat16, in place, or copied where their length or their number is no whole block.
struct PairRows {
    const uint16_t* data;
    int64_t stride;
};

static int64_t pair_stride(int64_t dim) { return blocks(dim, 32) * 32; }

static PairRows pair_rows(const Call& call, const View& view, int64_t batch, int64_t head, int64_t first, int64_t count,
                          int64_t dim, uint16_t* scratch, bool paged) {
    const uint16_t* data = static_cast<const uint16_t*>(view.data);
    const bool together = !paged || first / call.page_size == (first + count - 1) / call.page_size;
    if (together && dim % 32 == 0 && count % 16 == 0) return {data + place_of(call, view, batch, head, first, paged), view.row};
    const int64_t stride = pair_stride(dim);
    memset(scratch, 0, static_cast<size_t>(2 * stride * blocks(count, 16) * 16));
    for (int64_t n = 0; n < count; ++n)
        memcpy(scratch + n * stride, data + place_of(call, view, batch, head, first + n, paged), static_cast<size_t>(2 * dim));
    return {scratch, stride};
}

// Rows into lanes: pair j of row r becomes out[j · step + r]. A whole number of blocks of rows and pairs can be read.
static void lay_pairs(const PairRows& rows, int64_t count, int64_t dim, uint32_t* out, int64_t step = tile) {
    for (int64_t r = 0; r < blocks(count, 16) * 16; r += 16)
        for (int64_t j = 0; j < blocks(dim, 32); ++j) {
            Floats square[lanes];
            for (int lane = 0; lane < lanes; ++lane) {
                const float* from = reinterpret_cast<const float*>(rows.data + (r + lane) * rows.stride + j * 32);
                square[lane] = load(from);
            }
            flip(square);
            for (int lane = 0; lane < lanes; ++lane)
                store(reinterpret_cast<float*>(out + (j * 16 + lane) * step + r), square[lane]);
        }
}

// Sixteen numbers of two neighbouring rows, as pairs; a row past the last one is 0.
static inline Floats two_rows(const Call& call, const View& view, int64_t batch, int64_t head, int64_t first, int64_t place,
                              int64_t count, int64_t d, int64_t dim, bool paged) {
    const uint16_t* data = static_cast<const uint16_t*>(view.data);
    const __mmask16 inside = static_cast<__mmask16>(dim - d >= 16 ? 0xffff : (1u << (dim - d)) - 1);
    __m512i two[2];
    for (int n = 0; n < 2; ++n) {
        two[n] = _mm512_setzero_si512();
        if (place + n < count)
            two[n] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(
                inside, data + place_of(call, view, batch, head, first + place + n, paged) + d));
    }
    __m512i joined = _mm512_or_si512(two[0], _mm512_slli_epi32(two[1], 16));
    return reinterpret_cast<Floats&>(joined);
}

// Keys by dimension to dimension by keys: out[d · tile + key], zeros past the last key.
static void turn_pairs(const Call& call, const View& view, int64_t batch, int64_t head, int64_t first, int64_t count,
                       int64_t dim, uint16_t* out, bool paged) {
    for (int64_t key = 0; key < tile; key += 32)
        for (int64_t d = 0; d < dim; d += 16) {
            Floats square[lanes];
            for (int pair = 0; pair < lanes; ++pair)
                square[pair] = two_rows(call, view, batch, head, first, key + 2 * pair, count, d, dim, paged);
            flip(square);
            for (int lane = 0; lane < lanes; ++lane)
                store(reinterpret_cast<float*>(out + (d + lane) * tile + key), square[lane]);
        }
}

// Rows by dimension as pairs of rows: a chunk for every 64 numbers, in it pair p of number d at p · tile + d.
static void weave_pairs(const Call& call, const View& view, int64_t batch, int64_t head, int64_t first, int64_t count,
                        int64_t dim, uint32_t* out) {
    for (int64_t d = 0; d < blocks(dim, 64) * 64; d += 16)
        for (int64_t pair = 0; pair < tile / 2; ++pair) {
            float* place = reinterpret_cast<float*>(out + d / 64 * (tile * tile / 2) + pair * tile + d % 64);
            store(place, d < dim ? two_rows(call, view, batch, head, first, 2 * pair, count, d, dim, false) : Floats{});
        }
}

// NaN and infinity become 0.
static void clean_pairs(void* pairs, int64_t bytes) {
    uint32_t* words = static_cast<uint32_t*>(pairs);
    for (int64_t n = 0; n < bytes / 4; ++n) {
        if ((words[n] & 0x7f80u) == 0x7f80u) words[n] &= 0xffff0000u;
        if ((words[n] & 0x7f800000u) == 0x7f800000u) words[n] &= 0xffffu;
    }
}

// Two weights of a lane as a pair, rounded to the nearest.
static inline Floats pair_of(Floats low, Floats high) {
    const Words half = Words{} + 0x8000u;
    const Words l = (reinterpret_cast<Words&>(low) + half) >> 16, h = (reinterpret_cast<Words&>(high) + half) & 0xffff0000u;
    Words two = l | h;
    return reinterpret_cast<Floats&>(two);
}

#endif
