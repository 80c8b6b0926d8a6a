// For the CUDA kernels, which know nothing of torch: eight elements at a time, sums over warps and blocks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "type.h"

namespace growth_ds::cuda {

constexpr int N = 8;  // elements a pack: 16 bytes of 16-bit floats, twice 16 bytes of fp32
constexpr int WARP = 32;

template <typename T>
struct alignas(16) Pack {
  T at[N];
};

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(__half x) { return __half2float(x); }
__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T>
constexpr int PARTS = sizeof(Pack<T>) / sizeof(uint4);

// `from` is 16-byte aligned. memcpy: a pack is no uint4, and the compiler may use that.
template <typename T>
__device__ __forceinline__ Pack<T> load(const T* from) {
  uint4 parts[PARTS<T>];
#pragma unroll
  for (int i = 0; i < PARTS<T>; ++i) parts[i] = reinterpret_cast<const uint4*>(from)[i];
  Pack<T> out;
  memcpy(&out, parts, sizeof out);
  return out;
}

template <typename T>
__device__ __forceinline__ void store(T* to, const Pack<T>& x) {
  uint4 parts[PARTS<T>];
  memcpy(parts, &x, sizeof x);
#pragma unroll
  for (int i = 0; i < PARTS<T>; ++i) reinterpret_cast<uint4*>(to)[i] = parts[i];
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The sums of two numbers over a block of `warps` warps, for every thread of it; `shared` holds 2 * WARPS floats, and the
// next call may follow at once.
template <int WARPS>
__device__ __forceinline__ float2 block_sum(float a, float b, float2* shared) {
  a = warp_sum(a);
  b = warp_sum(b);
  if (WARPS == 1) return {a, b};
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = {a, b};
  __syncthreads();
  float2 total = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    total.x += shared[i].x;
    total.y += shared[i].y;
  }
  __syncthreads();
  return total;
}

// out (columns,) = the sum of partials (rows, stride), each column in an order that depends on `rows` alone. Blocks of
// (32, 8) threads, one for 32 columns.
template <typename T>
__global__ void __launch_bounds__(256) add_partials(const float* partials, int64_t rows, int64_t stride,
                                                    int64_t columns, T* out) {
  __shared__ float parts[8][WARP + 1];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * WARP + threadIdx.x;
  float total = 0.0f;
  if (column < columns)
    for (int64_t r = threadIdx.y; r < rows; r += 8) total += partials[r * stride + column];
  parts[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
#pragma unroll
  for (int i = 1; i < 8; ++i) total += parts[i][threadIdx.x];
  out[column] = narrow<T>(total);
}

template <typename T>
void launch_add_partials(const float* partials, int64_t rows, int64_t stride, int64_t columns, T* out,
                         cudaStream_t stream) {
  if (columns == 0) return;
  add_partials<T><<<static_cast<unsigned>((columns + WARP - 1) / WARP), dim3(WARP, 8), 0, stream>>>(
      partials, rows, stride, columns, out);
}

// f with an object of the element type.
template <typename F>
void with_type(Type type, F f) {
  if (type == Type::float32) return f(float{});
  if (type == Type::float16) return f(__half{});
  f(__nv_bfloat16{});
}

// What went wrong at the launches before, or null.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace growth_ds::cuda
