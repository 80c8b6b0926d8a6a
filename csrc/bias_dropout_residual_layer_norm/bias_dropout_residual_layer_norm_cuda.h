// Launchers of the CUDA kernels; `stream` is a cudaStream_t. They return what went wrong, or null.
#pragma once

#include <cstdint>

#include "../include/type.h"

namespace growth_ds::cuda {

// As in bias_dropout_residual_layer_norm.h, but the seed is on the device (null: no dropout).
struct Dropout {
  const int64_t* seed;
  uint32_t threshold;
  float scale;
};

struct NormForward {
  const void *x, *bias, *residual, *gamma, *beta;
  const float* share;
  void *y, *z;
  float *mean, *rstd;
  int64_t rows, width;
  float eps;
  Dropout dropout;
};

struct NormBackward {
  const void *of_y, *z, *gamma;
  const float *share, *mean, *rstd;
  void *of_x, *of_residual;
  void *of_gamma, *of_beta, *of_bias;  // of_bias null: not asked for
  float* partials;                     // (norm_partials, 3, width), for the kernel's own use
  int64_t rows, width;
  Dropout dropout;
};

const char* norm_forward(Type type, const NormForward& task, void* stream);
int64_t norm_partials(int64_t rows, int64_t width);
const char* norm_backward(Type type, const NormBackward& task, void* stream);

}  // namespace growth_ds::cuda
