// LAMB over a flat fp32 tensor that holds many parameters: updates and squared norms, then the step by trust ratios.
#pragma once

#include "../include/adam_cpu.h"

namespace growth_ds {

// Tiles [begin, end) of `tiles`, each (row, first element, end): no tile has elements of two rows, and row -1 is padding.
// lamb_update moves the moments on, puts Adam's direction times its multiplier plus decay * weight in the place of the
// gradient, which is taken times `factor`, and writes the tile's squared norms of weight and update to partials[tile]
// and partials[count + tile]. left: 1 - beta1^step. Padding is left as it is.
#define GROWTH_DS_UPDATE                                                                                               \
  const Adam &adam, float left, float decay, const float *weight, float *first, float *second, float *grad,            \
      float factor, const float *multiplier, const int64_t *ends, int64_t segments, const int64_t *tiles,              \
      int64_t count, double *partials, int64_t begin, int64_t end
GROWTH_DS_DECLARE(lamb_update, GROWTH_DS_UPDATE)

// weight -= rates[row] * update, rounded to `low` as well unless it is null; the update becomes 0, in padding too.
#define GROWTH_DS_APPLY                                                                                                \
  float *weight, float *update, const int64_t *tiles, const float *rates, void *low, int64_t begin, int64_t end
GROWTH_DS_DECLARE(lamb_apply, GROWTH_DS_APPLY)

}  // namespace growth_ds
