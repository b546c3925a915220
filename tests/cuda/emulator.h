// Runs CUDA kernels on the CPU, as C++: the same sources, one block after the other, each thread of a block a fiber.
//
// A fiber runs until it waits for others, so that what a missing barrier would leave to chance goes wrong every time. Copies in the
// background arrive when they are waited for; until then their place holds no numbers, and neither do shared memory and outputs at
// the start. The instructions of the tensor cores follow the fragment layouts of the PTX manual (section "Warp Level Matrix
// Multiply-Accumulate Instructions").
#define EMULATED
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)
#define DYNAMIC_SHARED(name) static unsigned char*& name = emulator::shared

using std::exp, std::expm1, std::log, std::max, std::min, std::sqrt, std::tanh, std::erf;

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};

namespace emulator {

struct Copy {
    void* to;
    unsigned char bytes[16];
};

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    Index index;
    bool begun, done;
    std::vector<char> stack;
    std::vector<Copy> copies;
};

// Threads that wait for each other; the last to come does what they wait for.
struct Barrier {
    unsigned expected, arrived, turn;
    void* slots[32];
};

static std::vector<Fiber> fibers;
static std::vector<Barrier> warps;
static Barrier block;
static jmp_buf scheduler;
static size_t current, progress;
static unsigned char* shared;
static void (*kernel)(void*);
static void* kernel_arguments;

[[noreturn]] static void fail(const char* why) {
    fprintf(stderr, "emulator: %s\n", why);
    exit(3);
}

static void pause() {
    if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
}

template <class F>
void meet(Barrier& barrier, unsigned lane, void* slot, F last) {
    if (slot) barrier.slots[lane] = slot;
    progress++;
    const unsigned turn = barrier.turn;
    if (++barrier.arrived == barrier.expected) {
        last(barrier);
        barrier.arrived = 0;
        barrier.turn++;
    } else {
        while (barrier.turn == turn) pause();
    }
}

static unsigned thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

template <class F>
void in_warp(void* slot, F last) {
    meet(warps[thread() / 32], thread() % 32, slot, last);
}

static void enter() {
    kernel(kernel_arguments);
    if (!fibers[current].copies.empty()) fail("a thread ends before its copies have arrived");
    fibers[current].done = true;
    progress++;
    _longjmp(scheduler, 1);
}

static void run_block(bool backwards) {
    for (auto& warp : warps) warp = {32, 0, 0, {}};
    block = {(unsigned)fibers.size(), 0, 0, {}};
    for (auto& fiber : fibers) {
        fiber.begun = fiber.done = false;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = fiber.stack.size();
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
    }
    for (volatile size_t left = 1; left > 0;) {
        left = 0;
        const size_t before = progress;
        for (volatile size_t turn = 0; turn < fibers.size(); turn = turn + 1) {
            current = backwards ? fibers.size() - 1 - turn : (size_t)turn;
            Fiber& fiber = fibers[current];
            if (fiber.done) continue;
            left = left + 1;
            threadIdx = fiber.index;
            if (_setjmp(scheduler) == 0) {
                if (fiber.begun) _longjmp(fiber.at, 1);
                fiber.begun = true;
                setcontext(&fiber.start);
            }
        }
        if (left > 0 && progress == before) fail("threads wait for others that never come");
    }
}

}  // namespace emulator

static inline void __syncthreads() {
    emulator::meet(emulator::block, 0, nullptr, [](emulator::Barrier&) {});
}

static inline void __syncwarp() {
    emulator::in_warp(nullptr, [](emulator::Barrier&) {});
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
    T exchange[2] = {x, x};
    emulator::in_warp(exchange, [mask](emulator::Barrier& b) {
        for (int lane = 0; lane < 32; lane++) ((T*)b.slots[lane])[1] = ((T*)b.slots[lane ^ mask])[0];
    });
    return exchange[1];
}

static inline float __int_as_float(int bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline void copy_16(void* to, const void* from, bool valid) {
    emulator::Copy copy = {to, {}};
    if ((uintptr_t)to % 16 || (valid && (uintptr_t)from % 16)) emulator::fail("a copy is not aligned");
    if (valid) memcpy(copy.bytes, from, 16);
    memset(to, 0xff, 16);
    emulator::fibers[emulator::current].copies.push_back(copy);
}

static inline void wait_for_copies() {
    auto& copies = emulator::fibers[emulator::current].copies;
    for (auto& copy : copies) memcpy(copy.to, copy.bytes, 16);
    copies.clear();
}

static inline float f16_to_float(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp((float)fraction, -24);
    if (exponent == 31) return __int_as_float((int)(sign | 0x7f800000 | fraction << 13));
    return __int_as_float((int)(sign | (exponent + 112) << 23 | fraction << 13));
}

static inline uint16_t bits_of_f16(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (size != size) return sign | 0x7e00;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(size, &exponent);
    const int unit = std::max(exponent - 11, -24);
    const float steps = std::nearbyint(std::ldexp(size, -unit));
    // steps of 2^unit: those beyond 1023 carry into the exponent
    return sign | (uint16_t)(size == 0 ? 0 : unit == -24 ? steps : steps - 1024 + (unit + 25) * 1024);
}

static inline uint16_t bits_of_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fff;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float half_to_float(uint16_t bits, bool is_bf16) {
    return is_bf16 ? __int_as_float((int)((uint32_t)bits << 16)) : f16_to_float(bits);
}

#define IS_BF16 (REAL == 2)
static inline uint32_t pack(float low, float high) {
    auto bits = [](float x) -> uint32_t { return IS_BF16 ? bits_of_bf16(x) : bits_of_f16(x); };
    return bits(low) | bits(high) << 16;
}

struct MatrixRequest {
    uint32_t* to;
    const void* row;
};

static inline void load_matrices_as(uint32_t to[4], const void* row, bool transposed) {
    if ((uintptr_t)row % 16) emulator::fail("a matrix row is not aligned");
    MatrixRequest request = {to, row};
    emulator::in_warp(&request, [transposed](emulator::Barrier& b) {
        for (int matrix = 0; matrix < 4; matrix++) {
            for (int lane = 0; lane < 32; lane++) {
                uint32_t both = 0;
                for (int part = 0; part < 2; part++) {
                    int at = lane / 4, column = lane % 4 * 2 + part;
                    if (transposed) std::swap(at, column);
                    const auto* numbers = (const uint16_t*)((MatrixRequest*)b.slots[matrix * 8 + at])->row;
                    both |= (uint32_t)numbers[column] << (16 * part);
                }
                ((MatrixRequest*)b.slots[lane])->to[matrix] = both;
            }
        }
    });
}

static inline void load_matrices(uint32_t to[4], const void* row) { load_matrices_as(to, row, false); }
static inline void load_transposed(uint32_t to[4], const void* row) { load_matrices_as(to, row, true); }

struct ProductRequest {
    float* d;
    uint32_t a[4], b[2];
};

static inline void multiply_add(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    ProductRequest request = {d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    emulator::in_warp(&request, [](emulator::Barrier& barrier) {
        float a[16][16], b[16][8];
        auto number = [](uint32_t both, int part) { return half_to_float((uint16_t)(both >> (16 * part)), IS_BF16); };
        for (int lane = 0; lane < 32; lane++) {
            const auto& r = *(ProductRequest*)barrier.slots[lane];
            const int group = lane / 4, pair = lane % 4 * 2;
            for (int part = 0; part < 2; part++) {
                for (int i = 0; i < 4; i++) a[group + i % 2 * 8][pair + i / 2 * 8 + part] = number(r.a[i], part);
                for (int i = 0; i < 2; i++) b[pair + i * 8 + part][group] = number(r.b[i], part);
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            float* d = ((ProductRequest*)barrier.slots[lane])->d;
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                float sum = 0;
                for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
                d[i] += sum;
            }
        }
    });
}

// A request on standard input, the outputs on standard output; numbers are 64-bit words. See `src/base/cuda/emulator.rs`.
namespace emulator {

struct Entry {
    const char* name;
    void (*call)(const uint64_t*);
    size_t arguments;
};

template <class T>
T argument(uint64_t word) {
    T x;
    memcpy(&x, &word, sizeof(T));
    return x;
}

template <auto F, class... A, size_t... I>
void unpack(void (*)(A...), const uint64_t* words, std::index_sequence<I...>) {
    F(argument<A>(words[I])...);
}

template <class... A>
constexpr size_t count(void (*)(A...)) {
    return sizeof...(A);
}

template <auto F>
void call(const uint64_t* words) {
    unpack<F>(F, words, std::make_index_sequence<count(F)>());
}

#define ENTRY(name) \
    { #name, emulator::call<&name>, emulator::count(&name) }

static uint64_t word() {
    uint64_t x;
    if (fread(&x, 8, 1, stdin) != 1) fail("the request ends early");
    return x;
}

// Numbers before and after what a kernel may write.
enum { GUARD = 256 };

struct Buffer {
    std::vector<unsigned char> bytes;
    unsigned char* start() { return (unsigned char*)(((uintptr_t)bytes.data() + GUARD + 255) / 256 * 256); }
    uint64_t size;
    explicit Buffer(uint64_t size) : bytes(size + 2 * GUARD + 256, 0xff), size(size) {}
    void check() {
        for (unsigned char* at = start() - GUARD; at < start() + size + GUARD; at++) {
            if (at == start()) at += size;
            if (at < start() + size + GUARD && *at != 0xff) fail("a kernel writes beyond its memory");
        }
    }
};

static int serve(const Entry* entries, size_t entry_count) {
    std::vector<char> name(word());
    if (fread(name.data(), 1, name.size(), stdin) != name.size()) fail("the request ends early");
    const Entry* entry = nullptr;
    for (size_t i = 0; i < entry_count; i++)
        if (std::string_view(entries[i].name) == std::string_view(name.data(), name.size())) entry = &entries[i];
    if (!entry) fail("there is no such kernel");
    gridDim.x = word(), gridDim.y = word(), gridDim.z = word();
    blockDim.x = word(), blockDim.y = word(), blockDim.z = word();
    Buffer memory(word());
    const bool backwards = word();
    std::vector<Buffer> buffers;
    std::vector<bool> is_output;
    for (uint64_t left = word(); left > 0; left--) {
        is_output.push_back(word());
        const bool is_given = word();
        buffers.emplace_back(word());
        if (is_given && fread(buffers.back().start(), 1, buffers.back().size, stdin) != buffers.back().size)
            fail("the request ends early");
    }
    std::vector<uint64_t> arguments(word());
    if (arguments.size() != entry->arguments) fail("the kernel takes another number of arguments");
    for (auto& argument : arguments) {
        const uint64_t kind = word(), value = word(), offset = word();
        argument = kind == 0 ? value : (uint64_t)(uintptr_t)(buffers[value].start() + offset);
    }
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    if (threads == 0 || threads > 1024 || threads % 32) fail("a block is not of whole warps");
    fibers.resize(threads);
    warps.resize(threads / 32);
    for (unsigned i = 0; i < threads; i++) {
        fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        fibers[i].stack.resize(1 << 17);
    }
    static const Entry* called;
    called = entry;
    kernel = [](void* words) { called->call((const uint64_t*)words); };
    kernel_arguments = arguments.data();
    shared = memory.start();
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
                memset(shared, 0xff, memory.size);
                run_block(backwards);
            }
    memory.check();
    for (size_t i = 0; i < buffers.size(); i++) {
        buffers[i].check();
        if (is_output[i]) fwrite(buffers[i].start(), 1, buffers[i].size, stdout);
    }
    return 0;
}

}  // namespace emulator
