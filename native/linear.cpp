// Calls of linear attention cut into pieces of work: key heads, and where they are few, columns of their states.
#include "linear.hpp"

#include <algorithm>

#include "pieces.hpp"

namespace foveate {
namespace {

constexpr int64_t narrowest = 16;  // columns of a piece

// Columns in a piece, such that there are about so many of them for each key head.
int64_t columns_of(const Linear& call, int64_t slices) {
    const int64_t units = (call.value_dim + narrowest - 1) / narrowest;
    return (units + slices - 1) / slices * narrowest;
}

Columnar piece(const Linear& call, int64_t columns, int64_t n) {
    const int64_t slices = (call.value_dim + columns - 1) / columns, head = n / slices, slice = n % slices;
    const int64_t first = slice * columns;
    return {head / call.key_heads, head % call.key_heads, first, std::min(columns, call.value_dim - first), slice};
}

double products_of(const Linear& call) {
    const double read = call.reads ? double(call.heads) : 0;
    // Each state is fetched from memory and put back, which takes as long as some products.
    return double(call.batch) * double(call.dim) * double(call.value_dim) *
           (double(call.steps) * (double(call.key_heads) * (call.delta_rule ? 2 : 1) + read) + 16 * double(call.key_heads));
}

}  // namespace

void linear(const Linear& call, const Kernel& kernel, int threads) {
    threads = threads_for(products_of(call), threads);
    // Every column is computed alike in any piece, so their number may depend on the threads. A narrow piece repeats what
    // keys and queries are to each other.
    const int64_t heads = call.batch * call.key_heads, wanted = (threads + heads - 1) / heads;
    const int64_t units = (call.value_dim + narrowest - 1) / narrowest;
    const int64_t columns = columns_of(call, std::clamp<int64_t>(wanted, 1, units));
    const int64_t bytes = kernel.linear_bytes(call, columns);
    spread(threads, heads * ((call.value_dim + columns - 1) / columns),
           [&](int64_t n) { kernel.linear(call, piece(call, columns, n), scratch_of(bytes)); });
}

void linear_backward(const LinearGradients& gradients, const Kernel& kernel, int threads) {
    const Linear& call = gradients.call;
    threads = threads_for(3 * products_of(call), threads);
    const int64_t columns = columns_of(call, gradients.slices);  // not by the threads: what slices have is summed
    const int64_t bytes = kernel.linear_backward_bytes(call, columns);
    spread(threads, call.batch * call.key_heads * ((call.value_dim + columns - 1) / columns),
           [&](int64_t n) { kernel.linear_backward(gradients, piece(call, columns, n), scratch_of(bytes)); });
}

}  // namespace foveate
