// Layers mixed into layers: out[j] = sum_i weight[j, i] * layers[i], for tensors stacked over their first dimension.
#pragma once

#include "../include/cpu.h"

namespace growth_ds {

constexpr int64_t COLUMNS = 512;  // elements of each layer that are held at a time

// Columns [begin, end) of n. layers (old, n), out (new, n): fp32 or bf16; weight (new, old) fp32.
#define GROWTH_DS_FORWARD                                                                                              \
  const void *layers, const float *weight, void *out, int64_t old_layers, int64_t new_layers, int64_t n, int64_t begin, \
      int64_t end
GROWTH_DS_DECLARE(depth_blend_float, GROWTH_DS_FORWARD)
GROWTH_DS_DECLARE(depth_blend_bf16, GROWTH_DS_FORWARD)

// The same columns of both gradients: of_layers (old, n) like layers, or null; of_weight (new, old) double, these
// columns' part of it, or null. grad (new, n) like layers.
#define GROWTH_DS_BACKWARD                                                                                             \
  const void *layers, const float *weight, const void *grad, void *of_layers, double *of_weight, int64_t old_layers,   \
      int64_t new_layers, int64_t n, int64_t begin, int64_t end
GROWTH_DS_DECLARE(depth_blend_backward_float, GROWTH_DS_BACKWARD)
GROWTH_DS_DECLARE(depth_blend_backward_bf16, GROWTH_DS_BACKWARD)

}  // namespace growth_ds
