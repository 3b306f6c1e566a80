// What a kernel is asked: pointers, sizes and strides, and which tiles of the score matrix to look at.
// Nothing here knows Python or torch.
#pragma once
#include <cstdint>

namespace foveate {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int tile = 64;  // query rows and keys of one tile of scores

// [batch, heads, length, dim] with any strides (in elements); the last one is 1.
struct View {
    void* data;
    int64_t batch, head, row;
};

struct Call {
    Dtype dtype;
    View q, k, v, out;
    float* lse;  // [batch, heads, queries], contiguous
    int64_t batch, heads, key_heads, queries, keys, dim, value_dim;
    float scale;

    // What changes the scores, in this order; each null or 0 where there is none.
    float softcap;           // cap · tanh(score / cap)
    const float* distances;  // added: entry keys − 1 + row − key of [batch, heads, queries + keys − 1 + tile]
    int64_t distance_batch, distance_head;
    const float* bias;  // added, −inf hides: batch, head, row, key by these strides
    int64_t bias_strides[4];
    const float* sinks;  // [heads]: one more logit in the sum

    // The tiles in rows, as a summary has them; null: every tile, whole.
    const int64_t* offsets;  // [tile batch, tile heads, tile rows + 1]
    const int64_t* columns;
    const int64_t* partial;  // −1: whole, else the place in bits
    const uint64_t* bits;    // [place, query row]: bit j is key j
    int64_t tile_batch, tile_heads;
};

// One tile of query rows of one head; `scratch` has `scratch_bytes` bytes, aligned to 64.
struct Kernel {
    const char* name;
    void (*forward)(const Call&, int64_t batch, int64_t head, int64_t tile_row, char* scratch);
};

inline int64_t scratch_bytes(const Call& call) {
    // The queries, transposed; scores; a tile of keys and values as float32; two running states of the rows.
    return 4 * tile * (2 * call.dim + 3 * call.value_dim + tile + 5);
}

extern const Kernel kernel_avx512, kernel_avx2, kernel_baseline;

// The best kernel of this machine, or the named one; null if the machine has no such instructions.
const Kernel* choose(const char* name);

// All tiles of query rows of a call, on `threads` threads.
void forward(const Call& call, const Kernel& kernel, int threads);

}  // namespace foveate
