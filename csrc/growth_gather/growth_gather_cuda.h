// Launcher of the CUDA kernel; it returns a cudaError_t as int. See growth_gather.h for what a Growth is.
#pragma once

#include "growth_gather.h"

namespace growth_ds::cuda {

// x: up to three tensors, all grown alike; factors (kinds, entries) or null; out (kinds, count).
int growth_gather(const Growth& growth, const float* const x[3], const int64_t* source, const double* factors,
                  int64_t entries, int64_t kinds, float* out, int64_t begin, int64_t count, void* stream);

}  // namespace growth_ds::cuda
