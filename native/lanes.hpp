// Vectors of one instruction set: arithmetic, powers of two, bits to lanes, transposition, half precision.
// Included by kernel.cpp inside the namespace of its unit; no template of the standard library, as said there.

#if defined(FOVEATE_AVX512)
constexpr int lanes = 16;
#elif defined(FOVEATE_AVX2)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * lanes), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * lanes), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * lanes), may_alias));
typedef float Loose __attribute__((vector_size(4 * lanes), aligned(2), may_alias));  // in memory: bfloat16 comes here too

static inline Floats spread(float x) { return x - Floats{}; }  // x − 0 is x, −0 too: a plain broadcast
static inline Floats load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
static inline void store(float* p, Floats x) { *reinterpret_cast<Loose*>(p) = x; }
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }  // where one is NaN: b
static inline Floats size_of(Floats x) { return x < Floats{} ? -x : x; }
static inline Ints bits_of(Floats x) { return reinterpret_cast<Ints&>(x); }
static inline Floats floats_of(Ints x) { return reinterpret_cast<Floats&>(x); }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// a · b + c in one instruction where there is one, whatever a compiler makes of the code around it; and a product that is
// not fused with what is added to it. So a score is the same number in every pass.
#if defined(FOVEATE_AVX512) || defined(FOVEATE_AVX2) || defined(FOVEATE_NEON)
constexpr bool fuses = true;
#else
constexpr bool fuses = false;
#endif
static inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(FOVEATE_AVX512)
    __m512 sum = _mm512_fmadd_ps(reinterpret_cast<__m512&>(a), reinterpret_cast<__m512&>(b), reinterpret_cast<__m512&>(c));
#elif defined(FOVEATE_AVX2)
    __m256 sum = _mm256_fmadd_ps(reinterpret_cast<__m256&>(a), reinterpret_cast<__m256&>(b), reinterpret_cast<__m256&>(c));
#elif defined(FOVEATE_NEON)
    float32x4_t sum = vfmaq_f32(reinterpret_cast<float32x4_t&>(c), reinterpret_cast<float32x4_t&>(a), reinterpret_cast<float32x4_t&>(b));
#else
    Floats sum = a * b + c;
#endif
    return reinterpret_cast<Floats&>(sum);
}
static inline Floats rounded(Floats x) {
#if defined(FOVEATE_AVX512)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(FOVEATE_NEON)
    asm("" : "+w"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}

static inline bool any(Ints truth) {
#if defined(FOVEATE_AVX512)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i&>(truth)) != 0;
#elif defined(FOVEATE_AVX2)
    return _mm256_movemask_ps(reinterpret_cast<__m256&>(truth)) != 0;
#else
    int32_t found = 0;
    for (int lane = 0; lane < lanes; ++lane) found |= truth[lane];
    return found != 0;
#endif
}

// −1 in every lane whose bit is 1.
static inline Ints chosen(uint64_t bits) {
    Ints bit, word = Ints{} + static_cast<int32_t>(bits & ((1ull << lanes) - 1));
    for (int lane = 0; lane < lanes; ++lane) bit[lane] = 1 << lane;
    return (word & bit) != 0;
}

static inline Floats pick(uint64_t bits, Floats yes, Floats no) {
#if defined(FOVEATE_AVX512)
    return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512&>(no),
                                reinterpret_cast<__m512&>(yes));
#else
    return chosen(bits) ? yes : no;
#endif
}

// 2^x for x ≤ 20 or so: an exponent, and a polynomial of the fraction; exactly 0 for −inf; NaN stays; 2^0 is exactly 1.
// Relative error of the polynomial 9e-8, 2e-9 with all digits, 1e-4 with few, where bfloat16 is what becomes of it.
enum class Digits { few, most, all };

template <Digits digits = Digits::most>
static inline Floats power_of_two(Floats x) {
#if defined(FOVEATE_AVX512)
    // x − ⌊x⌋, 0 for −inf; and a product with 2^⌊x⌋, 0 far below.
    __m512 part = _mm512_reduce_ps(reinterpret_cast<__m512&>(x), 0x09);
    const Floats rest = reinterpret_cast<Floats&>(part);
    Floats y;
    if (digits == Digits::few) {
        y = spread(0.227644976f) + rest * spread(0.0770670557f);
        y = spread(0.69511679f) + rest * y;
    } else if (digits == Digits::all) {
        y = spread(1.24678459e-3f) + rest * spread(2.16129171e-4f);
        y = spread(9.67545162e-3f) + rest * y;
        y = spread(5.54852806e-2f) + rest * y;
        y = spread(0.240229306f) + rest * y;
        y = spread(0.693147044f) + rest * y;
    } else {
        y = spread(9.01702985e-3f) + rest * spread(1.86713029e-3f);
        y = spread(5.57999134e-2f) + rest * y;
        y = spread(0.24016445f) + rest * y;
        y = spread(0.693151312f) + rest * y;
    }
    y = spread(1.0f) + rest * y;
    __m512 scaled = _mm512_scalef_ps(reinterpret_cast<__m512&>(y), reinterpret_cast<__m512&>(x));
    return reinterpret_cast<Floats&>(scaled);
#else
    const Floats magic = spread(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number
    const Floats low = spread(-126.0f);
    const Floats clamped = x < low ? low : x;
    const Floats shifted = clamped + magic, whole = shifted - magic, rest = clamped - whole;
    Floats y;
    if (digits == Digits::few) {
        y = spread(0.242210965f) + rest * spread(0.05500893f);
        y = spread(0.693282928f) + rest * y;
    } else if (digits == Digits::all) {
        y = spread(1.33335581e-3f) + rest * spread(1.54035304e-4f);
        y = spread(9.61812911e-3f) + rest * y;
        y = spread(5.55041087e-2f) + rest * y;
        y = spread(2.40226507e-1f) + rest * y;
        y = spread(6.93147181e-1f) + rest * y;
    } else {
        y = spread(9.67151274e-3f) + rest * spread(1.32647271e-3f);
        y = spread(5.55073374e-2f) + rest * y;
        y = spread(0.240222421f) + rest * y;
        y = spread(0.693146978f) + rest * y;
    }
    y = spread(1.0f) + rest * y;
    Floats result = floats_of(bits_of(y) + (bits_of(shifted) << 23));
    result = x < low ? Floats{} : result;
    return x != x ? x : result;
#endif
}

// log x = power · ln 2 + what is returned, for a normal x: a series of (m − 1)/(m + 1), where m is within √2 of 1; relative
// error 1e-7. NaN and infinity are returned.
static inline Floats logarithm(Floats x, Ints& power) {
    power = (bits_of(x) - 0x3f3504f3) >> 23;
    const Floats m = floats_of(bits_of(x) - (power << 23)), s = (m - spread(1.0f)) / (m + spread(1.0f)), z = s * s;
    Floats y = spread(0.285714286f) + z * spread(0.222222222f);
    y = spread(0.4f) + z * y;
    y = spread(0.666666667f) + z * y;
    return x - x == Floats{} ? (s + s) + s * z * y : x;
}

// tanh: up to 1 an odd polynomial, beyond it 1 less what is small; relative error 1e-7.
static inline Floats tangent(Floats x) {
    const Floats size = size_of(x);
    const Floats t = power_of_two<Digits::all>(size * spread(-2.88539008f));
    const Floats far = spread(1.0f) - (t + t) / (spread(1.0f) + t);
    const Floats s = x * x;
    Floats near = spread(-0.000358451535f);
    near = near * s + spread(0.00230136303f);
    near = near * s - spread(0.00794610438f);
    near = near * s + spread(0.0214866562f);
    near = near * s - spread(0.0538798023f);
    near = near * s + spread(0.133323446f);
    near = near * s - spread(0.333332954f);
    near = near * s * x + x;
    return size < spread(1.0f) ? near : x < Floats{} ? -far : far;
}

static inline float sum_of(Floats x) {
    float halves[lanes];
    store(halves, x);
    for (int step = lanes / 2; step; step /= 2)
        for (int lane = 0; lane < step; ++lane) halves[lane] += halves[lane + step];
    return halves[0];
}

// Two vectors in blocks of `step` lanes: a₀ b₀ a₂ b₂ … and a₁ b₁ a₃ b₃ …
template <int step>
static inline void sort_blocks(Floats a, Floats b, Floats& even, Floats& odd) {
#if defined(__clang__)  // has no shuffle by a vector, and makes one of these lanes
    for (int lane = 0; lane < lanes; ++lane) {
        even[lane] = lane & step ? b[lane - step] : a[lane];
        odd[lane] = lane & step ? b[lane] : a[lane + step];
    }
#else
    Ints low, high;
    for (int lane = 0; lane < lanes; ++lane) {
        const bool second = lane & step;
        low[lane] = second ? lanes + lane - step : lane;
        high[lane] = second ? lanes + lane : lane + step;
    }
    even = __builtin_shuffle(a, b, low), odd = __builtin_shuffle(a, b, high);
#endif
}

// A square of lanes × lanes, rows to columns: log₂(lanes) rounds that swap blocks of 1, 2, 4… entries.
template <int step>
static inline void swap_blocks(Floats (&square)[lanes]) {
#pragma GCC unroll 16
    for (int row = 0; row < lanes; ++row)
        if (!(row & step)) {
            const Floats a = square[row], b = square[row + step];
            sort_blocks<step>(a, b, square[row], square[row + step]);
        }
}

static inline void flip(Floats (&square)[lanes]) {
    swap_blocks<1>(square);
    swap_blocks<2>(square);
#if defined(FOVEATE_AVX512) || defined(FOVEATE_AVX2)
    swap_blocks<4>(square);
#endif
#if defined(FOVEATE_AVX512)
    swap_blocks<8>(square);
#endif
}

// The sums over the lanes of as many vectors as there are lanes: lane n holds that of vector n.
template <int step>
static inline void fold_blocks(Floats (&square)[lanes]) {
#pragma GCC unroll 16
    for (int row = 0; row < lanes; row += 2 * step) {
        Floats even, odd;
        sort_blocks<step>(square[row], square[row + step], even, odd);
        square[row] = even + odd;
    }
}

static inline Floats sums_of(Floats (&square)[lanes]) {
    fold_blocks<1>(square);
    fold_blocks<2>(square);
#if defined(FOVEATE_AVX512) || defined(FOVEATE_AVX2)
    fold_blocks<4>(square);
#endif
#if defined(FOVEATE_AVX512)
    fold_blocks<8>(square);
#endif
    return square[0];
}

// The first `count` of a vector, and zeros; or a store of the first `count`.
static inline Floats load_some(const float* p, int64_t count) {
    if (count >= lanes) return load(p);
#if defined(FOVEATE_AVX512)
    __m512 some = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << most(count, 0)) - 1), p);
    return reinterpret_cast<Floats&>(some);
#else
    Floats some{};
    for (int lane = 0; lane < count; ++lane) some[lane] = p[lane];
    return some;
#endif
}

static inline void store_some(float* p, Floats x, int64_t count) {
    if (count >= lanes) return store(p, x);
#if defined(FOVEATE_AVX512)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << most(count, 0)) - 1), reinterpret_cast<__m512&>(x));
#else
    for (int lane = 0; lane < count; ++lane) p[lane] = x[lane];
#endif
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

// A row of half precision as float32, and back.
static void widen_row(const uint16_t* from, float* to, int64_t count, bool brain) {
    int64_t d = 0;
#if defined(FOVEATE_AVX512)
    for (; d + 16 <= count; d += 16) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + d));
        const __m512 wide = brain ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))
                                  : _mm512_cvtph_ps(halves);
        _mm512_storeu_ps(to + d, wide);
    }
#elif defined(FOVEATE_AVX2)
    for (; d + 8 <= count; d += 8) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + d));
        const __m256 wide = brain ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))
                                  : _mm256_cvtph_ps(halves);
        _mm256_storeu_ps(to + d, wide);
    }
#elif defined(FOVEATE_NEON)
    for (; d + 4 <= count && !brain; d += 4) vst1q_f32(to + d, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + d))));
#endif
    for (; d < count; ++d) to[d] = widen(from[d], brain);
}

static void narrow_row(const float* from, uint16_t* to, int64_t count, bool brain) {
    int64_t d = 0;
    if (brain) {
        for (; d < count; ++d) {
            uint32_t word;
            memcpy(&word, from + d, 4);
            const uint32_t round = (word + 0x7fff + ((word >> 16) & 1)) >> 16, quiet = (word >> 16) | 0x40;
            to[d] = static_cast<uint16_t>((word & 0x7fffffff) > 0x7f800000 ? quiet : round);
        }
        return;
    }
#if defined(FOVEATE_AVX512)
    for (; d + 16 <= count; d += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), _mm512_cvtps_ph(_mm512_loadu_ps(from + d), 0));
#elif defined(FOVEATE_AVX2)
    for (; d + 8 <= count; d += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d), _mm256_cvtps_ph(_mm256_loadu_ps(from + d), 0));
#elif defined(FOVEATE_NEON)
    for (; d + 4 <= count; d += 4) vst1_u16(to + d, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + d))));
#endif
    for (; d < count; ++d) to[d] = narrow(from[d], false);
}

// Whether no entry of a row is NaN or infinite.
static inline bool finite_row(const float* row, int64_t count) {
    Ints bad{};
    const Ints exponent = Ints{} + 0x7f800000;
    for (int64_t d = 0; d < count; d += lanes) bad |= (bits_of(load_some(row + d, count - d)) & exponent) == exponent;
    return !any(bad);
}

// The halves of a product of 32 bits in every lane.
static inline void multiply(Words a, uint32_t by, Words& high, Words& low) {
#if defined(FOVEATE_AVX512)
    const __m512i x = reinterpret_cast<__m512i&>(a), c = _mm512_set1_epi32(static_cast<int>(by));
    const __m512i even = _mm512_mul_epu32(x, c), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), c);
    __m512i l = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
    __m512i h = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    low = reinterpret_cast<Words&>(l), high = reinterpret_cast<Words&>(h);
#elif defined(FOVEATE_AVX2)
    const __m256i x = reinterpret_cast<__m256i&>(a), c = _mm256_set1_epi32(static_cast<int>(by));
    const __m256i even = _mm256_mul_epu32(x, c), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), c);
    __m256i l = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    __m256i h = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = reinterpret_cast<Words&>(l), high = reinterpret_cast<Words&>(h);
#else
    for (int lane = 0; lane < lanes; ++lane) {
        const uint64_t product = static_cast<uint64_t>(a[lane]) * by;
        high[lane] = static_cast<uint32_t>(product >> 32), low[lane] = static_cast<uint32_t>(product);
    }
#endif
}

// Philox-4x32-10 in every lane (Salmon et al. 2011): four words of the counter become four random ones.
static inline void philox(uint64_t seed, Words (&words)[4]) {
    uint32_t first = static_cast<uint32_t>(seed), second = static_cast<uint32_t>(seed >> 32);
    for (int turn = 0; turn < 10; ++turn) {
        Words left_high, left_low, right_high, right_low;
        multiply(words[0], 0xD2511F53u, left_high, left_low);
        multiply(words[2], 0xCD9E8D57u, right_high, right_low);
        words[0] = right_high ^ words[1] ^ first;
        words[1] = right_low;
        words[2] = left_high ^ words[3] ^ second;
        words[3] = left_low;
        first += 0x9E3779B9u, second += 0xBB67AE85u;
    }
}
