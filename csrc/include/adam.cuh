// Adam's moments and direction on a GPU, and four elements at a time from memory: what adamw and lamb have in common.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace growth_ds::cuda {

// Options of a step; the count is on the device, so the corrections are made there, once a block and in double.
struct AdamOptions {
  double beta1, beta2;
  float eps;
};

struct Adam {
  float beta1, rest1, beta2, rest2, root, left, eps;  // root: sqrt(1 - beta2^step); left: 1 - beta1^step
};

__device__ inline Adam adam_of(const AdamOptions& options, const float* step) {
  __shared__ Adam shared;
  if (threadIdx.x == 0) {
    const double count = *step;
    shared.beta1 = static_cast<float>(options.beta1);
    shared.rest1 = static_cast<float>(1.0 - options.beta1);
    shared.beta2 = static_cast<float>(options.beta2);
    shared.rest2 = static_cast<float>(1.0 - options.beta2);
    shared.root = static_cast<float>(sqrt(1.0 - pow(options.beta2, count)));
    shared.left = static_cast<float>(1.0 - pow(options.beta1, count));
    shared.eps = options.eps;
  }
  __syncthreads();
  return shared;
}

__device__ inline float adam_direction(const Adam& adam, float grad, float& first, float& second) {
  first = adam.rest1 < 0.5f ? first + (grad - first) * adam.rest1 : grad - (grad - first) * adam.beta1;  // torch's lerp
  second = second * adam.beta2 + grad * (grad * adam.rest2);
  return first / (sqrtf(second) / adam.root + adam.eps);
}

template <typename T>
__device__ inline float widened(T x) {
  return static_cast<float>(x);
}

template <typename T>
__device__ inline T rounded(float x);
template <>
__device__ inline float rounded(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 rounded(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half rounded(float x) {
  return __float2half_rn(x);
}

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// Elements [i, i + count) with count <= 4; whole fours of aligned tensors in one access.
template <typename T>
__device__ inline void load_four(const T* from, int64_t i, int count, bool aligned, float out[4]) {
  if (aligned && count == 4) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(from + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = widened(four.x[k]);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) out[k] = k < count ? widened(from[i + k]) : 0.0f;
}

template <typename T>
__device__ inline void store_four(T* to, int64_t i, int count, bool aligned, const float in[4]) {
  if (aligned && count == 4) {
    Four<T> four;
#pragma unroll
    for (int k = 0; k < 4; ++k) four.x[k] = rounded<T>(in[k]);
    *reinterpret_cast<Four<T>*>(to + i) = four;
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (k < count) to[i + k] = rounded<T>(in[k]);
}

// The first stretch that reaches beyond `at`.
__device__ inline int64_t stretch_of(int64_t at, const int64_t* ends, int64_t segments) {
  int64_t low = 0, high = segments;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ends[middle] > at)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Each element's own multipliers, or (with `ends`) those of its stretch.
__device__ inline void load_multipliers(const float* multiplier, const int64_t* ends, int64_t segments, int64_t i,
                                        int count, bool aligned, float out[4]) {
  if (ends == nullptr) return load_four(multiplier, i, count, aligned, out);
  int64_t k = stretch_of(i, ends, segments);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    while (k + 1 < segments && ends[k] <= i + j) ++k;
    out[j] = multiplier[k];
  }
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;  // null is
}

}  // namespace growth_ds::cuda
