// Launchers of the CUDA kernels; they return a cudaError_t as int. See depth_blend.h for what the arguments mean.
#pragma once

#include <cstdint>

namespace growth_ds::cuda {

enum Kind : int { NONE = 0, FLOAT = 1, BF16 = 2, HALF = 3 };

constexpr int64_t BLEND_COLUMNS = 64;  // of a block
constexpr int64_t BLEND_BLOCKS = 1024;

// Blocks of the weight's gradient, so rows of `partials` (blocks, new * old) double.
inline int64_t blend_blocks(int64_t n) {
  const int64_t wanted = (n + BLEND_COLUMNS - 1) / BLEND_COLUMNS;
  return wanted < BLEND_BLOCKS ? wanted : BLEND_BLOCKS;
}

// out[j] = sum_i weight[j * by_new + i * by_old] * in[i]: forward, and backward with the strides exchanged.
int depth_blend(const void* in, const float* weight, int64_t by_new, int64_t by_old, void* out, int64_t inputs,
                int64_t outputs, int64_t n, Kind kind, void* stream);

int depth_blend_weight(const void* layers, const void* grad, float* of_weight, double* partials, int64_t old_layers,
                       int64_t new_layers, int64_t n, Kind kind, void* stream);

}  // namespace growth_ds::cuda
