// The choice of a kernel, and a call spread over threads.
#include "attention.hpp"

#include <cstdlib>
#include <cstring>
#include <memory>

#include "pool.hpp"

namespace foveate {

static bool runs_here(const Kernel& kernel) {
#if defined(__x86_64__)
    if (&kernel == &kernel_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (&kernel == &kernel_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return &kernel == &kernel_baseline;
}

const Kernel* choose(const char* name) {
#if defined(__x86_64__)
    const Kernel* known[] = {&kernel_avx512, &kernel_avx2, &kernel_baseline};
#else
    const Kernel* known[] = {&kernel_baseline};
#endif
    for (const Kernel* kernel : known)
        if ((!*name || !std::strcmp(name, kernel->name)) && runs_here(*kernel)) return kernel;
    return nullptr;
}

namespace {

// Each thread keeps its scratch from call to call.
char* scratch_of(int64_t bytes) {
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };
    thread_local std::unique_ptr<char, Free> memory;
    thread_local int64_t size = 0;
    if (size < bytes) {
        size = (bytes + 4095) / 4096 * 4096;
        memory.reset(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(size))));
    }
    return memory.get();
}

struct Work {
    const Call& call;
    const Kernel& kernel;
    int64_t tile_rows, bytes;
};

void one_tile(void* context, int64_t index) {
    const Work& work = *static_cast<Work*>(context);
    // The last rows first: under a causal pattern they are the longest.
    const int64_t row = work.tile_rows - 1 - index % work.tile_rows, at = index / work.tile_rows;
    work.kernel.forward(work.call, at / work.call.heads, at % work.call.heads, row, scratch_of(work.bytes));
}

}  // namespace

void forward(const Call& call, const Kernel& kernel, int threads) {
    const int64_t tile_rows = (call.queries + tile - 1) / tile, count = call.batch * call.heads * tile_rows;
    Work work{call, kernel, tile_rows, scratch_bytes(call)};
    // Waking a thread costs some microseconds: not worth it below about a tenth of a millisecond of work.
    const double products = double(count) * tile * double(call.keys) * double(call.dim + call.value_dim);
    spread_over(products < 2e6 ? 1 : threads, count, one_tile, &work);
}

}  // namespace foveate
