// What the kernels share: the type of the numbers, sums over threads, and the tensor cores' instructions. No header is included,
// so that run-time compilation needs no toolkit. Before this text stand `#define REAL …` and what else the kernel asks for.
// Compiled with EMULATED, the functions of the first part come from the emulator instead.

#define REAL_F32 0
#define REAL_F64 1
#define REAL_BF16 2
#define REAL_F16 3

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

#if REAL == REAL_F32
typedef float real;
#elif REAL == REAL_F64
typedef double real;
#elif REAL == REAL_BF16
typedef bf16 real;
#else
typedef f16 real;
#endif

// What is computed in.
#if REAL == REAL_F64
typedef double acc;
#else
typedef float acc;
#endif

#ifndef EMULATED
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]

#if REAL == REAL_BF16
// Two numbers in one register, the first in the low half.
__device__ inline u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
#elif REAL == REAL_F16
__device__ inline u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
#endif

__device__ inline float f16_to_float(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ inline u32 shared_address(const void* pointer) {
    u32 address;
    asm("{ .reg .u64 wide; cvta.to.shared.u64 wide, %1; cvt.u32.u64 %0, wide; }" : "=r"(address) : "l"(pointer));
    return address;
}

// Sixteen bytes to shared memory, in the background; zeros where not valid.
__device__ inline void copy_16(void* to, const void* from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

// Until this thread's copies have arrived.
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// Four 8×8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(u32 to[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ inline void load_transposed(u32 to[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d += a · b of 16×16 and 16×8.
__device__ inline void multiply_add(float d[4], const u32 a[4], u32 b0, u32 b1) {
#if REAL == REAL_BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
#endif

__device__ inline float float_of_bits(u32 bits) { return __int_as_float((int)bits); }

__device__ inline acc infinity() { return (acc)float_of_bits(0x7f800000u); }

__device__ inline double wide(double x) { return x; }
__device__ inline float wide(float x) { return x; }
__device__ inline float wide(bf16 x) { return float_of_bits((u32)x.bits << 16); }
__device__ inline float wide(f16 x) { return f16_to_float(x.bits); }

// Rounded to the nearest number of the type.
__device__ inline real narrow(acc x) {
#if REAL == REAL_BF16 || REAL == REAL_F16
    real y;
    y.bits = (u16)pack(x, 0.0f);
    return y;
#else
    return x;
#endif
}

// Numbers that one access of 16 bytes moves.
enum { LANES = 16 / sizeof(real) };

struct alignas(16) Vector {
    real at[LANES];
};

// `count` numbers, or a vector of them.
__device__ inline void load(acc to[LANES], const real* from, int count, bool vector) {
    if (vector) {
        const Vector all = *(const Vector*)from;
#pragma unroll
        for (int i = 0; i < LANES; i++) to[i] = wide(all.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < LANES; i++) to[i] = i < count ? (acc)wide(from[i]) : (acc)0;
    }
}

__device__ inline void store(real* to, const acc from[LANES], int count, bool vector) {
    if (vector) {
        Vector all;
#pragma unroll
        for (int i = 0; i < LANES; i++) all.at[i] = narrow(from[i]);
        *(Vector*)to = all;
    } else {
#pragma unroll
        for (int i = 0; i < LANES; i++)
            if (i < count) to[i] = narrow(from[i]);
    }
}

// The sum over a warp, in every lane.
__device__ inline acc warp_sum(acc x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

// The sum over the threads of one row, `blockDim.x` of them; `scratch` of 32.
__device__ inline acc row_sum(acc x, acc* scratch) {
    x = warp_sum(x);
    if (blockDim.x == 32) return x;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < (int)blockDim.x / 32; warp++) x += scratch[warp];
    __syncthreads();
    return x;
}
