// Several callers at once, each on several threads: for ThreadSanitizer, and every result is equal to the bit to that of
// one thread alone. `make tsan` runs it.
#include <cstdio>
#include <thread>

#include "linear_cases.hpp"

using namespace foveate;
using namespace foveate::tests;

namespace {

constexpr int callers = 3, threads = 3, repeats = 2, calls_of_a_kind = 6;

// A large enough call of each kind to be given to other threads at all.
std::vector<std::unique_ptr<Case>> large_cases() {
    std::vector<std::unique_ptr<Case>> found;
    for (Kind kind : {Kind::forward, Kind::decode, Kind::paged_decode, Kind::dropout, Kind::backward, Kind::looked, Kind::gathered, Kind::gathered_backward})
        for (int taken = 0, seed = 0; taken < calls_of_a_kind; ++seed) {
            auto made = std::make_unique<Case>(kind, seed);
            const int64_t seen = made->gathers() ? made->call.chosen.count * made->call.chosen.block : made->keys;
            if (double(made->batch * made->heads) * double(made->queries * seen * (made->dim + made->value_dim)) < 2e6)
                continue;
            found.push_back(std::move(made)), ++taken;
        }
    return found;
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T)));
}

bool same(const Results& a, const Results& b) {
    return a.out.bytes == b.out.bytes && !std::memcmp(a.out.data.get(), b.out.data.get(), size_t(a.out.bytes)) &&
           same(a.lse, b.lse) && same(a.dq, b.dq) && same(a.dk, b.dk) && same(a.dv, b.dv) && same(a.d_bias, b.d_bias) &&
           same(a.d_distances, b.d_distances) && same(a.weights, b.weights) && same(a.indices, b.indices) &&
           same(a.rest, b.rest) && same(a.entropy, b.entropy) && same(a.received, b.received);
}

// Any output will do for a backward pass to start from, as long as it is the same one.
Results started(const Case& in) {
    Results found(in);
    if (!in.differentiates()) return found;
    for (int64_t b = 0; b < in.batch; ++b)
        for (int64_t h = 0; h < in.heads; ++h)
            for (int64_t row = 0; row < in.queries; ++row)
                for (int64_t d = 0; d < in.value_dim; ++d) found.out.set(b, h, row, d, 0.5);
    found.lse.assign(found.lse.size(), 9);
    for (size_t n = 0; n < found.kept.size(); ++n) found.kept[n] = n % 4 == 0 ? 9.0f : n % 4 == 3;
    return found;
}

bool same(const LinearResults& a, const LinearResults& b) {
    return !std::memcmp(a.out.data.get(), b.out.data.get(), size_t(a.out.bytes)) && same(a.last, b.last) && same(a.dq, b.dq) &&
           same(a.dk, b.dk) && same(a.dv, b.dv) && same(a.d_decay, b.d_decay) && same(a.d_beta, b.d_beta) &&
           same(a.d_state, b.d_state);
}

// Linear attention from several callers; how many results differ from those of one thread.
int races_of_linear(const Kernel& kernel) {
    std::vector<std::unique_ptr<LinearCase>> cases;
    for (uint64_t seed = 0; cases.size() < size_t(calls_of_a_kind); ++seed) {
        auto made = std::make_unique<LinearCase>(seed);
        if (double(made->batch * made->heads * made->steps) * double(made->dim * made->width) > 1e6) cases.push_back(std::move(made));
    }
    std::vector<LinearResults> alone;
    for (const auto& in : cases) alone.emplace_back(*in), alone.back().run(*in, kernel, 1);
    std::atomic<int> wrong{0};
    const auto caller = [&](size_t first) {
        for (size_t n = 0; n < cases.size(); ++n) {
            const size_t which = (first + n) % cases.size();
            LinearResults found(*cases[which]);
            found.run(*cases[which], kernel, threads);
            if (same(found, alone[which])) continue;
            ++wrong;
            std::printf("WRONG: %s, linear: %s\n", kernel.name, cases[which]->text().c_str());
        }
    };
    std::vector<std::thread> others;
    for (size_t n = 0; n < callers; ++n) others.emplace_back(caller, n);
    for (std::thread& other : others) other.join();
    return wrong;
}

}  // namespace

int main() {
    const std::vector<std::unique_ptr<Case>> cases = large_cases();
    const Kernel* const* known;
    const int64_t count = known_kernels(&known);
    std::atomic<int> wrong{0};
    for (int64_t at = 0; at < count; ++at) {
        const Kernel& kernel = *known[at];
        if (const char* reason = why_not_here(kernel)) {
            std::printf("%s: %s\n", kernel.name, reason);
            continue;
        }
        std::vector<Results> alone;
        for (const auto& in : cases) {
            alone.push_back(started(*in));
            alone.back().run(*in, kernel, 1);
        }
        const auto caller = [&](size_t first) {
            for (size_t n = 0; n < repeats * cases.size(); ++n) {
                const size_t which = (first + n) % cases.size();
                Results found = started(*cases[which]);
                found.run(*cases[which], kernel, threads);
                if (same(found, alone[which])) continue;
                ++wrong;
                std::printf("WRONG: %s, %s: %s\n", kernel.name, kind_names[int(cases[which]->kind)], cases[which]->text().c_str());
            }
        };
        std::vector<std::thread> others;
        for (size_t n = 0; n < callers; ++n) others.emplace_back(caller, n * cases.size() / callers);
        for (std::thread& other : others) other.join();
        wrong += races_of_linear(kernel);
        std::printf("%s: %d callers, %d threads each, %zu calls\n", kernel.name, callers, threads,
                    callers * repeats * cases.size());
    }
    return wrong ? 1 : 0;
}
