// The backward pass of a band, from what the forward pass kept of its rows, in one pass over its tiles:
//
//     Pᵀ = exp(scores − lse)     dPᵀ = V·dOᵀ      dSᵀ = Pᵀ ∘ (dPᵀ − δ),   δ = Σ dO ∘ O − d lse, for each row
//     dV += Pᵀ·dO                dK += dSᵀ·Q      dQᵀ += Kᵀ·dSᵀ
//
// Query rows lie in the lanes as in the forward pass; dV and dK have their own dimension there. A band holds the
// gradient of its queries until the end. That of a tile of keys is summed over the band's rows and then added to what
// other bands have added: always in the order of their turns, so that results are equal to the bit on any number of
// threads. A thread waits only for bands that are being computed, and only if they are at an earlier tile of keys.

// One of the bands that add to the same tiles of keys, and how far each of them is.
struct Turn {
    std::atomic<int64_t>* passed;
    int64_t mine, ended;  // so many before this one are known to have ended

    // Its own sum for the column is ready: waits until every band before it is past the column.
    void come(int64_t column) {
        passed[mine].store(column, std::memory_order_release);
        while (ended < mine && passed[ended].load(std::memory_order_acquire) == INT64_MAX) ++ended;
        for (int64_t before = ended; before < mine; ++before)
            for (int spins = 0; passed[before].load(std::memory_order_acquire) <= column; ++spins) {
                if (spins > 200) sched_yield();
#if defined(__x86_64__)
                _mm_pause();
#endif
            }
    }
    void end() { passed[mine].store(INT64_MAX, std::memory_order_release); }
};

// NaN and infinity become 0: where a weight of 0 hides a row, its content must not matter.
static Rows cleaned(const Rows& rows, int64_t count, int64_t dim, float* scratch) {
    for (int64_t n = 0; n < count; ++n)
        for (int64_t d = 0; d < dim; d += lanes) {
            const Floats x = load_some(rows.data + n * rows.stride + d, dim - d);
            store(scratch + n * padded(dim) + d, x - x == Floats{} ? x : Floats{});
        }
    return {scratch, padded(dim)};
}

// A tile of rows made ready: queries and the gradient of the output across the lanes, what was kept of the rows (`above` is
// binary here), δ. A row that does not move gets no gradient of its output there: that of the log-sum-exp is left in δ.
// Into `sums`, if it is there, go the gradients of a row's scores. What they should sum to is known, so they tell the error
// of δ, by the rounding of the output: it is the same in a whole row, and adds up where an entry of a score collects there.
struct Ready {
    float *q, *d_out, *base, *above, *delta, *moves, *sunk, *sums;
};
constexpr int64_t row_floats = 6 * tile;  // numbers of the rows of a tile

template <typename Room>
static Ready ready_at(float* q, float* d_out, bool summed, Room room) {
    float *base = room(tile), *above = room(tile), *delta = room(tile), *moves = room(tile), *sunk = room(tile), *sums = room(tile);
    memset(sums, 0, sizeof(float) * tile);
    return {q, d_out, base, above, delta, moves, sunk, summed ? sums : nullptr};
}

// What the forward pass kept of row number `at` of all, or as much of it as the rounded log-sum-exp says.
static inline Kept kept_at(const Call& call, int64_t head, int64_t at) {
    if (call.rest) {
        Kept kept;
        memcpy(&kept, call.rest + at * kept_floats, sizeof kept);
        return kept;
    }
    const double lse = call.lse[at];
    return kept_of(call, 0, lse, call.sinks && lse != -INFINITY ? static_cast<float>(exp(call.sinks[head] - lse)) : 0.0f, 1);
}

// Where the sums of the forward pass had another order, or only a rounded log-sum-exp is left of it, large scores are not
// those that the weights have to be over: their bases are found again, from the scores of this pass.
static inline bool finds_base(const Gradients& g, int64_t at) {
    return g.other_order || (!g.call.rest && fabsf(g.call.lse[at]) > large && g.call.lse[at] != -INFINITY);
}

static void hold_still(const Ready& ready, int64_t row, int64_t across) {
    for (int64_t d = 0; d < across; ++d) ready.d_out[d * tile + row] = 0;
}

// What was kept (or `found`, where it had to be) and δ of a tile of rows; `ready.d_out` has `across` numbers of each.
static void rows_ready(const Gradients& g, int64_t batch, int64_t head, int64_t first_row, int64_t rows, const Rows& d_out,
                       const Rows& out, const Ready& ready, int64_t across, const Kept* found = nullptr) {
    const Call& call = g.call;
    for (int64_t row = 0; row < tile; ++row) {
        const int64_t at = number_of(call, batch, head, first_row + row);
        const bool again = row < rows && found && finds_base(g, at);
        const Kept kept = row >= rows ? Kept{INFINITY, 0, 0, 0} : again ? found[row] : kept_at(call, head, at);
        ready.base[row] = kept.base, ready.above[row] = static_cast<float>(kept.above * log2e);
        ready.moves[row] = kept.moves, ready.sunk[row] = kept.sunk, ready.delta[row] = 0;
        if (row >= rows) continue;
        Floats sum{};
        for (int64_t d = 0; d < call.value_dim; d += lanes)
            sum += load_some(d_out.data + row * d_out.stride + d, call.value_dim - d) *
                   load_some(out.data + row * out.stride + d, call.value_dim - d);
        ready.delta[row] = (kept.moves == 0 ? 0.0f : sum_of(sum)) - (g.d_lse ? g.d_lse[at] : 0);
        if (kept.moves == 0) hold_still(ready, row, across);
    }
}

// Weights (as they were given to the values) and the gradients of the scores of one tile; `before_cap` is what is handed
// on to q and k, `scores` what a bias gets. Without a cap they are the same.
struct TileGradients {
    float *weights, *scores, *before_cap;
};

// Scores become weights, and the gradients of weights those of scores, in place.
template <bool some_hidden>
static void score_gradients(const Call& call, const Place& at, int64_t active, float binary, const Ready& ready,
                            float* weights, float* d_scores, float* slopes) {
    const bool summed = ready.sums;
    for (int64_t n = 0; n < active * lanes; n += lanes) {
        const Floats base = load(ready.base + n), above = load(ready.above + n), delta = load(ready.delta + n);
        Floats sum{};
        for (int64_t key = 0; key < at.keys; key += 4) {
            Floats factors[4];
            if (call.threshold) dropped(call, at, key, n, factors);
            const int64_t end = least(4, at.keys - key);
            for (int64_t more = 0; more < end; ++more) {
                const int64_t place = (key + more) * tile + n;
                const Floats score = load(weights + place);
                Floats weight = power_of_two((score - base) * spread(binary) - above);
                if (some_hidden) weight = score == spread(-INFINITY) ? Floats{} : weight;  // whatever the row's base is
                Floats d_weight = load(d_scores + place);
                if (call.threshold) d_weight *= factors[more];
                Floats change = weight * (d_weight - delta);
                if (some_hidden) change = weight == Floats{} ? Floats{} : change;  // whatever the value holds
                if (summed) sum += change;
                store(d_scores + place, change);
                store(weights + place, call.threshold ? weight * factors[more] : weight);
                if (call.softcap != 0)
                    store(slopes + place, weight == Floats{} ? Floats{} : change * load(slopes + place));
            }
        }
        if (summed) store(ready.sums + n, load(ready.sums + n) + sum);
    }
}

// Raw scores of a tile become those that are weighed; whether some of them are hidden.
static bool scored(const Call& call, const Columns& mine, const Place& at, float* scores, float* slopes) {
    const int64_t active = (at.rows + lanes - 1) / lanes;
    if (adjusts(call)) adjust(call, at, active, scores, slopes);
    uint64_t seen[tile];
    const bool masked = mine.hides(seen);
    if (masked) hide(scores, seen, at.keys, active);
    return masked;
}

static bool finds_bases(const Gradients& g, int64_t at, int64_t rows) {
    bool found = false;
    for (int64_t row = at; row < at + rows; ++row) found |= finds_base(g, row);
    return found;
}

template <typename Raw>  // raw(first key, keys): scores of these rows and keys as the products leave them, into `scores`
static void find_bases(const Call& call, int64_t batch, int64_t head, Columns mine, float* scores, Kept* found, Raw raw) {
    float base[tile], times[tile], total[tile], shrink[tile];
    const State state{base, times, total, nullptr};
    bool far = near < 0;
    const int64_t active = (mine.rows + lanes - 1) / lanes;
    state.clear(active);
    for (; !mine.done(); mine.next()) {
        const int64_t first_key = mine.column() * tile, keys = keys_at(call, batch, first_key);
        raw(first_key, keys);
        scored(call, mine, {batch, head, mine.first_row, mine.rows, first_key, keys}, scores, nullptr);
        weigh_all(scores, keys, active, binary_of(call), state, far, shrink);
    }
    const Endings ends(call, head, state, mine.rows);
    for (int64_t row = 0; row < mine.rows; ++row) found[row] = ends.kept(call, row);
}

// The middle of it: `weights` holds raw scores, `d_scores` the gradients of weights.
static TileGradients through_softmax(const Call& call, const Columns& mine, const Place& at, const Ready& ready,
                                     float* weights, float* d_scores, float* slopes) {
    const int64_t active = (at.rows + lanes - 1) / lanes;
    const float binary = binary_of(call);
    if (scored(call, mine, at, weights, slopes) || call.bias)
        score_gradients<true>(call, at, active, binary, ready, weights, d_scores, slopes);
    else
        score_gradients<false>(call, at, active, binary, ready, weights, d_scores, slopes);
    return {weights, d_scores, call.softcap != 0 ? slopes : d_scores};
}

static int64_t backward_bytes(const Call& call, int64_t tile_rows) {
    const int64_t dim = padded(call.dim), value_dim = padded(call.value_dim);
    // Weights, gradients and slopes of a tile; keys and values as float32, clean keys; sums for a tile of keys.
    const int64_t widest = most(dim, value_dim);
    const int64_t shared = tile * (3 * tile + 2 * widest + 2 * dim + value_dim) + lanes * (dim + lanes);
    const int64_t each = row_floats + tile * (call.dim + call.value_dim + 2 * dim + value_dim);  // q, dO twice; dQ
    return 4 * (shared + tile_rows * each);
}

// `to` and `count` rows of `dim` numbers, contiguous there; `from` has rows of padded(dim).
static void add_rows(float* to, const float* from, int64_t count, int64_t dim, float factor) {
    for (int64_t n = 0; n < count; ++n)
        for (int64_t d = 0; d < dim; d += lanes) {
            float* place = to + n * dim + d;
            const Floats more = load(from + n * padded(dim) + d) * spread(factor);
            store_some(place, load_some(place, dim - d) + more, dim - d);
        }
}

// What a band kept to its end: dQ, out of the lanes, and for the gradients of what was added to the scores all of its rows.
// There δ is without the rounding of the output: Σ P ∘ dP = Σ dS + δ · ΣP, and what ΣP lacks is the share of a sink.
static void leave_rows(const Gradients& g, const Band& band, const BandColumns& columns, const Ready* ready,
                       const float* const* dq, float* row_scratch) {
    const Call& call = g.call;
    const int64_t dim = call.dim;
    float factors[tile];
    for (float& factor : factors) factor = call.scale;
    for (int64_t r = 0; r < band.count; ++r) {
        const int64_t at = number_of(call, band.batch, band.head, columns.of[r].first_row);
        unlay(dq[r], columns.of[r].rows, dim, factors, row_scratch, [&](int64_t row, const float* numbers) {
            memcpy(g.dq + (at + row) * dim, numbers, sizeof(float) * static_cast<size_t>(dim));
        });
        const Ready& mine = ready[r];
        for (int64_t row = 0; row < columns.of[r].rows && g.rows; ++row) {
            const float d_lse = g.d_lse ? g.d_lse[at + row] : 0.0f;
            const float delta = mine.delta[row] - mine.delta[row] * mine.sunk[row] + mine.sums[row] - d_lse;
            g.rows[at + row] = {mine.base[row], mine.above[row], mine.moves[row], delta};
        }
    }
}

static void backward(const Gradients& g, const Band& band, int64_t turn, int64_t turns, char* scratch) {
    const Call& call = g.call;
    const int64_t dim = call.dim, value_dim = call.value_dim, key_head = band.head / (call.heads / call.key_heads);
    const int64_t wide = padded(dim), value_wide = padded(value_dim);
    float* next = reinterpret_cast<float*>(scratch);
    const auto room = [&next](int64_t floats) { return next += floats, next - floats; };
    float *weights = room(tile * tile), *d_scores = room(tile * tile), *slopes = room(tile * tile);
    // Each of these holds a tile of keys, of values, or for a moment of queries or outputs.
    float *wide_k = room(tile * most(wide, value_wide)), *wide_v = room(tile * most(wide, value_wide));
    float* clean_k = room(tile * wide);
    float *dk = room(tile * wide), *dv = room(tile * value_wide);
    float* row_scratch = room(lanes * (wide + lanes));
    Ready ready[band_rows];
    Rows q[band_rows], d_out[band_rows];
    float* dq[band_rows];
    BandColumns columns(call, band);
    for (int64_t r = 0; r < band.count; ++r) {
        const int64_t first_row = columns.of[r].first_row, rows = columns.of[r].rows;
        float *q_across = room(tile * dim), *d_across = room(tile * value_dim);
        ready[r] = ready_at(q_across, d_across, g.rows, room);
        lay(rows_of(call, call.q, band.batch, band.head, first_row, rows, dim, wide_k), rows, dim, ready[r].q);
        Kept found[tile];
        const bool finds = finds_bases(g, number_of(call, band.batch, band.head, first_row), rows);
        if (finds)
            find_bases(call, band.batch, band.head, columns.of[r], weights, found, [&](int64_t first_key, int64_t keys) {
                dot_products(keys_of(call, band.batch, key_head, first_key, keys, wide_k), keys, ready[r].q, dim,
                             (rows + lanes - 1) / lanes, weights);
            });
        const Rows d_wide = rows_of(call, g.d_out, band.batch, band.head, first_row, rows, value_dim, wide_k);
        lay(d_wide, rows, value_dim, ready[r].d_out);
        rows_ready(g, band.batch, band.head, first_row, rows, d_wide,
                   rows_of(call, call.out, band.batch, band.head, first_row, rows, value_dim, wide_v), ready[r], value_dim,
                   finds ? found : nullptr);
        float *q_rows = room(tile * wide), *d_rows = room(tile * value_wide);
        q[r] = rows_of(call, call.q, band.batch, band.head, first_row, rows, dim, q_rows);
        q[r] = finite(q[r], rows, dim) ? whole_vectors(q[r], rows, dim, q_rows) : cleaned(q[r], rows, dim, q_rows);
        d_out[r] = rows_of(call, g.d_out, band.batch, band.head, first_row, rows, value_dim, d_rows);
        d_out[r] = whole_vectors(d_out[r], rows, value_dim, d_rows);
        dq[r] = room(tile * dim);
        memset(dq[r], 0, sizeof(float) * tile * dim);
    }
    Turn in_turn{g.passed + (band.batch * call.key_heads + key_head) * turns, turn, 0};
    for (int64_t column; (column = columns.next()) >= 0;) {
        const int64_t first_key = column * tile, keys = keys_at(call, band.batch, first_key);
        const Rows k = keys_of(call, band.batch, key_head, first_key, keys, wide_k);
        const Rows v = values_of(call, band.batch, key_head, first_key, keys, wide_v);
        const Rows safe_k = finite(k, keys, dim) ? k : cleaned(k, keys, dim, clean_k);
        bool first = true;
        for (int64_t r = 0; r < band.count; ++r) {
            Columns& mine = columns.of[r];
            if (mine.done() || mine.column() != column) continue;
            const Place at{band.batch, band.head, mine.first_row, mine.rows, first_key, keys};
            const int64_t active = (mine.rows + lanes - 1) / lanes;
            dot_products(k, keys, ready[r].q, dim, active, weights);
            dot_products(v, keys, ready[r].d_out, value_dim, active, d_scores);
            const TileGradients of_tile = through_softmax(call, mine, at, ready[r], weights, d_scores, slopes);
            const float* ds = of_tile.before_cap;
            if (first) {
                products<false, Into::fresh>(of_tile.weights, keys, tile, d_out[r].data, d_out[r].stride, mine.rows,
                                             value_wide / lanes, dv, value_wide);
                products<false, Into::fresh>(ds, keys, tile, q[r].data, q[r].stride, mine.rows, wide / lanes, dk, wide);
            } else {
                products<false, Into::added>(of_tile.weights, keys, tile, d_out[r].data, d_out[r].stride, mine.rows,
                                             value_wide / lanes, dv, value_wide);
                products<false, Into::added>(ds, keys, tile, q[r].data, q[r].stride, mine.rows, wide / lanes, dk, wide);
            }
            first = false;
            products<true, Into::added>(safe_k.data, dim, safe_k.stride, ds, tile, keys, active, dq[r], tile);
            mine.next();
        }
        in_turn.come(column);
        const int64_t place = (band.batch * call.key_heads + key_head) * call.keys + first_key;
        add_rows(g.dk + place * dim, dk, keys, dim, call.scale);
        add_rows(g.dv + place * value_dim, dv, keys, value_dim, 1);
    }
    in_turn.end();
    leave_rows(g, band, columns, ready, dq, row_scratch);
}
