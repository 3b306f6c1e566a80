// Every kernel against plain loops in double, over sizes around the edges of tiles, in memory of exactly the right size:
// under AddressSanitizer a read or write outside it is an error. `make asan` runs it.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../attention.hpp"

using foveate::Call, foveate::Kernel, foveate::View, foveate::tile;

namespace {

std::mt19937 generator(17);

int64_t pick(const std::vector<int64_t>& choices) { return choices[generator() % choices.size()]; }

// An allocation of its own for each matrix, so that its ends are guarded; rows may be further apart than they are long.
struct Matrix {
    int64_t heads, length, dim, row;
    std::unique_ptr<float[]> data;

    Matrix(int64_t batch, int64_t heads, int64_t length, int64_t dim, int64_t gap)
        : heads(heads), length(length), dim(dim), row(dim + gap), data(new float[batch * heads * length * row - gap]) {
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < batch * heads * length * row - gap; ++i) data[i] = normal(generator);
    }
    View view() { return {data.get(), heads * length * row, length * row, row}; }
    float* at(int64_t batch, int64_t head, int64_t place) { return &data[((batch * heads + head) * length + place) * row]; }
};

// A causal window of `reach` keys as tiles: the summary that Python would make.
struct Tiles {
    std::vector<int64_t> offsets{0}, columns, partial;
    std::vector<uint64_t> bits;

    Tiles(int64_t queries, int64_t keys, int64_t reach) {
        for (int64_t row = 0; row < queries; row += tile) {
            for (int64_t column = 0; column < keys; column += tile) {
                std::vector<uint64_t> words(tile, 0);
                int64_t seen = 0, all = 0;
                for (int64_t q = row; q < std::min(row + tile, queries); ++q)
                    for (int64_t k = column; k < std::min(column + tile, keys); ++k, ++all)
                        if (k <= q && q - k < reach) words[q - row] |= 1ull << (k - column), ++seen;
                if (!seen) continue;
                columns.push_back(column / tile);
                partial.push_back(seen == all ? -1 : int64_t(bits.size()) / tile);
                if (seen != all) bits.insert(bits.end(), words.begin(), words.end());
            }
            offsets.push_back(columns.size());
        }
    }
};

// The largest error of one random call.
double one(const Kernel& kernel, int threads) {
    const int64_t batch = pick({1, 2}), key_heads = pick({1, 2}), heads = key_heads * pick({1, 3});
    const int64_t queries = pick({1, 2, 63, 64, 65, 130}), keys = pick({1, 5, 63, 64, 65, 129});
    const int64_t dim = pick({1, 3, 16, 59, 64}), value_dim = pick({1, 2, 5, 6, 7, 64, 65}), reach = pick({1, 9, 1000, 0});
    Matrix q(batch, heads, queries, dim, pick({0, 3})), k(batch, key_heads, keys, dim, pick({0, 5})),
        v(batch, key_heads, keys, value_dim, pick({0, 2})), out(batch, heads, queries, value_dim, 0);
    std::unique_ptr<float[]> lse(new float[batch * heads * queries]);
    Tiles tiles(queries, keys, reach);
    Call call{};
    call.q = q.view(), call.k = k.view(), call.v = v.view(), call.out = out.view(), call.lse = lse.get();
    call.batch = batch, call.heads = heads, call.key_heads = key_heads, call.queries = queries, call.keys = keys;
    call.dim = dim, call.value_dim = value_dim, call.scale = 0.3f, call.tile_batch = call.tile_heads = 1;
    if (reach) {
        call.offsets = tiles.offsets.data(), call.columns = tiles.columns.data();
        call.partial = tiles.partial.data(), call.bits = tiles.bits.data();
    }
    // Scores: a cap; distances, a vector of exactly the length that the header names; a bias shared by the batch rows.
    const float cap = pick({0, 2});
    const int64_t length = queries + keys - 1 + tile;
    Matrix distances(1, heads, 1, length, 0), bias(1, heads, queries, keys, pick({0, 3}));
    const bool has_distances = pick({0, 1}), has_bias = pick({0, 1});
    call.softcap = cap;
    if (has_distances) call.distances = distances.data.get(), call.distance_head = length;
    if (has_bias) {
        const View view = bias.view();
        call.bias = bias.data.get();
        const int64_t strides[] = {0, view.head, view.row, 1};
        std::memcpy(call.bias_strides, strides, sizeof strides);
    }
    foveate::forward(call, kernel, threads);

    double worst = 0;
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t row = 0; row < queries; ++row) {
                std::vector<double> weights(keys, 0), result(value_dim, 0);
                double total = 0;
                for (int64_t key = 0; key < keys; ++key) {
                    if (reach && !(key <= row && row - key < reach)) continue;
                    double score = 0;
                    for (int64_t d = 0; d < dim; ++d)
                        score += double(q.at(b, h, row)[d]) * k.at(b, h / (heads / key_heads), key)[d];
                    score *= call.scale;
                    if (cap != 0) score = cap * std::tanh(score / cap);
                    if (has_distances) score += distances.at(0, h, 0)[keys - 1 + row - key];
                    if (has_bias) score += bias.at(0, h, row)[key];
                    total += weights[key] = std::exp(score);
                }
                for (int64_t key = 0; key < keys; ++key)
                    for (int64_t d = 0; d < value_dim && total > 0; ++d)
                        result[d] += weights[key] / total * v.at(b, h / (heads / key_heads), key)[d];
                for (int64_t d = 0; d < value_dim; ++d)
                    worst = std::max(worst, std::fabs(result[d] - out.at(b, h, row)[d]));
                const float sum = lse[(b * heads + h) * queries + row];
                worst = std::max(worst, total > 0 ? std::fabs(std::log(total) - sum) : sum == -INFINITY ? 0.0 : 1e9);
            }
    return worst;
}

}  // namespace

int main() {
    int failures = 0;
    for (const char* name : {"avx512", "avx2", "baseline"}) {
        const Kernel* kernel = foveate::choose(name);
        if (!kernel) {
            std::printf("%s: not on this machine\n", name);
            continue;
        }
        double worst = 0;
        for (int n = 0; n < 200; ++n) worst = std::max(worst, one(*kernel, 1 + n % 3));
        std::printf("%s: 200 calls, largest error %.2g\n", name, worst);
        failures += !(worst < 2e-5);
    }
    return failures;
}
