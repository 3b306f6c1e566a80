// What the kernels of linear attention are asked: pointers, sizes and strides. Nothing here knows Python or torch.
//
//     S_t = (I − δ·β_t·k_t·k_tᵀ)·A_t·S_{t−1} + β_t·k_t·v_tᵀ        A_t = diag(exp(decay_t))
//     o_t = scale · S_tᵀ·q_t
#pragma once
#include "attention.hpp"

namespace foveate {

struct Typed {
    View view;
    Dtype dtype;
};

// float32, one number or `dim` contiguous ones for each step; a stride is 0 where one stands for all. Null: there is none.
struct Gate {
    const float* data;
    int64_t batch, head, step;
};

struct Linear {
    Typed q, k, v, out;  // q and out: [batch, heads, steps, …], k and v: [batch, key heads, steps, …]
    int64_t batch, heads, key_heads, steps, dim, value_dim;
    float scale;
    bool delta_rule;
    bool reads;       // every step reads the state it has left; without it there is no q and no out
    Gate decay;       // natural logarithms ≤ 0
    bool by_channel;  // decay has `dim` numbers a step
    Gate beta;
    const uint8_t* resets;  // the steps before which the state is emptied
    int64_t reset_batch;
    const float* state;  // [batch, key heads, dim, value_dim], contiguous
    float* last;
    float* saved;     // [batch, key heads, segments, dim, value_dim]: the states before steps 0, segment, 2 · segment …; or null
    int64_t segment;  // a multiple of `chunk_steps`
};

constexpr int64_t chunk_steps = 16;

// Gradients are float32 and contiguous. Columns of the state do not depend on each other, so pieces of work are slices of
// them; what each has for q, k, decay and beta is kept apart: [slices, batch, …], to be summed.
struct LinearGradients {
    Linear call;
    Typed d_out;
    const float* d_last;
    float *dq, *dk, *dv, *d_decay, *d_beta, *d_state;  // d_decay, d_beta: null where there is none
    int64_t slices;
};

// Some columns of the states of one key head.
struct Columnar {
    int64_t batch, key_head, first, count, slice;
};

inline int64_t segments_of(const Linear& call) { return (call.steps + call.segment - 1) / call.segment; }

void linear(const Linear& call, const Kernel& kernel, int threads);
// Whether no decay is above 0 and, by the delta rule, every beta is from 0 to 2; NaN passes.
bool has_fine_gates(const Linear& call);
void linear_backward(const LinearGradients& gradients, const Kernel& kernel, int threads);

}  // namespace foveate
