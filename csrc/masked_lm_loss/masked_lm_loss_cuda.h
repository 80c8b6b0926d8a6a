// Launcher of the CUDA kernel; `stream` is a cudaStream_t. It returns what went wrong, or null.
#pragma once

#include <cstdint>

#include "../include/type.h"

namespace growth_ds::cuda {

// As masked_lm_loss.h has it, of all rows.
const char* cross_entropy(Type type, void* logits, const float* bias, const int64_t* labels, int64_t rows, int64_t vocab,
                          float scale, float* loss, uint8_t* correct, void* stream);

}  // namespace growth_ds::cuda
