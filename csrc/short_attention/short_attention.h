// Attention of short rows in bf16: scores, softmax and both products of a head while they are in the cache.
#pragma once

#include "../include/cpu.h"

namespace growth_ds {

// (B, T, N, D) bf16 with any strides but that of D, which is 1; strides in elements.
struct HeadsView {
  void* data;
  int64_t batch, row, head;
};

// Sizes of a call: D is a multiple of 16. Heads are counted through the batch: head h is head h % heads of row
// h / heads.
struct AttentionSizes {
  int64_t queries, keys, heads, width;
};

// Queries of which one block of scores has its columns; 16 of them are a vector of the widest registers.
constexpr int64_t ATTENTION_BLOCK = 64, ATTENTION_LANES = 16;

constexpr int64_t lanes_of(int64_t queries) { return (queries + ATTENTION_LANES - 1) / ATTENTION_LANES * ATTENTION_LANES; }

// bf16 numbers that the probabilities of one head take: a row for each key, in blocks of queries, and those are filled
// up to whole vectors.
constexpr int64_t weights_of(const AttentionSizes& s) { return s.keys * lanes_of(s.queries); }

// out = softmax(q k^T / sqrt(D)) v of heads [begin, end), and its probabilities. seen: for each of the `keys` of every
// row of the batch whether it counts, null for all; a row has one at least.
#define GROWTH_DS_FORWARD                                                                                              \
  HeadsView q, HeadsView k, HeadsView v, const bool *seen, AttentionSizes sizes, int64_t begin, int64_t end,           \
      HeadsView out, void *weights
// The gradients of q, k and v from that of out and the probabilities.
#define GROWTH_DS_BACKWARD                                                                                             \
  HeadsView of_out, HeadsView q, HeadsView k, HeadsView v, const void *weights, AttentionSizes sizes,              \
      int64_t begin, int64_t end, HeadsView of_q, HeadsView of_k, HeadsView of_v
GROWTH_DS_DECLARE(short_attention, GROWTH_DS_FORWARD)
GROWTH_DS_DECLARE(short_attention_backward, GROWTH_DS_BACKWARD)

}  // namespace growth_ds
