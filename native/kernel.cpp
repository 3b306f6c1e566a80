// The kernels of one instruction set; compiled once for each, with its own flags.
//
// Query rows lie in the vector lanes: Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·Pᵀ. Keys and values are read in their natural layout, an
// element at a time as a broadcast, so nothing is packed but a tile's queries, and no sum runs across lanes.
//
// Each unit has a namespace of its own and uses no template of the standard library: weak symbols of two units would be
// merged in silence, and the wrong instructions with them.
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "linear.hpp"

#if defined(FOVEATE_AMX)
#define UNIT amx
#define FOVEATE_PAIRS
#define FOVEATE_AVX512
#elif defined(FOVEATE_AVX512BF16)
#define UNIT avx512bf16
#define FOVEATE_PAIRS
#define FOVEATE_AVX512
#elif defined(FOVEATE_AVX512)
#define UNIT avx512
#elif defined(FOVEATE_AVX2)
#define UNIT avx2
#elif defined(FOVEATE_NEON)
#define UNIT neon
#else
#define UNIT baseline
#endif
#define JOIN(a, b) a##b
#define NAMED(a, b) JOIN(a, b)
#define STRING(a) #a
#define TEXT(a) STRING(a)

namespace foveate {
namespace UNIT {
#include "lanes.hpp"
#include "products.hpp"
#include "tiles.hpp"
#include "scores.hpp"
#include "bases.hpp"
#include "pairs.hpp"
#include "forward.hpp"
#include "forward_pairs.hpp"
#include "backward.hpp"
#include "backward_pairs.hpp"
#include "score_gradients.hpp"
#include "decode.hpp"
#include "gathered.hpp"
#include "gathered_pairs.hpp"
#include "gathered_backward.hpp"
#include "looked.hpp"
#include "linear_chunk.hpp"
#include "linear_forward.hpp"
#include "linear_backward.hpp"

// bfloat16 in pairs, where the instructions are there; everything else as float32.
static int64_t any_forward_bytes(const Call& call, int64_t tile_rows) {
#if defined(FOVEATE_PAIRS)
    if (call.dtype == Dtype::bfloat16) return pair_bytes(call, tile_rows);
#endif
    return forward_bytes(call, tile_rows);
}
static void any_forward(const Call& call, const Band& band, char* scratch) {
#if defined(FOVEATE_PAIRS)
    if (call.dtype == Dtype::bfloat16) return forward_pairs(call, band, scratch);
#endif
    forward(call, band, scratch);
}
static int64_t any_gathered_bytes(const Call& call) {
#if defined(FOVEATE_AMX)
    if (gathers_pairs(call)) return gathered_pair_bytes(call);
#endif
    return gathered_bytes(call);
}
static void any_gathered(const Call& call, const Band& band, char* scratch) {
#if defined(FOVEATE_AMX)
    if (gathers_pairs(call)) return gathered_pairs(call, band, scratch);
#endif
    gathered(call, band, scratch);
}
static int64_t any_backward_bytes(const Call& call, int64_t tile_rows) {
#if defined(FOVEATE_PAIRS)
    if (call.dtype == Dtype::bfloat16) return backward_pair_bytes(call, tile_rows);
#endif
    return backward_bytes(call, tile_rows);
}
static void any_backward(const Gradients& g, const Band& band, int64_t turn, int64_t turns, char* scratch) {
#if defined(FOVEATE_PAIRS)
    if (g.call.dtype == Dtype::bfloat16) return backward_pairs(g, band, turn, turns, scratch);
#endif
    backward(g, band, turn, turns, scratch);
}
}  // namespace UNIT

extern const Kernel NAMED(kernel_, UNIT);  // or it would be this unit's alone
const Kernel NAMED(kernel_, UNIT) = {
    TEXT(UNIT),
    UNIT::any_forward_bytes, UNIT::any_forward,
    UNIT::any_backward_bytes, UNIT::any_backward,
    UNIT::score_gradient_bytes, UNIT::bias_gradient, UNIT::distance_gradient,
    UNIT::decode_bytes, UNIT::part_floats, UNIT::decode, UNIT::merge,
    UNIT::any_gathered_bytes, UNIT::gathered_height, UNIT::gathered_units, UNIT::any_gathered,
    UNIT::gathered_backward_bytes, UNIT::gathered_backward,
    UNIT::looked_bytes, UNIT::rows_looked, UNIT::keys_received,
    UNIT::linear_bytes, UNIT::linear, UNIT::linear_backward_bytes, UNIT::linear_backward,
};

}  // namespace foveate
