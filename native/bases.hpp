// What the weights of a row are over, and how a row ends: the part of a softmax that its size must not show in.
//
// A weight is exp(score − base), and the base is a score of the row. The difference comes before any product: between large
// scores it is exact, so what a row has in common costs no digit.

constexpr double log2e = 1.44269504088896341, ln2 = 0.693147180559945309;

// In units of this a score is what the softmax is of; and what a difference is multiplied with to be a binary exponent.
static inline double unit_of(const Call& call) { return adjusts(call) ? 1.0 : call.scale; }
static inline float binary_of(const Call& call) { return static_cast<float>(unit_of(call) * log2e); }

// Sums in another order are other scores, and a log-sum-exp is rounded: beyond this size of it that shows in the weights.
constexpr float large = 64;

// While base · binary is near 0, a weight is 2^(score · binary − times) in one fused instruction, which rounds nothing but
// its result; `times` is the rounded product, and what that left out is in every weight of the row alike: a slip. Where
// nothing is fused, no base is near.
constexpr float near = fuses ? 1048576 : -1;

// The running state of 64 rows: the base (a score), its product, the sum of the weights, and their sum of values.
struct State {
    float *base, *times, *total, *out;

    void clear(int64_t active) const {
        for (int64_t n = 0; n < active * lanes; n += lanes)
            store(base + n, spread(-INFINITY)), store(times + n, Floats{}), store(total + n, Floats{});
    }
    State from(int64_t n) const { return {base + n, times + n, total + n, out}; }
    Floats ground(int64_t n) const {
        const Floats score = load(base + n);
        return score == spread(-INFINITY) ? Floats{} : score;
    }
    Floats slip(int64_t n, float binary) const {
        const Floats product = load(times + n);
        return size_of(product) <= spread(near) ? fused(ground(n), spread(binary), -product) : Floats{};
    }
    // What was weighed over the base of `n` shrinks by this over another one.
    Floats over(int64_t n, Floats ground_there, Floats slip_there, float binary) const {
        return power_of_two((load(base + n) - ground_there) * spread(binary) - slip(n, binary) + slip_there);
    }
    // Bases become `top` where `above` says so; returns what the sums so far shrink by, and whether a product is not near.
    Floats raise(int64_t n, Floats top, Ints above, float binary, bool& far) const {
        float old[2 * lanes];
        const State before{old, old + lanes, nullptr, nullptr};
        store(old, load(base + n)), store(old + lanes, load(times + n));
        const Floats risen = above ? top : load(base + n);
        const Floats product = rounded((risen == spread(-INFINITY) ? Floats{} : risen) * spread(binary));
        store(base + n, risen), store(times + n, product);
        far |= any(size_of(product) > spread(near));
        return above ? before.over(0, ground(n), slip(n, binary), binary) : spread(1.0f);
    }
};

// The bases of `wide` vectors of rows as their weights are made with them; `far`: some base may not be near. What a row gets
// hangs on its own base, and not on those beside it.
template <int wide, bool far>
struct Bases {
    Floats ground[wide], times[wide], binary;
    Ints is_near[wide];

    Bases(const State& state, float with_binary) : binary(spread(with_binary)) {
        for (int n = 0; n < wide; ++n) {
            times[n] = load(state.times + n * lanes);
            if (far) ground[n] = state.ground(n * lanes), is_near[n] = size_of(times[n]) <= spread(near);
        }
    }
    Floats exponent(Floats score, int n) const {
        if (!far) return fused(score, binary, -times[n]);
        const Floats apart = (score - ground[n]) * binary;
        return fuses ? (is_near[n] ? fused(score, binary, -times[n]) : apart) : apart;
    }
};

// What a backward pass makes the weights of a row from again: exp((score − base) · unit − above), where `base` is near the
// log-sum-exp. That in one float32 would lose what is behind its point.
struct Kept {
    float base, above, sunk, moves;  // sunk: the share of a sink; moves: 0 if one key has all the weight, else 1
};
constexpr int64_t kept_floats = 4;

// Of a log-sum-exp `ground` + `above`: the first one may be so large that the sum would not show the other.
static inline Kept kept_of(const Call& call, double ground, double above, float sunk, float moves) {
    const double unit = unit_of(call);
    const float base = above == -INFINITY ? INFINITY : static_cast<float>((ground + above) / unit);
    return {base, base - base == 0 ? static_cast<float>(ground - base * unit + above) : 0.0f, sunk, moves};
}

// How the rows of a tile end. A sink takes part here alone. `few`: some weights were made with few digits.
struct Endings {
    double ground[tile], above[tile];
    float factor[tile], sunk[tile], moves[tile];  // factor: of the values

    Endings(const Call& call, int64_t head, const State& state, int64_t rows, bool few = false) {
        const float binary = binary_of(call);
        const double unit = unit_of(call), sink = call.sinks ? call.sinks[head] : -INFINITY;
        float slips[tile], sinks[tile], rest[tile];
        int32_t powers[tile];
        for (int64_t n = 0; n < rows; n += lanes) store(slips + n, state.times ? state.slip(n, binary) : Floats{});
        for (int64_t row = 0; row < rows; ++row) {
            const bool seen = state.base[row] != -INFINITY;
            ground[row] = seen ? state.base[row] * unit - slips[row] * ln2 : call.sinks && sink != -INFINITY ? sink : 0;
            sinks[row] = static_cast<float>(sink - ground[row]);
        }
        for (int64_t n = 0; n < rows; n += lanes) {
            const Floats total = load(state.total + n), slip = load(slips + n);
            Floats share = spread(1.0f), drawn{};
            if (call.sinks) {
                const Floats higher = load(sinks + n), small = power_of_two<Digits::all>(size_of(higher) * spread(-log2e));
                share = higher > Floats{} ? small : share, drawn = higher > Floats{} ? spread(1.0f) : small;
            }
            const Floats whole = total * share + drawn, inverse = spread(1.0f) / whole;
            const Ints none = whole == Floats{};
            store(factor + n, none ? Floats{} : share * inverse), store(sunk + n, none ? Floats{} : drawn * inverse);
            Ints single = whole == power_of_two(slip);  // the weight of the base itself
            if (few) single |= whole == power_of_two<Digits::few>(slip);
            store(moves + n, single & (drawn < spread(0.5f)) ? Floats{} : spread(1.0f));  // and not of the sink
            Ints power;
            const Floats log = logarithm(whole, power);
            store(rest + n, none ? spread(-INFINITY) : log), memcpy(powers + n, &power, sizeof power);
        }
        for (int64_t row = 0; row < rows; ++row) {
            const bool single = moves[row] == 0;  // whose log-sum-exp is its score
            if (single) ground[row] = state.base[row] * unit;
            const double higher = sink > ground[row] ? sink - ground[row] : 0.0;  // far above, float32 would round it
            above[row] = single ? 0 : powers[row] * ln2 + rest[row] + higher;
        }
    }
    float lse(int64_t row) const { return static_cast<float>(ground[row] + above[row]); }
    Kept kept(const Call& call, int64_t row) const { return kept_of(call, ground[row], above[row], sunk[row], moves[row]); }
};

// Rows from number `at` of all on leave; `factors`: of the values, 0 for what is no row up to a tile.
static void leave_sums(const Call& call, int64_t head, int64_t at, const State& state, int64_t rows, float* factors,
                       bool few = false) {
    const Endings ends(call, head, state, rows, few);
    for (int64_t row = 0; row < tile; ++row) factors[row] = row < rows ? ends.factor[row] : 0.0f;
    for (int64_t row = 0; row < rows; ++row) call.lse[at + row] = ends.lse(row);
    for (int64_t row = 0; row < rows && call.rest; ++row) {
        const Kept kept = ends.kept(call, row);
        memcpy(call.rest + (at + row) * kept_floats, &kept, sizeof kept);
    }
}

// The same for one row; returns the factor of its values.
static float leave_sum(const Call& call, int64_t head, int64_t at, float base, float total) {
    float bases[lanes]{}, totals[lanes]{}, factors[tile];
    bases[0] = base, totals[0] = total;
    leave_sums(call, head, at, {bases, nullptr, totals, nullptr}, 1, factors);
    return factors[0];
}
