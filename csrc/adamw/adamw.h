// One step of AdamW over a flat fp32 tensor, in one pass: gradient scaled, moments, decay, weight, 16-bit copy.
#pragma once

#include "../include/adam_cpu.h"

namespace growth_ds {

// Elements [begin, end). weight, first, second: fp32, written. grad: fp32 or bf16, times `factor`. kept: 1 - lr * decay;
// size: lr / (1 - beta1^step). multiplier: null, or a factor of each element's update; with `ends` (segments,) ascending,
// multiplier[k] is that of all elements from ends[k - 1] up to ends[k]. low: null, or bf16 that gets the new weights.
#define GROWTH_DS_ARGUMENTS                                                                                            \
  const Adam &adam, float kept, float size, float *weight, float *first, float *second, const void *grad,              \
      float factor, const float *multiplier, const int64_t *ends, int64_t segments, void *low, int64_t begin,          \
      int64_t end
GROWTH_DS_DECLARE(adamw_float, GROWTH_DS_ARGUMENTS)
GROWTH_DS_DECLARE(adamw_bf16, GROWTH_DS_ARGUMENTS)

}  // namespace growth_ds
