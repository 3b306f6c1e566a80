// A chunk of steps of linear attention made ready: what its keys, decays and betas are to each other, before any value.
//
//     reading  k~ = k · e^(0→t)      from the state before the chunk to step t
//     leaving  k^ = k · e^(t→C)      from step t to the state after the chunk
//     inside   −k_i·e^(j→i)·k_j      below the diagonal: what the delta rule takes away
//
// e^(a→b) is a product of the steps' own factors, all ≤ 1: nothing overflows, and none is the quotient of two others. By
// channel, the keys of a chunk are carried along: at step i row j of `carried` is k_j·e^(j→i), kept for every i.
//
// Here dimensions, value dimensions or earlier steps lie in the lanes.

// Memory is asked for some rows of the next chunk: a processor that fetches ahead by itself stops at the end of a page.
template <bool writes>
static inline void expect(const Typed& of, int64_t place, int64_t count) {
    const int64_t size = of.dtype == Dtype::float32 ? 4 : 2;
    const char* next = static_cast<const char*>(of.view.data) + size * place;
    for (int64_t byte = 0; byte < size * count; byte += 64) __builtin_prefetch(next + byte, writes, 2);
}

// From float32 or half precision to rows of whole vectors, zeros beyond `dim`; as many rows more are expected.
static void take(const Typed& from, int64_t batch, int64_t head, int64_t first, int64_t count, int64_t column, int64_t dim,
                 float factor, float* to, int64_t stride) {
    const int64_t start = batch * from.view.batch + head * from.view.head + first * from.view.row + column;
    for (int64_t n = 0; n < count; ++n) {
        const int64_t place = start + n * from.view.row;
        float* row = to + n * stride;
        if (count > 1) expect<false>(from, place + count * from.view.row, dim);
        if (from.dtype == Dtype::float32) {
            const float* data = static_cast<const float*>(from.view.data) + place;
            for (int64_t d = 0; d < dim; d += lanes) store(row + d, load_some(data + d, dim - d) * spread(factor));
            continue;
        }
        widen_row(static_cast<const uint16_t*>(from.view.data) + place, row, dim, from.dtype == Dtype::bfloat16);
        for (int64_t d = dim; d < stride; ++d) row[d] = 0;
        if (factor != 1)
            for (int64_t d = 0; d < dim; d += lanes) store(row + d, load(row + d) * spread(factor));
    }
}

static void put(const Typed& to, int64_t batch, int64_t head, int64_t step, int64_t column, int64_t count, const float* row,
                int64_t ahead = 0) {
    const int64_t place = batch * to.view.batch + head * to.view.head + step * to.view.row + column;
    if (ahead) expect<true>(to, place + ahead * to.view.row, count);
    if (to.dtype == Dtype::float32) {
        float* data = static_cast<float*>(to.view.data) + place;
        for (int64_t d = 0; d < count; d += lanes) store_some(data + d, load(row + d), count - d);
    } else {
        narrow_row(row, static_cast<uint16_t*>(to.view.data) + place, count, to.dtype == Dtype::bfloat16);
    }
}

// `count` rows of `width` (whole vectors) to columns: out[d][n], zeros up to `stride`, which is whole vectors too.
static void turn(const float* rows, int64_t row, int64_t count, int64_t width, float* out, int64_t stride) {
    for (int64_t n = 0; n < stride; n += lanes)
        for (int64_t d = 0; d < width; d += lanes) {
            Floats square[lanes];
#pragma GCC unroll 16
            for (int lane = 0; lane < lanes; ++lane)
                square[lane] = n + lane < count ? load(rows + (n + lane) * row + d) : Floats{};
            flip(square);
#pragma GCC unroll 16
            for (int lane = 0; lane < lanes; ++lane) store(out + (d + lane) * stride + n, square[lane]);
        }
}

// out[j] = Σ_d x[d]·rows[j][d] for j < count, zeros up to a whole vector.
static void row_dots(const float* x, const float* rows, int64_t row, int64_t count, int64_t wide, float* out) {
    for (int64_t first = 0; first < count; first += lanes) {
        Floats square[lanes];
#pragma GCC unroll 4
        for (int four = 0; four < lanes; four += 4) {
            const float* at[4];
            for (int n = 0; n < 4; ++n) at[n] = rows + least(first + four + n, count - 1) * row;
            Floats a{}, b{}, c{}, e{};
            if (first + four < count)
                for (int64_t d = 0; d < wide; d += lanes) {
                    const Floats one = load(x + d);
                    a += one * load(at[0] + d), b += one * load(at[1] + d);
                    c += one * load(at[2] + d), e += one * load(at[3] + d);
                }
            square[four] = a, square[four + 1] = b, square[four + 2] = c, square[four + 3] = e;
        }
        const int64_t left = count - first;
        store(out + first, pick(left >= lanes ? ~0ull : (1ull << left) - 1, sums_of(square), Floats{}));
    }
}

static inline bool has_factors(const Linear& call) { return call.decay.data || call.resets; }

struct Chunk {
    int64_t wide, width;        // dim and columns in whole vectors
    int64_t first, count;       // its steps
    float *k, *k_across;        // [C][wide]; [wide][C], not by channel
    float *factors, *beta;      // of each step, as they are fetched logarithms: [C], by channel [C][wide]; [C]
    float* between;             // [C][C]: e^(j→i), zeros above the diagonal; not by channel
    float* carried;             // by channel: [C · (C + 1) / 2][wide]
    float* to_step;             // e^(0→t): [C] or [C][wide]
    float *reading, *kept;      // [C][wide]
    const float* leaving;       // [C][wide]
    float* carry;               // [wide]: e^(0→C)
    float* inside;              // [C][C]
};

static inline const float* carried_at(const Chunk& chunk, int64_t step) {
    return chunk.carried + step * (step + 1) / 2 * chunk.wide;
}

static int64_t chunk_floats(const Linear& call) {
    const int64_t size = chunk_steps, wide = padded(call.dim);
    const int64_t by_step = call.by_channel ? size * (size + 1) / 2 * wide + 2 * size * wide : wide * size + size * size + 2 * size;
    return 3 * size * wide + by_step + size + wide + size * size;
}

static Chunk chunk_at(const Linear& call, int64_t columns, float*& next) {
    Chunk chunk{};
    const int64_t size = chunk_steps, wide = padded(call.dim);
    chunk.wide = wide, chunk.width = padded(columns);
    const auto room = [&next](int64_t floats) { return next += floats, next - floats; };
    chunk.k = room(size * wide), chunk.reading = room(size * wide), chunk.kept = room(size * wide);
    if (call.by_channel) {
        chunk.carried = room(size * (size + 1) / 2 * wide);
        chunk.factors = room(size * wide), chunk.to_step = room(size * wide);
    } else {
        chunk.k_across = room(wide * size), chunk.between = room(size * size);
        chunk.factors = room(size), chunk.to_step = room(size);
    }
    chunk.beta = room(size), chunk.carry = room(wide), chunk.inside = room(size * size);
    return chunk;
}

static inline const float* gate_at(const Gate& gate, int64_t batch, int64_t head, int64_t step) {
    return gate.data + batch * gate.batch + head * gate.head + step * gate.step;
}
static inline bool is_reset(const Linear& call, int64_t batch, int64_t step) {
    return call.resets && call.resets[batch * call.reset_batch + step];
}
static inline Floats factor_of(Floats decay) { return power_of_two<Digits::all>(decay * spread(static_cast<float>(log2e))); }
static inline float beta_of(const Linear& call, const Columnar& at, int64_t step) {
    return call.beta.data ? *gate_at(call.beta, at.batch, at.key_head, step) : 1.0f;
}

// The logarithm of a step's factor, or those of all channels; a reset is a factor of 0.
static inline float log_of(const Linear& call, const Columnar& at, int64_t step) {
    if (is_reset(call, at.batch, step)) return -INFINITY;
    return call.decay.data ? *gate_at(call.decay, at.batch, at.key_head, step) : 0.0f;
}
static void logs_of(const Linear& call, const Columnar& at, int64_t step, float* out) {
    const float* decay = gate_at(call.decay, at.batch, at.key_head, step);
    const bool reset = is_reset(call, at.batch, step);
    for (int64_t d = 0; d < call.dim; d += lanes) store(out + d, reset ? spread(-INFINITY) : load_some(decay + d, call.dim - d));
}

// Row i keeps its entries before i, or up to i; times the decays between, if there are any.
static void below_diagonal(const Chunk& chunk, bool decayed, bool with_diagonal, float sign, float* rows) {
    for (int64_t i = 0; i < chunk.count; ++i)
        for (int64_t j = 0; j < chunk_steps; j += lanes) {
            const int64_t kept = i - j + with_diagonal;
            float* place = rows + i * chunk_steps + j;
            if (kept <= 0) {
                store(place, Floats{});
                continue;
            }
            Floats x = load(place) * spread(sign);
            if (decayed) x *= load(chunk.between + i * chunk_steps + j);
            store(place, pick(kept >= lanes ? ~0ull : (1ull << kept) - 1, x, Floats{}));
        }
}

// out[i][j] = Σ_d a[i][d]·b[d][j] for the steps i and j of a chunk.
static void pair_products(const float* a, int64_t a_row, const float* b, int64_t inner, const Chunk& chunk, float* out) {
    products<false, Into::fresh>(a, chunk.count, a_row, b, chunk_steps, inner, chunk_steps / lanes, out, chunk_steps);
}

// out[i][…] += Σ_j a[i][j]·b[j][…], or with a's columns for its rows.
template <bool turned>
static void add_steps(const float* a, const float* b, int64_t width, const Chunk& chunk, float* out) {
    products<turned, Into::added>(a, chunk.count, chunk_steps, b, width, chunk.count, width / lanes, out, width);
}

// Keys, values (into x), betas and factors of some steps; whether any of them is NaN or infinite. Then the steps have to be
// taken one by one: inside a product what is broken would reach rows before it. So would what the state holds, which would
// survive a factor of 0.
static bool fetch(const Linear& call, const Columnar& at, int64_t first, int64_t count, const float* state, Chunk& chunk, float* x) {
    const int64_t wide = chunk.wide, width = chunk.width;
    chunk.first = first, chunk.count = count;
    take(call.k, at.batch, at.key_head, first, count, 0, call.dim, 1, chunk.k, wide);
    take(call.v, at.batch, at.key_head, first, count, at.first, at.count, 1, x, width);
    Floats bad{};  // a sum of zeros
    for (int64_t n = 0; n < count * wide; n += lanes) bad += load(chunk.k + n) * Floats{};
    for (int64_t n = 0; n < count * width; n += lanes) bad += load(x + n) * Floats{};
    bool resets = false;
    for (int64_t n = 0; n < count; ++n) {
        chunk.beta[n] = beta_of(call, at, first + n);
        bad += spread(chunk.beta[n]) * Floats{};
        resets |= is_reset(call, at.batch, first + n);
    }
    if (call.by_channel) {
        for (int64_t n = 0; n < count; ++n) {
            logs_of(call, at, first + n, chunk.factors + n * wide);
            for (int64_t d = 0; d < wide; d += lanes) bad += larger(spread(-1.0f), load(chunk.factors + n * wide + d)) * Floats{};
        }
    } else if (has_factors(call)) {
        for (int64_t n = 0; n < chunk_steps; ++n) chunk.factors[n] = n < count ? log_of(call, at, first + n) : 0;
        for (int64_t n = 0; n < count; n += lanes) bad += larger(spread(-1.0f), load(chunk.factors + n)) * Floats{};
    }
    if (resets)
        for (int64_t n = 0; n < call.dim * width; n += lanes) bad += load(state + n) * Floats{};
    return sum_of(bad) != 0;
}

// By channel: every key carried along by products, and from before the chunk by the exponential of a sum, which a state
// that lives long is multiplied by again and again.
static void carry_keys(const Linear& call, Chunk& chunk) {
    const int64_t wide = chunk.wide;
    for (int64_t i = 0; i < chunk.count; ++i) {
        const float *logs = chunk.factors + i * wide, *k = chunk.k + i * wide, *before = i ? carried_at(chunk, i - 1) : nullptr;
        float* carried = chunk.carried + i * (i + 1) / 2 * wide;
        for (int64_t d = 0; d < wide; d += lanes) {
            const Floats sum = i ? load(chunk.carry + d) + load(logs + d) : load(logs + d);
            const Floats factor = factor_of(load(logs + d)), to_step = factor_of(sum);
            store(chunk.carry + d, sum);
            store(chunk.factors + i * wide + d, factor);
            store(chunk.to_step + i * wide + d, to_step);
            store(chunk.reading + i * wide + d, load(k + d) * to_step);
            for (int64_t j = 0; j < i; ++j) store(carried + j * wide + d, load(before + j * wide + d) * factor);
            store(carried + i * wide + d, load(k + d));
        }
        if (!call.delta_rule) continue;
        float* row = chunk.inside + i * chunk_steps;
        for (int64_t j = 0; j < chunk_steps; j += lanes) store(row + j, Floats{});
        if (i) row_dots(k, carried, wide, i, wide, row);
        for (int64_t j = 0; j < i; j += lanes) store(row + j, -load(row + j));
    }
    chunk.leaving = carried_at(chunk, chunk.count - 1);
    memcpy(chunk.carry, chunk.to_step + (chunk.count - 1) * wide, sizeof(float) * static_cast<size_t>(wide));
}

// Of steps that were fetched, everything that does not depend on values.
static void make_ready(const Linear& call, Chunk& chunk) {
    const int64_t size = chunk_steps, wide = chunk.wide, count = chunk.count;
    if (call.by_channel) return carry_keys(call, chunk);
    turn(chunk.k, wide, count, wide, chunk.k_across, size);
    const bool decays = has_factors(call);
    if (decays) {
        // Sums of logarithms first; nothing is left of what would go backwards.
        float sum = 0;
        for (int64_t i = 0; i < count; ++i) {
            float* row = chunk.between + i * size;
            for (int64_t j = 0; j < size; j += lanes)
                store(row + j, i ? load(row - size + j) + spread(chunk.factors[i]) : spread(-INFINITY));
            row[i] = 0;
            chunk.to_step[i] = sum += chunk.factors[i];
        }
        for (int64_t n = 0; n < count * size; n += lanes) store(chunk.between + n, factor_of(load(chunk.between + n)));
        for (int64_t n = 0; n < size; n += lanes) store(chunk.to_step + n, factor_of(load(chunk.to_step + n)));
        const float* from_step = chunk.between + (count - 1) * size;
        for (int64_t n = 0; n < count; ++n)
            for (int64_t d = 0; d < wide; d += lanes) {
                const Floats k = load(chunk.k + n * wide + d);
                store(chunk.reading + n * wide + d, k * spread(chunk.to_step[n]));
                store(chunk.kept + n * wide + d, k * spread(from_step[n]));
            }
        chunk.leaving = chunk.kept;
        for (int64_t d = 0; d < wide; d += lanes) store(chunk.carry + d, spread(chunk.to_step[count - 1]));
    } else {
        chunk.leaving = chunk.reading = chunk.k;
    }
    if (call.delta_rule) {
        pair_products(chunk.k, wide, chunk.k_across, wide, chunk, chunk.inside);
        below_diagonal(chunk, decays, false, -1, chunk.inside);
    }
}

// weights[i][j] = q_i·e^(j→i)·k_j for j ≤ i
static void weights_of(const Linear& call, const Chunk& chunk, const float* q, float* weights) {
    if (!call.by_channel) {
        pair_products(q, chunk.wide, chunk.k_across, chunk.wide, chunk, weights);
        return below_diagonal(chunk, has_factors(call), true, 1, weights);
    }
    for (int64_t i = 0; i < chunk.count; ++i) {
        float* row = weights + i * chunk_steps;
        for (int64_t j = 0; j < chunk_steps; j += lanes) store(row + j, Floats{});
        row_dots(q + i * chunk.wide, carried_at(chunk, i), chunk.wide, i + 1, chunk.wide, row);
    }
}

// rows · e^(0→t)
static void from_before(const Linear& call, const Chunk& chunk, float* rows) {
    if (!has_factors(call)) return;
    for (int64_t n = 0; n < chunk.count; ++n)
        for (int64_t d = 0; d < chunk.wide; d += lanes) {
            float* place = rows + n * chunk.wide + d;
            store(place, load(place) * (call.by_channel ? load(chunk.to_step + n * chunk.wide + d) : spread(chunk.to_step[n])));
        }
}

// u_i = β_i·x_i with x_i + Σ_{j < i} inside_ij·u_j: a triangular system, row after row.
template <int wide>
static void solve_down(const Chunk& chunk, float* x, float* u) {
    const int64_t width = chunk.width;
    for (int64_t i = 0; i < chunk.count; ++i) {
        const float* row = chunk.inside + i * chunk_steps;
        Floats sum[2][wide];
        for (int n = 0; n < wide; ++n) sum[0][n] = load(x + i * width + n * lanes), sum[1][n] = Floats{};
        int64_t j = 0;
        for (; j + 2 <= i; j += 2)
            for (int more = 0; more < 2; ++more)
                for (int n = 0; n < wide; ++n) sum[more][n] += spread(row[j + more]) * load(u + (j + more) * width + n * lanes);
        if (j < i)
            for (int n = 0; n < wide; ++n) sum[0][n] += spread(row[j]) * load(u + j * width + n * lanes);
        for (int n = 0; n < wide; ++n) {
            sum[0][n] += sum[1][n];
            store(x + i * width + n * lanes, sum[0][n]);
            store(u + i * width + n * lanes, sum[0][n] * spread(chunk.beta[i]));
        }
    }
}

// The same from below, for the gradient: g_j = β_j·d_j with d_j + Σ_{i > j} inside_ij·g_i.
template <int wide>
static void solve_up(const Chunk& chunk, float* d, float* g) {
    const int64_t width = chunk.width;
    for (int64_t j = chunk.count; j-- > 0;) {
        Floats sum[wide];
        for (int n = 0; n < wide; ++n) sum[n] = load(d + j * width + n * lanes);
        for (int64_t i = j + 1; i < chunk.count; ++i)
            for (int n = 0; n < wide; ++n) sum[n] += spread(chunk.inside[i * chunk_steps + j]) * load(g + i * width + n * lanes);
        for (int n = 0; n < wide; ++n) {
            store(d + j * width + n * lanes, sum[n]);
            store(g + j * width + n * lanes, sum[n] * spread(chunk.beta[j]));
        }
    }
}

// x, which holds values, becomes x = v − k~·S + inside·u, and u = β·x is what is written.
static void write_values(const Linear& call, const Chunk& chunk, const float* state, float* x, float* u) {
    const int64_t width = chunk.width, count = chunk.count;
    if (!call.delta_rule) {
        for (int64_t i = 0; i < count; ++i)
            for (int64_t n = 0; n < width; n += lanes) store(u + i * width + n, load(x + i * width + n) * spread(chunk.beta[i]));
        return;
    }
    products<false, Into::fresh>(chunk.reading, count, chunk.wide, state, width, call.dim, width / lanes, u, width);
    for (int64_t n = 0; n < count * width; n += lanes) store(x + n, load(x + n) - load(u + n));
    int64_t n = 0;
    for (; n + 4 * lanes <= width; n += 4 * lanes) solve_down<4>(chunk, x + n, u + n);
    for (; n < width; n += lanes) solve_down<1>(chunk, x + n, u + n);
}

// S ← e^(0→C)·S + k^ᵀ·u
static void carry_on(const Linear& call, const Chunk& chunk, const float* u, float* state) {
    const int64_t width = chunk.width;
    if (has_factors(call))
        products<true, Into::shrunk_rows>(chunk.leaving, call.dim, chunk.wide, u, width, chunk.count, width / lanes, state,
                                          width, chunk.carry);
    else
        products<true, Into::added>(chunk.leaving, call.dim, chunk.wide, u, width, chunk.count, width / lanes, state, width);
}
