// Random calls for the tests of the kernels. Everything that a kernel may touch is an allocation of exactly the right
// size, so that AddressSanitizer sees one element too many, and whatever nobody may read is NaN.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../attention.hpp"

namespace foveate::tests {

enum class Kind { forward, paged, decode, paged_decode, dropout, backward, looked, gathered, gathered_backward };
constexpr const char* kind_names[] = {"forward", "paged", "decode", "paged decode", "dropout", "backward", "looked",
                                      "gathered", "gathered backward"};
constexpr const char* dtype_names[] = {"float32", "bfloat16", "float16"};

// Half precision by its definition, in steps that have nothing in common with the kernels' own.
inline double value_of(uint16_t half, Dtype dtype) {
    if (dtype == Dtype::bfloat16) {
        const uint32_t word = uint32_t(half) << 16;
        float wide;
        std::memcpy(&wide, &word, 4);
        return wide;
    }
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                        : exponent == 0 ? std::ldexp(fraction, -24)
                                        : std::ldexp(1024 + fraction, exponent - 25);
    return half & 0x8000 ? -size : size;
}

inline uint16_t half_of(double x, Dtype dtype) {
    const bool brain = dtype == Dtype::bfloat16;
    const int digits = brain ? 7 : 10, lowest = brain ? -126 : -14;
    const double size = std::fabs(x);
    const int exponent = size == 0 ? lowest : std::max(std::ilogb(size), lowest);
    // In units of the last digit; a whole power of two more is a step of the exponent, as the format has it.
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, digits - exponent)));
    const int word = ((exponent - lowest) << digits) + units;
    return static_cast<uint16_t>((std::signbit(x) ? 0x8000 : 0) | word);
}

// [batch, heads, length, dim] of its own, rows `gap` further apart than they are long; `shared`: one row for all.
struct Matrix {
    Dtype dtype;
    int64_t batch, heads, length, dim, row, bytes;
    bool shared;
    std::unique_ptr<char[]> data;

    Matrix(Dtype dtype, int64_t batch, int64_t heads, int64_t length, int64_t dim, int64_t gap, bool shared = false)
        : dtype(dtype), batch(batch), heads(heads), length(length), dim(dim), row(dim + gap), shared(shared) {
        const int64_t rows = shared ? 1 : batch * heads * length;
        bytes = rows ? (rows * row - gap) * size() : 0;
        data.reset(new char[static_cast<size_t>(bytes)]);
        std::memset(data.get(), 0xff, static_cast<size_t>(bytes));  // NaN in every dtype
    }
    int64_t size() const { return dtype == Dtype::float32 ? 4 : 2; }
    View view() const {
        if (shared) return {data.get(), 0, 0, 0};
        return {data.get(), heads * length * row, length * row, row};
    }
    int64_t place(int64_t b, int64_t h, int64_t n, int64_t d) const {
        const View strides = view();
        return b * strides.batch + h * strides.head + n * strides.row + d;
    }
    double at(int64_t b, int64_t h, int64_t n, int64_t d) const {
        const char* from = data.get() + place(b, h, n, d) * size();
        if (dtype == Dtype::float32) return *reinterpret_cast<const float*>(from);
        return value_of(*reinterpret_cast<const uint16_t*>(from), dtype);
    }
    void set(int64_t b, int64_t h, int64_t n, int64_t d, double x) {
        char* to = data.get() + place(b, h, n, d) * size();
        if (dtype == Dtype::float32)
            *reinterpret_cast<float*>(to) = static_cast<float>(x);
        else
            *reinterpret_cast<uint16_t*>(to) = half_of(x, dtype);
    }
};

// One random call with all that it reads; `call` lacks only what is written, which `Results` holds.
struct Case {
    std::mt19937_64 random;
    Kind kind;
    Dtype dtype;
    int64_t batch, heads, key_heads, queries, keys, dim, value_dim;
    int64_t pages = 0, page_size = 0, page_row = 0;
    std::unique_ptr<Matrix> q, k, v, d_out;  // in pages: k and v are [pages, heads, page_size, dim]
    std::vector<int64_t> table, starts, lengths;
    std::vector<float> distances, bias, sinks, d_lse;
    int64_t bias_sizes[4] = {}, distance_batches = 1, top = 0;
    std::vector<char> given;  // with a summary: who sees whom, [tile batch, tile heads, queries, keys]
    std::vector<int64_t> offsets, columns, partial;
    std::vector<uint64_t> bits;
    std::vector<int64_t> chosen_wide;  // the selection, in one of the two
    std::vector<int32_t> chosen;
    int32_t outside = 0;
    bool wants_bias = false, wants_distances = false;
    bool keeps = false;  // a backward pass gets what the forward pass kept of its rows
    // Large scores: numbers of a grid, so that their sums are exact in float32 and the truth is about the same scores.
    bool large = false;
    int power = 0;        // of q and k: they are whole numbers times 2^power
    double offset = 0;    // of everything that is added, in steps of `step`
    double step = 1;
    Call call{};

    Case(Kind kind, uint64_t seed);
    bool sees(int64_t b, int64_t h, int64_t row, int64_t key) const;
    bool gathers() const { return kind == Kind::gathered || kind == Kind::gathered_backward; }
    bool differentiates() const { return kind == Kind::backward || kind == Kind::gathered_backward; }
    // Where a key lies: the batch row of `k` and `v` (or the page) and the place there.
    int64_t page_of(int64_t b, int64_t key) const { return pages ? table[b * page_row + key / page_size] : b; }
    int64_t slot_of(int64_t key) const { return pages ? key % page_size : key; }
    float bias_at(int64_t b, int64_t h, int64_t row, int64_t key) const {
        const int64_t* steps = call.bias_strides;
        return bias[b * steps[0] + h * steps[1] + row * steps[2] + key * steps[3]];
    }
    std::string text() const;

  private:
    int64_t pick(std::initializer_list<int64_t> choices) { return choices.begin()[random() % choices.size()]; }
    bool chance(int percent) { return int(random() % 100) < percent; }
    float normal() { return std::normal_distribution<float>()(random); }
    double whole() { return double(random() % 5) - 2; }
    float added() { return large ? float(offset + step * whole()) : normal(); }
    void fill(Matrix& matrix, int64_t b, int64_t h, int64_t n, bool scored = false) {
        for (int64_t d = 0; d < matrix.dim; ++d) matrix.set(b, h, n, d, scored && large ? std::ldexp(whole(), power) : normal());
    }
    void draw_large();
    void draw_sizes();
    void draw_reach();
    void draw_summary();
    void draw_selection();
    void draw_matrices();
    void draw_scores();
};

inline Case::Case(Kind kind, uint64_t seed) : random(seed), kind(kind) {
    do draw_sizes();
    while (batch * heads * queries * keys * (dim + value_dim) > 3'000'000);
    call.dtype = dtype;
    call.batch = batch, call.heads = heads, call.key_heads = key_heads, call.queries = queries, call.keys = keys;
    call.dim = dim, call.value_dim = value_dim;
    call.scale = chance(10) ? 0.0f : chance(20) ? -0.2f : 1 / std::sqrt(float(dim));
    call.left = call.right = -1;
    const bool paged = kind == Kind::paged || kind == Kind::paged_decode;
    if (!paged && !gathers() && chance(40))
        draw_summary();
    else
        draw_reach();
    if (gathers()) draw_selection();
    if (chance(30)) draw_large();
    draw_matrices();
    draw_scores();
    const bool drops = kind == Kind::dropout || (kind == Kind::backward && chance(40));
    keeps |= drops;  // without, the rounding of an output that dropout scaled counts where one key has all the weight
    if (drops) call.seed = random(), call.threshold = uint64_t(0.3 * 4294967296.0), call.boost = 1 / 0.7f;
    if (kind == Kind::looked) top = pick({1, 3, 8});
}

// Either what is scored is large, or what is added. Beside the largest that can be added no product would be seen.
inline void Case::draw_large() {
    large = true;
    call.scale = std::ldexp(float(pick({1, 1, -1})), int(pick({-3, -1, 0})));
    step = chance(50) ? 0.25 : 8;  // within a base's slack, and beyond it
    power = int(dtype == Dtype::float16 ? pick({0, 3, 13}) : pick({0, 3, 13, 30, 55}));
    step = std::max(step, std::fabs(std::ldexp(double(call.scale), 2 * power)));
    if (power) return;
    const double sizes[] = {-1e5, 98304, -std::ldexp(1, 30), std::ldexp(1, 70), -std::ldexp(1.5, 126)};
    offset = sizes[random() % 5];
    if (std::fabs(offset) > 1e6) step = std::ldexp(std::fabs(offset), -16), power = -149;  // every product is 0
}

inline void Case::draw_sizes() {
    dtype = static_cast<Dtype>(pick({0, 1, 2}));
    batch = pick({1, 2}), key_heads = pick({1, 2});
    heads = key_heads * pick({1, 3});
    queries = pick({1, 2, 63, 64, 65, 130}), keys = pick({1, 2, 63, 64, 65, 130, 200});
    dim = pick({1, 3, 16, 31, 33, 59, 64, 65, 128, 200}), value_dim = pick({1, 3, 16, 31, 33, 59, 64, 65, 128, 200});
    if (kind == Kind::decode || kind == Kind::paged_decode) {
        queries = pick({1, 1, 2, 7}), keys = pick({256, 300, 575, 1100});
        heads = key_heads * pick({1, 3, 4, 8});
    }
    if (gathers()) heads = key_heads * pick({1, 3, 4, 7}), queries = pick({1, 2, 63, 130, 300});
    if (!differentiates() && chance(3)) keys = 0;
    if (keys && (kind == Kind::paged || kind == Kind::paged_decode)) {
        page_size = pick({1, 7, 16, 63, 64, 128});
        page_row = (keys + page_size - 1) / page_size;
        keys = page_row * page_size;  // as many as the table has room for
        pages = batch * page_row;
    }
}

// By reach: how far a row sees to its left and right, from where, and how many keys there are.
inline void Case::draw_reach() {
    if (chance(60)) call.right = pick({0, 0, 5});
    if (chance(40)) call.left = pick({0, 9, 70});
    call.start = pick({0, keys - queries, 3});
    if (chance(40)) {
        for (int64_t b = 0; b < batch; ++b) starts.push_back(pick({keys - queries, 0, 7, -2}));
        starts.shrink_to_fit();
        call.starts = starts.data();
    }
    if (chance(50) || pages) {
        for (int64_t b = 0; b < batch; ++b) lengths.push_back(std::max<int64_t>(0, pick({keys, keys - 1, keys / 2, 0})));
        lengths.shrink_to_fit();
        call.lengths = lengths.data();
    }
}

// Lists of keys or blocks, for each batch row, head and query or shared, with entries that are none and that are repeated.
inline void Case::draw_selection() {
    const int64_t block = pick({1, 1, 3, 16, 64, 100}), count = pick({0, 1, 5, 33, 130}), entries = (keys + block - 1) / block;
    const int64_t lists = chance(30) ? 1 : chance(50) ? key_heads : heads;
    const int64_t full[3] = {batch, lists, queries};
    int64_t step = count, rows = 1;
    call.chosen.count = count, call.chosen.block = block, call.chosen.heads = lists, call.chosen.wide = chance(50);
    for (int axis = 2; axis >= 0; --axis) {
        const bool shared = axis != 1 && chance(20);
        call.chosen.strides[axis] = shared || full[axis] == 1 ? 0 : step;
        if (!shared) step *= full[axis], rows *= full[axis];
    }
    for (int64_t n = 0; n < rows * count; ++n) chosen_wide.push_back(chance(10) ? -1 : int64_t(random() % uint64_t(entries + 1)) - 1);
    chosen.assign(chosen_wide.begin(), chosen_wide.end());
    chosen_wide.shrink_to_fit(), chosen.shrink_to_fit();
    call.chosen.outside = &outside;
    static const int64_t nothing = 0;  // lists of no length are a selection too
    call.chosen.indices = chosen.empty() ? static_cast<const void*>(&nothing)
                          : call.chosen.wide ? static_cast<const void*>(chosen_wide.data()) : chosen.data();
}

// Tiles that are empty, whole or seen in part, a table for each batch row and head or shared.
inline void Case::draw_summary() {
    call.tile_batch = chance(50) ? batch : 1, call.tile_heads = chance(50) ? heads : 1;
    call.start = keys - queries;  // counts for dropout alone
    given.assign(static_cast<size_t>(call.tile_batch * call.tile_heads * queries * keys), 0);
    for (int64_t table_at = 0; table_at < call.tile_batch * call.tile_heads; ++table_at) {
        offsets.push_back(int64_t(columns.size()));
        for (int64_t row = 0; row < queries; row += tile) {
            for (int64_t column = 0; column < keys; column += tile) {
                const int64_t look = pick({0, 1, 2, 2});  // empty, whole, and the bits of every second tile or so
                std::vector<uint64_t> words(tile, 0);
                for (int64_t q = row; q < std::min(row + tile, queries); ++q)
                    for (int64_t key = column; key < std::min(column + tile, keys); ++key)
                        if (look == 1 || (look == 2 && chance(60))) {
                            words[q - row] |= 1ull << (key - column);
                            given[(table_at * queries + q) * keys + key] = 1;
                        }
                if (look == 0) continue;
                columns.push_back(column / tile);
                partial.push_back(look == 1 ? -1 : int64_t(bits.size()) / tile);
                if (look == 2) bits.insert(bits.end(), words.begin(), words.end());
            }
            offsets.push_back(int64_t(columns.size()));
        }
    }
    for (std::vector<int64_t>* each : {&offsets, &columns, &partial}) each->shrink_to_fit();
    bits.shrink_to_fit();
    call.offsets = offsets.data(), call.columns = columns.data(), call.partial = partial.data(), call.bits = bits.data();
}

inline bool Case::sees(int64_t b, int64_t h, int64_t row, int64_t key) const {
    if (gathers()) {
        const Selection& from = call.chosen;
        const int64_t at = b * from.strides[0] + h / (heads / from.heads) * from.strides[1] + row * from.strides[2];
        const auto list = chosen.begin() + at;
        if (std::find(list, list + from.count, int32_t(key / from.block)) == list + from.count) return false;
    }
    if (call.offsets) {
        const int64_t at = (call.tile_batch > 1 ? b : 0) * call.tile_heads + (call.tile_heads > 1 ? h : 0);
        return given[(at * queries + row) * keys + key];
    }
    const int64_t position = row + (call.starts ? starts[b] : call.start);
    return key < (call.lengths ? lengths[b] : keys) && (call.left < 0 || key >= position - call.left) &&
           (call.right < 0 || key <= position + call.right);
}

// Keys past the length of their batch row stay NaN, as do the gaps between rows.
inline void Case::draw_matrices() {
    q = std::make_unique<Matrix>(dtype, batch, heads, queries, dim, pick({0, 3, 32}));
    const int64_t outer = pages ? pages : batch, length = pages ? page_size : keys;
    k = std::make_unique<Matrix>(dtype, outer, key_heads, length, dim, pick({0, 5, 32}));
    v = std::make_unique<Matrix>(dtype, outer, key_heads, length, value_dim, pick({0, 1, 32}));
    for (int64_t n = 0; n < pages; ++n) table.push_back(n);
    std::shuffle(table.begin(), table.end(), random);
    table.shrink_to_fit();
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t n = 0; n < queries; ++n) fill(*q, b, h, n, true);
        for (int64_t h = 0; h < key_heads; ++h)
            for (int64_t n = 0; n < (call.lengths ? std::min(lengths[b], keys) : keys); ++n) {
                fill(*k, page_of(b, n), h, slot_of(n), true);
                fill(*v, page_of(b, n), h, slot_of(n));
            }
    }
    call.q = q->view(), call.k = k->view(), call.v = v->view();
    if (pages) call.pages = table.data(), call.page_row = page_row, call.page_size = page_size;
    if (!differentiates()) return;
    const bool shared = chance(25);
    d_out = std::make_unique<Matrix>(dtype, batch, heads, queries, value_dim, pick({0, 3}), shared);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t n = 0; n < queries; ++n)
                if (!shared || b + h + n == 0) fill(*d_out, b, h, n);
    if (chance(50))
        for (int64_t n = 0; n < batch * heads * queries; ++n) d_lse.push_back(normal());
    d_lse.shrink_to_fit();
}

inline void Case::draw_scores() {
    keeps = gathers() || (large && power > 0) || chance(60);
    if (!large && chance(30)) call.softcap = 2;
    if (chance(40)) {
        const int64_t length = queries + keys - 1 + tile;
        distance_batches = chance(30) ? batch : 1;
        distances.resize(static_cast<size_t>(distance_batches * heads * length));
        for (float& each : distances) each = added();
        call.distances = distances.data();
        call.distance_batch = distance_batches > 1 ? heads * length : 0, call.distance_head = length;
        wants_distances = !gathers() && chance(70);
    }
    if (keys && !gathers() && chance(40)) {
        const int64_t full[4] = {batch, heads, queries, keys};
        for (int n = 0; n < 4; ++n) bias_sizes[n] = chance(60) ? full[n] : 1;
        const bool turned = chance(25);  // keys further apart than rows
        int axes[4] = {3, 2, 1, 0};
        if (turned) std::swap(axes[0], axes[1]);
        int64_t step = 1, last = 0;
        for (int axis : axes) {
            call.bias_strides[axis] = bias_sizes[axis] > 1 ? step : 0;
            last += (bias_sizes[axis] - 1) * step;
            step *= bias_sizes[axis] + (axis == 3 && !turned ? pick({0, 3}) : 0);
        }
        bias.resize(static_cast<size_t>(last + 1));
        for (float& each : bias) each = chance(5) ? -INFINITY : added();
        call.bias = bias.data();
        wants_bias = chance(70);
    }
    if (chance(30)) {
        const double terms = (call.distances ? 1 : 0) + (call.bias ? 1 : 0);
        for (int64_t h = 0; h < heads; ++h)
            sinks.push_back(chance(20) ? -INFINITY : large ? float(terms * offset + 4 * step * whole()) : normal());
        sinks.shrink_to_fit();
        call.sinks = sinks.data();
    }
}

inline std::string Case::text() const {
    const auto number = [](int64_t n) { return std::to_string(n); };
    std::string said = std::string(dtype_names[int(dtype)]) + ", batch " + number(batch) + ", heads " + number(heads) +
                       "/" + number(key_heads) + ", " + number(queries) + " x " + number(keys) + ", dim " + number(dim) +
                       "/" + number(value_dim);
    if (pages) said += ", pages of " + number(page_size);
    if (call.offsets) said += ", summary";
    if (gathers())
        said += ", " + number(call.chosen.count) + " blocks of " + number(call.chosen.block) + " for " + number(call.chosen.heads) + " heads";
    if (call.left >= 0) said += ", left " + number(call.left);
    if (call.right >= 0) said += ", right " + number(call.right);
    if (call.starts) said += ", starts";
    if (call.lengths) said += ", lengths";
    if (call.softcap != 0) said += ", cap";
    if (call.distances) said += ", distances";
    if (call.bias) said += ", bias";
    if (call.sinks) said += ", sinks";
    if (call.threshold) said += ", dropout";
    if (large) said += ", times 2^" + number(power) + ", plus " + std::to_string(offset) + ", scale " + std::to_string(call.scale);
    if (differentiates() && !keeps) said += ", nothing kept";
    return said;
}

// What one run of a call writes, of exactly the right size; what is not added to is NaN before.
struct Results {
    Matrix out;
    std::vector<float> lse, kept, dq, dk, dv, d_bias, weights, rest, entropy, received;
    std::vector<double> d_distances;
    std::vector<int64_t> indices;

    explicit Results(const Case& of, int64_t gap = 0)
        : out(of.dtype, of.batch, of.heads, of.queries, of.value_dim, gap),
          lse(static_cast<size_t>(of.batch * of.heads * of.queries), NAN) {
        const auto size = [](int64_t count) { return static_cast<size_t>(count); };
        if (of.differentiates()) {
            if (of.keeps) kept.resize(4 * lse.size());
            dq.resize(lse.size() * size(of.dim));
            dk.resize(size(of.batch * of.key_heads * of.keys * of.dim));
            dv.resize(size(of.batch * of.key_heads * of.keys * of.value_dim));
            d_bias.resize(size(of.bias_sizes[0] * of.bias_sizes[1] * of.bias_sizes[2] * of.bias_sizes[3]));
            d_distances.resize(of.distances.size());
        }
        if (of.kind == Kind::looked) {
            rest = entropy = lse;
            weights.assign(lse.size() * size(of.top), NAN);
            indices.assign(lse.size() * size(of.top), -7);
            received.resize(size(of.batch * of.heads * of.keys));
        }
    }

    // What the forward pass of this kernel keeps for its backward pass.
    void keep(const Case& of, const Kernel& kernel, int threads) {
        Call call = of.call;
        call.out = out.view(), call.lse = lse.data(), call.rest = kept.empty() ? nullptr : kept.data();
        forward(call, kernel, threads);
    }

    // The backward pass reads `out`, `lse` and what was kept, which have to be there.
    void run(const Case& of, const Kernel& kernel, int threads) {
        Call call = of.call;
        call.out = out.view(), call.lse = lse.data(), call.rest = kept.empty() ? nullptr : kept.data();
        if (of.differentiates()) {
            Gradients gradients{};
            gradients.call = call, gradients.d_out = of.d_out->view();
            gradients.d_lse = of.d_lse.empty() ? nullptr : of.d_lse.data();
            gradients.dq = dq.data(), gradients.dk = dk.data(), gradients.dv = dv.data();
            if (of.wants_bias) gradients.d_bias = d_bias.data();
            for (int n = 0; n < 4; ++n) gradients.bias_sizes[n] = of.bias_sizes[n];
            if (of.wants_distances) gradients.d_distances = d_distances.data();
            gradients.distance_batches = of.distance_batches;
            backward(gradients, kernel, threads);
        } else if (of.kind == Kind::looked) {
            Looked seen{};
            seen.call = call, seen.top = of.top, seen.indices = indices.data(), seen.weights = weights.data();
            seen.rest = rest.data(), seen.entropy = entropy.data(), seen.received = received.data();
            looked(seen, kernel, threads);
        } else {
            forward(call, kernel, threads);
        }
    }
};

}  // namespace foveate::tests
