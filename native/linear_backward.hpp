// The backward pass of some columns: segment after segment from the end. States inside a segment are computed anew from the
// one that was saved before it, then its chunks are taken from the last to the first. With dS the gradient of the state
// after a chunk, and W the weights q·e^(j→i)·kᵀ of a query head:
//
//     du = k^·dS + Wᵀ·dO             g = β·(du + insideᵀ·g): the triangular system from below; dv = g, dβ = x·(du + …)
//     dW = dO·uᵀ    dq~ = dO·Sᵀ      dk~ = −g·Sᵀ       d inside = −g·uᵀ      dk^ = u·dSᵀ
//     dS ← e^(0→C)·dS + q~ᵀ·dO − k~ᵀ·g
//
// A decay of step t changes what goes from any j < t to any i ≥ t, so its gradient is a sum over that rectangle, and over
// what comes from the state before or goes to the one after. No sum is the difference of two others.
static inline int64_t chunks_in(const Linear& call) { return (call.segment + chunk_steps - 1) / chunk_steps; }

static int64_t linear_backward_bytes(const Linear& call, int64_t columns) {
    const int64_t size = chunk_steps, wide = padded(call.dim), width = padded(columns);
    const int64_t states = call.dim * width, turned = width * wide;
    return 4 * ((chunks_in(call) + 3) * states + 2 * turned + chunk_floats(call) + step_floats(call, columns) +
                call.segment * width + 4 * size * width + width * size + 3 * size * size + 7 * size * wide + 2 * wide + size);
}

// One piece's parts of the scratch.
struct Back {
    float *states, *x;       // of a segment: before each chunk; each step's value before β
    float *state, *after;    // for broken steps
    float *d_state, *state_across, *d_state_across;
    float *u, *du, *d_out, *g, *u_across;                  // [C][width], the last turned
    float *weights, *d_weights, *pairs;                    // [C][C]
    float *q, *dq, *dk, *d_reading, *rows, *columns, *d_logs;  // [C][wide]
    float *through, *factors;                              // [wide]
    float* d_log;                                          // [C]
};

static Back back_at(const Linear& call, int64_t columns, float*& next) {
    const int64_t size = chunk_steps, wide = padded(call.dim), width = padded(columns), states = call.dim * width;
    const auto room = [&next](int64_t floats) { return next += floats, next - floats; };
    Back b{};
    b.states = room(chunks_in(call) * states), b.x = room(call.segment * width);
    b.state = room(states), b.after = room(states), b.d_state = room(states);
    b.state_across = room(width * wide), b.d_state_across = room(width * wide);
    b.u = room(size * width), b.du = room(size * width), b.d_out = room(size * width), b.g = room(size * width);
    b.u_across = room(width * size);
    b.weights = room(size * size), b.d_weights = room(size * size), b.pairs = room(size * size);
    b.q = room(size * wide), b.dq = room(size * wide), b.dk = room(size * wide), b.d_reading = room(size * wide);
    b.rows = room(size * wide), b.columns = room(size * wide), b.d_logs = room(size * wide);
    b.through = room(wide), b.factors = room(wide), b.d_log = room(size);
    return b;
}

// Where a step's numbers go: of a query head, of a key head.
static inline int64_t query_row(const LinearGradients& g, const Columnar& at, int64_t head, int64_t step) {
    return ((at.slice * g.call.batch + at.batch) * g.call.heads + head) * g.call.steps + step;
}
static inline int64_t key_row(const LinearGradients& g, const Columnar& at, int64_t step) {
    return ((at.slice * g.call.batch + at.batch) * g.call.key_heads + at.key_head) * g.call.steps + step;
}
static void put_row(float* to, const float* from, int64_t count, float factor) {
    for (int64_t d = 0; d < count; d += lanes) store_some(to + d, load(from + d) * spread(factor), count - d);
}
static void put_values(const LinearGradients& g, const Columnar& at, int64_t step, const float* from) {
    const int64_t row = (at.batch * g.call.key_heads + at.key_head) * g.call.steps + step;
    put_row(g.dv + row * g.call.value_dim + at.first, from, at.count, 1);
}
static float dot(const float* a, const float* b, int64_t count) {
    Floats sum{};
    for (int64_t n = 0; n < count; n += lanes) sum += load(a + n) * load(b + n);
    return sum_of(sum);
}
static inline void add_products(float* to, const float* a, const float* b, int64_t count) {
    for (int64_t n = 0; n < count; n += lanes) store(to + n, load(to + n) + load(a + n) * load(b + n));
}

// By channel: the gradient `pairs` of Σ_d rows_i·e^(j→i)·k_j, at d_rows and d_keys, and of the decays between.
static void pair_gradients(const Chunk& chunk, const float* pairs, const float* rows, float* d_rows, float* d_keys, float* d_logs) {
    for (int64_t d = 0; d < chunk.wide; d += lanes) {
        Floats later[chunk_steps];  // Σ over the rows from here on of pairs·rows·e^(here→row), for each key
        for (int64_t i = chunk.count; i-- > 0;) {
            const float *row = pairs + i * chunk_steps, *carried = carried_at(chunk, i) + d;
            const Floats mine = load(rows + i * chunk.wide + d);
            const Floats factor = i + 1 < chunk.count ? load(chunk.factors + (i + 1) * chunk.wide + d) : Floats{};
            Floats d_row{}, d_log{};
            for (int64_t j = 0; j < i; ++j) {
                const Floats pair = spread(row[j]), key = load(carried + j * chunk.wide);
                const Floats sum = i + 1 < chunk.count ? later[j] * factor + pair * mine : pair * mine;
                later[j] = sum;
                d_row += pair * key;
                d_log += sum * key;
            }
            const Floats own = spread(row[i]);
            later[i] = i + 1 < chunk.count ? later[i] * factor + own * mine : own * mine;
            d_row += own * load(carried + i * chunk.wide);
            float *to_row = d_rows + i * chunk.wide + d, *to_log = d_logs + i * chunk.wide + d;
            store(to_row, load(to_row) + d_row);
            store(to_log, load(to_log) + d_log);
        }
        for (int64_t j = 0; j < chunk.count; ++j) {
            float* place = d_keys + j * chunk.wide + d;
            store(place, load(place) + later[j]);
        }
    }
}

// A query head's part: its dq, and what it adds to du, dk, dS and the gradients of decays.
static void head_gradients(const LinearGradients& g, const Columnar& at, const Chunk& chunk, int64_t head, const Back& b) {
    const Linear& call = g.call;
    const int64_t count = chunk.count, wide = chunk.wide, width = chunk.width, size = chunk_steps;
    const bool decays = has_factors(call);
    take(call.q, at.batch, head, chunk.first, count, 0, call.dim, call.scale, b.q, wide);
    take(g.d_out, at.batch, head, chunk.first, count, at.first, at.count, 1, b.d_out, width);
    weights_of(call, chunk, b.q, b.weights);
    add_steps<true>(b.weights, b.d_out, width, chunk, b.du);
    pair_products(b.d_out, width, b.u_across, width, chunk, b.d_weights);
    below_diagonal(chunk, false, true, 1, b.d_weights);
    products<false, Into::fresh>(b.d_out, count, width, b.state_across, wide, at.count, wide / lanes, b.dq, wide);
    from_before(call, chunk, b.dq);
    if (decays) add_products(b.rows, b.q, b.dq, count * wide);
    if (call.by_channel) {
        pair_gradients(chunk, b.d_weights, b.q, b.dq, b.dk, b.d_logs);
    } else {
        if (decays) {
            add_products(b.pairs, b.d_weights, b.weights, count * size);
            for (int64_t n = 0; n < count * size; n += lanes) store(b.d_weights + n, load(b.d_weights + n) * load(chunk.between + n));
        }
        add_steps<false>(b.d_weights, chunk.k, wide, chunk, b.dq);
        add_steps<true>(b.d_weights, b.q, wide, chunk, b.dk);
    }
    from_before(call, chunk, b.q);
    products<true, Into::added>(b.q, call.dim, wide, b.d_out, width, count, width / lanes, b.d_state, width);
    for (int64_t n = 0; n < count; ++n)
        put_row(g.dq + query_row(g, at, head, chunk.first + n) * call.dim, b.dq + n * wide, call.dim, call.scale);
}

// The gradients of the decays of a chunk, from the parts that were collected.
static void decay_gradients(const LinearGradients& g, const Columnar& at, const Chunk& chunk, const Back& b) {
    const Linear& call = g.call;
    const int64_t count = chunk.count, wide = chunk.wide, size = chunk_steps;
    if (call.by_channel) {
        // Rows from here on, keys before, and what goes all the way through.
        for (int64_t d = 0; d < wide; d += lanes) {
            Floats later{}, before = load(b.through + d);
            for (int64_t t = count; t-- > 0;) {
                later += load(b.rows + t * wide + d);
                store(b.d_logs + t * wide + d, load(b.d_logs + t * wide + d) + later);
            }
            for (int64_t t = 0; t < count; ++t) {
                store(b.d_logs + t * wide + d, load(b.d_logs + t * wide + d) + before);
                before += load(b.columns + t * wide + d);
            }
        }
        for (int64_t t = 0; t < count; ++t)
            put_row(g.d_decay + key_row(g, at, chunk.first + t) * call.dim, b.d_logs + t * wide, call.dim, 1);
        return;
    }
    Floats through{};
    for (int64_t d = 0; d < wide; d += lanes) through += load(b.through + d);
    float later = 0, before = sum_of(through);
    Floats rows[chunk_steps / lanes] = {};  // of the pairs: the sum of the rows from here on, for each key
    for (int64_t t = count; t-- > 0;) {
        Floats rectangle{};
        for (int64_t j = 0; j < size; j += lanes) {
            Floats& sum = rows[j / lanes];
            sum += load(b.pairs + t * size + j);
            const int64_t kept = t - j;
            if (kept > 0) rectangle += pick(kept >= lanes ? ~0ull : (1ull << kept) - 1, sum, Floats{});
        }
        Floats row{};
        for (int64_t d = 0; d < wide; d += lanes) row += load(b.rows + t * wide + d);
        later += sum_of(row);
        b.d_log[t] = sum_of(rectangle) + later;
    }
    float* to = g.d_decay + key_row(g, at, chunk.first);
    for (int64_t t = 0; t < count; ++t) {
        to[t] = b.d_log[t] + before;
        Floats column{};
        for (int64_t d = 0; d < wide; d += lanes) column += load(b.columns + t * wide + d);
        before += sum_of(column);
    }
}

// A chunk that was fetched and made ready; `state` is what it found, `x` what forward made of its values.
static void chunk_gradients(const LinearGradients& g, const Columnar& at, const Chunk& chunk, const float* state, const float* x,
                            const Back& b) {
    const Linear& call = g.call;
    const int64_t count = chunk.count, wide = chunk.wide, width = chunk.width, size = chunk_steps, group = group_of(call);
    const bool decays = has_factors(call);
    const size_t rows = sizeof(float) * static_cast<size_t>(count * wide);
    for (int64_t n = 0; n < count; ++n)
        for (int64_t d = 0; d < width; d += lanes) store(b.u + n * width + d, load(x + n * width + d) * spread(chunk.beta[n]));
    turn(b.u, width, count, width, b.u_across, size);
    turn(state, width, call.dim, width, b.state_across, wide);
    turn(b.d_state, width, call.dim, width, b.d_state_across, wide);
    memset(b.dk, 0, rows), memset(b.rows, 0, rows), memset(b.columns, 0, rows), memset(b.d_logs, 0, rows);
    memset(b.pairs, 0, sizeof(float) * static_cast<size_t>(count * size));
    products<false, Into::fresh>(chunk.leaving, count, wide, b.d_state, width, call.dim, width / lanes, b.du, width);
    if (decays) {
        memset(b.through, 0, sizeof(float) * static_cast<size_t>(wide));
        for (int64_t n = 0; n < at.count; ++n) add_products(b.through, b.state_across + n * wide, b.d_state_across + n * wide, wide);
        for (int64_t d = 0; d < wide; d += lanes) store(b.through + d, load(b.through + d) * load(chunk.carry + d));
        for (int64_t d = 0; d < call.dim; ++d)
            for (int64_t n = 0; n < width; n += lanes) store(b.d_state + d * width + n, load(b.d_state + d * width + n) * spread(chunk.carry[d]));
    }
    for (int64_t head = at.key_head * group; call.reads && head < (at.key_head + 1) * group; ++head)
        head_gradients(g, at, chunk, head, b);
    if (call.delta_rule) {
        int64_t n = 0;
        for (; n + 4 * lanes <= width; n += 4 * lanes) solve_up<4>(chunk, b.du + n, b.g + n);
        for (; n < width; n += lanes) solve_up<1>(chunk, b.du + n, b.g + n);
    } else {
        for (int64_t n = 0; n < count; ++n)
            for (int64_t d = 0; d < width; d += lanes) store(b.g + n * width + d, load(b.du + n * width + d) * spread(chunk.beta[n]));
    }
    for (int64_t n = 0; n < count; ++n) {
        put_values(g, at, chunk.first + n, b.g + n * width);
        if (g.d_beta) g.d_beta[key_row(g, at, chunk.first + n)] = dot(x + n * width, b.du + n * width, width);
    }
    if (call.delta_rule) {
        for (int64_t n = 0; n < count * width; n += lanes) store(b.g + n, -load(b.g + n));
        products<true, Into::added>(chunk.reading, call.dim, wide, b.g, width, count, width / lanes, b.d_state, width);
        products<false, Into::fresh>(b.g, count, width, b.state_across, wide, at.count, wide / lanes, b.d_reading, wide);
        from_before(call, chunk, b.d_reading);
        for (int64_t n = 0; n < count * wide; n += lanes) store(b.dk + n, load(b.dk + n) + load(b.d_reading + n));
        if (decays) add_products(b.rows, chunk.k, b.d_reading, count * wide);
        pair_products(b.g, width, b.u_across, width, chunk, b.d_weights);
        below_diagonal(chunk, false, false, 1, b.d_weights);
        if (call.by_channel) {
            pair_gradients(chunk, b.d_weights, chunk.k, b.dk, b.dk, b.d_logs);
        } else {
            if (decays) {
                for (int64_t n = 0; n < count * size; n += lanes) {
                    store(b.pairs + n, load(b.pairs + n) - load(b.d_weights + n) * load(chunk.inside + n));
                    store(b.d_weights + n, load(b.d_weights + n) * load(chunk.between + n));
                }
            }
            add_steps<false>(b.d_weights, chunk.k, wide, chunk, b.dk);
            add_steps<true>(b.d_weights, chunk.k, wide, chunk, b.dk);
        }
    }
    // What went to the state after the chunk: dk^, times e^(t→C).
    products<false, Into::fresh>(b.u, count, width, b.d_state_across, wide, at.count, wide / lanes, b.d_reading, wide);
    if (decays) add_products(b.columns, chunk.leaving, b.d_reading, count * wide);
    for (int64_t d = 0; d < wide; d += lanes) {
        Floats factor = spread(1.0f);
        for (int64_t n = count; n-- > 0;) {
            if (decays && !call.by_channel) factor = spread(chunk.between[(count - 1) * size + n]);
            float* place = b.dk + n * wide + d;
            store(place, load(place) + load(b.d_reading + n * wide + d) * factor);
            if (call.by_channel) factor *= load(chunk.factors + n * wide + d);
        }
    }
    for (int64_t n = 0; n < count; ++n)
        put_row(g.dk + key_row(g, at, chunk.first + n) * call.dim, b.dk + n * wide, call.dim, 1);
    if (g.d_decay) decay_gradients(g, at, chunk, b);
}

// A step alone: `before` is the state that it found.
static void step_gradients(const LinearGradients& g, const Columnar& at, int64_t t, const float* before, const Back& b, float* scratch) {
    const Linear& call = g.call;
    const int64_t wide = padded(call.dim), width = padded(at.count), group = group_of(call);
    const bool reset = is_reset(call, at.batch, t);
    const Floats beta = spread(beta_of(call, at, t));
    one_step(call, at, t, before, b.after, width, false, scratch);
    float *k = b.q, *x = b.u, *written = b.g, *decayed = b.state_across, *du = b.du, *dv = b.d_out;
    take(call.k, at.batch, at.key_head, t, 1, 0, call.dim, 1, k, wide);
    take(call.v, at.batch, at.key_head, t, 1, at.first, at.count, 1, x, width);
    if (call.by_channel)
        logs_of(call, at, t, b.factors);
    else
        for (int64_t d = 0; d < wide; d += lanes) store(b.factors + d, spread(log_of(call, at, t)));
    for (int64_t d = 0; d < wide; d += lanes) store(b.factors + d, factor_of(load(b.factors + d)));
    for (int64_t d = 0; d < call.dim; ++d)
        for (int64_t n = 0; n < width; n += lanes)
            store(decayed + d * width + n, reset ? Floats{} : load(before + d * width + n) * spread(b.factors[d]));
    if (call.delta_rule)
        for (int64_t d = 0; d < call.dim; ++d)
            for (int64_t n = 0; n < width; n += lanes) store(x + n, load(x + n) - spread(k[d]) * load(decayed + d * width + n));
    for (int64_t n = 0; n < width; n += lanes) store(written + n, load(x + n) * beta), store(du + n, Floats{});
    for (int64_t head = at.key_head * group; call.reads && head < (at.key_head + 1) * group; ++head) {
        take(call.q, at.batch, head, t, 1, 0, call.dim, call.scale, b.dq, wide);
        take(g.d_out, at.batch, head, t, 1, at.first, at.count, 1, dv, width);
        for (int64_t d = 0; d < call.dim; ++d) {
            for (int64_t n = 0; n < width; n += lanes)
                store(b.d_state + d * width + n, load(b.d_state + d * width + n) + spread(b.dq[d]) * load(dv + n));
            b.dk[d] = dot(b.after + d * width, dv, width);
        }
        put_row(g.dq + query_row(g, at, head, t) * call.dim, b.dk, call.dim, call.scale);
    }
    for (int64_t d = 0; d < call.dim; ++d)
        for (int64_t n = 0; n < width; n += lanes) store(du + n, load(du + n) + spread(k[d]) * load(b.d_state + d * width + n));
    for (int64_t n = 0; n < width; n += lanes) store(dv + n, load(du + n) * beta);
    put_values(g, at, t, dv);
    if (g.d_beta) g.d_beta[key_row(g, at, t)] = dot(x, du, width);
    float d_log = 0;
    for (int64_t d = 0; d < call.dim; ++d) {
        float *d_state = b.d_state + d * width, *of_before = decayed + d * width;
        b.dk[d] = dot(d_state, written, width);
        if (call.delta_rule) {
            b.dk[d] -= dot(of_before, dv, width);
            for (int64_t n = 0; n < width; n += lanes) store(d_state + n, load(d_state + n) - spread(k[d]) * load(dv + n));
        }
        b.d_logs[d] = reset ? 0 : dot(of_before, d_state, width);
        d_log += b.d_logs[d];
        for (int64_t n = 0; n < width; n += lanes) store(d_state + n, reset ? Floats{} : load(d_state + n) * spread(b.factors[d]));
    }
    put_row(g.dk + key_row(g, at, t) * call.dim, b.dk, call.dim, 1);
    if (!g.d_decay) return;
    if (call.by_channel)
        put_row(g.d_decay + key_row(g, at, t) * call.dim, b.d_logs, call.dim, 1);
    else
        g.d_decay[key_row(g, at, t)] = d_log;
}

static void backward_columns(const LinearGradients& g, const Columnar& at, char* scratch) {
    const Linear& call = g.call;
    const int64_t size = chunk_steps, width = padded(at.count), states = call.dim * width;
    const size_t state_bytes = sizeof(float) * static_cast<size_t>(states);
    float* next = reinterpret_cast<float*>(scratch);
    const Back b = back_at(call, at.count, next);
    Chunk chunk = chunk_at(call, at.count, next);
    if (g.d_last)
        take_state(call, at, g.d_last, b.d_state);
    else
        memset(b.d_state, 0, state_bytes);
    for (int64_t segment = segments_of(call); segment-- > 0;) {
        const int64_t start = segment * call.segment, end = least(start + call.segment, call.steps);
        take_state(call, at, call.saved + saved_at(call, at, segment), b.states);
        uint64_t broken = 0;
        for (int64_t first = start, n = 0; first < end; first += size, ++n) {
            float *state = b.states + n * states, *after = first + size < end ? state + states : b.after;
            const int64_t count = least(size, end - first);
            float* x = b.x + (first - start) * width;
            memcpy(after, state, state_bytes);
            if (count <= few_steps || fetch(call, at, first, count, state, chunk, x)) {
                broken |= 1ull << n;
                for (int64_t t = first; t < first + count; ++t) one_step(call, at, t, after, after, width, false, next);
                continue;
            }
            make_ready(call, chunk);
            write_values(call, chunk, state, x, b.u);
            if (after != b.after) carry_on(call, chunk, b.u, after);
        }
        for (int64_t n = (end - start + size - 1) / size; n-- > 0;) {
            const int64_t first = start + n * size, count = least(size, end - first);
            const float* state = b.states + n * states;
            if (broken >> n & 1) {
                for (int64_t t = first + count; t-- > first;) {
                    memcpy(b.state, state, state_bytes);
                    for (int64_t s = first; s < t; ++s) one_step(call, at, s, b.state, b.state, width, false, next);
                    step_gradients(g, at, t, b.state, b, next);
                }
                continue;
            }
            fetch(call, at, first, count, state, chunk, b.u);
            make_ready(call, chunk);
            chunk_gradients(g, at, chunk, state, b.x + (first - start) * width, b);
        }
    }
    put_state(call, at, b.d_state, g.d_state);
}

static void linear_backward(const LinearGradients& gradients, const Columnar& at, char* scratch) {
    const NoSubnormals none;
    backward_columns(gradients, at, scratch);
}
