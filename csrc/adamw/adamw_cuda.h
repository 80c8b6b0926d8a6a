// Launchers of the CUDA kernel; they return a cudaError_t as int. See adamw.h for what the arguments mean.
#pragma once

#include <cstdint>

namespace growth_ds::cuda {

enum Kind : int { NONE = 0, FLOAT = 1, BF16 = 2, HALF = 3 };

struct AdamW {
  float *weight, *first, *second;
  const void* grad;
  Kind grad_kind;
  const float *step, *factor, *multiplier;
  const int64_t* ends;
  int64_t segments, numel;
  void* low;
  Kind low_kind;
  double lr, beta1, beta2, eps, weight_decay;
};

int adamw(const AdamW& arguments, void* stream);

}  // namespace growth_ds::cuda
