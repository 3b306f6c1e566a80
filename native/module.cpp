// The one file that knows Python: addresses and sizes in, nothing out. `foveate.softmax.native` checks them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <string>
#include <vector>

#include "attention.hpp"
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

static void forward(int dtype, const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out, int64_t lse,
                    const std::array<int64_t, 7>& sizes, float scale, float softcap,
                    const std::array<int64_t, 3>& distances, const std::array<int64_t, 5>& bias, int64_t sinks,
                    const std::array<int64_t, 6>& tiles, const std::string& kernel, int threads) {
    const foveate::Kernel* chosen = foveate::choose(kernel.c_str());
    if (!chosen) throw nb::value_error("no such kernel on this machine");
    foveate::Call call{};
    call.dtype = static_cast<foveate::Dtype>(dtype);
    call.q = view(q), call.k = view(k), call.v = view(v), call.out = view(out);
    call.lse = address<float>(lse);
    call.batch = sizes[0], call.heads = sizes[1], call.key_heads = sizes[2];
    call.queries = sizes[3], call.keys = sizes[4], call.dim = sizes[5], call.value_dim = sizes[6];
    call.scale = scale;
    call.softcap = softcap;
    call.distances = address<const float>(distances[0]);
    call.distance_batch = distances[1], call.distance_head = distances[2];
    call.bias = address<const float>(bias[0]);
    for (int n = 0; n < 4; ++n) call.bias_strides[n] = bias[n + 1];
    call.sinks = address<const float>(sinks);
    call.offsets = address<const int64_t>(tiles[0]), call.columns = address<const int64_t>(tiles[1]);
    call.partial = address<const int64_t>(tiles[2]), call.bits = address<const uint64_t>(tiles[3]);
    call.tile_batch = tiles[4], call.tile_heads = tiles[5];
    nb::gil_scoped_release release;
    foveate::forward(call, *chosen, threads);
}

static std::vector<std::string> kernels() {
    std::vector<std::string> found;
    for (const char* name : {"avx512", "avx2", "baseline"})
        if (foveate::choose(name)) found.emplace_back(name);
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
    module.def("kernels", &kernels, "The kernels that run on this machine, the best first.");
    module.def("forward", &forward, nb::arg("dtype"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"),
               nb::arg("lse"), nb::arg("sizes"), nb::arg("scale"), nb::arg("softcap"), nb::arg("distances"), nb::arg("bias"), nb::arg("sinks"), nb::arg("tiles"),
               nb::arg("kernel"), nb::arg("threads"));
}
