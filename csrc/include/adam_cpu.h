// Adam's moments and direction for sixteen elements: what adamw and lamb have in common.
#pragma once

#include <cmath>

#include "cpu.h"

namespace growth_ds {

// Made in double from the options and the step count.
struct Adam {
  float beta1, rest1, beta2, rest2;  // rest: 1 - beta
  float root;                        // sqrt(1 - beta2^step)
  float eps;

  Adam(double b1, double b2, double epsilon, double step)
      : beta1(static_cast<float>(b1)),
        rest1(static_cast<float>(1.0 - b1)),
        beta2(static_cast<float>(b2)),
        rest2(static_cast<float>(1.0 - b2)),
        root(static_cast<float>(std::sqrt(1.0 - std::pow(b2, step)))),
        eps(static_cast<float>(epsilon)) {}
};

namespace GROWTH_DS_ISA {

GROWTH_DS_INLINE Floats square_root(Floats x) {
  float parts[W];
  store(parts, x);
  for (int64_t i = 0; i < W; ++i) parts[i] = __builtin_sqrtf(parts[i]);
  return load(parts);
}

// Moves both moments on and returns first / (sqrt(second) / root + eps).
GROWTH_DS_INLINE Floats adam_direction(const Adam& adam, Floats grad, Floats& first, Floats& second) {
  first = adam.rest1 < 0.5f ? first + (grad - first) * adam.rest1 : grad - (grad - first) * adam.beta1;  // torch's lerp
  second = second * adam.beta2 + grad * (grad * adam.rest2);
  return first / (square_root(second) / adam.root + adam.eps);
}

// Sixteen elements from `from`, or the first `count` of them and zeros.
template <typename T>
GROWTH_DS_INLINE Floats load_upto(const T* from, int64_t count) {
  return count >= W ? load(from) : load_some(from, count);
}

template <typename T>
GROWTH_DS_INLINE void store_upto(T* to, Floats x, int64_t count) {
  if (count >= W)
    store(to, x);
  else
    store_some(to, x, count);
}

// The first stretch that reaches beyond `at`. Not std::upper_bound: the linker keeps one instance of a library's template,
// and it might be the one with AVX-512.
GROWTH_DS_INLINE int64_t stretch_of(int64_t at, const int64_t* ends, int64_t segments) {
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

}  // namespace GROWTH_DS_ISA
}  // namespace growth_ds
