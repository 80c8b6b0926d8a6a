// Launchers of the CUDA kernels; `stream` is a cudaStream_t. They return what went wrong, or null.
#pragma once

#include <cstdint>

#include "../include/type.h"

namespace growth_ds::cuda {

const char* bias_gelu(Type type, const void* x, const void* bias, int64_t rows, int64_t width, bool tanh, void* out,
                      void* stream);

// Rows of fp32 partial sums that the backward needs.
int64_t bias_gelu_partials(int64_t rows, int64_t width);

// partials (bias_gelu_partials, width) is for the kernel's own use.
const char* bias_gelu_backward(Type type, const void* of_out, const void* x, const void* bias, int64_t rows,
                               int64_t width, bool tanh, void* of_x, void* of_bias, float* partials, void* stream);

}  // namespace growth_ds::cuda
