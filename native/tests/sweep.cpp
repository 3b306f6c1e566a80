// Every kernel that this machine can run against plain loops in double, over sizes around the edges of tiles, in memory
// of exactly the right size: under AddressSanitizer a read or write outside it is an error. `make asan` runs it, with as
// many calls of each kind as its argument says.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "linear_cases.hpp"
#include "truth.hpp"

using namespace foveate;
using namespace foveate::tests;

namespace {

// How far a result may be off in each dtype, times the largest true one, or the largest that goes into it: its own rounding,
// and sums in float32. The gradient of a bias that all pairs share is a sum of 100,000 terms of both signs.
constexpr double allowed[] = {4e-6, 1.0 / 128, 1.0 / 1024}, allowed_backward[] = {4e-5, 1.0 / 64, 1.0 / 512};

// The larger one, or NaN if there is one.
double worse(double a, double b) { return a != a || b != b ? NAN : std::max(a, b); }

template <typename Found>
double error_of(const std::vector<Found>& found, const std::vector<double>& truth, double size = 1) {
    double worst = 0;
    for (size_t n = 0; n < truth.size(); ++n) {
        const double wanted = truth[n], difference = std::fabs(double(found[n]) - wanted);
        worst = worse(worst, double(found[n]) == wanted ? 0 : difference);  // −inf is equal to itself
        if (std::isfinite(wanted)) size = std::max(size, std::fabs(wanted));
    }
    return worst / size;
}

std::vector<double> all_of(const Matrix& matrix) {
    std::vector<double> found;
    for (int64_t b = 0; b < matrix.batch; ++b)
        for (int64_t h = 0; h < matrix.heads; ++h)
            for (int64_t n = 0; n < matrix.length; ++n)
                for (int64_t d = 0; d < matrix.dim; ++d) found.push_back(matrix.at(b, h, n, d));
    return found;
}

// Two keys of nearly one weight may change places: each index has to be another key with the weight that is said.
double index_error(const Case& in, const Results& found, const Truth& truth) {
    double worst = 0;
    for (size_t row = 0; row < truth.rows.size(); ++row) {
        std::vector<char> taken(static_cast<size_t>(in.keys));
        for (int64_t n = 0; n < in.top; ++n) {
            const size_t at = row * size_t(in.top) + size_t(n);
            const int64_t key = found.indices[at];
            const bool is_a_key = key >= 0 && key < in.keys && !taken[size_t(key)];
            if (is_a_key) taken[size_t(key)] = 1;
            if (!is_a_key && !(key == -1 && truth.weights[at] == 0)) return NAN;
            worst = worse(worst, std::fabs(found.weights[at] - (is_a_key ? truth.rows[row][size_t(key)] : 0)));
        }
    }
    return worst;
}

double error_of(const Case& in, const Results& found, const Truth& truth) {
    if (in.differentiates()) {
        const double size = in.large ? std::max(1.0, std::fabs(std::ldexp(2.0 * in.call.scale, in.power))) : 1;  // of q and k
        const double inputs = worse(error_of(found.dq, truth.dq, size),
                                    worse(error_of(found.dk, truth.dk, size), error_of(found.dv, truth.dv)));
        const double bias = in.wants_bias ? error_of(found.d_bias, truth.d_bias) : 0;
        const double distances = in.wants_distances ? error_of(found.d_distances, truth.d_distances) : 0;
        return worse(inputs, worse(bias, distances));
    }
    const double lse = error_of(found.lse, truth.lse);
    if (in.kind != Kind::looked) return worse(lse, error_of(all_of(found.out), truth.out));
    const double sums = worse(error_of(found.rest, truth.rest), error_of(found.entropy, truth.entropy));
    const double keys = worse(error_of(found.weights, truth.weights), index_error(in, found, truth));
    return worse(worse(lse, sums), worse(keys, error_of(found.received, truth.received)));
}

struct Score {
    double worst[3] = {};
    int calls[3] = {};
};

double error_of(const LinearCase& in, const LinearResults& found, const LinearTruth& truth, bool backward) {
    if (!backward) return worse(in.call.reads ? error_of(all_of(found.out), truth.out) : 0, error_of(found.last, truth.last));
    const auto joined = [&in](const std::vector<float>& parts) { return LinearResults::joined(parts, in.slices); };
    const double queries = in.call.reads ? error_of(joined(found.dq), truth.dq) : 0;
    const double keys = worse(error_of(joined(found.dk), truth.dk), error_of(found.dv, truth.dv));
    const double gates = worse(error_of(joined(found.d_decay), truth.d_decay), error_of(joined(found.d_beta), truth.d_beta));
    return worse(worse(queries, keys), worse(gates, error_of(found.d_state, truth.d_state)));
}

// Linear attention, forward and backward; how many results were wrong.
int sweep_linear(const std::vector<const Kernel*>& kernels, int rounds) {
    int wrong = 0;
    std::vector<double> worst(kernels.size() * 2);
    for (int n = 0; n < rounds; ++n) {
        const LinearCase in(uint64_t(n) << 8 | 77);
        const LinearTruth truth(in);
        for (size_t at = 0; at < kernels.size(); ++at) {
            LinearResults found(in, n % 3);
            found.run(in, *kernels[at], 1 + n % 3);
            for (const bool backward : {false, true}) {
                const double error = error_of(in, found, truth, backward), bound = backward ? 4e-5 : allowed[int(in.v->dtype)];
                double& most = worst[at * 2 + backward];
                if (backward || in.v->dtype == Dtype::float32) most = worse(most, error);
                if (error <= bound || ++wrong > 20) continue;
                std::printf("WRONG by %.2g: %s, linear%s %d: %s\n", error, kernels[at]->name, backward ? " backward" : "", n,
                            in.text().c_str());
            }
        }
    }
    for (size_t at = 0; at < kernels.size(); ++at)
        std::printf("%-10s  linear: %d calls, largest errors in float32: forward %.2g, backward %.2g\n", kernels[at]->name, rounds,
                    worst[at * 2], worst[at * 2 + 1]);
    return wrong;
}

}  // namespace

int main(int count, char** words) {
    const int rounds = count > 1 ? std::atoi(words[1]) : 200;
    constexpr int kinds = sizeof kind_names / sizeof *kind_names;
    const Kernel* const* known;
    const int64_t all = known_kernels(&known);
    std::vector<const Kernel*> here;
    for (int64_t n = 0; n < all; ++n) {
        if (const char* reason = why_not_here(*known[n]))
            std::printf("%s: %s\n", known[n]->name, reason);
        else
            here.push_back(known[n]);
    }
    std::vector<Score> scores(here.size() * kinds);
    int wrong = 0;
    for (int kind = 0; kind < kinds; ++kind)
        for (int n = 0; n < rounds; ++n) {
            const Case in(static_cast<Kind>(kind), uint64_t(kind) << 32 | uint64_t(n));
            Results start(in);
            const Truth truth(in, start);
            for (size_t at = 0; at < here.size(); ++at) {
                Results found(in, n % 3);
                if (in.differentiates()) {
                    found.keep(in, *here[at], 1 + n % 3);
                    for (int64_t b = 0; b < in.batch; ++b)
                        for (int64_t h = 0; h < in.heads; ++h)
                            for (int64_t row = 0; row < in.queries; ++row)
                                for (int64_t d = 0; d < in.value_dim; ++d)
                                    found.out.set(b, h, row, d, start.out.at(b, h, row, d));
                    found.lse = start.lse;
                }
                found.run(in, *here[at], 1 + n % 3);
                const double error = error_of(in, found, truth);
                Score& score = scores[at * kinds + size_t(kind)];
                score.worst[int(in.dtype)] = worse(score.worst[int(in.dtype)], error);
                ++score.calls[int(in.dtype)];
                if (error <= (in.differentiates() ? allowed_backward : allowed)[int(in.dtype)]) continue;
                if (++wrong > 20) continue;
                std::printf("WRONG by %.2g: %s, %s %d: %s\n", error, here[at]->name, kind_names[kind], n, in.text().c_str());
            }
        }
    for (size_t at = 0; at < here.size(); ++at)
        for (int kind = 0; kind < kinds; ++kind) {
            const Score& score = scores[at * kinds + size_t(kind)];
            std::printf("%-10s  %-12s  largest errors:", here[at]->name, kind_names[kind]);
            for (int dtype = 0; dtype < 3; ++dtype)
                std::printf("  %s %.2g (%d calls)", dtype_names[dtype], score.worst[dtype], score.calls[dtype]);
            std::printf("\n");
        }
    wrong += sweep_linear(here, rounds);
    return wrong ? 1 : 0;
}
