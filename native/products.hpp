// The loops that all time goes into: out[i][…] = Σ_j a(i, j) · b[j][…], for rows of vectors b and numbers a.
//
//             b: rows of vectors →
//   a(i, j)  ┌──────────────────────────────┐
//   one at   │ out[i]: counts × vectors     │   ← one register tile: no sum crosses lanes, nothing spills
//   a time   └──────────────────────────────┘

#if defined(FOVEATE_AVX512)
constexpr int vectors = 4, counts = 6;  // 24 sums, 4 vectors of b and a broadcast, of 32 registers
#elif defined(FOVEATE_AVX2)
constexpr int vectors = 2, counts = 6;  // 12 + 2 + 1 of 16
#elif defined(FOVEATE_NEON)
constexpr int vectors = 4, counts = 6;  // of 32
#else
constexpr int vectors = 2, counts = 4;
#endif

// What becomes of the sum: out = sum, out + sum, or out · shrink + sum, with a factor for each column or for each row.
enum class Into { fresh, added, shrunk, shrunk_rows };

// a(i, j) is a[i · a_row + j] or, by columns, a[j · a_row + i].
template <int count, int wide, bool by_columns, Into into>
static inline void product(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t inner, float* out,
                           int64_t out_row, const float* shrink) {
    Floats sum[count][wide];
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
        for (int n = 0; n < wide; ++n) sum[i][n] = Floats{};
    for (int64_t j = 0; j < inner; ++j) {
        Floats column[wide];
#pragma GCC unroll 4
        for (int n = 0; n < wide; ++n) column[n] = load(b + j * b_row + n * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < count; ++i) {
            const Floats one = spread(by_columns ? a[j * a_row + i] : a[i * a_row + j]);
#pragma GCC unroll 4
            for (int n = 0; n < wide; ++n) sum[i][n] += one * column[n];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
        for (int n = 0; n < wide; ++n) {
            float* place = out + i * out_row + n * lanes;
            if (into == Into::fresh) store(place, sum[i][n]);
            if (into == Into::added) store(place, load(place) + sum[i][n]);
            if (into == Into::shrunk) store(place, load(place) * load(shrink + n * lanes) + sum[i][n]);
            if (into == Into::shrunk_rows) store(place, load(place) * spread(shrink[i]) + sum[i][n]);
        }
}

// A few vectors of width: more rows at once instead, so that enough sums are under way.
template <int count, int wide, bool by_columns, Into into>
static inline void strip(const float* a, int64_t rows, int64_t a_row, const float* b, int64_t b_row, int64_t inner,
                         float* out, int64_t out_row, const float* shrink) {
    const int64_t a_step = by_columns ? 1 : a_row, by_row = into == Into::shrunk_rows;
    int64_t i = 0;
    for (; i + count <= rows; i += count)
        product<count, wide, by_columns, into>(a + i * a_step, a_row, b, b_row, inner, out + i * out_row, out_row, shrink + by_row * i);
    if constexpr (count > 4)
        for (; i + 4 <= rows; i += 4)
            product<4, wide, by_columns, into>(a + i * a_step, a_row, b, b_row, inner, out + i * out_row, out_row, shrink + by_row * i);
    for (; i + 2 <= rows; i += 2)
        product<2, wide, by_columns, into>(a + i * a_step, a_row, b, b_row, inner, out + i * out_row, out_row, shrink + by_row * i);
    if (i < rows)
        product<1, wide, by_columns, into>(a + i * a_step, a_row, b, b_row, inner, out + i * out_row, out_row, shrink + by_row * i);
}

// `width` vectors of every row of out.
template <bool by_columns, Into into>
static void products(const float* a, int64_t rows, int64_t a_row, const float* b, int64_t b_row, int64_t inner,
                     int64_t width, float* out, int64_t out_row, const float* shrink = nullptr) {
    const auto from_column = [=](int64_t n) { return into == Into::shrunk ? shrink + n * lanes : shrink; };
    int64_t n = 0;
    for (; n + vectors <= width; n += vectors)
        strip<counts, vectors, by_columns, into>(a, rows, a_row, b + n * lanes, b_row, inner, out + n * lanes, out_row,
                                                 from_column(n));
    if constexpr (vectors > 2) {
        if (width - n == 3) {
            strip<8, 3, by_columns, into>(a, rows, a_row, b + n * lanes, b_row, inner, out + n * lanes, out_row,
                                          from_column(n));
            return;
        }
        if (width - n == 2) {
            strip<8, 2, by_columns, into>(a, rows, a_row, b + n * lanes, b_row, inner, out + n * lanes, out_row,
                                          from_column(n));
            return;
        }
    }
    if (n < width)
        strip<8, 1, by_columns, into>(a, rows, a_row, b + n * lanes, b_row, inner, out + n * lanes, out_row,
                                      from_column(n));
}
