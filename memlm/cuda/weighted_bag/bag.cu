// Weighted bags of a table's rows: out[t] = (sum_b weights[t, b] values[indices[t, b]]) silu(gate).
//
// A block computes SPAN channels of one token. Its warps share the bag out among them, each a run of
// consecutive rows; a warp has FLIGHT rows requested before it uses the first, 16 bytes per lane
// where rows allow it and single numbers elsewhere. The warps' sums meet in shared memory and are
// added in a fixed order. That the indices are rows of the table is not checked.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

constexpr int LANES = 32;
constexpr int SPAN = 256;   // channels of a block
constexpr int FLIGHT = 4;   // rows a warp has in flight; of float32 numbers each is two loads
constexpr unsigned ALL = 0xffffffff;

// What one load brings: numbers side by side.
template <typename Number, int COUNT>
struct alignas(COUNT * sizeof(Number)) Pack {
    Number at[COUNT];
};

// COUNT numbers per load; lane l of load c has the channels (c * LANES + l) * COUNT and after.
template <typename Number, int COUNT, int WARPS>
__global__ void __launch_bounds__(WARPS * LANES, 24 / WARPS)
    bag_kernel(const int *__restrict__ indices, const float *__restrict__ weights,
               const Number *__restrict__ values, const Number *__restrict__ gate,
               Number *__restrict__ out, Number *__restrict__ sums, int bag, long long width) {
    using Load = Pack<Number, COUNT>;
    constexpr int LOADS = SPAN / (LANES * COUNT);
    constexpr int ROWS = LOADS >= 8 ? 1 : FLIGHT;
    __shared__ float partial[WARPS][SPAN];

    const int blocks = static_cast<int>((width + SPAN - 1) / SPAN);
    const long long token = blockIdx.x / blocks;
    const long long begin = static_cast<long long>(blockIdx.x % blocks) * SPAN;
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    indices += token * bag;
    weights += token * bag;
    values += begin + lane * COUNT;

    bool inside[LOADS];
    float total[LOADS][COUNT];
#pragma unroll
    for (int c = 0; c < LOADS; c++) {
        inside[c] = begin + (c * LANES + lane) * COUNT < width;
#pragma unroll
        for (int i = 0; i < COUNT; i++) total[c][i] = 0;
    }

    const int share = (bag + WARPS - 1) / WARPS;
    const int last = min(bag, (warp + 1) * share);
    for (int first = warp * share; first < last; first += LANES) {
        // Each lane fetches one index and one weight; the others get them from it.
        const bool mine = first + lane < last;
        const int index = mine ? indices[first + lane] : 0;
        const float weight = mine ? weights[first + lane] : 0.0f;
        const int count = min(LANES, last - first);
        for (int r = 0; r < count; r += ROWS) {
            Load seen[ROWS][LOADS];
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                const Number *row = values + width * __shfl_sync(ALL, index, (r + j) % LANES);
#pragma unroll
                for (int c = 0; c < LOADS; c++) {
                    if (inside[c] && r + j < count) {
                        seen[j][c] = *reinterpret_cast<const Load *>(row + c * LANES * COUNT);
                    } else {
#pragma unroll
                        for (int i = 0; i < COUNT; i++) seen[j][c].at[i] = Number(0.0f);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                const float factor = __shfl_sync(ALL, weight, (r + j) % LANES);
#pragma unroll
                for (int c = 0; c < LOADS; c++)
#pragma unroll
                    for (int i = 0; i < COUNT; i++)
                        total[c][i] += factor * static_cast<float>(seen[j][c].at[i]);
            }
        }
    }

#pragma unroll
    for (int c = 0; c < LOADS; c++)
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            partial[warp][(c * LANES + lane) * COUNT + i] = total[c][i];
    __syncthreads();
    for (int c = threadIdx.x; c < SPAN && begin + c < width; c += WARPS * LANES) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += partial[w][c];
        const long long target = token * width + begin + c;
        if (gate != nullptr) {
            sums[target] = Number(sum);
            const float z = static_cast<float>(gate[target]);
            sum *= z / (1 + __expf(-z));
        }
        out[target] = Number(sum);
    }
}

struct Bag {
    const int *indices;
    const float *weights;
    const void *values, *gate;
    void *out, *sums;
    long long tokens, width;
    int bag, processors;
    cudaStream_t stream;
};

template <typename Number, int COUNT, int WARPS>
void launch(const Bag &b) {
    const long long blocks = (b.width + SPAN - 1) / SPAN;
    bag_kernel<Number, COUNT, WARPS>
        <<<static_cast<unsigned>(b.tokens * blocks), WARPS * LANES, 0, b.stream>>>(
            b.indices, b.weights, static_cast<const Number *>(b.values),
            static_cast<const Number *>(b.gate), static_cast<Number *>(b.out),
            static_cast<Number *>(b.sums), b.bag, b.width);
}

template <typename Number, int COUNT>
void launch_for(const Bag &b) {
    // Few tokens: more warps to each, so that a bag takes few turns.
    const bool few = b.tokens * ((b.width + SPAN - 1) / SPAN) < 4ll * b.processors;
    few ? launch<Number, COUNT, 16>(b) : launch<Number, COUNT, 4>(b);
}

template <typename Number>
void launch_of(const Bag &b) {
    constexpr int COUNT = 16 / sizeof(Number);
    const bool aligned = reinterpret_cast<unsigned long long>(b.values) % 16 == 0;
    aligned && b.width % COUNT == 0 ? launch_for<Number, COUNT>(b) : launch_for<Number, 1>(b);
}

}  // namespace

// Launches on `stream` of `device`; all tensors contiguous, at least one token and channel.
//   bytes, brain: of a number 4 (float32) or 2 (float16, with `brain` bfloat16)
//   gate, sums: null, or [tokens, width] as out
// Returns null, or what went wrong.
extern "C" const char *memlm_bag(int bytes, int brain, const int *indices, const float *weights,
                                 const void *values, const void *gate, void *out, void *sums,
                                 long long tokens, int bag, long long width, int processors,
                                 int device, void *stream) {
    cudaError_t status = cudaSetDevice(device);
    if (status == cudaSuccess) {
        const Bag b{indices, weights, values, gate, out,        sums,
                    tokens,  width,   bag,    processors, static_cast<cudaStream_t>(stream)};
        if (bytes == 4)
            launch_of<float>(b);
        else if (brain)
            launch_of<__nv_bfloat16>(b);
        else
            launch_of<__half>(b);
        status = cudaGetLastError();
    }
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
