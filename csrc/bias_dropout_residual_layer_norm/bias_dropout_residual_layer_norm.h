// y = LayerNorm(z) gamma + beta, z = residual + dropout(x + bias), and its gradients.
#pragma once

#include "../include/partials.h"
#include "../include/philox.h"

namespace growth_ds {

struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // 0: none
  float scale;         // 1 / (1 - p)
};

// (rows, width) and (width,) are float or bf16 alike; share, mean and rstd are fp32. Null: bias, residual, z (not kept),
// share (each element counts 1 / width in mean and variance; else share (width,), whose sum is 1).
struct NormForward {
  const void *x, *bias, *residual, *gamma, *beta;
  const float* share;
  void *y, *z;
  float *mean, *rstd;  // (rows,)
  int64_t width;
  float eps;
  Dropout dropout;
};

// of_residual is the gradient of z, of_x that of x; without dropout they are one and of_residual is null. `sums` (3,
// width) fp32 gets the sums over the rows for gamma, beta and bias; `with_bias` asks for the third.
struct NormBackward {
  const void *of_y, *z, *gamma;
  const float *share, *mean, *rstd;
  void *of_x, *of_residual;
  int64_t width;
  Dropout dropout;
  bool with_bias;
};

GROWTH_DS_DECLARE(norm_forward_float, const NormForward& task, int64_t begin, int64_t end)
GROWTH_DS_DECLARE(norm_forward_bf16, const NormForward& task, int64_t begin, int64_t end)
GROWTH_DS_DECLARE(norm_backward_float, const NormBackward& task, int64_t begin, int64_t end, float* sums)
GROWTH_DS_DECLARE(norm_backward_bf16, const NormBackward& task, int64_t begin, int64_t end, float* sums)

// out (columns [begin, end) of width) = the sum of column c of partials (blocks, stride).
#define GROWTH_DS_SUM const float *partials, int64_t blocks, int64_t stride, int64_t begin, int64_t end, void *out
GROWTH_DS_DECLARE(norm_sum_float, GROWTH_DS_SUM)
GROWTH_DS_DECLARE(norm_sum_bf16, GROWTH_DS_SUM)

}  // namespace growth_ds
