// Gradients of what was added to the scores, where they are wanted: a pass of their own, in which every entry of a bias
// has one owner. The owner goes through all batch rows, heads and tiles that share the entry, always in the same order.

struct TileScratch {
    float *weights, *d_scores, *slopes, *wide_k, *wide_v;
    Ready ready;
};

static int64_t score_gradient_bytes(const Call& call) {
    const int64_t dim = padded(call.dim), value_dim = padded(call.value_dim);  // a padded row holds pairs too
    return 4 * (5 * tile * tile + tile * (2 * most(dim, value_dim) + dim + value_dim) + row_floats);
}

static TileScratch tile_scratch(const Call& call, char* scratch) {
    float* next = reinterpret_cast<float*>(scratch);
    const auto room = [&next](int64_t floats) { return next += floats, next - floats; };
    const int64_t widest = most(padded(call.dim), padded(call.value_dim));
    TileScratch found{room(tile * tile), room(tile * tile), room(tile * tile), room(tile * widest), room(tile * widest), {}};
    float *q = room(tile * padded(call.dim)), *d_out = room(tile * padded(call.value_dim));
    found.ready = ready_at(q, d_out, false, room);
    return found;
}

// A tile of rows as the backward pass left them, and its queries as that pass has them: the scores have to be the same.
static void rows_again(const Gradients& g, int64_t batch, int64_t head, const Columns& mine, const TileScratch& scratch) {
    const Call& call = g.call;
    const int64_t first_row = mine.first_row, rows = mine.rows;
    const Ready& ready = scratch.ready;
    const Row* from = g.rows + number_of(call, batch, head, first_row);
    for (int64_t row = 0; row < tile; ++row) {
        const Row one = row < rows ? from[row] : Row{INFINITY, 0, 0, 0};
        ready.base[row] = one.base, ready.above[row] = one.above, ready.moves[row] = one.moves, ready.delta[row] = one.delta;
    }
    lay(rows_of(call, g.d_out, batch, head, first_row, rows, call.value_dim, scratch.wide_v), rows, call.value_dim, ready.d_out);
    for (int64_t row = 0; row < rows; ++row)
        if (ready.moves[row] == 0) hold_still(ready, row, call.value_dim);
#if defined(FOVEATE_PAIRS)
    if (call.dtype == Dtype::bfloat16) {
        uint16_t* copied = reinterpret_cast<uint16_t*>(scratch.wide_k);
        return lay_pairs(pair_rows(call, call.q, batch, head, first_row, rows, call.dim, copied, false), rows, call.dim,
                         reinterpret_cast<uint32_t*>(ready.q));
    }
#endif
    lay(rows_of(call, call.q, batch, head, first_row, rows, call.dim, scratch.wide_k), rows, call.dim, ready.q);
}

static void scores_again(const Call& call, const Place& at, int64_t key_head, const TileScratch& scratch) {
    const int64_t active = (at.rows + lanes - 1) / lanes;
#if defined(FOVEATE_PAIRS)
    if (call.dtype == Dtype::bfloat16) {
        const PairUnit unit;
        const PairRows k = pair_rows(call, call.k, at.batch, key_head, at.first_key, at.keys, call.dim,
                                     reinterpret_cast<uint16_t*>(scratch.wide_k), call.pages);
        return pair_products(k.data, blocks(at.keys, 16), k.stride, reinterpret_cast<const uint32_t*>(scratch.ready.q),
                             blocks(call.dim, 32), active, scratch.weights, false);
    }
#endif
    const Rows k = keys_of(call, at.batch, key_head, at.first_key, at.keys, scratch.wide_k);
    dot_products(k, at.keys, scratch.ready.q, call.dim, active, scratch.weights);
}

// The gradients of the scores of one tile, keys by rows; null if the tile is empty.
static const float* one_tile(const Gradients& g, int64_t batch, int64_t head, int64_t row_tile, int64_t column,
                             bool same_rows, const TileScratch& scratch) {
    const Call& call = g.call;
    Columns mine = columns_of(call, batch, head, row_tile);
    if (!same_rows) rows_again(g, batch, head, mine, scratch);
    mine.seek(column);
    if (mine.done() || mine.column() != column) return nullptr;
    const int64_t first_key = column * tile, keys = keys_at(call, batch, first_key);
    const int64_t key_head = head / (call.heads / call.key_heads);
    const Place at{batch, head, mine.first_row, mine.rows, first_key, keys};
    scores_again(call, at, key_head, scratch);
    const Rows v = values_of(call, batch, key_head, first_key, keys, scratch.wide_v);
    dot_products(v, keys, scratch.ready.d_out, call.value_dim, (mine.rows + lanes - 1) / lanes, scratch.d_scores);
    return through_softmax(call, mine, at, scratch.ready, scratch.weights, scratch.d_scores, scratch.slopes).scores;
}

// How many owners a bias has: for each of its batch rows and heads, its tiles of rows and of keys.
static void bias_owner(const Gradients& g, int64_t index, int64_t (&owner)[4]) {
    const int64_t rows = tiles_of(g.bias_sizes[2]), keys = tiles_of(g.bias_sizes[3]);
    owner[3] = index % keys, index /= keys;
    owner[2] = index % rows, index /= rows;
    owner[1] = index % g.bias_sizes[1], owner[0] = index / g.bias_sizes[1];
}

static void bias_gradient(const Gradients& g, int64_t index, char* scratch) {
    const Call& call = g.call;
    const TileScratch parts = tile_scratch(call, scratch);
    // One entry may collect from a whole matrix: in double, as the distances do.
    double* total = reinterpret_cast<double*>(scratch + score_gradient_bytes(call)) - tile * tile;
    memset(total, 0, sizeof(double) * tile * tile);
    int64_t owner[4];
    bias_owner(g, index, owner);
    // An axis on which one entry stands for all is gone through here; each has its place in `from` … `to`.
    const int64_t all[4] = {call.batch, call.heads, tiles_of(call.queries), tiles_of(call.keys)};
    int64_t from[4], to[4];
    for (int axis = 0; axis < 4; ++axis) {
        const bool shared = g.bias_sizes[axis] == 1;
        from[axis] = shared ? 0 : owner[axis], to[axis] = shared ? all[axis] : owner[axis] + 1;
    }
    const bool rows_shared = g.bias_sizes[2] == 1, keys_shared = g.bias_sizes[3] == 1;
    for (int64_t batch = from[0]; batch < to[0]; ++batch)
        for (int64_t head = from[1]; head < to[1]; ++head)
            for (int64_t row_tile = from[2]; row_tile < to[2]; ++row_tile)
                for (int64_t column = from[3]; column < to[3]; ++column) {
                    const float* found = one_tile(g, batch, head, row_tile, column, column > from[3], parts);
                    if (!found) continue;
                    const int64_t rows = least(call.queries - row_tile * tile, tile);
                    const int64_t keys = keys_at(call, batch, column * tile);
                    for (int64_t key = 0; key < keys; ++key)
                        for (int64_t row = 0; row < rows; ++row)
                            total[(keys_shared ? 0 : key * tile) + (rows_shared ? 0 : row)] += found[key * tile + row];
                }
    const int64_t first_row = owner[2] * tile, first_key = owner[3] * tile;
    const int64_t rows = least(g.bias_sizes[2] - first_row, tile), keys = least(g.bias_sizes[3] - first_key, tile);
    float* out = g.d_bias + (owner[0] * g.bias_sizes[1] + owner[1]) * g.bias_sizes[2] * g.bias_sizes[3];
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t key = 0; key < keys; ++key)
            out[(first_row + row) * g.bias_sizes[3] + first_key + key] = static_cast<float>(total[key * tile + row]);
}

// All tiles on one diagonal of tiles (row tile − column = diagonal), of one head: 128 sums, sums[64 + row − key].
static void distance_gradient(const Gradients& g, int64_t index, double* sums, char* scratch) {
    const Call& call = g.call;
    const TileScratch parts = tile_scratch(call, scratch);
    const int64_t row_tiles = tiles_of(call.queries), columns = tiles_of(call.keys), diagonals = row_tiles + columns - 1;
    const int64_t diagonal = index % diagonals - (columns - 1), head = index / diagonals % call.heads;
    const int64_t owner = index / diagonals / call.heads;
    for (int n = 0; n < 2 * tile; ++n) sums[n] = 0;
    const bool shared = g.distance_batches == 1;
    for (int64_t batch = shared ? 0 : owner; batch < (shared ? call.batch : owner + 1); ++batch)
        for (int64_t row_tile = most(diagonal, 0); row_tile < least(row_tiles, columns + diagonal); ++row_tile) {
            const float* found = one_tile(g, batch, head, row_tile, row_tile - diagonal, false, parts);
            if (!found) continue;
            const int64_t rows = least(call.queries - row_tile * tile, tile);
            const int64_t keys = keys_at(call, batch, (row_tile - diagonal) * tile);
            for (int64_t key = 0; key < keys; ++key)
                for (int64_t row = 0; row < rows; ++row) sums[tile + row - key] += found[key * tile + row];
        }
}
