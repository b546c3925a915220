// Gated activations, y = f(gate) · up, ELU, and what is added to the residual stream; arrays of `count` numbers.

enum { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

struct Activated {
    acc value, slope;
};

__device__ inline Activated activate(acc x, int kind) {
    if (kind == SILU) {
        const acc s = (acc)1 / ((acc)1 + exp(-x));
        return {x * s, s * ((acc)1 + x * ((acc)1 - s))};
    }
    if (kind == GELU) {
        // the normal distribution's function and density
        const acc below = (acc)0.5 * ((acc)1 + erf(x * (acc)0.70710678118654752));
        return {x * below, below + x * (acc)0.39894228040143268 * exp((acc)-0.5 * x * x)};
    }
    if (kind == GELU_TANH) {
        const acc root = (acc)0.79788456080286536, cubic = (acc)0.044715;
        const acc t = tanh(root * (x + cubic * x * x * x));
        const acc slope = root * ((acc)1 + (acc)3 * cubic * x * x) * ((acc)1 - t * t);
        return {(acc)0.5 * x * ((acc)1 + t), (acc)0.5 * ((acc)1 + t) + (acc)0.5 * x * slope};
    }
    return {x > 0 ? x : (acc)0, x > 0 ? (acc)1 : (acc)0};
}

extern "C" __global__ void gate_forward(const real* gate, const real* up, real* y, i64 count, int kind, int vector) {
    acc g[LANES], u[LANES];
    for (i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * LANES; at < count; at += (i64)gridDim.x * blockDim.x * LANES) {
        const int rest = count - at < LANES ? (int)(count - at) : LANES;
        const bool whole = vector && rest == LANES;
        load(g, gate + at, rest, whole);
        load(u, up + at, rest, whole);
#pragma unroll
        for (int i = 0; i < LANES; i++) g[i] = activate(g[i], kind).value * u[i];
        store(y + at, g, rest, whole);
    }
}

extern "C" __global__ void gate_backward(const real* gate, const real* up, const real* grad, real* dgate, real* dup, i64 count,
                                         int kind, int vector) {
    acc g[LANES], u[LANES], d[LANES];
    for (i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * LANES; at < count; at += (i64)gridDim.x * blockDim.x * LANES) {
        const int rest = count - at < LANES ? (int)(count - at) : LANES;
        const bool whole = vector && rest == LANES;
        load(g, gate + at, rest, whole);
        load(u, up + at, rest, whole);
        load(d, grad + at, rest, whole);
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            const Activated f = activate(g[i], kind);
            g[i] = d[i] * u[i] * f.slope;
            u[i] = d[i] * f.value;
        }
        store(dgate + at, g, rest, whole);
        store(dup + at, u, rest, whole);
    }
}

extern "C" __global__ void elu_forward(const real* x, real* y, i64 count, int vector) {
    acc part[LANES];
    for (i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * LANES; at < count; at += (i64)gridDim.x * blockDim.x * LANES) {
        const int rest = count - at < LANES ? (int)(count - at) : LANES;
        const bool whole = vector && rest == LANES;
        load(part, x + at, rest, whole);
#pragma unroll
        for (int i = 0; i < LANES; i++) part[i] = part[i] > 0 ? part[i] : expm1(part[i]);
        store(y + at, part, rest, whole);
    }
}

// The slope by the input: 1 where it is positive, else its exponential.
extern "C" __global__ void elu_backward(const real* x, const real* grad, real* dx, i64 count, int vector) {
    acc part[LANES], g[LANES];
    for (i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * LANES; at < count; at += (i64)gridDim.x * blockDim.x * LANES) {
        const int rest = count - at < LANES ? (int)(count - at) : LANES;
        const bool whole = vector && rest == LANES;
        load(part, x + at, rest, whole);
        load(g, grad + at, rest, whole);
#pragma unroll
        for (int i = 0; i < LANES; i++) g[i] *= part[i] > 0 ? (acc)1 : exp(part[i]);
        store(dx + at, g, rest, whole);
    }
}

// x + scale · (y + bias), of rows of `width`; without x or bias where they are not given.
extern "C" __global__ void add_scaled(const real* x, const real* y, const real* bias, real* sum, i64 count, int width,
                                      double scale, int vector) {
    acc part[LANES], other[LANES];
    for (i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * LANES; at < count; at += (i64)gridDim.x * blockDim.x * LANES) {
        const int rest = count - at < LANES ? (int)(count - at) : LANES;
        const bool whole = vector && rest == LANES;
        load(part, y + at, rest, whole);
        if (bias) {
#pragma unroll
            for (int i = 0; i < LANES; i++) part[i] += wide(bias[(at + i) % width]);
        }
#pragma unroll
        for (int i = 0; i < LANES; i++) part[i] *= (acc)scale;
        if (x) {
            load(other, x + at, rest, whole);
#pragma unroll
            for (int i = 0; i < LANES; i++) part[i] += other[i];
        }
        store(sum + at, part, rest, whole);
    }
}
