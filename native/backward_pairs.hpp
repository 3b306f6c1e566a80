// The backward pass of a band in bfloat16, with products of pairs. The same steps as in backward.hpp, which says what they
// mean; weights and gradients of scores are rounded to bfloat16 on their way into a product.
#if defined(FOVEATE_PAIRS)

// Weights or gradients of scores, keys by rows, rounded: two vectors of rows lie side by side. What no row has is 0.
static void round_rows(const float* from, int64_t keys, int64_t active, uint16_t* to) {
    for (int64_t key = 0; key < keys; ++key)
        for (int64_t n = 0; n < blocks(active, 2) * 2; n += 2) {
            const Floats low = load(from + key * tile + n * lanes);
            const Floats high = n + 1 < active ? load(from + key * tile + (n + 1) * lanes) : Floats{};
            __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<const __m512&>(high), reinterpret_cast<const __m512&>(low));
            memcpy(to + key * tile + n * lanes, &both, sizeof both);
        }
}

// Sums of a tile of keys join those of all bands; they lie in chunks of 64 numbers of each key.
static void add_chunks(float* to, const float* from, int64_t count, int64_t dim, float factor) {
    for (int64_t first = 0; first < dim; first += tile)
        for (int64_t n = 0; n < count; ++n)
            for (int64_t d = 0; d < least(dim - first, tile); d += lanes) {
                float* place = to + n * dim + first + d;
                const Floats more = load(from + (first + n) * tile + d) * spread(factor);
                store_some(place, load_some(place, dim - first - d) + more, dim - first - d);
            }
}

// Of one tile of rows: queries and dO across the lanes, both as pairs of rows, log-sum-exp and δ, dQ; all in floats.
static int64_t pair_row_floats(const Call& call) {
    const int64_t across = tile * (pair_stride(call.dim) + pair_stride(call.value_dim)) / 2;
    const int64_t woven = tile * tile / 2 * (blocks(call.dim, 64) + blocks(call.value_dim, 64));
    return across + woven + row_floats + tile * blocks(call.dim, 16) * 16;
}

static int64_t backward_pair_bytes(const Call& call, int64_t tile_rows) {
    const int64_t keys = tile * pair_stride(call.dim) / 2, values = tile * pair_stride(call.value_dim) / 2;
    const int64_t turned = tile * blocks(call.dim, 16) * 8, widest = most(padded(call.dim), padded(call.value_dim));
    // Scores, gradients, slopes; three rounded copies; keys, values, keys turned; sums; rows on their way in and out.
    const int64_t shared = 3 * tile * tile + 3 * tile * tile / 2 + keys + values + turned +
                           tile * tile * (blocks(call.dim, 64) + blocks(call.value_dim, 64)) + 2 * tile * widest +
                           lanes * (widest + lanes);
    return 4 * (shared + tile_rows * pair_row_floats(call));
}

static void backward_pairs(const Gradients& g, const Band& band, int64_t turn, int64_t turns, char* scratch) {
    const Call& call = g.call;
    const int64_t dim = call.dim, value_dim = call.value_dim, key_head = band.head / (call.heads / call.key_heads);
    const int64_t chunks = blocks(dim, 64), value_chunks = blocks(value_dim, 64), dim_blocks = blocks(dim, 16);
    float* next = reinterpret_cast<float*>(scratch);
    const auto room = [&next](int64_t floats) { return next += floats, next - floats; };
    const auto words = [&room](int64_t floats) { return reinterpret_cast<uint32_t*>(room(floats)); };
    const auto halves = [&room](int64_t floats) { return reinterpret_cast<uint16_t*>(room(floats)); };
    float *weights = room(tile * tile), *d_scores = room(tile * tile), *slopes = room(tile * tile);
    uint16_t *given_rows = halves(tile * tile / 2), *d_rows = halves(tile * tile / 2);
    uint32_t* d_pairs = words(tile * tile / 2);
    uint16_t* key_rows = halves(tile * pair_stride(dim) / 2);
    uint16_t* value_rows = halves(tile * pair_stride(value_dim) / 2);
    uint16_t* turned = halves(tile * dim_blocks * 8);
    float *dk = room(tile * tile * chunks), *dv = room(tile * tile * value_chunks);
    const int64_t widest = most(padded(dim), padded(value_dim));
    float *wide_a = room(tile * widest), *wide_b = room(tile * widest);
    float* row_scratch = room(lanes * (widest + lanes));

    Ready ready[band_rows];
    uint32_t *q[band_rows], *d_out[band_rows], *q_woven[band_rows], *d_woven[band_rows];
    float* dq[band_rows];
    const PairUnit unit;
    BandColumns columns(call, band);
    for (int64_t r = 0; r < band.count; ++r) {
        const int64_t first_row = columns.of[r].first_row, rows = columns.of[r].rows;
        q[r] = words(tile * pair_stride(dim) / 2), d_out[r] = words(tile * pair_stride(value_dim) / 2);
        q_woven[r] = words(tile * tile / 2 * chunks), d_woven[r] = words(tile * tile / 2 * value_chunks);
        ready[r] = ready_at(nullptr, reinterpret_cast<float*>(d_out[r]), g.rows, room);
        dq[r] = room(tile * dim_blocks * 16);
        memset(dq[r], 0, sizeof(float) * static_cast<size_t>(tile * dim_blocks * 16));
        lay_pairs(pair_rows(call, call.q, band.batch, band.head, first_row, rows, dim, key_rows, false), rows, dim, q[r]);
        lay_pairs(pair_rows(call, g.d_out, band.batch, band.head, first_row, rows, value_dim, value_rows, false), rows,
                  value_dim, d_out[r]);
        weave_pairs(call, call.q, band.batch, band.head, first_row, rows, dim, q_woven[r]);
        clean_pairs(q_woven[r], 2 * tile * tile * chunks);
        weave_pairs(call, g.d_out, band.batch, band.head, first_row, rows, value_dim, d_woven[r]);
        Kept found[tile];
        const bool finds = finds_bases(g, number_of(call, band.batch, band.head, first_row), rows);
        if (finds)
            find_bases(call, band.batch, band.head, columns.of[r], weights, found, [&](int64_t first_key, int64_t keys) {
                const PairRows k = pair_rows(call, call.k, band.batch, key_head, first_key, keys, dim, key_rows, call.pages);
                pair_products(k.data, blocks(keys, 16), k.stride, q[r], blocks(dim, 32), blocks(rows, lanes), weights, false);
            });
        const Rows d_wide = rows_of(call, g.d_out, band.batch, band.head, first_row, rows, value_dim, wide_a);
        rows_ready(g, band.batch, band.head, first_row, rows, d_wide,
                   rows_of(call, call.out, band.batch, band.head, first_row, rows, value_dim, wide_b), ready[r],
                   pair_stride(value_dim) / 2, finds ? found : nullptr);
    }

    Turn in_turn{g.passed + (band.batch * call.key_heads + key_head) * turns, turn, 0};
    for (int64_t column; (column = columns.next()) >= 0;) {
        const int64_t first_key = column * tile, keys = keys_at(call, band.batch, first_key);
        const PairRows k = pair_rows(call, call.k, band.batch, key_head, first_key, keys, dim, key_rows, call.pages);
        const PairRows v = pair_rows(call, call.v, band.batch, key_head, first_key, keys, value_dim, value_rows, call.pages);
        turn_pairs(call, call.k, band.batch, key_head, first_key, keys, dim, turned, call.pages);
        if (!finite_pairs(turned, dim * tile)) clean_pairs(turned, 2 * dim * tile);
        bool first = true;
        for (int64_t r = 0; r < band.count; ++r) {
            Columns& mine = columns.of[r];
            if (mine.done() || mine.column() != column) continue;
            const Place at{band.batch, band.head, mine.first_row, mine.rows, first_key, keys};
            const int64_t active = blocks(mine.rows, lanes), down = blocks(keys, 16), row_blocks = blocks(mine.rows, 32);
            pair_products(k.data, down, k.stride, q[r], blocks(dim, 32), active, weights, false);
            pair_products(v.data, down, v.stride, d_out[r], blocks(value_dim, 32), active, d_scores, false);
            const TileGradients of_tile = through_softmax(call, mine, at, ready[r], weights, d_scores, slopes);
            round_rows(of_tile.weights, keys, active, given_rows);
            round_rows(of_tile.before_cap, keys, active, d_rows);
            pair_up(of_tile.before_cap, keys, active, d_pairs);
            for (int64_t c = 0; c < value_chunks; ++c)
                pair_products(given_rows, down, tile, d_woven[r] + c * (tile * tile / 2), row_blocks,
                              blocks(least(value_dim - c * 64, 64), 16), dv + c * tile * tile, !first);
            for (int64_t c = 0; c < chunks; ++c)
                pair_products(d_rows, down, tile, q_woven[r] + c * (tile * tile / 2), row_blocks,
                              blocks(least(dim - c * 64, 64), 16), dk + c * tile * tile, !first);
            pair_products(turned, dim_blocks, tile, d_pairs, blocks(keys, 32), active, dq[r], true);
            first = false;
            mine.next();
        }
        in_turn.come(column);
        const int64_t place = (band.batch * call.key_heads + key_head) * call.keys + first_key;
        add_chunks(g.dk + place * dim, dk, keys, dim, call.scale);
        add_chunks(g.dv + place * value_dim, dv, keys, value_dim, 1);
    }
    in_turn.end();
    leave_rows(g, band, columns, ready, dq, row_scratch);
}
#endif
