// Linear attention, some columns of the state of one key head from the first step to the last: chunk after chunk.
//
//     u   = β·(v − k~·S + inside·u)          inside only for the delta rule: a triangular system
//     out = q~·S + (q·e^(j→i)·kᵀ)·u          for every query head of the key head
//     S   ← e^(0→C)·S + k^ᵀ·u
//
// A step alone, as in decoding, needs no matrix but the state. So are steps taken that hold a NaN or an infinity.

// Steps one by one: few of them, or broken ones.
constexpr int64_t few_steps = 4;

static inline int64_t group_of(const Linear& call) { return call.heads / call.key_heads; }

static int64_t step_floats(const Linear& call, int64_t columns) {
    const int64_t wide = padded(call.dim), width = padded(columns), group = group_of(call);
    return 3 * wide + 3 * width + group * (wide + width);
}

// `to` is what step t leaves of `from`; rows of both are `stride` apart and hold whole vectors. They may be the same.
static void one_step(const Linear& call, const Columnar& at, int64_t t, const float* from, float* to, int64_t stride,
                     bool reads, float* scratch) {
    const int64_t wide = padded(call.dim), width = padded(at.count), group = group_of(call);
    const auto room = [&scratch](int64_t floats) { return scratch += floats, scratch - floats; };
    float *k = room(wide), *factors = room(wide), *decayed = room(wide), *v = room(width), *u = room(width);
    float *q = room(group * wide), *out = room(group * width);
    const bool reset = is_reset(call, at.batch, t), decays = call.decay.data;
    take(call.k, at.batch, at.key_head, t, 1, 0, call.dim, 1, k, wide);
    take(call.v, at.batch, at.key_head, t, 1, at.first, at.count, 1, v, width);
    if (call.by_channel)
        logs_of(call, at, t, factors);
    else
        for (int64_t d = 0; d < wide; d += lanes) store(factors + d, spread(log_of(call, at, t)));
    for (int64_t d = 0; d < wide; d += lanes) {
        store(factors + d, factor_of(load(factors + d)));
        store(decayed + d, load(k + d) * load(factors + d));
    }
    if (call.delta_rule && !reset)
        products<false, Into::fresh>(decayed, 1, wide, from, stride, call.dim, width / lanes, u, width);
    else
        for (int64_t n = 0; n < width; n += lanes) store(u + n, Floats{});
    const Floats beta = spread(beta_of(call, at, t));
    for (int64_t n = 0; n < width; n += lanes) store(u + n, (load(v + n) - load(u + n)) * beta);
    for (int64_t d = 0; d < call.dim; ++d) {
        const Floats key = spread(k[d]), factor = spread(factors[d]);
        for (int64_t n = 0; n < width; n += lanes) {
            const Floats before = reset ? Floats{} : load(from + d * stride + n);  // whatever it held
            store(to + d * stride + n, (decays ? before * factor : before) + key * load(u + n));
        }
    }
    if (!reads) return;
    for (int64_t g = 0; g < group; ++g)
        take(call.q, at.batch, at.key_head * group + g, t, 1, 0, call.dim, call.scale, q + g * wide, wide);
    products<false, Into::fresh>(q, group, wide, to, stride, call.dim, width / lanes, out, width);
    for (int64_t g = 0; g < group; ++g)
        put(call.out, at.batch, at.key_head * group + g, t, at.first, at.count, out + g * width);
}

// Columns of a contiguous state, and back.
static void take_state(const Linear& call, const Columnar& at, const float* all, float* state) {
    const float* from = all + (at.batch * call.key_heads + at.key_head) * call.dim * call.value_dim + at.first;
    for (int64_t d = 0; d < call.dim; ++d)
        for (int64_t n = 0; n < at.count; n += lanes)
            store(state + d * padded(at.count) + n, load_some(from + d * call.value_dim + n, at.count - n));
}
static void put_state(const Linear& call, const Columnar& at, const float* state, float* all) {
    float* to = all + (at.batch * call.key_heads + at.key_head) * call.dim * call.value_dim + at.first;
    for (int64_t d = 0; d < call.dim; ++d)
        for (int64_t n = 0; n < at.count; n += lanes)
            store_some(to + d * call.value_dim + n, load(state + d * padded(at.count) + n), at.count - n);
}
// Where one of the saved states is, as if it were the only one.
static inline int64_t saved_at(const Linear& call, const Columnar& at, int64_t segment) {
    const int64_t states = call.dim * call.value_dim, head = at.batch * call.key_heads + at.key_head;
    return (head * (segments_of(call) - 1) + segment) * states;
}

static int64_t linear_bytes(const Linear& call, int64_t columns) {
    const int64_t size = chunk_steps, wide = padded(call.dim), width = padded(columns);
    return 4 * (call.dim * width + chunk_floats(call) + step_floats(call, columns) + 3 * size * width + size * (wide + size));
}

static void read_chunk(const Linear& call, const Columnar& at, const Chunk& chunk, const float* state, const float* u,
                       float* q, float* weights, float* out) {
    const int64_t width = chunk.width, group = group_of(call);
    for (int64_t head = at.key_head * group; head < (at.key_head + 1) * group; ++head) {
        take(call.q, at.batch, head, chunk.first, chunk.count, 0, call.dim, call.scale, q, chunk.wide);
        weights_of(call, chunk, q, weights);
        from_before(call, chunk, q);
        products<false, Into::fresh>(q, chunk.count, chunk.wide, state, width, call.dim, width / lanes, out, width);
        add_steps<false>(weights, u, width, chunk, out);
        for (int64_t n = 0; n < chunk.count; ++n)
            put(call.out, at.batch, head, chunk.first + n, at.first, at.count, out + n * width, chunk.count);
    }
}

static void forward_columns(const Linear& call, const Columnar& at, char* scratch) {
    const int64_t size = chunk_steps, wide = padded(call.dim), width = padded(at.count);
    float* next = reinterpret_cast<float*>(scratch);
    const auto room = [&next](int64_t floats) { return next += floats, next - floats; };
    float* state = room(call.dim * width);
    if (call.steps == 1 && at.count % lanes == 0 && !call.saved) {  // decoding: from one state into the other
        const int64_t place = (at.batch * call.key_heads + at.key_head) * call.dim * call.value_dim + at.first;
        return one_step(call, at, 0, call.state + place, call.last + place, call.value_dim, call.reads, next);
    }
    take_state(call, at, call.state, state);
    Chunk chunk = chunk_at(call, at.count, next);
    float *x = room(size * width), *u = room(size * width), *out = room(size * width);
    float *q = room(size * wide), *weights = room(size * size);
    for (int64_t first = 0; first < call.steps; first += size) {
        const int64_t count = least(size, call.steps - first);
        if (call.saved && first % call.segment == 0)
            put_state(call, at, state, call.saved + saved_at(call, at, first / call.segment));
        if (count <= few_steps || fetch(call, at, first, count, state, chunk, x)) {
            for (int64_t t = first; t < first + count; ++t) one_step(call, at, t, state, state, width, call.reads, next);
            continue;
        }
        make_ready(call, chunk);
        write_values(call, chunk, state, x, u);
        if (call.reads) read_chunk(call, at, chunk, state, u, q, weights, out);
        carry_on(call, chunk, u, state);
    }
    put_state(call, at, state, call.last);
}

// Numbers below 1e-38 are left out while a piece is computed: decays make many of them, and on x86 each takes as long as a
// hundred others.
struct NoSubnormals {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();
    NoSubnormals() { _mm_setcsr(before | 0x8000); }
    ~NoSubnormals() { _mm_setcsr(before); }
#endif
};

static void linear(const Linear& call, const Columnar& at, char* scratch) {
    const NoSubnormals none;
    forward_columns(call, at, scratch);
}
