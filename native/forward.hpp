// Forward attention of a band: a few tiles of query rows of one head.
//
//        64 query rows →            for every tile of 64 keys that is not empty:
//   key  ┌───────────────┐            scores  = K·Qᵀ · scale
//    ↓   │ Sᵀ  (lanes)   │            hidden  = −inf                  (partial tiles only, by bits)
//        │               │            base, weights = exp(score − base), running sum
//        └───────────────┘            Oᵀ      = Oᵀ · shrink + Vᵀ·Pᵀ   (a fresh product, then one addition)
//
// The base of a row is not always its maximum: it is raised only when a score stands more than 2^8 above it. Then most
// tiles rescale nothing, and no weight is larger than 2^8.
constexpr int tiles_in_group = 32;
constexpr float slack = 8;

// Two running states of a tile of rows. Tiles are summed in groups, so that a long row is not rounded once for every tile:
// at 65,536 keys that keeps the relative error below 1e-6. A row of few tiles has one group and is never joined.
struct Running {
    State whole, group;
    float binary;
    bool far = near < 0;
    int64_t active, visited = 0;  // vectors of rows; tiles in this group
    int64_t step = tile;          // from one number of `out` to the next
    bool joined = false;

    // Before any key. The sum of values is not cleared: its first product is stored fresh.
    void begin(float with_binary, int64_t rows) {
        binary = with_binary, active = (rows + lanes - 1) / lanes;
        group.clear(active);
    }
    void zero(int64_t value_dim) const {
        for (int64_t d = 0; d < value_dim; ++d) memset(group.out + d * step, 0, sizeof(float) * lanes * static_cast<size_t>(active));
    }

    // Called before each tile: whether it is the first of its group.
    bool next(int64_t value_dim) {
        if (visited++ < tiles_in_group) return visited == 1;
        join(value_dim);
        group.clear(active);
        visited = 1;
        return true;
    }
    void join(int64_t value_dim) {
        if (!joined) {
            const State full = group;
            group = whole, whole = full;
            joined = true;
            return;
        }
        for (int64_t n = 0; n < active * lanes; n += lanes) {
            const Floats top = load(group.base + n);
            const Floats mine = whole.raise(n, top, top > load(whole.base + n), binary, far);
            const Floats theirs = group.over(n, whole.ground(n), whole.slip(n, binary), binary);
            store(whole.total + n, load(whole.total + n) * mine + load(group.total + n) * theirs);
            for (int64_t d = 0; d < value_dim; ++d) {
                float* place = whole.out + d * step + n;
                store(place, load(place) * mine + load(group.out + d * step + n) * theirs);
            }
        }
    }
    const State& end(int64_t value_dim) {
        if (!visited) zero(value_dim);
        join(value_dim);
        return whole;
    }
};

template <int wide, bool far>
static inline void weights_over(float* scores, int64_t keys, const Bases<wide, far>& bases, Floats (&sum)[wide], int64_t step) {
    for (int n = 0; n < wide; ++n) sum[n] = Floats{};
    for (int64_t key = 0; key < keys; ++key)
        for (int n = 0; n < wide; ++n) {
            float* place = scores + key * step + n * lanes;
            const Floats weight = power_of_two(bases.exponent(load(place), n));
            store(place, weight);
            sum[n] += weight;
        }
}

// Scores become weights, in place, for `wide` vectors of rows; whether any sum so far has to shrink.
template <int wide>
static bool weigh(float* scores, int64_t keys, float binary, const State& state, bool& far, float* shrink, int64_t step) {
    Floats top[wide], sum[wide];
    for (int n = 0; n < wide; ++n) top[n] = spread(-INFINITY);
    for (int64_t key = 0; key < keys; ++key)
        for (int n = 0; n < wide; ++n) top[n] = larger(load(scores + key * step + n * lanes), top[n]);
    Ints above[wide], raised{};
    for (int n = 0; n < wide; ++n) {
        above[n] = (top[n] - load(state.base + n * lanes)) * spread(binary) > spread(slack);
        raised |= above[n];
        store(shrink + n * lanes, spread(1.0f));
    }
    const bool any_raised = any(raised);
    for (int n = 0; n < wide && any_raised; ++n)
        store(shrink + n * lanes, state.raise(n * lanes, top[n], above[n], binary, far));
    if (near < 0 || far)
        weights_over<wide>(scores, keys, Bases<wide, true>(state, binary), sum, step);
    else
        weights_over<wide>(scores, keys, Bases<wide, false>(state, binary), sum, step);
    for (int n = 0; n < wide; ++n) {
        float* total = state.total + n * lanes;
        store(total, load(total) * load(shrink + n * lanes) + sum[n]);
    }
    return any_raised;
}

static bool weigh_all(float* scores, int64_t keys, int64_t active, float binary, const State& state, bool& far, float* shrink,
                      int64_t step = tile) {
    bool raised = false;
    int64_t n = 0;
    for (; n + 4 <= active; n += 4)
        raised |= weigh<4>(scores + n * lanes, keys, binary, state.from(n * lanes), far, shrink + n * lanes, step);
    for (; n < active; ++n)
        raised |= weigh<1>(scores + n * lanes, keys, binary, state.from(n * lanes), far, shrink + n * lanes, step);
    return raised;
}

// The product with the values in which a weight of 0 hides its value, whatever that holds: 0 · inf is 0 and not NaN.
static void guarded_products(const Rows& v, int64_t value_dim, const float* weights, int64_t keys, int64_t active,
                             float* out, const float* shrink, int64_t step = tile) {
    for (int64_t d = 0; d < value_dim; ++d)
        for (int64_t n = 0; n < active * lanes; n += lanes) {
            Floats sum{};
            for (int64_t key = 0; key < keys; ++key) {
                const Floats weight = load(weights + key * step + n);
                sum += weight == Floats{} ? Floats{} : weight * spread(v.data[key * v.stride + d]);
            }
            float* place = out + d * step + n;
            store(place, load(place) * load(shrink + n) + sum);
        }
}

static int64_t forward_bytes(const Call& call, int64_t tile_rows) {
    // Keys and values as float32, scores, factors, rows on their way out; for each tile of rows: queries, two states.
    const int64_t shared = tile * (padded(call.dim) + padded(call.value_dim) + tile + 1) + lanes * (call.value_dim + lanes);
    return 4 * (shared + tile_rows * tile * (call.dim + 2 * call.value_dim + 6));
}

static void leave_row(const Call& call, int64_t place, const float* numbers) {
    if (call.dtype == Dtype::float32)
        memcpy(static_cast<float*>(call.out.data) + place, numbers, sizeof(float) * call.value_dim);
    else
        narrow_row(numbers, static_cast<uint16_t*>(call.out.data) + place, call.value_dim, call.dtype == Dtype::bfloat16);
}

// Results of a tile of rows leave: values over their sum, and the log-sum-exp.
static void leave(const Call& call, int64_t batch, int64_t head, int64_t first_row, int64_t rows, const State& state,
                  float* factors, float* row_scratch, int64_t step = tile, bool few = false) {
    leave_sums(call, head, number_of(call, batch, head, first_row), state, rows, factors, few);
    const int64_t at = batch * call.out.batch + head * call.out.head + first_row * call.out.row;
    const auto take = [&](int64_t row, const float* numbers) { leave_row(call, at + row * call.out.row, numbers); };
    unlay(state.out, rows, call.value_dim, factors, row_scratch, take, step);
}

static void forward(const Call& call, const Band& band, char* scratch) {
    const int64_t dim = call.dim, value_dim = call.value_dim, key_head = band.head / (call.heads / call.key_heads);
    const bool adjusted = adjusts(call);
    const float binary = binary_of(call);
    float* scores = reinterpret_cast<float*>(scratch);
    float* wide_k = scores + tile * tile;
    float* wide_v = wide_k + tile * padded(dim);
    float* shrink = wide_v + tile * padded(value_dim);
    float* row_scratch = shrink + tile;
    float* q[band_rows];
    Running state[band_rows];
    float* next = row_scratch + lanes * (value_dim + lanes);
    BandColumns columns(call, band);
    for (int64_t r = 0; r < band.count; ++r) {
        const Columns& mine = columns.of[r];
        q[r] = next, next += tile * dim;
        state[r].whole = {next, next + tile, next + 2 * tile, next + 3 * tile}, next += tile * (value_dim + 3);
        state[r].group = {next, next + tile, next + 2 * tile, next + 3 * tile}, next += tile * (value_dim + 3);
        state[r].begin(binary, mine.rows);
        lay(rows_of(call, call.q, band.batch, band.head, mine.first_row, mine.rows, dim, wide_k), mine.rows, dim, q[r]);
    }
    for (int64_t column; (column = columns.next()) >= 0;) {
        const int64_t first_key = column * tile, keys = keys_at(call, band.batch, first_key);
        const Rows k = keys_of(call, band.batch, key_head, first_key, keys, wide_k);
        const Rows v = values_of(call, band.batch, key_head, first_key, keys, wide_v);
        for (int64_t r = 0; r < band.count; ++r) {
            Columns& mine = columns.of[r];
            if (mine.done() || mine.column() != column) continue;
            const bool first = state[r].next(value_dim);
            const State& group = state[r].group;
            const Place at{band.batch, band.head, mine.first_row, mine.rows, first_key, keys};
            const int64_t active = (mine.rows + lanes - 1) / lanes;
            dot_products(k, keys, q[r], dim, active, scores);
            if (adjusted) adjust(call, at, active, scores, nullptr);
            uint64_t seen[tile];
            const bool masked = mine.hides(seen);
            if (masked) hide(scores, seen, keys, active);
            const bool raised = weigh_all(scores, keys, active, binary, group, state[r].far, shrink);
            if (call.threshold) drop(call, at, active, scores);
            if ((masked || call.bias || call.threshold) && !finite(v, keys, value_dim)) {
                if (first) state[r].zero(value_dim);
                guarded_products(v, value_dim, scores, keys, active, group.out, shrink);
            } else if (first) {
                products<true, Into::fresh>(v.data, value_dim, v.stride, scores, tile, keys, active, group.out, tile);
            } else if (raised) {
                products<true, Into::shrunk>(v.data, value_dim, v.stride, scores, tile, keys, active, group.out, tile, shrink);
            } else {
                products<true, Into::added>(v.data, value_dim, v.stride, scores, tile, keys, active, group.out, tile);
            }
            mine.next();
        }
    }
    for (int64_t r = 0; r < band.count; ++r) {
        leave(call, band.batch, band.head, columns.of[r].first_row, columns.of[r].rows, state[r].end(value_dim), shrink,
              row_scratch);
    }
}
