// The same calls by plain loops in double: what the kernels are compared with.
#pragma once
#include "cases.hpp"

namespace foveate::tests {

// Word `key % 4` of Philox-4x32-10 (Salmon et al. 2011), whose counter is (key / 4, query, head, batch).
inline uint32_t philox_word(uint64_t seed, uint32_t batch, uint32_t head, uint32_t query, uint32_t key) {
    uint32_t words[4] = {key / 4, query, head, batch}, keys[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t left = uint64_t(words[0]) * 0xD2511F53u, right = uint64_t(words[2]) * 0xCD9E8D57u;
        const uint32_t next[4] = {uint32_t(right >> 32) ^ words[1] ^ keys[0], uint32_t(right),
                                  uint32_t(left >> 32) ^ words[3] ^ keys[1], uint32_t(left)};
        std::memcpy(words, next, sizeof words);
        keys[0] += 0x9E3779B9u, keys[1] += 0xBB67AE85u;
    }
    return words[key % 4];
}

// One row of weights: they and the sink's sum to 1. A key that is not seen has weight 0 and nothing else.
struct Weights {
    std::vector<double> of, factor, slope;  // factor: by dropout; slope: what the cap lets through of a gradient
    std::vector<char> seen;
    double lse, sink;
};

inline Weights weights_of(const Case& in, int64_t b, int64_t h, int64_t row) {
    const Call& call = in.call;
    const auto keys = static_cast<size_t>(in.keys);
    Weights found{std::vector<double>(keys), std::vector<double>(keys, 1), std::vector<double>(keys, 1),
                  std::vector<char>(keys), -INFINITY, 0};
    const int64_t key_head = h / (in.heads / in.key_heads), query = row + (call.starts ? in.starts[b] : call.start);
    const double sink = call.sinks ? call.sinks[h] : -INFINITY;
    double top = sink;
    std::vector<double> q(static_cast<size_t>(in.dim));
    for (int64_t d = 0; d < in.dim; ++d) q[d] = in.q->at(b, h, row, d);
    for (int64_t key = 0; key < in.keys; ++key) {
        if (!in.sees(b, h, row, key) || (call.bias && in.bias_at(b, h, row, key) == -INFINITY)) continue;
        double score = 0;
        for (int64_t d = 0; d < in.dim; ++d) score += q[d] * in.k->at(in.page_of(b, key), key_head, in.slot_of(key), d);
        score *= call.scale;
        if (call.softcap != 0) {
            const double bent = std::tanh(score / call.softcap);
            score = call.softcap * bent, found.slope[key] = 1 - bent * bent;
        }
        if (call.distances)
            score += call.distances[b * call.distance_batch + h * call.distance_head + in.keys - 1 + row - key];
        if (call.bias) score += in.bias_at(b, h, row, key);
        if (call.threshold) {
            const uint32_t word = philox_word(call.seed, uint32_t(b), uint32_t(h), uint32_t(query), uint32_t(key));
            found.factor[key] = word >= call.threshold ? call.boost : 0;
        }
        found.of[key] = score, found.seen[key] = 1;
        top = std::max(top, score);
    }
    double sum = top == -INFINITY ? 0 : std::exp(sink - top);
    for (int64_t key = 0; key < in.keys; ++key)
        if (found.seen[key]) sum += std::exp(found.of[key] - top);
    if (sum > 0) found.lse = top + std::log(sum), found.sink = std::exp(sink - top) / sum;
    for (int64_t key = 0; key < in.keys; ++key) found.of[key] = found.seen[key] ? std::exp(found.of[key] - top) / sum : 0;
    return found;
}

// Everything that Results has room for. `given` gets the output and log-sum-exp that a backward pass starts from, in
// the dtype of the call: the truth starts from the same, so that only the backward pass itself is measured.
struct Truth {
    std::vector<double> out, lse, dq, dk, dv, d_bias, d_distances, weights, rest, entropy, received;
    std::vector<std::vector<double>> rows;  // all weights of every row, for the indices of the heaviest

    Truth(const Case& in, Results& given) {
        const int64_t all_rows = in.batch * in.heads * in.queries;
        out.resize(static_cast<size_t>(all_rows * in.value_dim));
        lse.resize(static_cast<size_t>(all_rows));
        dq.resize(given.dq.size()), dk.resize(given.dk.size()), dv.resize(given.dv.size());
        d_bias.resize(given.d_bias.size()), d_distances.resize(given.d_distances.size());
        rest.resize(given.rest.size()), entropy.resize(given.entropy.size()), received.resize(given.received.size());
        for (int64_t b = 0; b < in.batch; ++b)
            for (int64_t h = 0; h < in.heads; ++h)
                for (int64_t row = 0; row < in.queries; ++row) {
                    const Weights found = weights_of(in, b, h, row);
                    const int64_t at = (b * in.heads + h) * in.queries + row;
                    lse[at] = found.lse;
                    if (in.kind == Kind::looked) {
                        look(in, at, found);
                        continue;
                    }
                    sum_values(in, b, h, at, found);
                    if (!in.differentiates()) continue;
                    for (int64_t d = 0; d < in.value_dim; ++d) given.out.set(b, h, row, d, out[at * in.value_dim + d]);
                    given.lse[at] = float(found.lse);
                    differentiate(in, given, b, h, row, found);
                }
    }

  private:
    void sum_values(const Case& in, int64_t b, int64_t h, int64_t at, const Weights& found) {
        for (int64_t key = 0; key < in.keys; ++key) {
            const double weight = found.of[key] * found.factor[key];
            if (!found.seen[key]) continue;
            for (int64_t d = 0; d < in.value_dim; ++d)
                out[at * in.value_dim + d] +=
                    weight * in.v->at(in.page_of(b, key), h / (in.heads / in.key_heads), in.slot_of(key), d);
        }
    }

    void differentiate(const Case& in, const Results& given, int64_t b, int64_t h, int64_t row, const Weights& found) {
        const int64_t at = (b * in.heads + h) * in.queries + row, key_head = h / (in.heads / in.key_heads);
        double delta = in.d_lse.empty() ? 0 : -in.d_lse[at], finer = delta;  // of what is added, without the output's rounding
        // Where one key has all the weight, the rounding of the output is no gradient of its score.
        const bool single = std::any_of(found.of.begin(), found.of.end(), [](double weight) { return float(weight) == 1; });
        const bool moves = !in.keeps || !single;
        std::vector<double> d_out(static_cast<size_t>(in.value_dim));
        for (int64_t d = 0; d < in.value_dim; ++d) {
            d_out[d] = in.d_out->at(b, h, row, d);
            if (moves) delta += d_out[d] * given.out.at(b, h, row, d), finer += d_out[d] * out[at * in.value_dim + d];
        }
        for (int64_t key = 0; key < in.keys; ++key) {
            if (!found.seen[key]) continue;
            const int64_t place = (b * in.key_heads + key_head) * in.keys + key;
            double d_weight = 0;
            for (int64_t d = 0; d < in.value_dim; ++d) {
                d_weight += d_out[d] * in.v->at(b, key_head, key, d);
                dv[place * in.value_dim + d] += found.of[key] * found.factor[key] * d_out[d];
            }
            const double d_given = moves ? found.factor[key] * d_weight : 0;
            const double d_score = found.of[key] * (d_given - delta), d_added = found.of[key] * (d_given - finer);
            if (!d_distances.empty()) {
                const int64_t length = in.queries + in.keys - 1 + tile, shared = in.distance_batches > 1 ? b : 0;
                d_distances[(shared * in.heads + h) * length + in.keys - 1 + row - key] += d_added;
            }
            if (!in.bias.empty()) {
                const int64_t index[4] = {b, h, row, key};
                int64_t entry = 0;
                for (int n = 0; n < 4; ++n) entry = entry * in.bias_sizes[n] + (in.bias_sizes[n] > 1 ? index[n] : 0);
                d_bias[entry] += d_added;
            }
            const double handed_on = d_score * found.slope[key] * in.call.scale;
            for (int64_t d = 0; d < in.dim; ++d) {
                dq[at * in.dim + d] += handed_on * in.k->at(b, key_head, key, d);
                dk[place * in.dim + d] += handed_on * in.q->at(b, h, row, d);
            }
        }
    }

    void look(const Case& in, int64_t at, const Weights& found) {
        std::vector<double> falling(found.of);
        std::sort(falling.rbegin(), falling.rend());
        double kept = 0;
        for (int64_t n = 0; n < in.top; ++n) {
            weights.push_back(n < in.keys ? falling[n] : 0);
            kept += weights.back();
        }
        if (found.lse > -INFINITY) rest[at] = std::max(0.0, 1 - found.sink - kept);
        for (int64_t key = 0; key < in.keys; ++key) {
            if (found.of[key] > 0) entropy[at] -= found.of[key] * std::log(found.of[key]);
            received[at / in.queries * in.keys + key] += found.of[key];
        }
        rows.push_back(found.of);
    }
};

}  // namespace foveate::tests
