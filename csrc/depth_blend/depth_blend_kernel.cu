// A thread has one column: it reads each input layer once, into shared memory, and writes each output layer once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "depth_blend_cuda.h"

namespace growth_ds::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int MIX_THREADS = 128;

// Dynamic shared memory: weight (outputs, inputs), then `inputs` rows of MIX_THREADS values.
template <typename T>
__global__ void __launch_bounds__(MIX_THREADS)
    mix_kernel(const T* in, const float* weight, int64_t by_new, int64_t by_old, T* out, int inputs, int outputs,
               int64_t n) {
  extern __shared__ float shared[];
  float* values = shared + outputs * inputs;
  for (int k = threadIdx.x; k < outputs * inputs; k += MIX_THREADS)
    shared[k] = weight[k / inputs * by_new + k % inputs * by_old];
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * MIX_THREADS;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * MIX_THREADS + threadIdx.x; at < n; at += stride) {
    // each thread reads back only what it wrote: no barrier
    for (int i = 0; i < inputs; ++i) values[i * MIX_THREADS + threadIdx.x] = static_cast<float>(in[i * n + at]);
    for (int j = 0; j < outputs; ++j) {
      float sum = 0.0f;
      for (int i = 0; i < inputs; ++i) sum += shared[j * inputs + i] * values[i * MIX_THREADS + threadIdx.x];
      out[j * n + at] = static_cast<T>(sum);
    }
  }
}

// Products of BLEND_COLUMNS columns at a time; each thread has pairs (j, i), and a block its own row of partials.
template <typename T>
__global__ void __launch_bounds__(THREADS) products_kernel(const T* layers, const T* grad, double* partials,
                                                           int old_layers, int new_layers, int64_t n) {
  extern __shared__ float shared[];
  constexpr int PITCH = BLEND_COLUMNS + 1;
  float *x = shared, *g = shared + old_layers * PITCH;
  const int pairs = old_layers * new_layers;
  double* own = partials + static_cast<int64_t>(blockIdx.x) * pairs;
  for (int k = threadIdx.x; k < pairs; k += THREADS) own[k] = 0.0;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * BLEND_COLUMNS; at < n; at += gridDim.x * BLEND_COLUMNS) {
    const int count = n - at < BLEND_COLUMNS ? static_cast<int>(n - at) : static_cast<int>(BLEND_COLUMNS);
    __syncthreads();
    for (int k = threadIdx.x; k < (old_layers + new_layers) * BLEND_COLUMNS; k += THREADS) {
      const int row = k / BLEND_COLUMNS, column = k % BLEND_COLUMNS;
      const T* from = row < old_layers ? layers + row * n : grad + (row - old_layers) * n;
      shared[row * PITCH + column] = column < count ? static_cast<float>(from[at + column]) : 0.0f;
    }
    __syncthreads();
    for (int k = threadIdx.x; k < pairs; k += THREADS) {
      const float *a = g + k / old_layers * PITCH, *b = x + k % old_layers * PITCH;
      float sum = 0.0f;
      for (int c = 0; c < BLEND_COLUMNS; ++c) sum += a[c] * b[c];
      own[k] += static_cast<double>(sum);
    }
  }
}

__global__ void sum_kernel(const double* partials, int64_t blocks, int64_t pairs, float* of_weight) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= pairs) return;
  double total = 0.0;
  for (int64_t block = 0; block < blocks; ++block) total += partials[block * pairs + k];
  of_weight[k] = static_cast<float>(total);
}

// More than 48 KB of shared memory has to be asked for.
template <typename K>
int allow(K kernel, size_t bytes) {
  return static_cast<int>(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

template <typename T>
int mixed(const void* in, const float* weight, int64_t by_new, int64_t by_old, void* out, int64_t inputs,
          int64_t outputs, int64_t n, cudaStream_t stream) {
  const size_t bytes = sizeof(float) * static_cast<size_t>(inputs * outputs + inputs * MIX_THREADS);
  if (const int error = allow(mix_kernel<T>, bytes)) return error;
  const int64_t wanted = (n + MIX_THREADS - 1) / MIX_THREADS;
  mix_kernel<T><<<static_cast<int>(wanted < 4096 ? wanted : 4096), MIX_THREADS, bytes, stream>>>(
      static_cast<const T*>(in), weight, by_new, by_old, static_cast<T*>(out), static_cast<int>(inputs),
      static_cast<int>(outputs), n);
  return static_cast<int>(cudaGetLastError());
}

template <typename T>
int multiplied(const void* layers, const void* grad, double* partials, int64_t old_layers, int64_t new_layers,
               int64_t n, cudaStream_t stream) {
  const size_t bytes = sizeof(float) * static_cast<size_t>((old_layers + new_layers) * (BLEND_COLUMNS + 1));
  if (const int error = allow(products_kernel<T>, bytes)) return error;
  products_kernel<T><<<static_cast<int>(blend_blocks(n)), THREADS, bytes, stream>>>(
      static_cast<const T*>(layers), static_cast<const T*>(grad), partials, static_cast<int>(old_layers),
      static_cast<int>(new_layers), n);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int depth_blend(const void* in, const float* weight, int64_t by_new, int64_t by_old, void* out, int64_t inputs,
                int64_t outputs, int64_t n, Kind kind, void* raw) {
  if (n == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(raw);
  if (kind == BF16) return mixed<__nv_bfloat16>(in, weight, by_new, by_old, out, inputs, outputs, n, stream);
  if (kind == HALF) return mixed<__half>(in, weight, by_new, by_old, out, inputs, outputs, n, stream);
  return mixed<float>(in, weight, by_new, by_old, out, inputs, outputs, n, stream);
}

int depth_blend_weight(const void* layers, const void* grad, float* of_weight, double* partials, int64_t old_layers,
                       int64_t new_layers, int64_t n, Kind kind, void* raw) {
  auto* stream = static_cast<cudaStream_t>(raw);
  const int64_t pairs = old_layers * new_layers;
  int error = 0;
  if (n > 0) {
    if (kind == BF16)
      error = multiplied<__nv_bfloat16>(layers, grad, partials, old_layers, new_layers, n, stream);
    else if (kind == HALF)
      error = multiplied<__half>(layers, grad, partials, old_layers, new_layers, n, stream);
    else
      error = multiplied<float>(layers, grad, partials, old_layers, new_layers, n, stream);
  }
  if (error != 0 || pairs == 0) return error;
  sum_kernel<<<static_cast<int>((pairs + 63) / 64), 64, 0, stream>>>(partials, blend_blocks(n), pairs, of_weight);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace growth_ds::cuda
