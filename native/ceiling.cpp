#include "ceiling.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace foveate {
namespace {

constexpr int trials = 5;                   // the best one counts: anything else on the machine only slows
constexpr double trial_seconds = 0.06;      // long beside the start of a thread
constexpr size_t stream = size_t{1} << 30;  // bytes to read: past the caches of a desktop, though not of every server

using Loop = double (*)(int64_t rounds);  // how much was done: floating-point operations

thread_local volatile float kept;  // what a loop computed ends here, so that no compiler drops the loop

// The wall time of piece(0), …, piece(threads − 1), each on a thread of its own.
template <typename Piece>
double seconds(int threads, const Piece& piece) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int n = 1; n < threads; ++n) others.emplace_back([&piece, n] { piece(n); });
    piece(0);
    for (auto& other : others) other.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Twelve sums that do not wait for each other: more than any machine has multiply-adds in flight, and all in registers.
// Each starts at a number of its own, or the compiler would see that they are one.
#define TWELVE(step) step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9) step(10) step(11)

#define FMA_LOOP(name, attribute, bytes)                                                   \
    attribute double name(int64_t rounds) {                                                \
        typedef float Vector __attribute__((vector_size(bytes)));                          \
        Vector factor, term;                                                               \
        for (int n = 0; n < int(bytes / 4); ++n) factor[n] = 0.999f, term[n] = 0.5f;       \
        TWELVE(FMA_START)                                                                  \
        for (int64_t round = 0; round < rounds; ++round) { TWELVE(FMA_STEP) }              \
        const Vector total = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + s10 + s11;  \
        kept = total[0];                                                                   \
        return double(rounds) * 12 * (bytes / 4) * 2;                                      \
    }
#define FMA_START(n) Vector s##n = term + float(n);
#define FMA_STEP(n) s##n = s##n * factor + term;

// Words of a part of the stream, in twelve sums as well.
#define READ_LOOP(name, attribute, bytes)                                                  \
    attribute void name(const char* from, size_t size) {                                   \
        typedef uint64_t Vector __attribute__((vector_size(bytes)));                       \
        TWELVE(READ_START)                                                                 \
        for (size_t at = 0; at + 12 * bytes <= size; at += 12 * bytes) {                   \
            const auto words = reinterpret_cast<const Vector*>(from + at);                 \
            TWELVE(READ_STEP)                                                              \
        }                                                                                  \
        const Vector total = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + s10 + s11;  \
        kept = float(total[0]);                                                            \
    }
#define READ_START(n) Vector s##n = {};
#define READ_STEP(n) s##n += words[n];

#define ANYWHERE
FMA_LOOP(fma_anywhere, ANYWHERE, 16)
READ_LOOP(read_anywhere, ANYWHERE, 16)

double none(int64_t) { return 0; }

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f")))
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define AMX __attribute__((target("amx-tile,amx-bf16")))

FMA_LOOP(fma_avx2, AVX2, 32)
FMA_LOOP(fma_avx512, AVX512, 64)
READ_LOOP(read_avx2, AVX2, 32)
READ_LOOP(read_avx512, AVX512, 64)

#if defined(FOVEATE_HAS_AMX)  // by the compiler: one that knows it knows bfloat16 in AVX-512 too
AVX512_BF16 double dot_avx512(int64_t rounds) {
    const __m512bh ones = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1), _mm512_set1_ps(1));
#define START(n) __m512 s##n = _mm512_set1_ps(n);
#define DOT(n) s##n = _mm512_dpbf16_ps(s##n, ones, ones);
#define TOTAL(n) total = _mm512_add_ps(total, s##n);
    TWELVE(START)
    for (int64_t round = 0; round < rounds; ++round) { TWELVE(DOT) }
    __m512 total = _mm512_setzero_ps();
    TWELVE(TOTAL)
    kept = _mm512_cvtss_f32(total);
    return double(rounds) * 12 * 32 * 2;
}

// Four tiles of 16 × 16 sums from two tiles of each side: as many as fit, so every product starts at once.
AMX double tiles_amx(int64_t rounds) {
    alignas(64) uint8_t shape[64] = {};
    shape[0] = 1;  // the palette
    for (int n = 0; n < 8; ++n) shape[16 + 2 * n] = 64, shape[48 + n] = 16;
    alignas(64) uint16_t ones[16 * 32];
    std::fill(std::begin(ones), std::end(ones), uint16_t{0x3f80});
    alignas(64) float out[16 * 16];
    asm volatile("" ::: "memory");  // g++ does not know that these instructions read and write memory
    _tile_loadconfig(shape);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, ones, 64);
    _tile_loadd(5, ones, 64);
    _tile_loadd(6, ones, 64);
    _tile_loadd(7, ones, 64);
    for (int64_t round = 0; round < rounds; ++round) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, 64);
    _tile_release();
    asm volatile("" ::: "memory");
    kept = out[0];
    return double(rounds) * 4 * 16 * 16 * 32 * 2;
}

bool has(unsigned leaf, unsigned part, int which, int bit) {
    unsigned words[4] = {};
    return __get_cpuid_count(leaf, part, &words[0], &words[1], &words[2], &words[3]) && (words[which] >> bit & 1);
}

bool has_amx() {
#if defined(__linux__)
    constexpr int request_permission = 0x1023, tile_data = 18;  // the kernel wants to be asked for the tiles' state
    return has(7, 0, 3, 22) && has(7, 0, 3, 24) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif
#endif

Loop best_float32() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return fma_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fma_avx2;
#endif
    return fma_anywhere;
}

Loop best_bfloat16() {
#if defined(FOVEATE_HAS_AMX)
    if (has_amx()) return tiles_amx;
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && has(7, 1, 0, 5)) return dot_avx512;
#endif
    return none;
}

double operations(Loop loop, int threads) {
    int64_t rounds = 1 << 12;
    double done = 0;
    while (true) {  // the first rounds also wake the vector units
        const double took = seconds(1, [&](int) { done = loop(rounds); });
        if (done == 0) return 0;
        if (took > trial_seconds / 4) {
            rounds = std::max<int64_t>(1, int64_t(double(rounds) * trial_seconds / took));
            break;
        }
        rounds *= 2;
    }
    double best = 0;
    for (int trial = 0; trial < trials; ++trial) {
        const double took = seconds(threads, [&](int n) {
            const double mine = loop(rounds);
            if (n == 0) done = mine;
        });
        best = std::max(best, done * threads / took);
    }
    return best / 1e9;
}

double reads(int threads) {
    void (*read)(const char*, size_t) = read_anywhere;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) read = read_avx512;
    else if (__builtin_cpu_supports("avx2")) read = read_avx2;
#endif
    const std::unique_ptr<char, void (*)(void*)> buffer(static_cast<char*>(std::aligned_alloc(4096, stream)), std::free);
    if (!buffer) return 0;
    const size_t part = stream / size_t(threads) / 4096 * 4096;
    // Each thread writes its own part first: a page that nobody wrote is one page of zeros, read from the cache.
    seconds(threads, [&](int n) { std::memset(buffer.get() + size_t(n) * part, 1, part); });
    double best = 0;
    for (int trial = 0; trial < trials; ++trial) {
        const double took = seconds(threads, [&](int n) { read(buffer.get() + size_t(n) * part, part); });
        best = std::max(best, double(part) * threads / took);
    }
    return best / 1e9;
}

}  // namespace

double ceiling(const std::string& what, int threads) {
    threads = std::max(1, threads);
    if (what == "float32") return operations(best_float32(), threads);
    if (what == "bfloat16") return operations(best_bfloat16(), threads);
    if (what == "read") return reads(threads);
    return -1;
}

}  // namespace foveate
