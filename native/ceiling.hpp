// How fast this machine can be at most: what a benchmark holds a kernel against.
#pragma once
#include <string>

namespace foveate {

// "float32": multiply-adds in vectors, GFLOP/s. "bfloat16": the same in matrix or dot-product instructions, 0 where
// there are none. "read": a stream of reads from a buffer larger than most caches, GB/s. −1 for any other word.
double ceiling(const std::string& what, int threads);

}  // namespace foveate
