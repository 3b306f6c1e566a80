// Forward attention of one tile of query rows, compiled once for every instruction set.
//
// Query rows lie in the vector lanes: Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·Pᵀ. Keys and values are read in their natural layout, an
// element at a time as a broadcast, so nothing is packed but the tile's queries, and no sum runs across lanes.
//
//        64 query rows →            for every tile of 64 keys that is not empty:
//   key  ┌───────────────┐            scores  = K·Qᵀ · scale          (registers: ROWS keys × VECTORS vectors)
//    ↓   │ Sᵀ  (lanes)   │            hidden  = −inf                  (partial tiles only, by bits)
//        │               │            running maximum, exp, running sum
//        └───────────────┘            Oᵀ      = Oᵀ · shrink + Vᵀ·Pᵀ   (a fresh product, then one addition)
//
// Each unit has a namespace of its own and uses no template of the standard library: weak symbols of two units would be
// merged in silence, and the wrong instructions with them.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "attention.hpp"

#if defined(FOVEATE_AVX512)
#define UNIT avx512
#elif defined(FOVEATE_AVX2)
#define UNIT avx2
#else
#define UNIT baseline
#endif
#define JOIN(a, b) a##b
#define NAMED(a, b) JOIN(a, b)
#define STRING(a) #a
#define TEXT(a) STRING(a)

namespace foveate {
namespace UNIT {

#if defined(FOVEATE_AVX512)
constexpr int lanes = 16, vectors = 4, broadcasts = 6;
#elif defined(FOVEATE_AVX2)
constexpr int lanes = 8, vectors = 2, broadcasts = 6;
#else
constexpr int lanes = 4, vectors = 2, broadcasts = 4;
#endif
constexpr int tiles_in_group = 32;
constexpr int width = lanes * vectors;  // query rows of one register tile

typedef float Floats __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * lanes), aligned(4), may_alias));

static inline Floats spread(float x) { return x - Floats{}; }  // x − 0 is x, −0 too: a plain broadcast
static inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
static inline void store(float* p, Floats x) { *reinterpret_cast<Floats*>(p) = x; }
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }  // where b is NaN: b
static inline Floats larger_or_nan(Floats a, Floats b) { return a != a ? a : larger(a, b); }

// 2^x for x ≤ 0: an exponent, and a polynomial of the fraction in [−½, ½] (relative error 2e-7); 0 below −126, NaN stays.
static inline Floats power_of_two(Floats x) {
    const Floats low = spread(-126.0f), magic = spread(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number
    Floats clamped = x < low ? low : x;
    Floats shifted = clamped + magic;
    Floats rest = clamped - (shifted - magic);
    Floats y = spread(1.33335581e-3f) + rest * spread(1.54035304e-4f);
    y = spread(9.61812911e-3f) + rest * y;
    y = spread(5.55041087e-2f) + rest * y;
    y = spread(2.40226507e-1f) + rest * y;
    y = spread(6.93147181e-1f) + rest * y;
    y = spread(1.0f) + rest * y;
    Ints bits = reinterpret_cast<Ints&>(y) + (reinterpret_cast<Ints&>(shifted) << 23);
    Floats result = reinterpret_cast<Floats&>(bits);
    result = x < low ? Floats{} : result;
    return x != x ? x : result;
}

static inline float widen(uint16_t half, bool brain) {
    uint32_t word;
    if (brain) {
        word = static_cast<uint32_t>(half) << 16;
    } else {  // float16: its exponent and fraction, moved; subnormals through a product
        uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = static_cast<uint32_t>(half & 0x7fff) << 13;
        float magnitude;
        uint32_t shifted = rest + (rest >= 0x0f800000u ? 0x70000000u : 0u);
        memcpy(&magnitude, &shifted, 4);
        if (rest < 0x0f800000u) magnitude *= 5.192296858534828e33f;  // 2^112
        memcpy(&word, &magnitude, 4);
        word |= sign;
    }
    float wide;
    memcpy(&wide, &word, 4);
    return wide;
}

static inline uint16_t narrow(float x, bool brain) {
    uint32_t word;
    memcpy(&word, &x, 4);
    if (brain) {
        if ((word & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((word >> 16) | 0x40);
        return static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
    }
    uint16_t sign = static_cast<uint16_t>((word >> 16) & 0x8000);
    word &= 0x7fffffff;
    if (word > 0x7f800000) return sign | 0x7e00;
    if (word >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
    if (word < 0x38800000) {                       // subnormal or 0: let the adder round
        float magnitude;
        memcpy(&magnitude, &word, 4);
        magnitude += 0.5f;
        memcpy(&word, &magnitude, 4);
        return sign | static_cast<uint16_t>(word - 0x3f000000);
    }
    return sign | static_cast<uint16_t>((word - 0x38000000 + 0xfff + ((word >> 13) & 1)) >> 13);
}

// Rows first … first + count of a matrix as float32: where they are, or widened into `scratch`.
struct Rows {
    const float* data;
    int64_t stride;
};
static Rows rows_of(const View& view, int64_t batch, int64_t head, int64_t first, int64_t count, int64_t dim,
                    Dtype dtype, float* scratch) {
    int64_t at = batch * view.batch + head * view.head + first * view.row;
    if (dtype == Dtype::float32) return {static_cast<const float*>(view.data) + at, view.row};
    const uint16_t* data = static_cast<const uint16_t*>(view.data) + at;
    bool brain = dtype == Dtype::bfloat16;
    for (int64_t row = 0; row < count; ++row)
        for (int64_t d = 0; d < dim; ++d) scratch[row * dim + d] = widen(data[row * view.row + d], brain);
    return {scratch, dim};
}

// out[i][0 … width) = Σ_j a(i, j) · b[j][0 … width) for `count` consecutive i: the one loop that all time goes into.
template <int count>
static inline void product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t inner, float* out,
                           const float* shrink) {
    Floats sum[count][vectors] = {};
    for (int64_t j = 0; j < inner; ++j) {
        Floats column[vectors];
        for (int n = 0; n < vectors; ++n) column[n] = load(b + j * tile + n * lanes);
        for (int i = 0; i < count; ++i) {
            Floats one = spread(a[i * a_row + j * a_step]);
            for (int n = 0; n < vectors; ++n) sum[i][n] += one * column[n];
        }
    }
    for (int i = 0; i < count; ++i)
        for (int n = 0; n < vectors; ++n) {
            float* place = out + i * tile + n * lanes;
            store(place, shrink ? load(place) * load(shrink + n * lanes) + sum[i][n] : sum[i][n]);
        }
}

static void products(const float* a, int64_t rows, int64_t a_row, int64_t a_step, const float* b, int64_t inner,
                     float* out, const float* shrink) {
    for (int part = 0; part < tile; part += width) {
        int64_t i = 0;
        const float* s = shrink ? shrink + part : nullptr;
        for (; i + broadcasts <= rows; i += broadcasts)
            product<broadcasts>(a + i * a_row, a_row, a_step, b + part, inner, out + i * tile + part, s);
        for (; i + 2 <= rows; i += 2)
            product<2>(a + i * a_row, a_row, a_step, b + part, inner, out + i * tile + part, s);
        for (; i < rows; ++i)
            product<1>(a + i * a_row, a_row, a_step, b + part, inner, out + i * tile + part, s);
    }
}

// The same sum, in which a weight of 0 hides its value, whatever that holds: 0 · inf is 0 here and not NaN.
static void guarded_products(const float* v, int64_t value_dim, int64_t v_row, const float* weights, int64_t keys,
                             float* out, const float* shrink) {
    for (int64_t d = 0; d < value_dim; ++d)
        for (int n = 0; n < tile; n += lanes) {
            Floats sum{};
            for (int64_t key = 0; key < keys; ++key) {
                const Floats weight = load(weights + key * tile + n);
                sum += weight == Floats{} ? Floats{} : weight * spread(v[key * v_row + d]);
            }
            float* place = out + d * tile + n;
            store(place, load(place) * load(shrink + n) + sum);
        }
}

static bool finite(const Rows& rows, int64_t count, int64_t dim) {
    float sum = 0;
    for (int64_t row = 0; row < count; ++row)
        for (int64_t d = 0; d < dim; ++d) sum += rows.data[row * rows.stride + d] * 0.0f;
    return sum == 0;
}

// Bit j of word r becomes bit r of word j: three lines from Hacker's Delight, section 7-3.
static void transpose(uint64_t words[tile]) {
    uint64_t mask = 0x00000000ffffffffull;
    for (int step = 32; step; step >>= 1, mask ^= mask << step)
        for (int k = 0; k < tile; k = (k + step + 1) & ~step) {
            uint64_t swap = ((words[k] >> step) ^ words[k + step]) & mask;
            words[k] ^= swap << step;
            words[k + step] ^= swap;
        }
}

// tanh: near 0 its series, else by 2^x; relative error 2e-7.
static inline Floats tangent(Floats x) {
    const Floats size = x < Floats{} ? -x : x;
    const Floats t = power_of_two(size * spread(-2.88539008f));
    const Floats far = (spread(1.0f) - t) / (spread(1.0f) + t);
    const Floats s = x * x;
    Floats near = spread(2.18694885e-2f);
    near = near * s - spread(5.39682540e-2f);
    near = near * s + spread(1.33333333e-1f);
    near = near * s - spread(3.33333333e-1f);
    near = near * s * x + x;
    return size < spread(0.3f) ? near : x < Floats{} ? -far : far;
}

// Scaled, capped and biased scores of a tile, for rows in the lanes.
static void adjust(const Call& call, int64_t batch, int64_t head, int64_t first_row, int64_t rows, int64_t first_key,
                   int64_t keys, float scale, float* scores) {
    const float* distances = call.distances;
    if (distances) distances += batch * call.distance_batch + head * call.distance_head + call.keys - 1 + first_row;
    const float* bias = call.bias;
    const int64_t *strides = call.bias_strides, row_step = strides[2], key_step = strides[3];
    if (bias) bias += batch * strides[0] + head * strides[1] + first_row * row_step + first_key * key_step;
    for (int64_t key = 0; key < keys; ++key)
        for (int n = 0; n < tile; n += lanes) {
            float* place = scores + key * tile + n;
            Floats score = load(place) * spread(scale);
            if (call.softcap != 0) score = spread(call.softcap) * tangent(score / spread(call.softcap));
            if (distances) score += load(distances + n - first_key - key);
            if (bias) {
                Floats added{};
                for (int lane = 0; lane < lanes && n + lane < rows; ++lane)
                    added[lane] = bias[(n + lane) * row_step + key * key_step];
                score = added == spread(-INFINITY) ? added : score + added;
            }
            store(place, score);
        }
}

// −inf where a row (a lane) does not see a key, for the lanes from row n on.
static void hide(float* scores, const uint64_t* seen, int n, int64_t keys) {
    Ints bit;
    for (int lane = 0; lane < lanes; ++lane) bit[lane] = 1 << lane;
    for (int64_t key = 0; key < keys; ++key) {
        const Ints word = Ints{} + static_cast<int32_t>((seen[key] >> n) & ((1ull << lanes) - 1));
        store(scores + key * tile, (word & bit) != 0 ? load(scores + key * tile) : spread(-INFINITY));
    }
}

// The running state of 64 rows: the maximum (a binary logarithm), the sum of the weights, and their sum of values.
struct State {
    float *top, *total, *out;
};

static void clear(const State& state, int64_t value_dim) {
    for (int n = 0; n < tile; n += lanes) {
        store(state.top + n, spread(-INFINITY));
        store(state.total + n, Floats{});
    }
    memset(state.out, 0, sizeof(float) * tile * value_dim);
}

// What was summed over other keys joins `whole`. Tiles are summed in groups first, so that a long row is not rounded
// once for every tile: at 65,536 keys that keeps the relative error below 1e-6.
static void join(const State& whole, const State& group, int64_t value_dim) {
    for (int n = 0; n < tile; n += lanes) {
        const Floats most = larger_or_nan(load(whole.top + n), load(group.top + n));
        const Floats base = most == spread(-INFINITY) ? Floats{} : most;
        const Floats mine = power_of_two(load(whole.top + n) - base), theirs = power_of_two(load(group.top + n) - base);
        store(whole.total + n, load(whole.total + n) * mine + load(group.total + n) * theirs);
        store(whole.top + n, most);
        for (int64_t d = 0; d < value_dim; ++d) {
            float* place = whole.out + d * tile + n;
            store(place, load(place) * mine + load(group.out + d * tile + n) * theirs);
        }
    }
}

static void forward(const Call& call, int64_t batch, int64_t head, int64_t tile_row, char* scratch) {
    const int64_t dim = call.dim, value_dim = call.value_dim, key_head = head / (call.heads / call.key_heads);
    const int64_t first_row = tile_row * tile;
    const float log2e = 1.44269504088896f, ln2 = 0.693147180559945f;
    const float sign = call.scale < 0 ? -1.0f : 1.0f, scale = sign * call.scale;
    const bool adjusted = call.softcap != 0 || call.distances || call.bias;
    const float binary = adjusted ? log2e : scale * log2e;
    const int64_t rows = call.queries - first_row < tile ? call.queries - first_row : tile;
    float* q = reinterpret_cast<float*>(scratch);
    float* scores = q + tile * dim;
    float* wide_k = scores + tile * tile;
    float* wide_v = wide_k + tile * dim;
    float* shrink = wide_v + tile * value_dim;
    State state{shrink + tile, shrink + 2 * tile, shrink + 5 * tile};
    State group{shrink + 3 * tile, shrink + 4 * tile, state.out + tile * value_dim};

    memset(q, 0, sizeof(float) * tile * dim);
    Rows q_rows = rows_of(call.q, batch, head, first_row, rows, dim, call.dtype, wide_k);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t d = 0; d < dim; ++d) q[d * tile + row] = sign * q_rows.data[row * q_rows.stride + d];
    clear(state, value_dim);
    clear(group, value_dim);
    if (call.sinks && call.sinks[head] != -INFINITY)
        for (int row = 0; row < tile; ++row) state.top[row] = call.sinks[head] * log2e, state.total[row] = 1;

    const int64_t tile_rows = (call.queries + tile - 1) / tile, key_tiles = (call.keys + tile - 1) / tile;
    int64_t first = 0, end = key_tiles;
    if (call.offsets) {
        int64_t b = call.tile_batch > 1 ? batch : 0, h = call.tile_heads > 1 ? head : 0;
        const int64_t* place = call.offsets + (b * call.tile_heads + h) * (tile_rows + 1) + tile_row;
        first = place[0], end = place[1];
    }
    for (int64_t entry = first; entry < end; ++entry) {
        if (entry > first && (entry - first) % tiles_in_group == 0) {
            join(state, group, value_dim);
            clear(group, value_dim);
        }
        const int64_t first_key = (call.offsets ? call.columns[entry] : entry) * tile;
        const int64_t keys = call.keys - first_key < tile ? call.keys - first_key : tile;
        Rows k = rows_of(call.k, batch, key_head, first_key, keys, dim, call.dtype, wide_k);
        Rows v = rows_of(call.v, batch, key_head, first_key, keys, value_dim, call.dtype, wide_v);
        products(k.data, keys, k.stride, 1, q, dim, scores, nullptr);
        if (adjusted) adjust(call, batch, head, first_row, rows, first_key, keys, scale, scores);

        const bool masked = call.offsets && call.partial[entry] >= 0;
        uint64_t seen[tile];
        if (masked) {
            memcpy(seen, call.bits + call.partial[entry] * tile, sizeof seen);
            transpose(seen);
        }
        for (int n = 0; n < tile; n += lanes) {
            if (masked) hide(scores + n, seen, n, keys);
            // The maximum is of raw scores: the scale is positive, and what is kept is its binary logarithm.
            Floats most = spread(-INFINITY);
            for (int64_t key = 0; key < keys; ++key) most = larger_or_nan(most, load(scores + key * tile + n));
            most = larger_or_nan(load(group.top + n), most * spread(binary));
            const Floats base = most == spread(-INFINITY) ? Floats{} : most;
            const Floats less = power_of_two(load(group.top + n) - base);
            Floats sum{};
            for (int64_t key = 0; key < keys; ++key) {
                float* place = scores + key * tile + n;
                const Floats weight = power_of_two(load(place) * spread(binary) - base);
                store(place, weight);
                sum += weight;
            }
            store(shrink + n, less);
            store(group.top + n, most);
            store(group.total + n, load(group.total + n) * less + sum);
        }
        if ((masked || call.bias) && !finite(v, keys, value_dim))
            guarded_products(v.data, value_dim, v.stride, scores, keys, group.out, shrink);
        else
            products(v.data, value_dim, 1, v.stride, scores, keys, group.out, shrink);
    }
    join(state, group, value_dim);

    const bool brain = call.dtype == Dtype::bfloat16;
    for (int64_t row = 0; row < rows; ++row) {
        const float sum = state.total[row], factor = sum == 0 ? 0.0f : 1.0f / sum;
        call.lse[(batch * call.heads + head) * call.queries + first_row + row] =
            sum == 0 ? -INFINITY : state.top[row] * ln2 + logf(sum);
        const int64_t at = batch * call.out.batch + head * call.out.head + (first_row + row) * call.out.row;
        for (int64_t d = 0; d < value_dim; ++d) {
            const float x = sum == 0 ? 0.0f : state.out[d * tile + row] * factor;
            if (call.dtype == Dtype::float32)
                static_cast<float*>(call.out.data)[at + d] = x;
            else
                static_cast<uint16_t*>(call.out.data)[at + d] = narrow(x, brain);
        }
    }
}

}  // namespace UNIT

const Kernel NAMED(kernel_, UNIT) = {TEXT(UNIT), UNIT::forward};

}  // namespace foveate
