// gelu(x + bias) and its gradients.
#pragma once

#include "../include/partials.h"

namespace growth_ds {

// x, out (rows, width), bias (width,), all float or bf16: rows [begin, end). tanh: the approximation, else erf.
#define GROWTH_DS_FORWARD                                                                                              \
  const void *x, const void *bias, int64_t begin, int64_t end, int64_t width, bool tanh, void *out
GROWTH_DS_DECLARE(bias_gelu_float, GROWTH_DS_FORWARD)
GROWTH_DS_DECLARE(bias_gelu_bf16, GROWTH_DS_FORWARD)

// of_x (rows, width) is written; of_bias (width,) fp32 holds the sum of the rows [begin, end) of of_x before rounding.
#define GROWTH_DS_BACKWARD                                                                                             \
  const void *of_out, const void *x, const void *bias, int64_t begin, int64_t end, int64_t width, bool tanh,           \
      void *of_x, float *of_bias
GROWTH_DS_DECLARE(bias_gelu_backward_float, GROWTH_DS_BACKWARD)
GROWTH_DS_DECLARE(bias_gelu_backward_bf16, GROWTH_DS_BACKWARD)

#define GROWTH_DS_SUM const float *partials, int64_t blocks, int64_t width, int64_t begin, int64_t end, void *out
GROWTH_DS_DECLARE(bias_gelu_sum_float, GROWTH_DS_SUM)
GROWTH_DS_DECLARE(bias_gelu_sum_bf16, GROWTH_DS_SUM)

}  // namespace growth_ds
