// y = LayerNorm(residual + dropout(x + bias)) and its gradients. WARPS warps hold a row in registers, P packs a thread;
// rows of any other width take the loops at the end, which read them again instead.
#include <algorithm>

#include "../include/cuda_rows.h"
#include "../include/philox.h"
#include "bias_dropout_residual_layer_norm_cuda.h"

namespace growth_ds::cuda {
namespace {

constexpr int LOOP_WARPS = 8;
constexpr int64_t MOST_WIDTH = 8192;  // of a row in registers

// What dropout multiplies columns [column, column + N) with; column is a multiple of 4.
struct Keep {
  float at[N];
};

__device__ __forceinline__ Keep keep(const Dropout& dropout, uint64_t seed, int64_t row, int64_t column) {
  Keep out;
#pragma unroll
  for (int part = 0; part < N / 4; ++part) {
    uint32_t c[4] = {static_cast<uint32_t>(column / 4 + part), static_cast<uint32_t>(row),
                     static_cast<uint32_t>(row >> 32), 0};
    philox(c[0], c[1], c[2], c[3], seed);
#pragma unroll
    for (int i = 0; i < 4; ++i) out.at[4 * part + i] = c[i] >= dropout.threshold ? dropout.scale : 0.0f;
  }
  return out;
}

__device__ __forceinline__ uint64_t seed_of(const Dropout& dropout) {
  return dropout.seed ? static_cast<uint64_t>(*dropout.seed) : 0;
}

template <typename T>
__device__ __forceinline__ const T* at(const void* from, int64_t i) {
  return static_cast<const T*>(from) + i;
}

template <typename T>
__device__ __forceinline__ T* at(void* from, int64_t i) {
  return static_cast<T*>(from) + i;
}

// z at columns [column, column + N), rounded to T as it is kept.
template <typename T>
__device__ __forceinline__ Pack<T> make_z(const NormForward& task, uint64_t seed, int64_t row, int64_t column) {
  const int64_t i = row * task.width + column;
  Pack<T> z = load(at<T>(task.x, i));
  if (!task.z) return z;
  float sum[N];
#pragma unroll
  for (int k = 0; k < N; ++k) sum[k] = wide(z.at[k]);
  if (task.bias) {
    const Pack<T> bias = load(at<T>(task.bias, column));
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] += wide(bias.at[k]);
  }
  if (task.dropout.seed) {
    const Keep kept = keep(task.dropout, seed, row, column);
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] *= kept.at[k];
  }
  if (task.residual) {
    const Pack<T> residual = load(at<T>(task.residual, i));
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] += wide(residual.at[k]);
  }
#pragma unroll
  for (int k = 0; k < N; ++k) z.at[k] = narrow<T>(sum[k]);
  store(at<T>(task.z, i), z);
  return z;
}

// The weights of columns [column, column + N) in mean and variance.
__device__ __forceinline__ Pack<float> share_of(const float* share, int64_t column, float equal) {
  if (share) return load(share + column);
  Pack<float> out;
#pragma unroll
  for (int k = 0; k < N; ++k) out.at[k] = equal;
  return out;
}

template <typename T, int WARPS, int P>
__global__ void __launch_bounds__(WARPS* WARP) forward(const NormForward task) {
  __shared__ float2 shared[WARPS];
  const uint64_t seed = seed_of(task.dropout);
  const float equal = 1.0f / static_cast<float>(task.width);
  for (int64_t r = blockIdx.x; r < task.rows; r += gridDim.x) {
    Pack<T> z[P];
    float mean = 0.0f, variance = 0.0f;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int64_t column = (static_cast<int64_t>(p) * WARPS * WARP + threadIdx.x) * N;
      if (column >= task.width) continue;
      z[p] = make_z<T>(task, seed, r, column);
      const Pack<float> share = share_of(task.share, column, equal);
#pragma unroll
      for (int k = 0; k < N; ++k) mean += wide(z[p].at[k]) * share.at[k];
    }
    mean = block_sum<WARPS>(mean, 0.0f, shared).x;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int64_t column = (static_cast<int64_t>(p) * WARPS * WARP + threadIdx.x) * N;
      if (column >= task.width) continue;
      const Pack<float> share = share_of(task.share, column, equal);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float apart = wide(z[p].at[k]) - mean;
        variance += apart * apart * share.at[k];
      }
    }
    const float rstd = 1.0f / sqrtf(block_sum<WARPS>(variance, 0.0f, shared).x + task.eps);  // rsqrtf may be two ulps off
    if (threadIdx.x == 0) {
      task.mean[r] = mean;
      task.rstd[r] = rstd;
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int64_t column = (static_cast<int64_t>(p) * WARPS * WARP + threadIdx.x) * N;
      if (column >= task.width) continue;
      const Pack<T> gamma = load(at<T>(task.gamma, column)), beta = load(at<T>(task.beta, column));
      Pack<T> y;
#pragma unroll
      for (int k = 0; k < N; ++k)
        y.at[k] = narrow<T>((wide(z[p].at[k]) - mean) * rstd * wide(gamma.at[k]) + wide(beta.at[k]));
      store(at<T>(task.y, r * task.width + column), y);
    }
  }
}

// a is rounded before it is summed and before the sum is taken away, so that what should cancel does (__fmul_rn). The
// formula: of_z = rstd (a - s sum(a) - s n sum(a n)) with n = (z - mean) rstd, a = of_y gamma and the share s of an element. Each
// block keeps its columns' sums for gamma, beta and bias in registers and writes one partial of them.
template <typename T, int WARPS, int P>
__global__ void __launch_bounds__(WARPS* WARP) backward(const NormBackward task) {
  __shared__ float2 shared[WARPS];
  const uint64_t seed = seed_of(task.dropout);
  const float equal = 1.0f / static_cast<float>(task.width);
  float of_gamma[P][N] = {}, of_beta[P][N] = {}, of_bias[P][N] = {};
  for (int64_t r = blockIdx.x; r < task.rows; r += gridDim.x) {
    const float mean = task.mean[r], rstd = task.rstd[r];
    Pack<T> of_y[P], z[P];
    float straight = 0.0f, along = 0.0f;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int64_t column = (static_cast<int64_t>(p) * WARPS * WARP + threadIdx.x) * N;
      if (column >= task.width) continue;
      of_y[p] = load(at<T>(task.of_y, r * task.width + column));
      z[p] = load(at<T>(task.z, r * task.width + column));
      const Pack<T> gamma = load(at<T>(task.gamma, column));
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float slope = wide(of_y[p].at[k]), normal = (wide(z[p].at[k]) - mean) * rstd;
        of_gamma[p][k] += slope * normal;
        of_beta[p][k] += slope;
        const float a = __fmul_rn(slope, wide(gamma.at[k]));
        straight += a;
        along += a * normal;
      }
    }
    const float2 sums = block_sum<WARPS>(straight, along, shared);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int64_t column = (static_cast<int64_t>(p) * WARPS * WARP + threadIdx.x) * N;
      if (column >= task.width) continue;
      const Pack<T> gamma = load(at<T>(task.gamma, column));
      const Pack<float> share = share_of(task.share, column, equal);
      float of_z[N];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float normal = (wide(z[p].at[k]) - mean) * rstd;
        const float a = __fmul_rn(wide(of_y[p].at[k]), wide(gamma.at[k]));
        of_z[k] = rstd * (a - share.at[k] * (sums.x + normal * sums.y));
        z[p].at[k] = narrow<T>(of_z[k]);
      }
      if (task.of_residual) store(at<T>(task.of_residual, r * task.width + column), z[p]);
      if (task.dropout.seed) {
        const Keep kept = keep(task.dropout, seed, r, column);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          of_z[k] *= kept.at[k];
          z[p].at[k] = narrow<T>(of_z[k]);
        }
      }
      store(at<T>(task.of_x, r * task.width + column), z[p]);
#pragma unroll
      for (int k = 0; k < N; ++k) of_bias[p][k] += of_z[k];
    }
  }
  float* to = task.partials + static_cast<int64_t>(blockIdx.x) * 3 * task.width;
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const int64_t column = (static_cast<int64_t>(p) * WARPS * WARP + threadIdx.x) * N;
    if (column >= task.width) continue;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      to[column + k] = of_gamma[p][k];
      to[task.width + column + k] = of_beta[p][k];
      to[2 * task.width + column + k] = of_bias[p][k];
    }
  }
}

__device__ __forceinline__ float keep_one(const Dropout& dropout, uint64_t seed, int64_t row, int64_t column) {
  if (!dropout.seed) return 1.0f;
  return keep(dropout, seed, row, column / 4 * 4).at[column % 4];
}

// Rows of any width: three readings of z in the forward, two in the backward, one element at a time.
template <typename T>
__global__ void __launch_bounds__(LOOP_WARPS* WARP) forward_loop(const NormForward task) {
  __shared__ float2 shared[LOOP_WARPS];
  const uint64_t seed = seed_of(task.dropout);
  const float equal = 1.0f / static_cast<float>(task.width);
  for (int64_t r = blockIdx.x; r < task.rows; r += gridDim.x) {
    const int64_t skip = r * task.width;
    const T* z = at<T>(task.z ? task.z : task.x, skip);
    float mean = 0.0f, variance = 0.0f;
    for (int64_t i = threadIdx.x; i < task.width; i += blockDim.x) {
      if (task.z) {
        float sum = wide(*at<T>(task.x, skip + i));
        if (task.bias) sum += wide(*at<T>(task.bias, i));
        sum *= keep_one(task.dropout, seed, r, i);
        if (task.residual) sum += wide(*at<T>(task.residual, skip + i));
        *at<T>(task.z, skip + i) = narrow<T>(sum);
      }
      mean += wide(z[i]) * (task.share ? task.share[i] : equal);
    }
    mean = block_sum<LOOP_WARPS>(mean, 0.0f, shared).x;
    for (int64_t i = threadIdx.x; i < task.width; i += blockDim.x) {
      const float apart = wide(z[i]) - mean;
      variance += apart * apart * (task.share ? task.share[i] : equal);
    }
    const float rstd = 1.0f / sqrtf(block_sum<LOOP_WARPS>(variance, 0.0f, shared).x + task.eps);  // rsqrtf may be two ulps off
    if (threadIdx.x == 0) {
      task.mean[r] = mean;
      task.rstd[r] = rstd;
    }
    for (int64_t i = threadIdx.x; i < task.width; i += blockDim.x)
      *at<T>(task.y, skip + i) =
          narrow<T>((wide(z[i]) - mean) * rstd * wide(*at<T>(task.gamma, i)) + wide(*at<T>(task.beta, i)));
  }
}

template <typename T>
__global__ void __launch_bounds__(LOOP_WARPS* WARP) backward_loop(const NormBackward task) {
  __shared__ float2 shared[LOOP_WARPS];
  const uint64_t seed = seed_of(task.dropout);
  const float equal = 1.0f / static_cast<float>(task.width);
  float* to = task.partials + static_cast<int64_t>(blockIdx.x) * 3 * task.width;
  for (int64_t i = threadIdx.x; i < 3 * task.width; i += blockDim.x) to[i] = 0.0f;
  __syncthreads();
  for (int64_t r = blockIdx.x; r < task.rows; r += gridDim.x) {
    const float mean = task.mean[r], rstd = task.rstd[r];
    const T *of_y = at<T>(task.of_y, r * task.width), *z = at<T>(task.z, r * task.width);
    float straight = 0.0f, along = 0.0f;
    for (int64_t i = threadIdx.x; i < task.width; i += blockDim.x) {
      const float a = __fmul_rn(wide(of_y[i]), wide(*at<T>(task.gamma, i)));
      straight += a;
      along += a * (wide(z[i]) - mean) * rstd;
    }
    const float2 sums = block_sum<LOOP_WARPS>(straight, along, shared);
    for (int64_t i = threadIdx.x; i < task.width; i += blockDim.x) {
      const float slope = wide(of_y[i]), normal = (wide(z[i]) - mean) * rstd;
      const float share = task.share ? task.share[i] : equal;
      float of_z = rstd * (__fmul_rn(slope, wide(*at<T>(task.gamma, i))) - share * (sums.x + normal * sums.y));
      if (task.of_residual) *at<T>(task.of_residual, r * task.width + i) = narrow<T>(of_z);
      of_z *= keep_one(task.dropout, seed, r, i);
      *at<T>(task.of_x, r * task.width + i) = narrow<T>(of_z);
      to[i] += slope * normal;  // a column is one thread's for all rows
      to[task.width + i] += slope;
      to[2 * task.width + i] += of_z;
    }
  }
}

template <int WARPS, int P>
struct Size {
  static constexpr int warps = WARPS, packs = P;
};

// f with the smallest of these that holds a row, where one does.
template <typename F>
bool with_forward_size(int64_t width, F f) {
  if (width <= 256) return f(Size<1, 1>{}), true;
  if (width <= 512) return f(Size<1, 2>{}), true;
  if (width <= 1024) return f(Size<1, 4>{}), true;
  if (width <= 2048) return f(Size<4, 2>{}), true;
  if (width <= 4096) return f(Size<4, 4>{}), true;
  return width <= MOST_WIDTH ? (f(Size<8, 4>{}), true) : false;
}

// The backward holds two rows and three sums: one pack a thread as long as a block has the threads.
template <typename F>
bool with_backward_size(int64_t width, F f) {
  if (width <= 256) return f(Size<1, 1>{}), true;
  if (width <= 512) return f(Size<2, 1>{}), true;
  if (width <= 1024) return f(Size<4, 1>{}), true;
  if (width <= 2048) return f(Size<8, 1>{}), true;
  if (width <= 4096) return f(Size<16, 1>{}), true;
  return width <= MOST_WIDTH ? (f(Size<16, 2>{}), true) : false;
}

// Does a row start on 16 bytes wherever these do?
template <typename... Pointers>
bool packed(int64_t width, Pointers... pointers) {
  return width % N == 0 && (aligned(pointers) && ...);
}

}  // namespace

const char* norm_forward(Type type, const NormForward& task, void* stream) {
  if (task.rows == 0 || task.width == 0) return nullptr;
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(task.rows, 1 << 16));
  const bool fast = packed(task.width, task.x, task.bias, task.residual, task.gamma, task.beta, task.share, task.y, task.z);
  with_type(type, [&](auto element) {
    using T = decltype(element);
    const bool done = fast && with_forward_size(task.width, [&](auto size) {
      forward<T, size.warps, size.packs><<<blocks, size.warps * WARP, 0, queue>>>(task);
    });
    if (!done) forward_loop<T><<<blocks, LOOP_WARPS * WARP, 0, queue>>>(task);
  });
  return launch_error();
}

// Partials: enough blocks for every multiprocessor, and few beside the rows. Of the shape alone, so that sums are too.
int64_t norm_partials(int64_t rows, int64_t width) {
  const int64_t blocks = std::min<int64_t>(2048, std::max<int64_t>(264, (1 << 19) / std::max<int64_t>(width, 1)));
  return std::min(rows, blocks);
}

const char* norm_backward(Type type, const NormBackward& task, void* stream) {
  if (task.width == 0) return nullptr;
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t partials = norm_partials(task.rows, task.width);
  const auto blocks = static_cast<unsigned>(partials);
  const bool fast = packed(task.width, task.of_y, task.z, task.gamma, task.share, task.of_x, task.of_residual);
  with_type(type, [&](auto element) {
    using T = decltype(element);
    const bool done = task.rows == 0 || (fast && with_backward_size(task.width, [&](auto size) {
                        backward<T, size.warps, size.packs><<<blocks, size.warps * WARP, 0, queue>>>(task);
                      }));
    if (!done) backward_loop<T><<<blocks, LOOP_WARPS * WARP, 0, queue>>>(task);
    void* totals[] = {task.of_gamma, task.of_beta, task.of_bias};
    for (int64_t which = 0; which < 3; ++which)
      if (totals[which])
        launch_add_partials<T>(task.partials + which * task.width, partials, 3 * task.width, task.width,
                               static_cast<T*>(totals[which]), queue);
  });
  return launch_error();
}

}  // namespace growth_ds::cuda
