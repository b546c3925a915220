// Rotary position embedding of [batch, seq, heads, width] with given strides; y is dense. `cos` and `sin` are [batch, seq, half].
// Heads from `rotated` on stay as they are. A unit is a pair, or as many pairs as a vector holds, or as much of what comes after the pairs.

extern "C" __global__ void rope(const real* x, const real* cos, const real* sin, real* y, i64 units, int seq, int heads,
                                int rotated, int width, int half, i64 by_batch, i64 by_row, i64 by_head, int interleaved, int inverse,
                                int vector) {
    const int step = vector ? LANES : 1, turning = half / step, per_head = turning + (width - 2 * half) / step;
    for (i64 unit = (i64)blockIdx.x * blockDim.x + threadIdx.x; unit < units; unit += (i64)gridDim.x * blockDim.x) {
        const i64 at = unit / per_head;
        const int part = (int)(unit % per_head), head = (int)(at % heads);
        const i64 position = at / heads;
        const real* from = x + position / seq * by_batch + position % seq * by_row + head * by_head;
        real* to = y + at * width;
        acc first[LANES], second[LANES], c[LANES], s[LANES];
        if (part >= turning) {
            const int i = 2 * half + (part - turning) * step;
            load(first, from + i, 1, vector);
            store(to + i, first, 1, vector);
            continue;
        }
        const int i = part * step;
        if (head < rotated) {
            load(c, cos + position * half + i, 1, vector);
            load(s, sin + position * half + i, 1, vector);
        } else {
#pragma unroll
            for (int k = 0; k < LANES; k++) {
                c[k] = 1;
                s[k] = 0;
            }
        }
        // of interleaved pairs, a unit takes two vectors side by side
        const int one = interleaved ? 2 * i : i, other = interleaved ? 2 * i + step : i + half;
        load(first, from + one, 1, vector);
        load(second, from + other, 1, vector);
#pragma unroll
        for (int k = 0; k < LANES; k++) {
            if (inverse) s[k] = -s[k];
        }
        if (interleaved && vector) {
#pragma unroll
            for (int k = 0; k < LANES / 2; k++) {
                const acc a = first[2 * k], b = first[2 * k + 1], d = second[2 * k], e = second[2 * k + 1];
                const int far = k + LANES / 2;
                first[2 * k] = a * c[k] - b * s[k];
                first[2 * k + 1] = b * c[k] + a * s[k];
                second[2 * k] = d * c[far] - e * s[far];
                second[2 * k + 1] = e * c[far] + d * s[far];
            }
        } else {
#pragma unroll
            for (int k = 0; k < LANES; k++) {
                const acc a = first[k], b = second[k];
                first[k] = a * c[k] - b * s[k];
                second[k] = b * c[k] + a * s[k];
            }
        }
        store(to + one, first, 1, vector);
        store(to + other, second, 1, vector);
    }
}
