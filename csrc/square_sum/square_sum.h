// The sum of the squares of a flat tensor, in double.
#pragma once

#include "../include/cpu.h"

namespace growth_ds {

// total: of elements [begin, end) of x, which are fp32 or bf16.
#define GROWTH_DS_SQUARES const void *x, int64_t begin, int64_t end, double *total
GROWTH_DS_DECLARE(square_sum_float, GROWTH_DS_SQUARES)
GROWTH_DS_DECLARE(square_sum_bf16, GROWTH_DS_SQUARES)

}  // namespace growth_ds
