// What a kernel is asked: pointers, sizes and strides, who sees whom, and what changes the scores.
// Nothing here knows Python or torch.
#pragma once
#include <atomic>
#include <cstdint>

namespace foveate {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int tile = 64;  // query rows and keys of one tile of scores

// [batch, heads, length, dim] with any strides (in elements); the last one is 1.
struct View {
    void* data;
    int64_t batch, head, row;
};

// Keys, or blocks of keys, that each query chose: entry n of a list are the keys from n · block on. In any order, an entry
// outside the call is none, a repeated one counts once. Each of `heads` lists serves neighbouring query heads.
struct Selection {
    const void* indices;  // [batch, heads, queries, count], int64 if `wide`, else int32; null: no selection
    int64_t strides[3];   // of batch, head and query (0: shared); the last one is 1
    int64_t count, block, heads;
    bool wide;
    int32_t* outside;     // becomes 1 if there is an entry that is neither in the call nor −1
};

struct Call {
    Dtype dtype;
    View q, k, v, out;
    float* lse;   // [batch, heads, queries], contiguous
    float* rest;  // [batch, heads, queries, 4]: what a backward pass makes the weights from again; null: not kept, and it has
                  // to find out by itself where the log-sum-exp is large. With a selection it is never null.
    int64_t batch, heads, key_heads, queries, keys, dim, value_dim;
    float scale;

    // Where keys and values lie in pages: k and v are [pages, heads, page_size, dim], `batch` being the stride of pages,
    // and key n of batch row b is in page pages[b · page_row + n / page_size]. Null: one stretch for each batch row.
    const int64_t* pages;
    int64_t page_row, page_size;

    // What changes the scores, in this order; each null or 0 where there is none.
    float softcap;           // cap · tanh(score / cap)
    const float* distances;  // added: entry keys − 1 + row − key of [batch, heads, queries + keys − 1 + tile]
    int64_t distance_batch, distance_head;
    const float* bias;  // added, −inf hides: batch, head, row, key by these strides
    int64_t bias_strides[4];
    const float* sinks;  // [heads]: one more logit in the sum

    // Dropout: a weight is kept if its Philox word is at least `threshold`, and then multiplied by `boost`.
    uint64_t seed, threshold;  // threshold 0: nothing is dropped
    float boost;

    // Who sees whom. A row has the position row + starts[b] (null: row + start), and the keys lie before lengths[b] (null:
    // before `keys`). Without a summary it sees those from position − left to position + right (−1: no limit).
    const int64_t *starts, *lengths;
    int64_t start, left, right;
    // With a summary: its tiles in rows.
    const int64_t* offsets;  // [tile batch, tile heads, tile rows + 1]
    const int64_t* columns;
    const int64_t* partial;  // −1: whole, else the place in bits
    const uint64_t* bits;    // [place, query row]: bit j is key j
    int64_t tile_batch, tile_heads;
    // With a selection: of what the reach shows, the chosen keys alone. Then there are no summary, bias, dropout and pages.
    Selection chosen;
};

// What the gradients of scores are made from, for one row: a weight is 2^((score − base) · binary − above).
struct Row {
    float base, above, moves, delta;
};

// The backward pass: `call` as in the forward pass, with its results; gradients are float32 and contiguous.
struct Gradients {
    Call call;
    View d_out;
    const float* d_lse;             // [batch, heads, queries], or null
    float *dq, *dk, *dv;            // added to what is there (zeros)
    float* d_bias;                  // contiguous, sizes as bias_sizes; null: not wanted
    int64_t bias_sizes[4];          // 1 where one entry stands for all
    double* d_distances;            // as distances; null: not wanted
    int64_t distance_batches;       // 1 or batch
    Row* rows;                      // [batch, heads, queries], if something added to the scores wants a gradient
    bool other_order;               // the forward pass took its sums in another order than this one does
    std::atomic<int64_t>* passed;   // [batch, key heads, turns]: the key tiles before this one are done
};

// What was looked at.
struct Looked {
    Call call;  // `out` and v are not used
    int64_t top;
    int64_t* indices;  // [batch, heads, queries, top]: the heaviest keys, heaviest first; −1 where there is none
    float* weights;    // likewise
    float *rest, *entropy;  // [batch, heads, queries]
    float* received;        // [batch, heads, keys], zeros before
    float *bases, *factors;  // [batch, heads, queries]: a weight is exp(score − base) · factor; for the second pass
    std::atomic<int64_t>* passed;
};

struct Linear;  // linear.hpp has these
struct LinearGradients;
struct Columnar;

// Rows of tiles that one piece of work takes: what it prepares of a tile of keys serves all of them.
struct Band {
    int64_t batch, head, first, count;  // in tile rows
};

// The functions of one instruction set; `scratch` is aligned to 64 and as large as the function before says.
struct Kernel {
    const char* name;
    int64_t (*forward_bytes)(const Call&, int64_t tile_rows);
    void (*forward)(const Call&, const Band&, char* scratch);
    int64_t (*backward_bytes)(const Call&, int64_t tile_rows);
    void (*backward)(const Gradients&, const Band&, int64_t turn, int64_t turns, char* scratch);
    int64_t (*score_gradient_bytes)(const Call&);
    void (*bias_gradient)(const Gradients&, int64_t owner, char* scratch);
    void (*distance_gradient)(const Gradients&, int64_t owner, double* sums, char* scratch);
    int64_t (*decode_bytes)(const Call&);
    int64_t (*part_floats)(const Call&);  // of one row
    void (*decode)(const Call&, int64_t batch, int64_t key_head, int64_t first, int64_t end, float* part, char* scratch);
    void (*merge)(const Call&, int64_t batch, int64_t key_head, const float* parts, int64_t count, int64_t step, char* scratch);
    int64_t (*gathered_bytes)(const Call&);
    int64_t (*gathered_height)(const Call&);  // queries of a piece of work
    int64_t (*gathered_units)(const Call&);   // lists of a query; `head` of a band is one of them, `first` a query
    void (*gathered)(const Call&, const Band&, char* scratch);
    int64_t (*gathered_backward_bytes)(const Call&);
    void (*gathered_backward)(const Gradients&, const Band&, int64_t turn, int64_t turns, char* scratch);
    int64_t (*looked_bytes)(const Looked&);
    void (*rows_looked)(const Looked&, const Band&, char* scratch);
    void (*keys_received)(const Looked&, const Band&, int64_t turn, int64_t turns, char* scratch);
    int64_t (*linear_bytes)(const Linear&, int64_t columns);
    void (*linear)(const Linear&, const Columnar&, char* scratch);
    int64_t (*linear_backward_bytes)(const Linear&, int64_t columns);
    void (*linear_backward)(const LinearGradients&, const Columnar&, char* scratch);
};

inline int64_t start_of(const Call& call, int64_t batch) { return call.starts ? call.starts[batch] : call.start; }
inline int64_t tiles_of(int64_t length) { return (length + tile - 1) / tile; }

// Every kernel that was compiled, best first, with those that this machine cannot run.
int64_t known_kernels(const Kernel* const** all);
const char* why_not_here(const Kernel& kernel);  // what this machine lacks for it; null if it runs here
// The best kernel of this machine, or the named one; null if it does not run here.
const Kernel* choose(const char* name);

// The whole of a call, on `threads` threads.
void forward(const Call& call, const Kernel& kernel, int threads);
void backward(const Gradients& gradients, const Kernel& kernel, int threads);
void looked(const Looked& looked, const Kernel& kernel, int threads);

}  // namespace foveate
