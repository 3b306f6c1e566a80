// The choice of a kernel, and a call cut into pieces of work.
#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "pieces.hpp"

namespace foveate {

#if defined(FOVEATE_HAS_AMX)
extern const Kernel kernel_amx;
#endif
#if defined(FOVEATE_HAS_AVX512BF16)
extern const Kernel kernel_avx512bf16;
#endif
#if defined(FOVEATE_HAS_AVX512)
extern const Kernel kernel_avx512;
#endif
#if defined(FOVEATE_HAS_AVX2)
extern const Kernel kernel_avx2;
#endif
#if defined(FOVEATE_HAS_NEON)
extern const Kernel kernel_neon;
#else
extern const Kernel kernel_baseline;
#endif

namespace {

bool is(const Kernel& kernel, const char* name) { return !std::strcmp(kernel.name, name); }

#if defined(__x86_64__)
// Asked once: in a virtual machine the instruction takes some microseconds.
bool converts_float16() {  // F16C, a word that not every compiler knows
    static const bool has = [] {
        unsigned a, b, c = 0, d;
        return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
    }();
    return has;
}

bool has_matrix_unit() {
    static const bool has = [] {
        unsigned a, b, c, d = 0;
        const unsigned bf16 = 1u << 22, tiles = 1u << 24;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tiles);
    }();
    return has;
}

// The state of the matrix unit is large, so Linux has to be asked for it, once for all threads of a process.
bool may_use_matrix_unit() {
#if defined(__linux__)
    constexpr int request = 0x1023, tile_data = 18;
    static const bool allowed = syscall(SYS_arch_prctl, request, tile_data) == 0;
    return allowed;
#else
    return false;
#endif
}

const char* lacking(const Kernel& kernel) {
    if (is(kernel, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                       converts_float16()
                   ? nullptr
                   : "the processor has no AVX2";
    if (is(kernel, "baseline")) return nullptr;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
        return "the processor has no AVX-512";
    if (is(kernel, "avx512")) return nullptr;
    if (!__builtin_cpu_supports("avx512bf16")) return "the processor has no AVX-512 for bfloat16";
    if (is(kernel, "avx512bf16")) return nullptr;
    if (!has_matrix_unit()) return "the processor has no matrix unit";
    return may_use_matrix_unit() ? nullptr : "the system does not let this process use the matrix unit";
}
#endif

// On Intel's processors a product of pairs takes as long as four of float32: there only the matrix unit is worth it.
bool pays_here(const Kernel& kernel) {
#if defined(__x86_64__)
    if (is(kernel, "avx512bf16")) return !__builtin_cpu_is("intel");
#endif
    (void)kernel;
    return true;
}

}  // namespace

const char* why_not_here(const Kernel& kernel) {
#if defined(__x86_64__)
    return lacking(kernel);
#else
    (void)kernel;
    return nullptr;
#endif
}

int64_t known_kernels(const Kernel* const** all) {
    static const Kernel* const known[] = {
#if defined(FOVEATE_HAS_AMX)
        &kernel_amx,
#endif
#if defined(FOVEATE_HAS_AVX512BF16)
        &kernel_avx512bf16,
#endif
#if defined(FOVEATE_HAS_AVX512)
        &kernel_avx512,
#endif
#if defined(FOVEATE_HAS_AVX2)
        &kernel_avx2,
#endif
#if defined(FOVEATE_HAS_NEON)
        &kernel_neon,
#else
        &kernel_baseline,
#endif
    };
    *all = known;
    return sizeof known / sizeof *known;
}

const Kernel* choose(const char* name) {
    const Kernel* const* known;
    const int64_t count = known_kernels(&known);
    for (int64_t n = 0; n < count; ++n)
        if ((*name ? is(*known[n], name) : pays_here(*known[n])) && !why_not_here(*known[n])) return known[n];
    return nullptr;
}

namespace {

// How many of the pairs are visible, about.
double share(const Call& call) {
    if (call.chosen.indices)
        return std::min(1.0, double(call.chosen.count * call.chosen.block) / double(std::max<int64_t>(1, call.keys)));
    if (call.offsets) {
        const int64_t rows = call.tile_batch * call.tile_heads * tiles_of(call.queries);
        const int64_t listed = call.offsets[call.tile_batch * call.tile_heads * (tiles_of(call.queries) + 1) - 1];
        return double(listed) / double(std::max<int64_t>(1, rows * tiles_of(call.keys)));
    }
    if (call.left < 0) return call.right < 0 ? 1 : 0.5;
    return std::min(1.0, double(call.left + std::max<int64_t>(call.right, 0) + tile) / double(std::max<int64_t>(1, call.keys)));
}

double products_of(const Call& call) {
    return double(call.batch * call.heads) * double(call.queries) * double(call.keys) * double(call.dim + call.value_dim) *
           share(call);
}

// The rows of a head in bands, the last first: under a causal pattern they are the longest.
struct Bands {
    int64_t tiles, height, count;

    Bands(const Call& call, int64_t height) : tiles(tiles_of(call.queries)), height(height) {
        count = (tiles + height - 1) / height;
    }
    Band at(int64_t batch, int64_t head, int64_t n) const {
        const int64_t end = tiles - n * height, first = std::max<int64_t>(0, end - height);
        return {batch, head, first, end - first};
    }
};

constexpr int64_t most_tiles = 4, most_prepared = 16;  // of a band; where keys and values are prepared for it

void decode_all(const Call& call, const Kernel& kernel, int threads) {
    const int64_t rows = call.heads / call.key_heads * call.queries, groups = call.batch * call.key_heads;
    const int64_t columns = tiles_of(call.keys);
    // Stretches of 512 keys and more, about 64 pieces in all; their number depends on the call alone, and so do the sums.
    // None is longer than 2,048 keys: its tiles are summed one after the other, and a long row would be rounded too often.
    const int64_t wanted = std::max<int64_t>(1, 64 / std::max<int64_t>(1, groups));
    const int64_t stretch = std::clamp<int64_t>((columns + wanted - 1) / wanted, 8, 32), count = (columns + stretch - 1) / stretch;
    const int64_t floats = kernel.part_floats(call) * rows;
    std::unique_ptr<float[]> parts(new float[static_cast<size_t>(groups * count * floats)]);
    const int64_t bytes = kernel.decode_bytes(call);
    // Reading is what takes the time here: a number costs as much as eight products.
    const double read = share(call) * double(groups * call.keys) * double(call.dim + call.value_dim);
    spread(threads_for(std::max(products_of(call), 8 * read), threads), groups * count, [&](int64_t n) {
        const int64_t at = n / count, first = n % count * stretch;
        kernel.decode(call, at / call.key_heads, at % call.key_heads, first, std::min(first + stretch, columns),
                      parts.get() + n * floats, scratch_of(bytes));
    });
    for (int64_t at = 0; at < groups; ++at)
        kernel.merge(call, at / call.key_heads, at % call.key_heads, parts.get() + at * count * floats, count, floats,
                     scratch_of(bytes));
}

// Pieces of work of a selection: tiles of queries, the last first.
struct Tiles {
    int64_t queries, height, count;

    Tiles(const Call& call, int64_t height) : queries(call.queries), height(height) {
        count = (queries + height - 1) / height;
    }
    Band at(int64_t batch, int64_t unit, int64_t n) const {
        const int64_t first = (count - 1 - n) * height;
        return {batch, unit, first, std::min(height, queries - first)};
    }
};

void gather_all(const Call& call, const Kernel& kernel, int threads) {
    const int64_t units = kernel.gathered_units(call), bytes = kernel.gathered_bytes(call);
    const Tiles tiles(call, kernel.gathered_height(call));
    spread(threads_for(products_of(call), threads), call.batch * units * tiles.count, [&](int64_t n) {
        const int64_t at = n / tiles.count;
        kernel.gathered(call, tiles.at(at / units, at % units, n % tiles.count), scratch_of(bytes));
    });
}

void gather_gradients(Gradients& gradients, const Kernel& kernel, int threads) {
    const Call& call = gradients.call;
    const int64_t groups = call.batch * call.key_heads, bytes = kernel.gathered_backward_bytes(call);
    const int64_t lists = kernel.gathered_units(call) / call.key_heads;  // of a key head
    const Tiles tiles(call, kernel.gathered_height(call));
    const int64_t turns = lists * tiles.count;
    std::vector<std::atomic<int64_t>> passed(static_cast<size_t>(groups * turns));
    gradients.passed = passed.data();
    spread(threads, groups * turns, [&](int64_t n) {
        const int64_t turn = n / groups, at = n % groups, key_head = at % call.key_heads;
        const Band band = tiles.at(at / call.key_heads, key_head * lists + turn / tiles.count, turn % tiles.count);
        kernel.gathered_backward(gradients, band, turn, turns, scratch_of(bytes));
    });
}

// Whether rows are so few that keys are better put in the lanes.
bool is_decoding(const Call& call) {
    const int64_t rows = call.heads / call.key_heads * call.queries;
    return !call.threshold && call.queries <= 16 && rows <= 64 && (rows <= 4 || call.keys >= 256);
}

}  // namespace

void forward(const Call& call, const Kernel& kernel, int threads) {
    if (call.chosen.indices) return gather_all(call, kernel, threads);
    if (is_decoding(call)) return decode_all(call, kernel, threads);
    // Keys and values of half precision are prepared once for a band; tall ones, as long as all threads have several.
    const int64_t rows = tiles_of(call.queries) * call.batch * call.heads;
    const bool prepares = call.dtype != Dtype::float32;
    const Bands bands(call, prepares ? std::clamp<int64_t>(rows / (4 * threads), 1, most_prepared) : 1);
    const int64_t bytes = kernel.forward_bytes(call, bands.height);
    spread(threads_for(products_of(call), threads), call.batch * call.heads * bands.count, [&](int64_t n) {
        const int64_t at = n / bands.count;
        kernel.forward(call, bands.at(at / call.heads, at % call.heads, n % bands.count), scratch_of(bytes));
    });
}

void backward(const Gradients& given, const Kernel& kernel, int threads) {
    Gradients gradients = given;
    const Call& call = gradients.call;
    threads = threads_for(3 * products_of(call), threads);
    const int64_t group = call.heads / call.key_heads, groups = call.batch * call.key_heads;
    if (call.chosen.indices) return gather_gradients(gradients, kernel, threads);
    const Bands bands(call, std::min(most_tiles, std::max<int64_t>(1, 768 / std::max<int64_t>(1, call.dim + call.value_dim))));
    const int64_t turns = group * bands.count;
    std::vector<std::atomic<int64_t>> passed(static_cast<size_t>(groups * turns));
    gradients.passed = passed.data();
    const bool scored = gradients.d_bias || gradients.d_distances;
    std::unique_ptr<Row[]> rows(scored ? new Row[static_cast<size_t>(call.batch * call.heads * call.queries)] : nullptr);
    gradients.rows = rows.get(), gradients.other_order = is_decoding(call);
    const int64_t bytes = kernel.backward_bytes(call, bands.height);
    // Turn by turn through all heads: two bands of one head, of which one may have to wait, seldom run together.
    spread(threads, groups * turns, [&](int64_t n) {
        const int64_t turn = n / groups, at = n % groups, key_head = at % call.key_heads;
        const Band band = bands.at(at / call.key_heads, key_head * group + turn / bands.count, turn % bands.count);
        kernel.backward(gradients, band, turn, turns, scratch_of(bytes));
    });
    const int64_t score_bytes = kernel.score_gradient_bytes(call);
    if (gradients.d_bias) {
        const int64_t* sizes = gradients.bias_sizes;
        spread(threads, sizes[0] * sizes[1] * tiles_of(sizes[2]) * tiles_of(sizes[3]),
               [&](int64_t n) { kernel.bias_gradient(gradients, n, scratch_of(score_bytes)); });
    }
    if (gradients.d_distances) {
        const int64_t columns = tiles_of(call.keys), diagonals = tiles_of(call.queries) + columns - 1;
        const int64_t owners = gradients.distance_batches * call.heads, length = call.queries + call.keys - 1 + tile;
        std::vector<double> sums(static_cast<size_t>(owners * diagonals * 2 * tile));
        spread(threads, owners * diagonals, [&](int64_t n) {
            kernel.distance_gradient(gradients, n, sums.data() + n * 2 * tile, scratch_of(score_bytes));
        });
        for (int64_t n = 0; n < owners * diagonals; ++n) {
            // Entry 0 of the sums is the distance 64 · diagonal − 64, at keys − 1 + that in the vector.
            const int64_t first = call.keys - 1 + (n % diagonals - (columns - 1)) * tile - tile;
            for (int64_t entry = 0; entry < 2 * tile; ++entry)
                if (first + entry >= 0 && first + entry < length)
                    gradients.d_distances[n / diagonals * length + first + entry] += sums[static_cast<size_t>(n * 2 * tile + entry)];
        }
    }
}

void looked(const Looked& given, const Kernel& kernel, int threads) {
    Looked looked = given;
    const Call& call = looked.call;
    threads = threads_for(products_of(call), threads);
    const int64_t bytes = kernel.looked_bytes(looked), heads = call.batch * call.heads;
    const Bands single(call, 1), bands(call, most_tiles);
    std::unique_ptr<float[]> of_rows(new float[static_cast<size_t>(2 * heads * call.queries)]);
    looked.bases = of_rows.get(), looked.factors = of_rows.get() + heads * call.queries;
    spread(threads, heads * single.count, [&](int64_t n) {
        const int64_t at = n / single.count;
        kernel.rows_looked(looked, single.at(at / call.heads, at % call.heads, n % single.count), scratch_of(bytes));
    });
    std::vector<std::atomic<int64_t>> passed(static_cast<size_t>(heads * bands.count));
    looked.passed = passed.data();
    spread(threads, heads * bands.count, [&](int64_t n) {
        const int64_t turn = n / heads, at = n % heads;
        kernel.keys_received(looked, bands.at(at / call.heads, at % call.heads, turn), turn, bands.count, scratch_of(bytes));
    });
}

}  // namespace foveate
