// Elements of grown tensors: a gather and a factor for each axis.
#pragma once

#include "../include/cpu.h"

namespace growth_ds {

constexpr int64_t MOST_AXES = 8;

// A tensor over `axes` axes of old and new sizes. Unit j of new axis a stands at table entry offset[a] + j: `source` has
// the old unit, `factors` what values are multiplied with (null: all 1). Factors are multiplied in double, axis after
// axis, and rounded once, to float, before the value is multiplied: the bits of growth_ds/growth/apply.py.
struct Growth {
  int64_t axes;
  int64_t old_size[MOST_AXES], new_size[MOST_AXES], offset[MOST_AXES];
};

// out gets elements [first, first + end - begin) of the flattened grown tensor, beginning at out[begin].
#define GROWTH_DS_ARGUMENTS                                                                                            \
  const Growth &growth, const float *x, const int64_t *source, const double *factors, float *out, int64_t first,       \
      int64_t begin, int64_t end
GROWTH_DS_DECLARE(growth_gather, GROWTH_DS_ARGUMENTS)

}  // namespace growth_ds
