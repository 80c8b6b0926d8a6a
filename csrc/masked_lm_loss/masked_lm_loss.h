// Cross-entropy of rows of logits, whose gradient takes their place.
#pragma once

#include "../include/cpu.h"

namespace growth_ds {

// logits (rows, vocab), float or bf16: rows [begin, end) become scale * (softmax(logits + bias) - onehot(label)). A label
// outside [0, vocab) gives loss 0 and gradient 0; scale 0 leaves the logits as they are. loss (rows,): nats; correct
// (rows,): 1 where the label is the first of the largest.
#define GROWTH_DS_ARGUMENTS                                                                                            \
  void *logits, const float *bias, const int64_t *labels, int64_t begin, int64_t end, int64_t vocab, float scale,      \
      float *loss, uint8_t *correct
GROWTH_DS_DECLARE(cross_entropy_rows_float, GROWTH_DS_ARGUMENTS)
GROWTH_DS_DECLARE(cross_entropy_rows_bf16, GROWTH_DS_ARGUMENTS)

}  // namespace growth_ds
