// Softmax attention, as in FlashAttention-2 (arXiv 2307.08691): scores exist for a tile of queries and keys at a time.
//
// Every kernel has tiles of its own rows, 16 for each of four warps, and goes over columns in tiles of N. Products of rows with
// columns lie in registers as the tensor cores give them: of the 16 × 8 numbers of `s[i]`, lane l has rows l / 4 and l / 4 + 8,
// columns 2 · (l % 4) and the next. Half types multiply in the tensor cores, float32 in order in the same arrangement.
//
// Given: WIDTH (head size), STAGES (1 or 2 tiles of columns in shared memory), FORWARD_KEYS, QUERY_KEYS, KEY_QUERIES (columns of a
// tile in each kernel), PARTS (2 where the gradients of keys and values are computed by blocks of their own), GRAIN (queries that an
// entry of `tiles` stands for).

enum {
    WARPS = 4,
    THREADS = 32 * WARPS,
    ROWS = 16 * WARPS,
    PADDED = (WIDTH + 15) / 16 * 16,
    // so that eight rows lie in different banks
    STRIDE = PADDED + LANES,
};

// Tiles of the block, and what comes with them.
DYNAMIC_SHARED(memory);

#define LOG2_E 1.44269504088896341f

// Columns that a query or its tile sees: the first and the end of what some of its queries see, and of what all see.
struct Bounds {
    int from, to, all_from, all_to;
};

__device__ inline Bounds bounds_of(const int* tiles, int batch, int seq, int first, int count) {
    const int entries = (seq + GRAIN - 1) / GRAIN;
    Bounds b = {0x7fffffff, 0, 0, 0x7fffffff};
    for (int at = first / GRAIN; at < entries && at * GRAIN < first + count; at++) {
        const int* entry = tiles + ((i64)batch * entries + at) * 4;
        b.from = min(b.from, entry[0]);
        b.to = max(b.to, entry[1]);
        b.all_from = max(b.all_from, entry[2]);
        b.all_to = min(b.all_to, entry[3]);
    }
    return b;
}

// COUNT rows from `first` on, zeros from `end` on and beyond the width.
template <int COUNT>
__device__ inline void load_rows(real* to, const real* from, i64 stride, int first, int end, bool vector) {
    if (vector) {
        for (int at = threadIdx.x; at < COUNT * (PADDED / LANES); at += THREADS) {
            const int row = at / (PADDED / LANES), column = at % (PADDED / LANES) * LANES;
            const bool valid = first + row < end && column < WIDTH;
            copy_16(to + row * STRIDE + column, valid ? from + (first + row) * stride + column : from, valid);
        }
    } else {
        for (int at = threadIdx.x; at < COUNT * PADDED; at += THREADS) {
            const int row = at / PADDED, column = at % PADDED;
            const bool valid = first + row < end && column < WIDTH;
            to[row * STRIDE + column] = valid ? from[(first + row) * stride + column] : narrow(0);
        }
    }
}

#if REAL == REAL_F32

// s += rows · columnsᵀ of 16 and N rows in shared memory.
template <int N>
__device__ inline void multiply_rows(float s[N / 8][4], const real* rows, const real* columns) {
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
#pragma unroll 1
    for (int k = 0; k < PADDED; k += 4) {
        const float4 a = *(const float4*)(rows + group * STRIDE + k), b = *(const float4*)(rows + (group + 8) * STRIDE + k);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float4 c = *(const float4*)(columns + (i * 8 + pair + j) * STRIDE + k);
                s[i][j] += a.x * c.x + a.y * c.y + a.z * c.z + a.w * c.w;
                s[i][j + 2] += b.x * c.x + b.y * c.y + b.z * c.z + b.w * c.w;
            }
        }
    }
}

// sum += weights · columns, of 16 × N weights in registers; `scratch` has 16 rows of N + 4.
template <int N>
__device__ inline void add_weighted(float sum[PADDED / 8][4], float weights[N / 8][4], const real* columns, float* scratch) {
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) scratch[(group + j / 2 * 8) * (N + 4) + i * 8 + pair + j % 2] = weights[i][j];
    }
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < N; k++) {
        const float a = scratch[group * (N + 4) + k], b = scratch[(group + 8) * (N + 4) + k];
#pragma unroll
        for (int i = 0; i < PADDED / 8; i++) {
            const float2 c = *(const float2*)(columns + k * STRIDE + i * 8 + pair);
            sum[i][0] += a * c.x;
            sum[i][1] += a * c.y;
            sum[i][2] += b * c.x;
            sum[i][3] += b * c.y;
        }
    }
}

#else

template <int N>
__device__ inline void multiply_rows(float s[N / 8][4], const real* rows, const real* columns) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    const real* a_row = rows + (matrix % 2 * 8 + row) * STRIDE + matrix / 2 * 8;
    const real* b_row = columns + (matrix / 2 * 8 + row) * STRIDE + matrix % 2 * 8;
#pragma unroll
    for (int k = 0; k < PADDED; k += 16) {
        u32 a[4], b[4];
        load_matrices(a, a_row + k);
#pragma unroll
        for (int i = 0; i < N / 8; i += 2) {
            load_matrices(b, b_row + i * 8 * STRIDE + k);
            multiply_add(s[i], a, b[0], b[1]);
            multiply_add(s[i + 1], a, b[2], b[3]);
        }
    }
}

template <int N>
__device__ inline void add_weighted(float sum[PADDED / 8][4], float weights[N / 8][4], const real* columns, float*) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    const real* b_row = columns + (matrix % 2 * 8 + row) * STRIDE + matrix / 2 * 8;
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        // the products of one multiplication are the factors of the next
        const float *low = weights[k / 8], *high = weights[k / 8 + 1];
        const u32 a[4] = {pack(low[0], low[1]), pack(low[2], low[3]), pack(high[0], high[1]), pack(high[2], high[3])};
#pragma unroll
        for (int i = 0; i < PADDED / 8; i += 2) {
            u32 b[4];
            load_transposed(b, b_row + k * STRIDE + i * 8);
            multiply_add(sum[i], a, b[0], b[1]);
            multiply_add(sum[i + 1], a, b[2], b[3]);
        }
    }
}

#endif

template <int COUNT>
__device__ inline void clear(float x[COUNT][4]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i][0] = x[i][1] = x[i][2] = x[i][3] = 0;
}

// Rows `first + group` and eight further of [rows, heads, WIDTH], times their factors.
__device__ inline void store_rows(real* to, i64 stride, int first, int end, const float x[PADDED / 8][4], float low, float high) {
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first + group + half * 8;
        if (row >= end) continue;
        const float factor = half ? high : low;
        real* at = to + row * stride;
#pragma unroll
        for (int i = 0; i < PADDED / 8; i++) {
            const int column = i * 8 + pair;
            const float a = x[i][half * 2] * factor, b = x[i][half * 2 + 1] * factor;
#if REAL != REAL_F32
            if (WIDTH % 2 == 0) {
                if (column < WIDTH) *(u32*)(at + column) = pack(a, b);
                continue;
            }
#endif
            if (column < WIDTH) at[column] = narrow(a);
            if (column + 1 < WIDTH) at[column + 1] = narrow(b);
        }
    }
}

// A raw score as the power of two that it stands for; `slope` by the scaled score.
__device__ inline float power(float score, float scale, float cap, float* slope) {
    *slope = 1;
    if (cap == 0) return score * scale * LOG2_E;
    const float t = tanhf(score * scale / cap);
    *slope = 1 - t * t;
    return cap * LOG2_E * t;
}

// What the four lanes of a row have together.
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The first and the end of the keys that a query sees; `ranges` of [batch, seq, 2].
__device__ inline void range_of(const int* ranges, int batch, int seq, int query, int* from, int* to) {
    const int* range = ranges + ((i64)batch * seq + query) * 2;
    *from = query < seq ? range[0] : 0;
    *to = query < seq ? range[1] : 0;
}

// `out` of [batch, seq, heads, WIDTH]; `logs` of [batch, heads, seq]: the logarithm to the base 2 of each query's denominator,
// infinite where it sees no key. The grid is [query tiles, heads, batch].
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_forward(const real* q, const real* k, const real* v, real* out, float* logs, const int* ranges, const int* tiles,
                      const u8* hidden, int heads, int kv_heads, int seq, int total, i64 q_batch, i64 q_head, i64 q_row,
                      i64 k_batch, i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row, float scale, float cap,
                      int vector) {
    enum { N = FORWARD_KEYS, TILE = N * STRIDE };
    real *own = (real*)memory, *stages = own + ROWS * STRIDE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    float* scratch = (float*)(stages + STAGES * 2 * TILE) + warp * 16 * (N + 4);
    // the last queries see the most keys: they go first
    const int head = blockIdx.y, batch = blockIdx.z, first = (int)(gridDim.x - 1 - blockIdx.x) * ROWS;
    q += batch * q_batch + head * q_head;
    k += batch * k_batch + head / (heads / kv_heads) * k_head;
    v += batch * v_batch + head / (heads / kv_heads) * v_head;
    if (hidden) hidden += (i64)batch * total;
    const Bounds seen = bounds_of(tiles, batch, seq, first, ROWS);
    int from[2], to[2];
    range_of(ranges, batch, seq, first + warp * 16 + group, &from[0], &to[0]);
    range_of(ranges, batch, seq, first + warp * 16 + group + 8, &from[1], &to[1]);
    float sum[PADDED / 8][4], largest[2] = {-infinity(), -infinity()}, totals[2] = {0, 0};
    clear<PADDED / 8>(sum);
    load_rows<ROWS>(own, q, q_row, first, seq, vector);
    for (int key = seen.from, stage = 0; key < seen.to; key += N) {
        if (key == seen.from || STAGES == 1) {
            load_rows<N>(stages, k, k_row, key, total, vector);
            load_rows<N>(stages + TILE, v, v_row, key, total, vector);
        }
        wait_for_copies();
        __syncthreads();
        const real *keys = stages + stage * 2 * TILE, *values = keys + TILE;
        if (STAGES == 2) {
            stage = 1 - stage;
            if (key + N < seen.to) {
                load_rows<N>(stages + stage * 2 * TILE, k, k_row, key + N, total, vector);
                load_rows<N>(stages + stage * 2 * TILE + TILE, v, v_row, key + N, total, vector);
            }
        }
        float s[N / 8][4];
        clear<N / 8>(s);
        multiply_rows<N>(s, own + warp * 16 * STRIDE, keys);
        const bool whole = !hidden && key >= seen.all_from && key + N <= seen.all_to;
        float top[2] = {largest[0], largest[1]};
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = key + i * 8 + pair + j % 2;
                float slope;
                s[i][j] = power(s[i][j], scale, cap, &slope);
                const bool is_seen = whole || (column >= from[j / 2] && column < to[j / 2] && !(hidden && hidden[column]));
                if (!is_seen) s[i][j] = -infinity();
                top[j / 2] = fmaxf(top[j / 2], s[i][j]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            top[half] = quad_max(top[half]);
            // a row that has seen nothing yet has no largest score to subtract
            const float base = top[half] == -infinity() ? 0 : top[half], shrink = exp2f(largest[half] - base);
            largest[half] = top[half];
            totals[half] *= shrink;
#pragma unroll
            for (int i = 0; i < N / 8; i++) {
#pragma unroll
                for (int j = half * 2; j < half * 2 + 2; j++) {
                    s[i][j] = exp2f(s[i][j] - base);
                    totals[half] += s[i][j];
                }
            }
#pragma unroll
            for (int i = 0; i < PADDED / 8; i++) {
                sum[i][half * 2] *= shrink;
                sum[i][half * 2 + 1] *= shrink;
            }
        }
        add_weighted<N>(sum, s, values, scratch);
        if (STAGES == 1) __syncthreads();
    }
    wait_for_copies();
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float all = quad_sum(totals[half]);
        inverse[half] = all > 0 ? 1 / all : 0;
        const int row = first + warp * 16 + group + half * 8;
        if (row < seq && lane % 4 == 0)
            logs[((i64)batch * heads + head) * seq + row] = all > 0 ? largest[half] + log2f(all) : infinity();
    }
    store_rows(out + ((i64)batch * seq * heads + head) * WIDTH, (i64)heads * WIDTH, first + warp * 16, seq, sum, inverse[0],
               inverse[1]);
}

// Σ out · grad of each query, `dots` of [batch, heads, seq]; a warp for each row of [batch, seq, heads, WIDTH].
extern "C" __global__ void attention_dots(const real* out, const real* grad, float* dots, int heads, int seq, int rows) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    float sum = 0;
    for (int i = threadIdx.x % 32; i < WIDTH; i += 32) sum += wide(out[(i64)row * WIDTH + i]) * wide(grad[(i64)row * WIDTH + i]);
    sum = warp_sum(sum);
    const int head = row % heads, query = row / heads % seq, batch = row / heads / seq;
    if (threadIdx.x % 32 == 0) dots[((i64)batch * heads + head) * seq + query] = sum;
}

// The gradient of the queries, [batch, seq, heads, WIDTH] from `to_start` on with positions `to_row` apart; `grad` is dense. The grid is [query tiles, heads, batch].
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_queries(const real* q, const real* k, const real* v, const real* grad, const float* logs, const float* dots,
                      real* dq, i64 to_start, i64 to_row, const int* ranges, const int* tiles, const u8* hidden, int heads, int kv_heads, int seq,
                      int total, i64 q_batch, i64 q_head, i64 q_row, i64 k_batch, i64 k_head, i64 k_row, i64 v_batch,
                      i64 v_head, i64 v_row, float scale, float cap, int vector) {
    enum { N = QUERY_KEYS, TILE = N * STRIDE };
    real *own = (real*)memory, *own_grad = own + ROWS * STRIDE, *stages = own_grad + ROWS * STRIDE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    float* scratch = (float*)(stages + STAGES * 2 * TILE) + warp * 16 * (N + 4);
    const int head = blockIdx.y, batch = blockIdx.z, first = (int)(gridDim.x - 1 - blockIdx.x) * ROWS;
    const i64 dense = ((i64)batch * seq * heads + head) * WIDTH, dense_row = (i64)heads * WIDTH;
    q += batch * q_batch + head * q_head;
    k += batch * k_batch + head / (heads / kv_heads) * k_head;
    v += batch * v_batch + head / (heads / kv_heads) * v_head;
    if (hidden) hidden += (i64)batch * total;
    const Bounds seen = bounds_of(tiles, batch, seq, first, ROWS);
    int from[2], to[2];
    float log[2], dot[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first + warp * 16 + group + half * 8;
        const i64 at = ((i64)batch * heads + head) * seq + row;
        range_of(ranges, batch, seq, row, &from[half], &to[half]);
        log[half] = row < seq ? logs[at] : infinity();
        dot[half] = row < seq ? dots[at] : 0;
    }
    float sum[PADDED / 8][4];
    clear<PADDED / 8>(sum);
    load_rows<ROWS>(own, q, q_row, first, seq, vector);
    load_rows<ROWS>(own_grad, grad + dense, dense_row, first, seq, vector);
    for (int key = seen.from, stage = 0; key < seen.to; key += N) {
        if (key == seen.from || STAGES == 1) {
            load_rows<N>(stages, k, k_row, key, total, vector);
            load_rows<N>(stages + TILE, v, v_row, key, total, vector);
        }
        wait_for_copies();
        __syncthreads();
        const real *keys = stages + stage * 2 * TILE, *values = keys + TILE;
        if (STAGES == 2) {
            stage = 1 - stage;
            if (key + N < seen.to) {
                load_rows<N>(stages + stage * 2 * TILE, k, k_row, key + N, total, vector);
                load_rows<N>(stages + stage * 2 * TILE + TILE, v, v_row, key + N, total, vector);
            }
        }
        float s[N / 8][4], d[N / 8][4];
        clear<N / 8>(s);
        clear<N / 8>(d);
        multiply_rows<N>(s, own + warp * 16 * STRIDE, keys);
        multiply_rows<N>(d, own_grad + warp * 16 * STRIDE, values);
        const bool whole = !hidden && key >= seen.all_from && key + N <= seen.all_to;
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = key + i * 8 + pair + j % 2;
                float slope;
                const float weight = exp2f(power(s[i][j], scale, cap, &slope) - log[j / 2]);
                const bool is_seen = whole || (column >= from[j / 2] && column < to[j / 2] && !(hidden && hidden[column]));
                s[i][j] = is_seen ? weight * slope * (d[i][j] - dot[j / 2]) : 0;
            }
        }
        add_weighted<N>(sum, s, keys, scratch);
        if (STAGES == 1) __syncthreads();
    }
    wait_for_copies();
    store_rows(dq + to_start + (i64)batch * seq * to_row + head * WIDTH, to_row, first + warp * 16, seq, sum, scale, scale);
}

// What a tile of queries brings along for the gradients of keys and values.
template <int N>
struct Queries {
    float log[N], dot[N];
    int from[N], to[N];
};

template <int N>
__device__ inline void load_queries(Queries<N>* to, const float* logs, const float* dots, const int* ranges, int batch, int seq,
                                    int first) {
    for (int i = threadIdx.x; i < N; i += THREADS) {
        const int query = first + i;
        to->log[i] = query < seq ? logs[query] : infinity();
        to->dot[i] = query < seq ? dots[query] : 0;
        range_of(ranges, batch, seq, query, &to->from[i], &to->to[i]);
    }
}

// The gradients of keys and values, [batch, total, kv_heads, WIDTH] from their starts on with positions `to_row` apart: both, or one. Every key-value head gathers the
// gradients from its query heads in their order.
template <bool OF_KEYS, bool OF_VALUES>
__device__ inline void keys_and_values(const real* q, const real* k, const real* v, const real* grad, const float* logs,
                                       const float* dots, real* dk, real* dv, i64 dk_start, i64 dv_start, i64 to_row,
                                       const int* ranges, const int* tiles,
                                       const u8* hidden, int heads, int kv_heads, int seq, int total, i64 q_batch, i64 q_head,
                                       i64 q_row, i64 k_batch, i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row,
                                       float scale, float cap, int vector, int batch) {
    enum { N = KEY_QUERIES, TILE = N * STRIDE };
    real *own = (real*)memory, *own_values = own + ROWS * STRIDE, *stages = own_values + ROWS * STRIDE;
    Queries<N>* queries = (Queries<N>*)(stages + STAGES * 2 * TILE);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    float* scratch = (float*)(queries + STAGES) + warp * 16 * (N + 4);
    const int kv_head = blockIdx.y, first = (int)blockIdx.x * ROWS, members = heads / kv_heads;
    const int query_tiles = (seq + N - 1) / N, steps = members * query_tiles;
    q += batch * q_batch + (i64)kv_head * members * q_head;
    grad += ((i64)batch * seq * heads + kv_head * members) * WIDTH;
    logs += ((i64)batch * heads + kv_head * members) * seq;
    dots += ((i64)batch * heads + kv_head * members) * seq;
    bool is_hidden[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int key = first + warp * 16 + group + half * 8;
        is_hidden[half] = key >= total || (hidden && hidden[(i64)batch * total + key]);
    }
    float k_sum[OF_KEYS ? PADDED / 8 : 1][4], v_sum[OF_VALUES ? PADDED / 8 : 1][4];
    clear<OF_KEYS ? PADDED / 8 : 1>(k_sum);
    clear<OF_VALUES ? PADDED / 8 : 1>(v_sum);
    load_rows<ROWS>(own, k + batch * k_batch + kv_head * k_head, k_row, first, total, vector);
    if (OF_KEYS) load_rows<ROWS>(own_values, v + batch * v_batch + kv_head * v_head, v_row, first, total, vector);
    // from a step on, the first whose queries see a key of the tile
    auto next_of = [&](int step) {
        for (; step < steps; step++) {
            const Bounds seen = bounds_of(tiles, batch, seq, step % query_tiles * N, N);
            if (seen.from < first + ROWS && seen.to > first) break;
        }
        return step;
    };
    auto fetch = [&](int step, int stage) {
        const int member = step / query_tiles, query = step % query_tiles * N;
        real* to = stages + stage * 2 * TILE;
        load_rows<N>(to, q + member * q_head, q_row, query, seq, vector);
        load_rows<N>(to + TILE, grad + (i64)member * WIDTH, (i64)heads * WIDTH, query, seq, vector);
        load_queries<N>(queries + stage, logs + (i64)member * seq, dots + (i64)member * seq, ranges, batch, seq, query);
    };
    int step = next_of(0), stage = 0;
    if (STAGES == 2 && step < steps) fetch(step, 0);
    while (step < steps) {
        if (STAGES == 1) fetch(step, 0);
        wait_for_copies();
        __syncthreads();
        const real *rows = stages + stage * 2 * TILE, *grads = rows + TILE;
        const Queries<N>* of = queries + stage;
        const Bounds seen = bounds_of(tiles, batch, seq, step % query_tiles * N, N);
        const bool whole = seen.all_from <= first && seen.all_to >= first + ROWS;
        step = next_of(step + 1);
        if (STAGES == 2) {
            stage = 1 - stage;
            if (step < steps) fetch(step, stage);
        }
        float s[N / 8][4], d[N / 8][4], slopes[N / 8][4];
        clear<N / 8>(s);
        multiply_rows<N>(s, own + warp * 16 * STRIDE, rows);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = i * 8 + pair + j % 2, key = first + warp * 16 + group + j / 2 * 8;
                const float weight = exp2f(power(s[i][j], scale, cap, &slopes[i][j]) - of->log[column]);
                const bool is_seen = whole || (key >= of->from[column] && key < of->to[column]);
                s[i][j] = is_seen && !is_hidden[j / 2] ? weight : 0;
            }
        }
        if (OF_VALUES) add_weighted<N>(v_sum, s, grads, scratch);
        if (OF_KEYS) {
            clear<N / 8>(d);
            multiply_rows<N>(d, own_values + warp * 16 * STRIDE, grads);
#pragma unroll
            for (int i = 0; i < N / 8; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) s[i][j] *= slopes[i][j] * (d[i][j] - of->dot[i * 8 + pair + j % 2]);
            }
            add_weighted<N>(k_sum, s, rows, scratch);
        }
        if (STAGES == 1) __syncthreads();
    }
    wait_for_copies();
    const i64 at = (i64)batch * total * to_row + kv_head * WIDTH;
    if constexpr (OF_KEYS) store_rows(dk + dk_start + at, to_row, first + warp * 16, total, k_sum, scale, scale);
    if constexpr (OF_VALUES) store_rows(dv + dv_start + at, to_row, first + warp * 16, total, v_sum, 1, 1);
}

// The grid is [key tiles, kv_heads, batch · PARTS].
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_keys(const real* q, const real* k, const real* v, const real* grad, const float* logs, const float* dots, real* dk,
                   real* dv, i64 dk_start, i64 dv_start, i64 to_row, const int* ranges, const int* tiles, const u8* hidden, int heads, int kv_heads, int seq, int total,
                   i64 q_batch, i64 q_head, i64 q_row, i64 k_batch, i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row,
                   float scale, float cap, int vector) {
    const int batch = blockIdx.z / PARTS;
#define ARGUMENTS                                                                                                           \
    q, k, v, grad, logs, dots, dk, dv, dk_start, dv_start, to_row, ranges, tiles, hidden, heads, kv_heads, seq, total, q_batch, \
        q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, scale, cap, vector, batch
    if (PARTS == 1) {
        keys_and_values<true, true>(ARGUMENTS);
    } else if (blockIdx.z % PARTS == 0) {
        keys_and_values<true, false>(ARGUMENTS);
    } else {
        keys_and_values<false, true>(ARGUMENTS);
    }
}
