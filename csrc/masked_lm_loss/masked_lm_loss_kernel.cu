// Cross-entropy of rows of logits, whose gradient takes their place. One block a row: a first reading finds the maximum
// and the sum of the exponentials together, a second one writes the gradient.
#include <algorithm>
#include <cfloat>

#include "../include/cuda_rows.h"
#include "masked_lm_loss_cuda.h"

namespace growth_ds::cuda {
namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;

// Of some logits: the largest, the first column that has it, and the sum of exp(logit - largest).
struct Peak {
  float top, sum;
  int64_t first;
};

__device__ __forceinline__ void add(Peak& peak, float logit, int64_t column) {
  if (logit > peak.top) {  // columns come in rising order: the first of equal ones stays
    peak.sum = peak.sum * __expf(peak.top - logit) + 1.0f;
    peak.top = logit;
    peak.first = column;
  } else {
    peak.sum += __expf(logit - peak.top);
  }
}

__device__ __forceinline__ Peak join(const Peak& a, const Peak& b) {
  const float top = fmaxf(a.top, b.top);
  const bool left = a.top > b.top || (a.top == b.top && a.first < b.first);
  return {top, a.sum * __expf(a.top - top) + b.sum * __expf(b.top - top), left ? a.first : b.first};
}

// The peak of the block's row, for every thread.
__device__ __forceinline__ Peak block_peak(Peak mine, Peak* shared) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2)
    mine = join(mine, {__shfl_xor_sync(0xffffffffu, mine.top, step), __shfl_xor_sync(0xffffffffu, mine.sum, step),
                       __shfl_xor_sync(0xffffffffu, mine.first, step)});
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = mine;
  __syncthreads();
  Peak all = shared[0];
  for (int i = 1; i < WARPS; ++i) all = join(all, shared[i]);
  return all;
}

// PACKED: every row starts on 16 bytes and has whole packs.
template <typename T, bool PACKED>
__global__ void __launch_bounds__(THREADS) kernel(T* logits, const float* __restrict__ bias,
                                                  const int64_t* __restrict__ labels, int64_t vocab, float scale,
                                                  float* __restrict__ loss, uint8_t* __restrict__ correct) {
  constexpr int COUNT = PACKED ? N : 1;
  __shared__ Peak shared[WARPS];
  const int64_t label = labels[blockIdx.x];
  T* row = logits + static_cast<int64_t>(blockIdx.x) * vocab;
  const bool counts = label >= 0 && label < vocab;
  Peak peak = {-FLT_MAX, 0.0f, vocab};
  float chosen = 0.0f;
  if (counts) {
    chosen = wide(row[label]) + bias[label];  // before the block's first barrier, so before any is overwritten
    for (int64_t i = threadIdx.x * COUNT; i < vocab; i += THREADS * COUNT) {
      if (PACKED) {
        const Pack<T> some = load(row + i);
        const Pack<float> offsets = load(bias + i);
#pragma unroll
        for (int k = 0; k < N; ++k) add(peak, wide(some.at[k]) + offsets.at[k], i + k);
      } else {
        add(peak, wide(row[i]) + bias[i], i);
      }
    }
    peak = block_peak(peak, shared);
  }
  if (threadIdx.x == 0) {
    loss[blockIdx.x] = counts ? logf(peak.sum) + peak.top - chosen : 0.0f;
    correct[blockIdx.x] = counts && peak.first == label;
  }
  if (scale == 0.0f) return;
  const float share = counts ? scale / peak.sum : 0.0f;
  const auto slope = [&](float logit, int64_t column) {
    if (!counts) return 0.0f;  // whatever the logit is
    return __expf(logit - peak.top) * share - (column == label ? scale : 0.0f);
  };
  for (int64_t i = threadIdx.x * COUNT; i < vocab; i += THREADS * COUNT) {
    if (PACKED) {
      Pack<T> some = load(row + i);
      const Pack<float> offsets = load(bias + i);
#pragma unroll
      for (int k = 0; k < N; ++k) some.at[k] = narrow<T>(slope(wide(some.at[k]) + offsets.at[k], i + k));
      store(row + i, some);
    } else {
      row[i] = narrow<T>(slope(wide(row[i]) + bias[i], i));
    }
  }
}

}  // namespace

const char* cross_entropy(Type type, void* logits, const float* bias, const int64_t* labels, int64_t rows, int64_t vocab,
                          float scale, float* loss, uint8_t* correct, void* stream) {
  if (rows == 0 || vocab == 0) return nullptr;
  const auto blocks = static_cast<unsigned>(rows);
  const auto queue = static_cast<cudaStream_t>(stream);
  const bool packed = vocab % N == 0 && aligned(logits) && aligned(bias);
  with_type(type, [&](auto element) {
    using T = decltype(element);
    auto* data = static_cast<T*>(logits);
    if (packed)
      kernel<T, true><<<blocks, THREADS, 0, queue>>>(data, bias, labels, vocab, scale, loss, correct);
    else
      kernel<T, false><<<blocks, THREADS, 0, queue>>>(data, bias, labels, vocab, scale, loss, correct);
  });
  return launch_error();
}

}  // namespace growth_ds::cuda
