// The one file that knows Python: addresses and sizes in, nothing out. `foveate.softmax.native` checks them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "linear.hpp"
#include "pool.hpp"
#include "ceiling.hpp"

namespace nb = nanobind;
using Matrix = std::array<int64_t, 4>;  // address, then the strides of batch, head and row

template <typename T>
static T* address(int64_t place) {
    return reinterpret_cast<T*>(place);
}

static foveate::View view(const Matrix& matrix) {
    return {address<void>(matrix[0]), matrix[1], matrix[2], matrix[3]};
}

static const foveate::Kernel& kernel_of(const std::string& name) {
    const foveate::Kernel* chosen = foveate::choose(name.c_str());
    if (!chosen) throw nb::value_error("no such kernel on this machine");
    return *chosen;
}

// What forward, backward and looked have in common; the fields are those of foveate::Call.
static foveate::Call call_of(int dtype, const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out, const std::array<int64_t, 2>& lse,
                             const std::array<int64_t, 7>& sizes, float scale, const std::array<int64_t, 3>& pages,
                             float softcap, const std::array<int64_t, 3>& distances, const std::array<int64_t, 5>& bias,
                             int64_t sinks, int64_t seed, double dropout, const std::array<int64_t, 5>& reach,
                             const std::array<int64_t, 6>& tiles, const std::array<int64_t, 9>& selection) {
    foveate::Call call{};
    call.dtype = static_cast<foveate::Dtype>(dtype);
    call.q = view(q), call.k = view(k), call.v = view(v), call.out = view(out);
    call.lse = address<float>(lse[0]), call.rest = address<float>(lse[1]);
    call.batch = sizes[0], call.heads = sizes[1], call.key_heads = sizes[2];
    call.queries = sizes[3], call.keys = sizes[4], call.dim = sizes[5], call.value_dim = sizes[6];
    call.scale = scale;
    call.pages = address<const int64_t>(pages[0]), call.page_row = pages[1], call.page_size = pages[2];
    call.softcap = softcap;
    call.distances = address<const float>(distances[0]);
    call.distance_batch = distances[1], call.distance_head = distances[2];
    call.bias = address<const float>(bias[0]);
    for (int n = 0; n < 4; ++n) call.bias_strides[n] = bias[n + 1];
    call.sinks = address<const float>(sinks);
    call.seed = static_cast<uint64_t>(seed);
    // As Python rounds it. A rate that rounds to 1 keeps nothing: no word of 32 bits reaches that threshold.
    call.threshold = static_cast<uint64_t>(std::nearbyint(dropout * 4294967296.0));
    call.boost = call.threshold >> 32 ? 0.0f : static_cast<float>(1 / (1 - dropout));
    call.starts = address<const int64_t>(reach[0]), call.start = reach[1];
    call.lengths = address<const int64_t>(reach[2]), call.left = reach[3], call.right = reach[4];
    call.offsets = address<const int64_t>(tiles[0]), call.columns = address<const int64_t>(tiles[1]);
    call.partial = address<const int64_t>(tiles[2]), call.bits = address<const uint64_t>(tiles[3]);
    call.tile_batch = tiles[4], call.tile_heads = tiles[5];
    call.chosen.indices = address<const void>(selection[0]);
    for (int n = 0; n < 3; ++n) call.chosen.strides[n] = selection[n + 1];
    call.chosen.count = selection[4], call.chosen.block = selection[5], call.chosen.heads = selection[6];
    call.chosen.wide = selection[7] == 8, call.chosen.outside = address<int32_t>(selection[8]);
    return call;
}

template <typename... More>
static auto bound(void (*function)(const foveate::Call&, const foveate::Kernel&, int, More...)) {
    return [function](int dtype, const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out, const std::array<int64_t, 2>& lse,
                      const std::array<int64_t, 7>& sizes, float scale, const std::array<int64_t, 3>& pages, float softcap,
                      const std::array<int64_t, 3>& distances, const std::array<int64_t, 5>& bias, int64_t sinks,
                      int64_t seed, double dropout, const std::array<int64_t, 5>& reach,
                      const std::array<int64_t, 6>& tiles, const std::array<int64_t, 9>& selection, const std::string& kernel, int threads, More... more) {
        const foveate::Kernel& chosen = kernel_of(kernel);
        const foveate::Call call = call_of(dtype, q, k, v, out, lse, sizes, scale, pages, softcap, distances, bias, sinks,
                                           seed, dropout, reach, tiles, selection);
        nb::gil_scoped_release release;
        function(call, chosen, threads, more...);
    };
}

static void forward(const foveate::Call& call, const foveate::Kernel& kernel, int threads) {
    foveate::forward(call, kernel, threads);
}

static void backward(const foveate::Call& call, const foveate::Kernel& kernel, int threads, const Matrix& d_out,
                     int64_t d_lse, const std::array<int64_t, 3>& d_inputs, const std::array<int64_t, 5>& d_bias,
                     const std::array<int64_t, 2>& d_distances) {
    foveate::Gradients gradients{};
    gradients.call = call;
    gradients.d_out = view(d_out), gradients.d_lse = address<const float>(d_lse);
    gradients.dq = address<float>(d_inputs[0]), gradients.dk = address<float>(d_inputs[1]);
    gradients.dv = address<float>(d_inputs[2]);
    gradients.d_bias = address<float>(d_bias[0]);
    for (int n = 0; n < 4; ++n) gradients.bias_sizes[n] = d_bias[n + 1];
    gradients.d_distances = address<double>(d_distances[0]), gradients.distance_batches = d_distances[1];
    foveate::backward(gradients, kernel, threads);
}

static void looked(const foveate::Call& call, const foveate::Kernel& kernel, int threads, int64_t top, int64_t indices,
                   int64_t weights, const std::array<int64_t, 3>& sums) {
    foveate::Looked looked{};
    looked.call = call, looked.top = top;
    looked.indices = address<int64_t>(indices), looked.weights = address<float>(weights);
    looked.rest = address<float>(sums[0]), looked.entropy = address<float>(sums[1]);
    looked.received = address<float>(sums[2]);
    foveate::looked(looked, kernel, threads);
}

using Numbers = std::array<int64_t, 5>;  // a Matrix and its dtype
using Steps = std::array<int64_t, 4>;    // address, then the strides of batch, head and step

static foveate::Typed typed(const Numbers& numbers) {
    return {{address<void>(numbers[0]), numbers[1], numbers[2], numbers[3]}, static_cast<foveate::Dtype>(numbers[4])};
}
static foveate::Gate gate(const Steps& steps) { return {address<const float>(steps[0]), steps[1], steps[2], steps[3]}; }

// The fields are those of foveate::Linear.
static foveate::Linear linear_of(const std::array<Numbers, 4>& tensors, const std::array<int64_t, 6>& sizes, float scale,
                                 const std::array<bool, 3>& kinds, const std::array<Steps, 2>& gates,
                                 const std::array<int64_t, 2>& resets, const std::array<int64_t, 4>& states) {
    foveate::Linear call{};
    call.q = typed(tensors[0]), call.k = typed(tensors[1]), call.v = typed(tensors[2]), call.out = typed(tensors[3]);
    call.batch = sizes[0], call.heads = sizes[1], call.key_heads = sizes[2];
    call.steps = sizes[3], call.dim = sizes[4], call.value_dim = sizes[5];
    call.scale = scale;
    call.delta_rule = kinds[0], call.reads = kinds[1], call.by_channel = kinds[2];
    call.decay = gate(gates[0]), call.beta = gate(gates[1]);
    call.resets = address<const uint8_t>(resets[0]), call.reset_batch = resets[1];
    call.state = address<const float>(states[0]), call.last = address<float>(states[1]);
    call.saved = address<float>(states[2]), call.segment = states[3];
    return call;
}

template <typename Result, typename... More>
static auto bound_linear(Result (*function)(const foveate::Linear&, const foveate::Kernel&, int, More...)) {
    return [function](const std::array<Numbers, 4>& tensors, const std::array<int64_t, 6>& sizes, float scale,
                      const std::array<bool, 3>& kinds, const std::array<Steps, 2>& gates, const std::array<int64_t, 2>& resets,
                      const std::array<int64_t, 4>& states, const std::string& kernel, int threads, More... more) {
        const foveate::Kernel& chosen = kernel_of(kernel);
        const foveate::Linear call = linear_of(tensors, sizes, scale, kinds, gates, resets, states);
        nb::gil_scoped_release release;
        return function(call, chosen, threads, more...);
    };
}

static void linear(const foveate::Linear& call, const foveate::Kernel& kernel, int threads) {
    foveate::linear(call, kernel, threads);
}

static bool linear_checked(const foveate::Linear& call, const foveate::Kernel& kernel, int threads) {
    if (!foveate::has_fine_gates(call)) return false;
    foveate::linear(call, kernel, threads);
    return true;
}

static void linear_backward(const foveate::Linear& call, const foveate::Kernel& kernel, int threads, const Numbers& d_out,
                            int64_t d_last, const std::array<int64_t, 6>& gradients, int64_t slices) {
    foveate::LinearGradients g{};
    g.call = call, g.slices = slices;
    g.d_out = typed(d_out), g.d_last = address<const float>(d_last);
    g.dq = address<float>(gradients[0]), g.dk = address<float>(gradients[1]), g.dv = address<float>(gradients[2]);
    g.d_decay = address<float>(gradients[3]), g.d_beta = address<float>(gradients[4]), g.d_state = address<float>(gradients[5]);
    foveate::linear_backward(g, kernel, threads);
}

static std::vector<std::pair<std::string, std::string>> variants() {
    std::vector<std::pair<std::string, std::string>> found;
    const foveate::Kernel* const* known;
    const int64_t count = foveate::known_kernels(&known);
    for (int64_t n = 0; n < count; ++n) {
        const char* reason = foveate::why_not_here(*known[n]);
        found.emplace_back(known[n]->name, reason ? reason : "");
    }
    return found;
}

static std::vector<std::string> kernels() {
    std::vector<std::string> found;
    for (const auto& [name, reason] : variants())
        if (reason.empty()) found.push_back(name);
    return found;
}

static double ceiling(const std::string& what, int threads) {
    nb::gil_scoped_release release;
    return foveate::ceiling(what, threads);
}

#ifdef __clang__
constexpr const char* compiler = "clang " __clang_version__;
#else
constexpr const char* compiler = "g++ " __VERSION__;
#endif

NB_MODULE(_native, module) {
    module.doc() = "Attention kernels for CPUs.";
    module.attr("tile") = int(foveate::tile);
    module.attr("compiler") = compiler;
    module.def("ceiling", &ceiling, nb::arg("what"), nb::arg("threads"), "The most this machine can do.");
    module.def("share_threads_of", [](const std::string& library) { return foveate::share_threads_of(library.c_str()); },
               "Use the threads of an OpenMP runtime that is loaded already; whether that can be.");
    module.def("variants", &variants, "Every kernel that was compiled, the best first, and what this machine lacks for it.");
    module.def("chosen", [] { return std::string(kernel_of("").name); }, "The kernel that is used unless one is named.");
    module.def("kernels", &kernels, "The kernels that run on this machine, the best first.");
    module.def("forward", bound(&forward));
    module.def("backward", bound(&backward));
    module.def("looked", bound(&looked));
    module.def("linear", bound_linear(&linear));
    module.def("linear_checked", bound_linear(&linear_checked));
    module.def("linear_backward", bound_linear(&linear_backward));
}
