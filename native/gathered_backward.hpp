// The gradients of gathered.hpp.

#if defined(FOVEATE_AMX)
// Raw scores of picked keys, [row][key], by the matrix unit: weights have to be made again from those of the forward pass.
// Where they are not large the vectors' own will do, and the unit would slow these down.
struct UnitScores {
    const Gathering& piece;
    int64_t rows, pairs;
    uint32_t* q;
    float* by_key;
    uint16_t* key_rows;
    GatherUnit unit;

    static int64_t floats(const Call& call, int64_t height) {
        return unit_rows(call) * (height * padded(call.dim) + tile) + tile * padded(call.dim);
    }
    template <typename Room>
    UnitScores(const Gathering& piece, const Band& band, bool any_large, Room room)
        : piece(piece), rows(unit_rows(piece.call)), pairs(pair_stride(piece.call.dim) / 2),
          q(reinterpret_cast<uint32_t*>(room(rows * band.count * piece.wide))), by_key(room(rows * tile)),
          key_rows(reinterpret_cast<uint16_t*>(room(tile * piece.wide))), unit(any_large ? rows : 0) {
        if (any_large) lay_queries(piece.call, band, piece.rows, rows, pairs, q);
    }
    void make(const Picked& picked, int64_t t) const {
        picked_scores(piece.call, piece.keys.place, picked, q + t * pairs * rows, rows, key_rows, by_key);
        for (int64_t row = 0; row < piece.rows; ++row)
            for (int64_t key = 0; key < picked.count; ++key) piece.scores[row * tile + key] = by_key[key * rows + row];
    }
};
#else
static bool gathers_pairs(const Call&) { return false; }

struct UnitScores {  // there is none
    static int64_t floats(const Call&, int64_t) { return 0; }
    template <typename Room>
    UnitScores(const Gathering&, const Band&, bool, Room) {}
    void make(const Picked&, int64_t) const {}
};
#endif

// The gradients of a tile of queries. It keeps those of its queries to the end; those of the keys of a stretch it collects
// by itself, and adds them to what the tiles before it have added, in their order, as backward.hpp does.
static int64_t collected_keys(const Call& call) { return stretch_of(call, true) * call.chosen.block; }

static int64_t gathered_backward_bytes(const Call& call) {
    const int64_t height = gathered_height(call), rows = height * shared_rows(call);
    const int64_t wide = padded(call.dim), value_wide = padded(call.value_dim), keys = collected_keys(call);
    const int64_t scalars = 5 * shared_rows(call) * ((height + tile - 1) / tile * tile);
    return 4 * (gathered_floats(call, height) + UnitScores::floats(call, height) + rows * (2 * wide + value_wide) + scalars +
                keys * (wide + value_wide) + (keys + 63) / 64 * 16 + 2 * tile * value_wide);
}

static void gathered_backward(const Gradients& g, const Band& band, int64_t turn, int64_t turns, char* scratch) {
    const Call& call = g.call;
    float* next = reinterpret_cast<float*>(scratch);
    const auto room = [&next](int64_t floats) { return next += floats, next - floats; };
    const Gathering piece(call, band, room);
    const int64_t rows = piece.rows, wide = piece.wide, value_wide = piece.value_wide, stretch = stretch_of(call, true);
    const int64_t key_head = band.head * rows / (call.heads / call.key_heads), padding = (band.count + tile - 1) / tile * tile;
    const float binary = binary_of(call);
    float *q = room(band.count * rows * wide), *d_out = room(band.count * rows * value_wide), *dq = room(band.count * rows * wide);
    float *base = room(rows * padding), *above = room(rows * padding), *delta = room(rows * padding);
    float *moves = room(rows * padding), *sunk = room(rows * padding);
    float *wide_a = room(tile * value_wide), *wide_b = room(tile * value_wide);
    const int64_t most_keys = collected_keys(call);
    float *dk = room(most_keys * wide), *dv = room(most_keys * value_wide);
    char* touched = reinterpret_cast<char*>(room((most_keys + 63) / 64 * 16));
    fetch(call, call.q, band, rows, call.dim, q);
    fetch(call, g.d_out, band, rows, call.value_dim, d_out);
    memset(dq, 0, sizeof(float) * static_cast<size_t>(band.count * rows * wide));
    memset(touched, 0, static_cast<size_t>(most_keys));
    bool is_large[gathered_queries]{}, any_large = false;  // by the matrix unit, that is
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t t = 0; t < band.count; t += tile) {
            const int64_t head = band.head * rows + row, first = band.first + t, count = least(tile, band.count - t);
            const int64_t to = row * padding + t;
            const Rows d_rows = rows_of(call, g.d_out, band.batch, head, first, count, call.value_dim, wide_a);
            const Rows out_rows = rows_of(call, call.out, band.batch, head, first, count, call.value_dim, wide_b);
            rows_ready(g, band.batch, head, first, count, d_rows, out_rows,
                       {nullptr, nullptr, base + to, above + to, delta + to, moves + to, sunk + to, nullptr}, 0);
            for (int64_t n = 0; n < count && gathers_pairs(call); ++n)
                any_large |= is_large[t + n] |= fabsf(base[to + n]) * unit_of(call) > large && base[to + n] != INFINITY;
        }
    const UnitScores by_unit(piece, band, any_large, room);
    Turn in_turn{g.passed + (band.batch * call.key_heads + key_head) * turns, turn, 0};
    Picked picked;
    for (int64_t at; (at = next_stretch(piece.wishes, band.count, stretch)) >= 0;) {
        const int64_t first_key = at * stretch * call.chosen.block, end_key = least(first_key + most_keys, call.keys);
        for (int64_t t = 0; t < band.count; ++t) {
            int64_t inside = 0;
            while (pick_next(call, piece.wishes[t], inside, (at + 1) * stretch, piece.keys, piece.values, picked)) {
                float *dk_at[tile], *dv_at[tile];
                for (int64_t n = 0; n < picked.count; ++n) {
                    const int64_t place = picked.key[n] - first_key;
                    dk_at[n] = dk + place * wide, dv_at[n] = dv + place * value_wide;
                    if (touched[place]) continue;
                    touched[place] = 1;
                    memset(dk_at[n], 0, sizeof(float) * static_cast<size_t>(wide));
                    memset(dv_at[n], 0, sizeof(float) * static_cast<size_t>(value_wide));
                }
                const float *mine = q + t * rows * wide, *d_mine = d_out + t * rows * value_wide;
                if (is_large[t])
                    by_unit.make(picked, t);
                else
                    gathered_dots(mine, rows, wide, picked.k, picked.count, piece.scores);
                gathered_dots(d_mine, rows, value_wide, picked.v, picked.count, piece.d_scores);
                for (int64_t row = 0; row < rows; ++row) {
                    float *score = piece.scores + row * tile, *d_score = piece.d_scores + row * tile, *slopes = piece.slopes;
                    adjust_chosen(call, band.batch, band.head * rows + row, band.first + t, picked, score, slopes);
                    const int64_t one = row * padding + t;
                    for (int64_t n = 0; n < picked.count; n += lanes) {
                        const Floats weight = power_of_two((load(score + n) - spread(base[one])) * spread(binary) - spread(above[one]));
                        Floats change = weight * (load(d_score + n) * spread(moves[one]) - spread(delta[one]));
                        if (call.softcap != 0) change *= load(slopes + n);
                        store(score + n, weight);
                        store(d_score + n, change);
                    }
                }
                gathered_mix(piece.d_scores, rows, picked.k, picked.count, wide, dq + t * rows * wide);
                gathered_scatter(piece.d_scores, rows, mine, dk_at, picked.count, wide);
                gathered_scatter(piece.scores, rows, d_mine, dv_at, picked.count, value_wide);
            }
        }
        in_turn.come(at);
        const int64_t place = (band.batch * call.key_heads + key_head) * call.keys;
        for (int64_t key = first_key; key < end_key; ++key) {
            const int64_t n = key - first_key;
            if (!touched[n]) continue;
            touched[n] = 0;
            add_rows(g.dk + (place + key) * call.dim, dk + n * wide, 1, call.dim, call.scale);
            add_rows(g.dv + (place + key) * call.value_dim, dv + n * value_wide, 1, call.value_dim, 1);
        }
    }
    in_turn.end();
    for (int64_t n = 0; n < band.count * rows; ++n) {
        const int64_t row = (band.batch * call.heads + band.head * rows + n % rows) * call.queries + band.first + n / rows;
        add_rows(g.dq + row * call.dim, dq + n * wide, 1, call.dim, call.scale);
    }
}
