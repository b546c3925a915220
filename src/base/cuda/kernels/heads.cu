// Rows of heads from one order to another: [batch, seq, heads, width] with strides of its own on either side.

enum { COPY = 0, ELU = 1, ELU_SLOPE = 2 };

// to = from, its ELU, or `from` times the slope of ELU at `at`. A unit is a number, or what a vector holds.
extern "C" __global__ void rearrange(const real* from, const real* at, real* to, i64 units, int seq, int heads, int width,
                                     i64 from_batch, i64 from_row, i64 from_head, i64 at_batch, i64 at_row, i64 at_head,
                                     i64 to_batch, i64 to_row, i64 to_head, int kind, int vector) {
    const int step = vector ? LANES : 1, per_head = width / step;
    for (i64 unit = (i64)blockIdx.x * blockDim.x + threadIdx.x; unit < units; unit += (i64)gridDim.x * blockDim.x) {
        const int part = (int)(unit % per_head) * step, head = (int)(unit / per_head % heads);
        const i64 position = unit / per_head / heads, batch = position / seq, row = position % seq;
        acc x[LANES], y[LANES];
        load(x, from + batch * from_batch + row * from_row + head * from_head + part, 1, vector);
        if (kind == ELU_SLOPE) load(y, at + batch * at_batch + row * at_row + head * at_head + part, 1, vector);
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            if (kind == ELU) x[i] = x[i] > 0 ? x[i] : expm1(x[i]);
            if (kind == ELU_SLOPE) x[i] *= y[i] > 0 ? (acc)1 : exp(y[i]);
        }
        store(to + batch * to_batch + row * to_row + head * to_head + part, x, 1, vector);
    }
}
