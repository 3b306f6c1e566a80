// Pieces of work over threads that are kept from call to call.
#pragma once
#include <cstdint>

namespace foveate {

// work(context, 0), …, work(context, count − 1), each once, on the calling thread and up to threads − 1 others.
void spread_over(int threads, int64_t count, void (*work)(void*, int64_t), void* context);

}  // namespace foveate
