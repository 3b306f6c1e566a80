// Forward attention of a band in bfloat16, with products of pairs. The same steps as in forward.hpp, which says what
// they mean; weights are rounded to bfloat16 on their way to the values, their sum is taken before.
#if defined(FOVEATE_PAIRS)

// Work goes on half a tile of rows at a time, and the scores of the next half are made between the weights of this one
// and their product with the values: what was just written is then there when the matrix unit reads it. All numbers of a
// half lie together, `half` to a row: rows twice as far apart would share half of the first cache's places. Columns
// are prepared a few at a time, for all rows of the band.
constexpr int64_t half = 32, columns_at_once = 4;
constexpr float most_sum = 256;  // of the weights of a row and a tile, or its base is raised

// Pairs of weights for `wide` vectors of rows over their bases, and what they sum to.
template <int wide, bool far>
static inline void pairs_over(const float* scores, int64_t keys, const Bases<wide, far>& bases, Floats (&sum)[wide], uint32_t* pairs) {
    for (int n = 0; n < wide; ++n) sum[n] = Floats{};
    int64_t key = 0;
    for (; key + 2 <= keys; key += 2)
        for (int n = 0; n < wide; ++n) {
            const float* place = scores + key * half + n * lanes;
            const Floats one = power_of_two<Digits::few>(bases.exponent(load(place), n));
            const Floats two = power_of_two<Digits::few>(bases.exponent(load(place + half), n));
            sum[n] += one + two;
            store(reinterpret_cast<float*>(pairs + key / 2 * half + n * lanes), pair_of(one, two));
        }
    for (; key < blocks(keys, 32) * 32; key += 2)
        for (int n = 0; n < wide; ++n) {
            const Floats last = key < keys ? load(scores + key * half + n * lanes) : spread(-INFINITY);
            const Floats one = power_of_two<Digits::few>(bases.exponent(last, n));
            sum[n] += one;
            store(reinterpret_cast<float*>(pairs + key / 2 * half + n * lanes), pair_of(one, Floats{}));
        }
}

// Scores become pairs of weights; whether any sum so far has to shrink. Bases hold for most tiles, so weights are made
// with the old ones, and their sums say which rows had a score too far above: only those get their maxima, and all weights
// are made anew. A row's bits depend on no other row.
template <int wide>
static bool weigh_pairs(const float* scores, int64_t keys, float binary, const State& state, bool& far, float* shrink, uint32_t* pairs) {
    Floats sum[wide];
    Ints wanting[wide], some{}, raised{}, begun{};
    for (int n = 0; n < wide; ++n) {
        wanting[n] = load(state.base + n * lanes) == spread(-INFINITY);
        begun |= ~wanting[n];
    }
    const auto weigh = [&] {
        if (far)
            pairs_over<wide>(scores, keys, Bases<wide, true>(state, binary), sum, pairs);
        else
            pairs_over<wide>(scores, keys, Bases<wide, false>(state, binary), sum, pairs);
    };
    if (any(begun)) weigh();
    for (int n = 0; n < wide; ++n) {
        if (any(begun)) wanting[n] |= (sum[n] <= spread(most_sum)) == 0;  // or NaN
        some |= wanting[n];
    }
    const bool holds = !any(some);
    for (int n = 0; n < wide && !holds; ++n) {
        Floats top = spread(-INFINITY);
        for (int64_t key = 0; key < keys; ++key) top = larger(load(scores + key * half + n * lanes), top);
        const Ints above = wanting[n] & (top > load(state.base + n * lanes));
        raised |= above;
        store(shrink + n * lanes, state.raise(n * lanes, top, above, binary, far));
    }
    if (!holds) weigh();
    for (int n = 0; n < wide; ++n) {
        float* total = state.total + n * lanes;
        store(total, (holds ? load(total) : load(total) * load(shrink + n * lanes)) + sum[n]);
    }
    return any(raised);
}

// Weights that are there as float32 already become pairs.
static void pair_up(const float* weights, int64_t keys, int64_t active, uint32_t* pairs, int64_t step = tile) {
    for (int64_t key = 0; key < blocks(keys, 32) * 32; key += 2)
        for (int64_t n = 0; n < active * lanes; n += lanes) {
            const Floats one = key < keys ? load(weights + key * step + n) : Floats{};
            const Floats two = key + 1 < keys ? load(weights + (key + 1) * step + n) : Floats{};
            store(reinterpret_cast<float*>(pairs + key / 2 * step + n), pair_of(one, two));
        }
}

static int64_t pair_bytes(const Call& call, int64_t tile_rows) {
    const int64_t keys = tile * pair_stride(call.dim) / 2, values = tile * blocks(call.value_dim, 16) * 8;
    const int64_t shared = columns_at_once * (keys + values) + half * tile + half * tile / 2 +
                           tile * (padded(call.value_dim) + 1) + lanes * (call.value_dim + lanes);
    return 4 * (shared + tile_rows * (keys + 2 * tile * (blocks(call.value_dim, 16) * 16 + 3)));
}

// A few columns made ready: keys in place or padded, values turned.
struct Prepared {
    int64_t column, keys;
    PairRows k;
    uint16_t *key_rows, *turned;
    int finite;  // −1: not asked yet

    bool has_finite(int64_t value_dim) {
        if (finite < 0) finite = finite_pairs(turned, value_dim * tile);
        return finite;
    }
};

// Half a tile of rows against one column.
struct Visit {
    int64_t h, c;  // half, prepared column
    Columns mine;
};

static void forward_pairs(const Call& call, const Band& band, char* scratch) {
    const int64_t dim = call.dim, value_dim = call.value_dim, value_wide = blocks(value_dim, 16) * 16;
    const int64_t key_head = band.head / (call.heads / call.key_heads);
    const bool adjusted = adjusts(call);
    const float binary = binary_of(call);
    float* next = reinterpret_cast<float*>(scratch);
    const auto room = [&next](int64_t floats) { return next += floats, next - floats; };
    const int64_t key_floats = tile * pair_stride(dim) / 2, value_floats = tile * value_wide / 2;
    float* scores = room(half * tile);
    uint32_t* pairs = reinterpret_cast<uint32_t*>(room(half * tile / 2));
    Prepared ready[columns_at_once];
    for (Prepared& each : ready)
        each.key_rows = reinterpret_cast<uint16_t*>(room(key_floats)), each.turned = reinterpret_cast<uint16_t*>(room(value_floats));
    float *wide_v = room(tile * padded(value_dim)), *shrink = room(tile), *row_scratch = room(lanes * (value_dim + lanes));
    uint32_t* q[2 * band_rows];
    Running state[2 * band_rows];
    BandColumns ahead(call, band);
    Columns columns[2 * band_rows];
    const int64_t halves = blocks(least(call.queries - band.first * tile, band.count * tile), half);
    const auto rows_of_half = [&](int64_t h) { return least(call.queries - band.first * tile - h * half, half); };
    for (int64_t h = 0; h < halves; ++h) {
        columns[h] = ahead.of[h / 2];
        q[h] = reinterpret_cast<uint32_t*>(room(key_floats / 2));
        state[h].whole = {room(half), room(half), room(half), room(half * value_wide)};
        state[h].group = {room(half), room(half), room(half), room(half * value_wide)};
        state[h].step = half;
        const int64_t first_row = band.first * tile + h * half, rows = rows_of_half(h);
        state[h].begin(binary, rows);
        lay_pairs(pair_rows(call, call.q, band.batch, band.head, first_row, rows, dim, ready[0].key_rows, false), rows, dim,
                  q[h], half);
    }

    const PairUnit unit;
    int64_t prepared = 0;
    const auto prepare = [&] {
        for (prepared = 0; prepared < columns_at_once; ++prepared) {
            Prepared& to = ready[prepared];
            to.column = ahead.next();
            if (to.column < 0) break;
            for (int64_t r = 0; r < band.count; ++r)
                if (!ahead.of[r].done() && ahead.of[r].column() == to.column) ahead.of[r].next();
            const int64_t first_key = to.column * tile;
            to.keys = keys_at(call, band.batch, first_key);
            to.k = pair_rows(call, call.k, band.batch, key_head, first_key, to.keys, dim, to.key_rows, call.pages);
            turn_pairs(call, call.v, band.batch, key_head, first_key, to.keys, value_dim, to.turned, call.pages);
            to.finite = -1;
        }
        return prepared > 0;
    };
    // The next visit, half by half through the prepared columns; false at their end.
    const auto advance = [&](Visit& to) {
        for (++to.c; to.h < halves; ++to.h, to.c = 0) {
            Columns& mine = columns[to.h];
            while (to.c < prepared && (mine.done() || mine.column() != ready[to.c].column)) ++to.c;
            if (to.c >= prepared) continue;
            to.mine = mine;
            mine.next();
            return true;
        }
        return false;
    };
    const auto score = [&](const Visit& of) {
        const Prepared& with = ready[of.c];
        pair_products<half>(with.k.data, blocks(with.keys, 16), with.k.stride, q[of.h], blocks(dim, 32),
                            blocks(rows_of_half(of.h), lanes), scores, false);
    };
    while (prepare()) {
        Visit visit{0, -1, {}};
        bool more = advance(visit);
        if (more) score(visit);
        while (more) {
            const Visit now = visit;
            Prepared& with = ready[now.c];
            const int64_t keys = with.keys, rows = rows_of_half(now.h), first_key = with.column * tile;
            const int64_t active = blocks(rows, lanes), above = now.h % 2 * half;  // rows of the tile above this half
            const Place at{band.batch, band.head, now.mine.first_row + above, rows, first_key, keys};
            Running& running = state[now.h];
            const bool first = running.next(value_wide);
            const State& mine = running.group;
            if (adjusted) adjust(call, at, active, scores, nullptr, half);
            uint64_t seen[tile];
            const bool masked = now.mine.hides(seen);
            if (masked) hide(scores, seen, keys, active, above, half);
            const bool guarded = (masked || call.bias || call.threshold) && !with.has_finite(value_dim);
            bool raised;
            if (guarded || call.threshold) {
                raised = weigh_all(scores, keys, active, binary, mine, running.far, shrink, half);
                if (call.threshold) drop(call, at, active, scores, half);
                pair_up(scores, keys, active, pairs, half);
            } else {
                raised = active == 2 ? weigh_pairs<2>(scores, keys, binary, mine, running.far, shrink, pairs)
                                     : weigh_pairs<1>(scores, keys, binary, mine, running.far, shrink, pairs);
            }
            if (guarded) {
                if (first) running.zero(value_wide);
                const Rows v = values_of(call, band.batch, key_head, first_key, keys, wide_v);
                guarded_products(v, value_dim, scores, keys, active, mine.out, shrink, half);
            } else if (raised && !first) {
                for (int64_t d = 0; d < value_dim; ++d)
                    for (int64_t n = 0; n < active * lanes; n += lanes) {
                        float* place = mine.out + d * half + n;
                        store(place, load(place) * load(shrink + n));
                    }
            }
            more = advance(visit);
            if (more) score(visit);
            if (!guarded)
                pair_products<half>(with.turned, value_wide / 16, tile, pairs, blocks(keys, 32), active, mine.out, !first);
        }
    }
    for (int64_t h = 0; h < halves; ++h) {
        leave(call, band.batch, band.head, band.first * tile + h * half, rows_of_half(h), state[h].end(value_wide), shrink,
              row_scratch, half, true);
    }
}
#endif
