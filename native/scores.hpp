// What stands around the products of a tile: rows fetched as float32, queries laid across the lanes, scores changed and
// hidden, weights dropped.

static inline int64_t padded(int64_t dim) { return (dim + lanes - 1) / lanes * lanes; }

// Rows of a matrix as float32: where they are, or brought together in `scratch` as whole vectors, zeros at their end.
// While they are, memory is asked for the rows that come `ahead` of them.
struct Rows {
    const float* data;
    int64_t stride;
};

// The place of a row among all rows of a call.
static inline int64_t number_of(const Call& call, int64_t batch, int64_t head, int64_t row) {
    return (batch * call.heads + head) * call.queries + row;
}

// Where row n of one head is, in elements.
static inline int64_t place_of(const Call& call, const View& view, int64_t batch, int64_t head, int64_t n, bool paged) {
    if (!paged) return batch * view.batch + head * view.head + n * view.row;
    const int64_t page = call.pages[batch * call.page_row + n / call.page_size];
    return page * view.batch + head * view.head + n % call.page_size * view.row;
}

static Rows rows_of(const Call& call, const View& view, int64_t batch, int64_t head, int64_t first, int64_t count,
                    int64_t dim, float* scratch, bool paged = false, int64_t ahead = 0) {
    const bool together = !paged || first / call.page_size == (first + count - 1) / call.page_size;
    if (together && call.dtype == Dtype::float32)
        return {static_cast<const float*>(view.data) + place_of(call, view, batch, head, first, paged), view.row};
    const bool brain = call.dtype == Dtype::bfloat16;
    const int64_t stride = padded(dim), size = call.dtype == Dtype::float32 ? 4 : 2;
    for (int64_t n = 0; n < count; ++n) {
        const int64_t at = place_of(call, view, batch, head, first + n, paged);
        float* row = scratch + n * stride;
        if (ahead) {  // a processor fetches ahead by itself, but not from one page of memory into another
            const char* next = static_cast<const char*>(view.data) + size * (at + ahead * view.row);
            for (int64_t byte = 0; byte < size * dim; byte += 64) __builtin_prefetch(next + byte, 0, 2);
        }
        if (call.dtype == Dtype::float32)
            memcpy(row, static_cast<const float*>(view.data) + at, sizeof(float) * dim);
        else
            widen_row(static_cast<const uint16_t*>(view.data) + at, row, dim, brain);
        for (int64_t d = dim; d < stride; ++d) row[d] = 0;
    }
    return {scratch, stride};
}

// The same rows such that whole vectors can be read of each.
static Rows whole_vectors(const Rows& rows, int64_t count, int64_t dim, float* scratch) {
    if (rows.data == scratch || dim % lanes == 0) return rows;
    for (int64_t n = 0; n < count; ++n)
        for (int64_t d = 0; d < dim; d += lanes)
            store(scratch + n * padded(dim) + d, load_some(rows.data + n * rows.stride + d, dim - d));
    return {scratch, padded(dim)};
}

static Rows keys_of(const Call& call, int64_t batch, int64_t head, int64_t first, int64_t count, float* scratch,
                    int64_t ahead = 0) {
    return rows_of(call, call.k, batch, head, first, count, call.dim, scratch, call.pages, ahead);
}
static Rows values_of(const Call& call, int64_t batch, int64_t head, int64_t first, int64_t count, float* scratch,
                      int64_t ahead = 0) {
    return rows_of(call, call.v, batch, head, first, count, call.value_dim, scratch, call.pages, ahead);
}

static bool finite(const Rows& rows, int64_t count, int64_t dim) {
    for (int64_t n = 0; n < count; ++n)
        if (!finite_row(rows.data + n * rows.stride, dim)) return false;
    return true;
}

// Rows into lanes: out[d · tile + row]; what lies beyond the last row is 0 up to a whole vector.
static void lay(const Rows& rows, int64_t count, int64_t dim, float* out) {
    for (int64_t r = 0; r < count; r += lanes)
        for (int64_t d = 0; d < dim; d += lanes) {
            Floats square[lanes];
            for (int lane = 0; lane < lanes; ++lane)
                square[lane] = r + lane < count ? load_some(rows.data + (r + lane) * rows.stride + d, dim - d) : Floats{};
            flip(square);
            for (int lane = 0; lane < lanes && d + lane < dim; ++lane) store(out + (d + lane) * tile + r, square[lane]);
        }
}

// The opposite, times a factor for each row: one row of `dim` numbers at a time, given to `take(row, numbers)`.
// In this file `step` is how far one vector of rows is from the next.
template <typename Take>
static void unlay(const float* columns, int64_t count, int64_t dim, const float* factors, float* row_scratch, Take take,
                  int64_t step = tile) {
    const int64_t padded = (dim + lanes - 1) / lanes * lanes;
    for (int64_t r = 0; r < count; r += lanes) {
        for (int64_t d = 0; d < dim; d += lanes) {
            Floats square[lanes];
            for (int lane = 0; lane < lanes; ++lane)
                square[lane] = d + lane < dim ? load(columns + (d + lane) * step + r) * load(factors + r) : Floats{};
            flip(square);
            for (int lane = 0; lane < lanes; ++lane) store(row_scratch + lane * padded + d, square[lane]);
        }
        for (int lane = 0; lane < lanes && r + lane < count; ++lane) take(r + lane, row_scratch + lane * padded);
    }
}

// Rows of keys (or of values) against what lies across the lanes. Long ones are summed in parts, so that the rounding
// of one long chain does not grow with the head size.
static void dot_products(const Rows& rows, int64_t count, const float* across, int64_t dim, int64_t active, float* out) {
    const int64_t part = count > 8 ? 128 : 16;  // a row of few keys shows the rounding of each, and has the time
    products<false, Into::fresh>(rows.data, count, rows.stride, across, tile, least(dim, part), active, out, tile);
    for (int64_t d = part; d < dim; d += part)
        products<false, Into::added>(rows.data + d, count, rows.stride, across + d * tile, tile, least(dim - d, part), active,
                                     out, tile);
}

// What the scores of one tile are made with.
struct Place {
    int64_t batch, head, first_row, rows, first_key, keys;
};

// Scaled, capped and biased scores of a tile, for rows in the lanes; `slopes`: what the cap lets through of a gradient.
static void adjust(const Call& call, const Place& at, int64_t active, float* scores, float* slopes, int64_t step = tile) {
    const float* distances = call.distances;
    if (distances)
        distances += at.batch * call.distance_batch + at.head * call.distance_head + call.keys - 1 + at.first_row;
    const float* bias = call.bias;
    const int64_t *strides = call.bias_strides, row_step = strides[2], key_step = strides[3];
    if (bias)
        bias += at.batch * strides[0] + at.head * strides[1] + at.first_row * row_step + at.first_key * key_step;
    for (int64_t n = 0; n < active * lanes; n += lanes) {
        const Floats scale = spread(call.scale), cap = spread(call.softcap);
        for (int64_t key = 0; key < at.keys && call.softcap != 0; ++key) {
            float* place = scores + key * step + n;
            const Floats bent = tangent(load(place) * scale / cap);
            if (slopes) store(slopes + key * step + n, spread(1.0f) - bent * bent);
            store(place, distances ? fused(cap, bent, load(distances + n - at.first_key - key)) : cap * bent);
        }
        for (int64_t key = 0; key < at.keys && call.softcap == 0; ++key) {
            float* place = scores + key * step + n;
            store(place, distances ? fused(load(place), scale, load(distances + n - at.first_key - key)) : load(place) * scale);
        }
        if (!bias) continue;
        for (int64_t first = 0; first < at.keys; first += lanes) {
            Floats square[lanes];
            if (row_step == 0) {
                for (int64_t key = first; key < least(first + lanes, at.keys); ++key)
                    square[key - first] = spread(bias[key * key_step]);
            } else if (key_step == 1) {  // rows of keys, turned
                for (int lane = 0; lane < lanes; ++lane)
                    square[lane] = n + lane < at.rows ? load_some(bias + (n + lane) * row_step + first, at.keys - first)
                                                      : Floats{};
                flip(square);
            } else {
                for (int64_t key = first; key < least(first + lanes, at.keys); ++key) {
                    Floats added{};
                    for (int lane = 0; lane < lanes && n + lane < at.rows; ++lane)
                        added[lane] = bias[(n + lane) * row_step + key * key_step];
                    square[key - first] = added;
                }
            }
            for (int64_t key = first; key < least(first + lanes, at.keys); ++key) {
                float* place = scores + key * step + n;
                const Floats added = square[key - first];  // −inf hides, whatever the score is
                store(place, added == spread(-INFINITY) ? added : load(place) + added);
            }
        }
    }
}

// −inf where a row does not see a key: `seen` has a bit for each row, the lanes begin at row `from`.
static void hide(float* scores, const uint64_t* seen, int64_t keys, int64_t active, int64_t from = 0, int64_t step = tile) {
    for (int64_t key = 0; key < keys; ++key)
        for (int64_t n = 0; n < active * lanes; n += lanes) {
            float* place = scores + key * step + n;
            store(place, pick(seen[key] >> (n + from), load(place), spread(-INFINITY)));
        }
}

// Whether scores are changed before they are weighed. If not, a weight is made from the raw product and the scale is part of
// its exponent, which takes one that is positive and neither 0 nor infinite times log₂e.
static bool adjusts(const Call& call) {
    return call.softcap != 0 || call.distances || call.bias || !(call.scale > 1e-30f && call.scale < 1e30f);
}

// The factor of every weight of four neighbouring keys, for the rows in the lanes from n on: 0 or `boost`.
static inline void dropped(const Call& call, const Place& at, int64_t key, int64_t n, Floats (&factors)[4]) {
    Words words[4];
    const int64_t query = start_of(call, at.batch) + at.first_row + n;
    for (int lane = 0; lane < lanes; ++lane) words[1][lane] = static_cast<uint32_t>(query + lane);
    words[0] = Words{} + static_cast<uint32_t>((at.first_key + key) / 4);
    words[2] = Words{} + static_cast<uint32_t>(at.head);
    words[3] = Words{} + static_cast<uint32_t>(at.batch);
    philox(call.seed, words);
    for (int word = 0; word < 4; ++word)
        factors[word] = words[word] >= Words{} + static_cast<uint32_t>(call.threshold) ? spread(call.boost) : Floats{};
}

static void drop(const Call& call, const Place& at, int64_t active, float* weights, int64_t step = tile) {
    for (int64_t n = 0; n < active * lanes; n += lanes)
        for (int64_t key = 0; key < at.keys; key += 4) {
            Floats factors[4];
            dropped(call, at, key, n, factors);
            for (int64_t more = 0; more < least(4, at.keys - key); ++more) {
                float* place = weights + (key + more) * step + n;
                store(place, load(place) * factors[more]);
            }
        }
}
