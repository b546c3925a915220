// Negative log-likelihoods of labels from raw logits of [rows, vocab], where z = cap · tanh(scale · (x + bias) / cap), without
// the tanh where cap is 0. One block works on a row.

__device__ inline acc logit(acc x, const real* bias, int at, acc scale, acc cap) {
    if (bias) x += wide(bias[at]);
    x *= scale;
    return cap > 0 ? cap * tanh(x / cap) : x;
}

// The largest of some logits, the sum of exponentials relative to it, and where the largest is.
struct Seen {
    acc largest, sum;
    int at;
};

__device__ inline Seen join(Seen a, Seen b) {
    const bool first = a.largest > b.largest || (a.largest == b.largest && a.at < b.at);
    const acc top = first ? a.largest : b.largest;
    if (top == -infinity()) return a;
    return {top, a.sum * exp(a.largest - top) + b.sum * exp(b.largest - top), first ? a.at : b.at};
}

// `found` of [3, rows]: loss, log Σ exp(z), most likely label.
extern "C" __global__ void loss_forward(const real* logits, const real* bias, const u32* targets, acc* found, int rows,
                                        int vocab, double scale, double cap, int vector) {
    __shared__ Seen scratch[32];
    const int row = blockIdx.x;
    logits += (i64)row * vocab;
    Seen mine = {-infinity(), 0, vocab};
    acc part[LANES];
    for (int at = threadIdx.x * LANES; at < vocab; at += blockDim.x * LANES) {
        load(part, logits + at, vocab - at, vector);
        acc top = mine.largest;
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            if (at + i >= vocab) {
                part[i] = -infinity();
                continue;
            }
            part[i] = logit(part[i], bias, at + i, (acc)scale, (acc)cap);
            if (part[i] > top) {
                top = part[i];
                mine.at = at + i;
            }
        }
        if (top == -infinity()) continue;
        mine.sum *= exp(mine.largest - top);
        mine.largest = top;
#pragma unroll
        for (int i = 0; i < LANES; i++) mine.sum += exp(part[i] - top);
    }
    for (int lane = 16; lane > 0; lane /= 2) {
        Seen other;
        other.largest = __shfl_xor_sync(0xffffffffu, mine.largest, lane);
        other.sum = __shfl_xor_sync(0xffffffffu, mine.sum, lane);
        other.at = __shfl_xor_sync(0xffffffffu, mine.at, lane);
        mine = join(mine, other);
    }
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < (int)blockDim.x / 32; warp++) mine = join(mine, scratch[warp]);
    const u32 target = targets[row];
    const acc total = mine.largest + log(mine.sum);
    found[row] = total - logit(wide(logits[target]), bias, target, (acc)scale, (acc)cap);
    found[rows + row] = total;
    found[2 * rows + row] = (acc)mine.at;
}

// The gradient of factor · loss by the raw logits; `grad` may be `logits`. Without factors they are 1.
extern "C" __global__ void loss_backward(const real* logits, const real* bias, const u32* targets, const acc* found,
                                         const acc* factors, real* grad, int rows, int vocab, double scale, double cap,
                                         int vector) {
    const int row = blockIdx.x;
    logits += (i64)row * vocab;
    grad += (i64)row * vocab;
    const acc total = found[rows + row], factor = (factors ? factors[row] : (acc)1) * (acc)scale;
    const int target = (int)targets[row];
    acc part[LANES];
    for (int at = (blockIdx.y * blockDim.x + threadIdx.x) * LANES; at < vocab; at += gridDim.y * blockDim.x * LANES) {
        load(part, logits + at, vocab - at, vector);
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            if (at + i >= vocab) continue;
            const acc z = logit(part[i], bias, at + i, (acc)scale, (acc)cap);
            const acc slope = cap > 0 ? (acc)1 - (z / (acc)cap) * (z / (acc)cap) : (acc)1;
            part[i] = factor * slope * (exp(z - total) - (at + i == target ? (acc)1 : (acc)0));
        }
        store(grad + at, part, vocab - at, vector);
    }
}
