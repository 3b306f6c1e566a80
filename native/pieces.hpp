// Pieces of work: over threads, with scratch that each thread keeps.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "pool.hpp"

namespace foveate {

// Each thread keeps its scratch from call to call.
inline char* scratch_of(int64_t bytes) {
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };
    thread_local std::unique_ptr<char, Free> memory;
    thread_local int64_t size = 0;
    const auto renew = [](int64_t wanted) {
        void* found = nullptr;
        memory.reset();
        if (posix_memalign(&found, 64, static_cast<size_t>(wanted))) std::abort();
        memory.reset(static_cast<char*>(found)), size = wanted;
    };
#if defined(FOVEATE_EXACT_SCRATCH)
    // For tests: not a byte more than was asked for, and NaN instead of what the last call left.
    renew(bytes);
    std::memset(memory.get(), 0xff, static_cast<size_t>(bytes));
#else
    if (size < bytes) renew((bytes + 4095) / 4096 * 4096);
#endif
    return memory.get();
}

template <typename Body>
void spread(int threads, int64_t count, const Body& body) {
    spread_over(threads, count, [](void* context, int64_t n) { (*static_cast<const Body*>(context))(n); },
                const_cast<void*>(static_cast<const void*>(&body)));
}

// Waking a thread costs some microseconds: not worth it below about a tenth of a millisecond of work.
inline int threads_for(double products, int threads) { return products < 2e6 ? 1 : threads; }

}  // namespace foveate
