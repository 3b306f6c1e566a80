// Pieces of work over threads that are kept from call to call.
#pragma once
#include <cstdint>

namespace foveate {

// work(context, 0), …, work(context, count − 1), each once, on the calling thread and up to threads − 1 others.
void spread_over(int threads, int64_t count, void (*work)(void*, int64_t), void* context);

// Use the threads of the OpenMP runtime that this library has already loaded, if it is one; whether it is.
bool share_threads_of(const char* library);

}  // namespace foveate
