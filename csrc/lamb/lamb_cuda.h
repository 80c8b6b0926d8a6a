// Launchers of the CUDA kernels; they return a cudaError_t as int. See lamb.h for what the arguments mean.
#pragma once

#include <cstdint>

namespace growth_ds::cuda {

struct LambUpdate {
  const float* weight;
  float *first, *second, *grad;
  const float *step, *factor, *multiplier;
  const int64_t* ends;
  int64_t segments;
  const int64_t *tiles, *starts;
  int64_t count, rows;
  double *partials, *squares;
  double beta1, beta2, eps, weight_decay;
};

struct LambApply {
  float *weight, *update;
  const int64_t* tiles;
  int64_t count;
  const float* rates;
  void* low;
  bool low_is_half;  // else bf16
};

int lamb_update(const LambUpdate& arguments, void* stream);
int lamb_apply(const LambApply& arguments, void* stream);

}  // namespace growth_ds::cuda
