// What was looked at, without the matrix of weights.
//
// First by rows: the heaviest keys of every row, what is not among them, log-sum-exp and entropy, in one pass over the
// scores. Then by keys: the weight that each received, in the order of the bands, as gradients of keys are summed.

static inline float above_zero(float x) { return x < 0 ? 0.0f : x; }  // NaN stays

static int64_t looked_bytes(const Looked& looked) {
    const Call& call = looked.call;
    const int64_t shared = tile * (padded(call.dim) + tile) + band_rows * tile * call.dim;
    return 4 * (shared + tile * (4 + 2 * looked.top) + tile * lanes);
}

// The heaviest scores of the rows in the lanes so far, falling; a new one finds its place from the end.
static inline void insert(float* heaviest, int32_t* places, int64_t top, Floats score, int32_t place) {
    float* const keys = reinterpret_cast<float*>(places);  // only moved, lane by lane
    const Floats key = floats_of(Ints{} + place);
    for (int64_t at = (top - 1) * lanes; at >= 0; at -= lanes) {
        const Floats kept = load(heaviest + at), its_key = load(keys + at);
        const Ints rises = score > kept;
        if (!any(rises)) return;
        if (at < (top - 1) * lanes) {
            store(heaviest + at + lanes, rises ? kept : load(heaviest + at + lanes));
            store(keys + at + lanes, rises ? its_key : load(keys + at + lanes));
        }
        store(heaviest + at, rises ? score : kept);
        store(keys + at, rises ? key : its_key);
    }
}

static void rows_looked(const Looked& looked, const Band& band, char* scratch) {
    const Call& call = looked.call;
    const int64_t dim = call.dim, top = looked.top, key_head = band.head / (call.heads / call.key_heads);
    const bool adjusted = adjusts(call);
    const Floats binary = spread(binary_of(call));
    float* next = reinterpret_cast<float*>(scratch);
    const auto room = [&next](int64_t floats) { return next += floats, next - floats; };
    float *scores = room(tile * tile), *wide = room(tile * padded(dim)), *q = room(tile * dim);
    // For every row: base and sum of weights, sum of weight · (score − base).
    float *base = room(tile), *total = room(tile), *moment = room(tile);
    float* heaviest = room(tile * top);  // of the rows in the lanes from n on: [n / lanes][top][lanes]
    int32_t* places = reinterpret_cast<int32_t*>(room(tile * top));
    const auto entry = [top](int64_t row, int64_t n) { return row / lanes * lanes * top + n * lanes + row % lanes; };
    for (int64_t r = band.first; r < band.first + band.count; ++r) {
        Columns mine = columns_of(call, band.batch, band.head, r);
        const int64_t active = (mine.rows + lanes - 1) / lanes;
        lay(rows_of(call, call.q, band.batch, band.head, mine.first_row, mine.rows, dim, wide), mine.rows, dim, q);
        for (int row = 0; row < tile; ++row) base[row] = -INFINITY, total[row] = moment[row] = 0;
        for (int64_t n = 0; n < tile * top; ++n) heaviest[n] = -INFINITY, places[n] = -1;
        for (; !mine.done(); mine.next()) {
            const int64_t first_key = mine.column() * tile, keys = keys_at(call, band.batch, first_key);
            const Place at{band.batch, band.head, mine.first_row, mine.rows, first_key, keys};
            const Rows k = keys_of(call, band.batch, key_head, first_key, keys, wide);
            dot_products(k, keys, q, dim, active, scores);
            if (adjusted) adjust(call, at, active, scores, nullptr);
            uint64_t seen[tile];
            if (mine.hides(seen)) hide(scores, seen, keys, active);
            for (int64_t n = 0; n < active * lanes; n += lanes) {
                Floats highest = spread(-INFINITY);
                for (int64_t key = 0; key < keys; ++key) highest = larger(load(scores + key * tile + n), highest);
                const Floats old = load(base + n), risen = larger(highest, old);
                const Floats ground = risen == spread(-INFINITY) ? Floats{} : risen;
                const Floats shift = (old - ground) * binary, shrink = power_of_two(shift);
                Floats sum{}, weighted{};
                for (int64_t key = 0; key < keys; ++key) {
                    const Floats above = (load(scores + key * tile + n) - ground) * binary, weight = power_of_two(above);
                    sum += weight;
                    weighted += weight == Floats{} ? Floats{} : weight * above;
                }
                const Floats before = load(total + n), moved = (load(moment + n) + before * shift) * shrink;
                store(base + n, risen);
                store(total + n, before * shrink + sum);
                store(moment + n, (shrink == Floats{} ? Floats{} : moved) + weighted);  // as far away as that: 0 · infinity
                if (!top) continue;
                float* const kept = heaviest + n * top;
                const float* const least_kept = kept + (top - 1) * lanes;
                if (!any(highest > load(least_kept))) continue;
                for (int64_t key = 0; key < keys; ++key) {
                    const Floats score = load(scores + key * tile + n);
                    if (any(score > load(least_kept)))
                        insert(kept, places + n * top, top, score, static_cast<int32_t>(first_key + key));
                }
            }
        }
        const int64_t out = number_of(call, band.batch, band.head, mine.first_row);
        const Endings ends(call, band.head, {base, nullptr, total, nullptr}, mine.rows);
        for (int64_t row = 0; row < mine.rows; ++row) {
            // All from the base, which is one of the scores, and not from the log-sum-exp, which has been rounded once more.
            const float sum = total[row], factor = ends.factor[row], sunk = ends.sunk[row];
            call.lse[out + row] = ends.lse(row);
            looked.bases[out + row] = sum == 0 ? INFINITY : base[row], looked.factors[out + row] = factor;
            // Σ −p · log p = Σ p · (lse − score) over the keys; a sink has a share of the sum and no part in this.
            const double entropy = (1.0 - sunk) * ends.above[row] - double(factor) * moment[row] * ln2;
            looked.entropy[out + row] = sum == 0 ? 0.0f : above_zero(static_cast<float>(entropy));
            double kept = 0;
            for (int64_t n = 0; n < top; ++n) {
                const int64_t place = (out + row) * top + n;
                const int32_t key = places[entry(row, n)];
                const float weight = key < 0 ? 0.0f : exp2f((heaviest[entry(row, n)] - base[row]) * binary[0]) * factor;
                looked.indices[place] = key, looked.weights[place] = weight;
                kept += weight;
            }
            const bool all_kept = top && places[entry(row, top - 1)] < 0 && sum == sum;
            looked.rest[out + row] = sum == 0 || all_kept ? 0.0f : above_zero(static_cast<float>(1.0 - sunk - kept));
        }
    }
}

// Weights from the bases and sums of their rows, summed over the rows of a band for every key.
static void keys_received(const Looked& looked, const Band& band, int64_t turn, int64_t turns, char* scratch) {
    const Call& call = looked.call;
    const int64_t dim = call.dim, key_head = band.head / (call.heads / call.key_heads);
    const bool adjusted = adjusts(call);
    const Floats binary = spread(binary_of(call));
    float* next = reinterpret_cast<float*>(scratch);
    const auto room = [&next](int64_t floats) { return next += floats, next - floats; };
    float *scores = room(tile * tile), *wide = room(tile * padded(dim)), *sums = room(tile * lanes);
    float *bases = room(tile), *factors = room(tile);
    float* q[band_rows];
    BandColumns columns(call, band);
    const int64_t all = (band.batch * call.heads + band.head) * call.queries;
    for (int64_t r = 0; r < band.count; ++r) {
        const Columns& mine = columns.of[r];
        q[r] = room(tile * dim);
        lay(rows_of(call, call.q, band.batch, band.head, mine.first_row, mine.rows, dim, wide), mine.rows, dim, q[r]);
    }
    Turn in_turn{looked.passed + (band.batch * call.heads + band.head) * turns, turn, 0};
    for (int64_t column; (column = columns.next()) >= 0;) {
        const int64_t first_key = column * tile, keys = keys_at(call, band.batch, first_key);
        const Rows k = keys_of(call, band.batch, key_head, first_key, keys, wide);
        memset(sums, 0, sizeof(float) * tile * lanes);
        for (int64_t r = 0; r < band.count; ++r) {
            Columns& mine = columns.of[r];
            if (mine.done() || mine.column() != column) continue;
            const Place at{band.batch, band.head, mine.first_row, mine.rows, first_key, keys};
            const int64_t active = (mine.rows + lanes - 1) / lanes;
            dot_products(k, keys, q[r], dim, active, scores);
            if (adjusted) adjust(call, at, active, scores, nullptr);
            uint64_t seen[tile];
            if (mine.hides(seen)) hide(scores, seen, keys, active);
            for (int64_t row = 0; row < active * lanes; ++row) {
                const int64_t place = all + mine.first_row + row;
                bases[row] = row < mine.rows ? looked.bases[place] : INFINITY;
                factors[row] = row < mine.rows ? looked.factors[place] : 0.0f;
            }
            for (int64_t n = 0; n < active * lanes; n += lanes) {
                const Floats base = load(bases + n), factor = load(factors + n);
                for (int64_t key = 0; key < keys; ++key) {
                    const Floats score = load(scores + key * tile + n);
                    const Floats weight = power_of_two((score - base) * binary) * factor;
                    // A lane without a row, or whose row sees nothing, gives a key that is NaN no weight either.
                    float* sum = sums + key * lanes;
                    store(sum, load(sum) + (score == spread(-INFINITY) || factor == Floats{} ? Floats{} : weight));
                }
            }
            mine.next();
        }
        in_turn.come(column);
        float* received = looked.received + (band.batch * call.heads + band.head) * call.keys + first_key;
        for (int64_t key = 0; key < keys; ++key) received[key] += sum_of(load(sums + key * lanes));
    }
    in_turn.end();
}
