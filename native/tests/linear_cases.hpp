// Random calls of linear attention, forward and backward, and the same by the recurrence in double.
#pragma once
#include "../linear.hpp"
#include "cases.hpp"

namespace foveate::tests {

struct LinearCase {
    std::mt19937_64 random;
    int64_t batch, heads, key_heads, steps, dim, width, segment, slices;
    std::unique_ptr<Matrix> q, k, v, d_out;
    std::vector<float> decay, beta, state, d_last;
    std::vector<uint8_t> resets;
    Linear call{};

    explicit LinearCase(uint64_t seed);
    std::string text() const;
    // The factor of a channel at a step, 0 where the state is emptied.
    double factor(int64_t b, int64_t h, int64_t t, int64_t d) const {
        if (call.resets && resets[size_t(b * call.reset_batch + t)]) return 0;
        if (!call.decay.data) return 1;
        const Gate& gate = call.decay;
        return std::exp(double(gate.data[b * gate.batch + h * gate.head + t * gate.step + (call.by_channel ? d : 0)]));
    }
    double writes(int64_t b, int64_t h, int64_t t) const {
        const Gate& gate = call.beta;
        return gate.data ? double(gate.data[b * gate.batch + h * gate.head + t * gate.step]) : 1;
    }

  private:
    int64_t pick(std::initializer_list<int64_t> choices) { return choices.begin()[random() % choices.size()]; }
    bool chance(int percent) { return int(random() % 100) < percent; }
    float normal() { return std::normal_distribution<float>()(random); }
    float unit() { return std::uniform_real_distribution<float>()(random); }
    std::unique_ptr<Matrix> drawn(Dtype dtype, int64_t of, int64_t columns, float size);
    Gate gate(std::vector<float>& numbers, int64_t channels);
};

inline std::unique_ptr<Matrix> LinearCase::drawn(Dtype dtype, int64_t of, int64_t columns, float size) {
    auto made = std::make_unique<Matrix>(dtype, batch, of, steps, columns, pick({0, 3, 32}));
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < of; ++h)
            for (int64_t t = 0; t < steps; ++t)
                for (int64_t d = 0; d < columns; ++d) made->set(b, h, t, d, normal() * size);
    return made;
}

// Numbers for each batch row, head and step, or one for all of an axis.
inline Gate LinearCase::gate(std::vector<float>& numbers, int64_t channels) {
    const bool rows = chance(50), each = chance(70), moves = chance(80);
    const int64_t b = rows ? batch : 1, h = each ? key_heads : 1, t = moves ? steps : 1;
    numbers.resize(size_t(b * h * t * channels));
    return {numbers.data(), rows ? h * t * channels : 0, each ? t * channels : 0, moves ? channels : 0};
}

inline LinearCase::LinearCase(uint64_t seed) : random(seed) {
    batch = pick({1, 2}), key_heads = pick({1, 2}), heads = key_heads * pick({1, 3});
    steps = pick({1, 2, 5, 15, 16, 17, 31, 33, 64, 66, 131}), segment = pick({32, 64, 128});
    dim = pick({1, 3, 16, 31, 33, 64, 65}), width = pick({1, 3, 16, 31, 33, 64, 65, 100});
    const Dtype keys = static_cast<Dtype>(pick({0, 0, 1, 2})), values = static_cast<Dtype>(pick({0, 0, 1, 2}));
    q = drawn(keys, heads, dim, 1), k = drawn(keys, key_heads, dim, 1 / std::sqrt(float(dim)));
    v = drawn(values, key_heads, width, 1), d_out = drawn(values, heads, width, 1);
    call.q = {q->view(), keys}, call.k = {k->view(), keys}, call.v = {v->view(), values};
    call.batch = batch, call.heads = heads, call.key_heads = key_heads, call.steps = steps;
    call.dim = dim, call.value_dim = width, call.scale = chance(20) ? -0.2f : 0.5f;
    call.delta_rule = chance(50), call.reads = chance(90), call.by_channel = chance(40);
    if (call.by_channel || chance(70)) {
        call.decay = gate(decay, call.by_channel ? dim : 1);
        for (float& each : decay) each = chance(4) ? -INFINITY : chance(10) ? -3000.0f : chance(50) ? -0.01f * unit() : -unit();
    }
    if (chance(60)) {
        call.beta = gate(beta, 1);
        for (float& each : beta) each = 1.5f * unit();
    }
    if (chance(30)) {
        const bool rows = chance(50);
        resets.resize(size_t((rows ? batch : 1) * steps));
        for (uint8_t& each : resets) each = chance(8);
        call.resets = resets.data(), call.reset_batch = rows ? steps : 0;
    }
    state.resize(size_t(batch * key_heads * dim * width)), d_last.resize(state.size());
    for (std::vector<float>* each : {&state, &d_last})
        for (float& number : *each) number = normal();
    call.state = state.data(), call.segment = segment;
    const int64_t units = (width + 15) / 16, wanted = std::min(units, pick({1, 2, 3})), columns = (units + wanted - 1) / wanted;
    slices = (units + columns - 1) / columns;
}

inline std::string LinearCase::text() const {
    std::string said = std::string(dtype_names[int(call.q.dtype)]) + "/" + dtype_names[int(call.v.dtype)];
    const std::pair<const char*, int64_t> sizes[] = {{"batch", batch}, {"heads", heads}, {"key heads", key_heads},
                                                     {"steps", steps}, {"dim", dim}, {"width", width}, {"segment", segment},
                                                     {"slices", slices}};
    for (const auto& [name, size] : sizes) said += std::string(", ") + name + " " + std::to_string(size);
    if (call.delta_rule) said += ", delta rule";
    if (call.decay.data) said += call.by_channel ? ", decays by channel" : ", decays";
    if (call.beta.data) said += ", beta";
    if (call.resets) said += ", resets";
    if (!call.reads) said += ", no queries";
    return said;
}

// What a call writes, of exactly the right size and NaN before.
struct LinearResults {
    Matrix out;
    std::vector<float> last, saved, dq, dk, dv, d_decay, d_beta, d_state;

    explicit LinearResults(const LinearCase& of, int64_t gap = 0) : out(of.v->dtype, of.batch, of.heads, of.steps, of.width, gap) {
        const auto some = [](int64_t count) { return std::vector<float>(size_t(count), NAN); };
        const int64_t keys = of.batch * of.key_heads * of.steps, queries = of.batch * of.heads * of.steps;
        last = d_state = some(int64_t(of.state.size()));
        saved = some(int64_t(of.state.size()) * ((of.steps + of.segment - 1) / of.segment));
        dq = some(of.slices * queries * of.dim), dk = some(of.slices * keys * of.dim), dv = some(keys * of.width);
        if (of.call.decay.data) d_decay = some(of.slices * keys * (of.call.by_channel ? of.dim : 1));
        if (of.call.beta.data) d_beta = some(of.slices * keys);
    }

    void run(const LinearCase& of, const Kernel& kernel, int threads) {
        Linear call = of.call;
        call.out = {out.view(), of.v->dtype}, call.last = last.data();
        linear(call, kernel, threads);
        call.saved = saved.data();
        linear(call, kernel, threads);
        LinearGradients g{};
        g.call = call, g.d_out = {of.d_out->view(), of.d_out->dtype}, g.d_last = of.d_last.data(), g.slices = of.slices;
        g.dq = dq.data(), g.dk = dk.data(), g.dv = dv.data(), g.d_state = d_state.data();
        if (of.call.decay.data) g.d_decay = d_decay.data();
        if (of.call.beta.data) g.d_beta = d_beta.data();
        linear_backward(g, kernel, threads);
    }
    // The sum of what slices have.
    static std::vector<double> joined(const std::vector<float>& parts, int64_t slices) {
        std::vector<double> sums(parts.size() / size_t(slices));
        for (size_t n = 0; n < parts.size(); ++n) sums[n % sums.size()] += parts[n];
        return sums;
    }
};

// The recurrence, step by step, there and back.
struct LinearTruth {
    std::vector<double> out, last, dq, dk, dv, d_decay, d_beta, d_state;

    explicit LinearTruth(const LinearCase& in) {
        const int64_t keys = in.batch * in.key_heads * in.steps, queries = in.batch * in.heads * in.steps;
        out.resize(size_t(queries * in.width)), dq.resize(size_t(queries * in.dim)), dk.resize(size_t(keys * in.dim));
        dv.resize(size_t(keys * in.width)), last.resize(in.state.size()), d_state.resize(in.state.size());
        if (in.call.decay.data) d_decay.resize(size_t(keys * (in.call.by_channel ? in.dim : 1)));
        if (in.call.beta.data) d_beta.resize(size_t(keys));
        for (int64_t b = 0; b < in.batch; ++b)
            for (int64_t h = 0; h < in.key_heads; ++h) head(in, b, h);
    }

  private:
    void head(const LinearCase& in, int64_t b, int64_t h) {
        const int64_t dim = in.dim, width = in.width, states = dim * width, group = in.heads / in.key_heads;
        const int64_t first = (b * in.key_heads + h) * states;
        std::vector<std::vector<double>> all{{in.state.begin() + first, in.state.begin() + first + states}}, missing;
        for (int64_t t = 0; t < in.steps; ++t) {
            std::vector<double> state = all.back(), x(static_cast<size_t>(width));
            for (int64_t d = 0; d < dim; ++d)
                for (int64_t n = 0; n < width; ++n) state[d * width + n] *= in.factor(b, h, t, d);
            for (int64_t n = 0; n < width; ++n) {
                x[n] = in.v->at(b, h, t, n);
                for (int64_t d = 0; in.call.delta_rule && d < dim; ++d) x[n] -= in.k->at(b, h, t, d) * state[d * width + n];
            }
            for (int64_t d = 0; d < dim; ++d)
                for (int64_t n = 0; n < width; ++n) state[d * width + n] += in.k->at(b, h, t, d) * in.writes(b, h, t) * x[n];
            for (int64_t head = h * group; in.call.reads && head < (h + 1) * group; ++head)
                for (int64_t d = 0; d < dim; ++d)
                    for (int64_t n = 0; n < width; ++n)
                        out[row(in, in.heads, b, head, t) * width + n] += in.call.scale * in.q->at(b, head, t, d) * state[d * width + n];
            all.push_back(state), missing.push_back(x);
        }
        std::copy(all.back().begin(), all.back().end(), last.begin() + first);
        std::vector<double> d_after(in.d_last.begin() + first, in.d_last.begin() + first + states);
        for (int64_t t = in.steps; t-- > 0;) back(in, b, h, t, all[t], all[t + 1], missing[t], d_after);
        std::copy(d_after.begin(), d_after.end(), d_state.begin() + first);
    }

    void back(const LinearCase& in, int64_t b, int64_t h, int64_t t, const std::vector<double>& before,
              const std::vector<double>& after, const std::vector<double>& x, std::vector<double>& d_after) {
        const int64_t dim = in.dim, width = in.width, group = in.heads / in.key_heads, at = row(in, in.key_heads, b, h, t);
        for (int64_t head = h * group; in.call.reads && head < (h + 1) * group; ++head)
            for (int64_t d = 0; d < dim; ++d)
                for (int64_t n = 0; n < width; ++n) {
                    const double d_out = in.call.scale * in.d_out->at(b, head, t, n);
                    dq[row(in, in.heads, b, head, t) * dim + d] += d_out * after[d * width + n];
                    d_after[d * width + n] += d_out * in.q->at(b, head, t, d);
                }
        const double beta = in.writes(b, h, t);
        for (int64_t n = 0; n < width; ++n) {
            double d_u = 0;
            for (int64_t d = 0; d < dim; ++d) d_u += in.k->at(b, h, t, d) * d_after[d * width + n];
            dv[at * width + n] = beta * d_u;
            if (!d_beta.empty()) d_beta[at] += x[n] * d_u;
            for (int64_t d = 0; d < dim; ++d) {
                double& d_state = d_after[d * width + n];
                const double factor = in.factor(b, h, t, d), decayed = factor * before[d * width + n];
                dk[at * dim + d] += beta * x[n] * d_state;
                if (in.call.delta_rule) {
                    dk[at * dim + d] -= beta * d_u * decayed;
                    d_state -= beta * d_u * in.k->at(b, h, t, d);
                }
                if (!d_decay.empty()) d_decay[in.call.by_channel ? at * dim + d : at] += decayed * d_state;
                d_state *= factor;
            }
        }
    }

    static int64_t row(const LinearCase& in, int64_t heads, int64_t b, int64_t h, int64_t t) {
        return (b * heads + h) * in.steps + t;
    }
};

}  // namespace foveate::tests
