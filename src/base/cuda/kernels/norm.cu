// Root-mean-square and layer normalisation of rows. `blockDim.x` threads work on a row; blocks of several rows have 32 for each.

struct Moments {
    acc mean, factor;
};

__device__ inline Moments moments(const real* x, int width, bool is_layer, acc epsilon, bool vector, acc* scratch) {
    acc part[LANES], sum = 0;
    if (is_layer) {
        for (int at = threadIdx.x * LANES; at < width; at += blockDim.x * LANES) {
            load(part, x + at, width - at, vector);
#pragma unroll
            for (int i = 0; i < LANES; i++) sum += part[i];
        }
        sum = row_sum(sum, scratch);
    }
    const acc mean = sum / width;
    sum = 0;
    for (int at = threadIdx.x * LANES; at < width; at += blockDim.x * LANES) {
        load(part, x + at, width - at, vector);
#pragma unroll
        for (int i = 0; i < LANES; i++)
            if (at + i < width) sum += (part[i] - mean) * (part[i] - mean);
    }
    sum = row_sum(sum, scratch);
    return {mean, (acc)1 / sqrt(sum / width + epsilon)};
}

// y = (x − mean) · factor · (weight + offset) + bias; `weight` and `bias` of [weight_rows, width] serve the rows in turn.
extern "C" __global__ void norm_forward(const real* x, const real* weight, const real* bias, real* y, int rows, int width,
                                        int weight_rows, int is_layer, double epsilon, double offset, int vector) {
    __shared__ acc scratch[32];
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    x += (i64)row * width;
    y += (i64)row * width;
    weight += (i64)(row % weight_rows) * width;
    const Moments m = moments(x, width, is_layer, (acc)epsilon, vector, scratch);
    acc part[LANES], w[LANES], b[LANES];
    for (int at = threadIdx.x * LANES; at < width; at += blockDim.x * LANES) {
        load(part, x + at, width - at, vector);
        load(w, weight + at, width - at, vector);
#pragma unroll
        for (int i = 0; i < LANES; i++) part[i] = (part[i] - m.mean) * m.factor * (w[i] + (acc)offset);
        if (bias) {
            load(b, bias + (i64)(row % weight_rows) * width + at, width - at, vector);
#pragma unroll
            for (int i = 0; i < LANES; i++) part[i] += b[i];
        }
        store(y + at, part, width - at, vector);
    }
}

// With x̂ the normalised row and g = grad · (weight + offset): dx = factor · (g − mean(g) − x̂ · mean(g·x̂)), without mean(g)
// where the mean is not taken off; and `more`, where it is given, on top.
extern "C" __global__ void norm_backward(const real* x, const real* grad, const real* weight, const real* more, real* dx, int rows,
                                         int width, int weight_rows, int is_layer, double epsilon, double offset, int vector) {
    __shared__ acc scratch[32];
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    x += (i64)row * width;
    grad += (i64)row * width;
    dx += (i64)row * width;
    weight += (i64)(row % weight_rows) * width;
    const Moments m = moments(x, width, is_layer, (acc)epsilon, vector, scratch);
    acc part[LANES], g[LANES], w[LANES], shift = 0, shrink = 0;
    for (int at = threadIdx.x * LANES; at < width; at += blockDim.x * LANES) {
        load(part, x + at, width - at, vector);
        load(g, grad + at, width - at, vector);
        load(w, weight + at, width - at, vector);
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            if (at + i >= width) continue;
            g[i] *= w[i] + (acc)offset;
            shift += g[i];
            shrink += g[i] * (part[i] - m.mean);
        }
    }
    shift = is_layer ? row_sum(shift, scratch) / width : 0;
    shrink = m.factor * m.factor * row_sum(shrink, scratch) / width;
    for (int at = threadIdx.x * LANES; at < width; at += blockDim.x * LANES) {
        load(part, x + at, width - at, vector);
        load(g, grad + at, width - at, vector);
        load(w, weight + at, width - at, vector);
#pragma unroll
        for (int i = 0; i < LANES; i++)
            g[i] = m.factor * (g[i] * (w[i] + (acc)offset) - shift - (part[i] - m.mean) * shrink);
        if (more) {
            load(part, more + (i64)row * width + at, width - at, vector);
#pragma unroll
            for (int i = 0; i < LANES; i++) g[i] += part[i];
        }
        store(dx + at, g, width - at, vector);
    }
}
