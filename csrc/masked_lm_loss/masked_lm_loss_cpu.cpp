#include <cmath>
#include <limits>

#include "masked_lm_loss.h"

namespace growth_ds::GROWTH_DS_ISA {
namespace {

constexpr float LOWEST = std::numeric_limits<float>::lowest();

// Whether the label is what argmax gives: the first of the largest.
template <typename T>
bool is_first(const T* logits, const float* bias, int64_t label, float chosen, float top) {
  if (chosen < top) return false;
  for (int64_t i = 0; i < label; ++i)
    if (get(logits + i) + bias[i] >= top) return false;
  return true;
}

template <typename T>
void one_row(T* logits, const float* bias, int64_t vocab, int64_t label, float scale, float* loss, uint8_t* correct) {
  const int64_t whole = vocab - vocab % W, rest = vocab % W;
  Floats tops = splat(LOWEST);
  for (int64_t i = 0; i < whole; i += W) tops = larger(tops, load(logits + i) + load(bias + i));
  if (rest) tops = larger(tops, load_some(logits + whole, rest, LOWEST) + load_some(bias + whole, rest));
  const float top = largest(tops);
  Floats sums[4] = {};  // short chains round less
  for (int64_t i = 0; i < whole; i += W) sums[i / W % 4] += exp_fast(load(logits + i) + load(bias + i) - top);
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (int64_t i = whole; i < vocab; ++i) total += std::exp(get(logits + i) + bias[i] - top);
  const float chosen = get(logits + label) + bias[label];
  *loss = std::log(total) + top - chosen;
  *correct = is_first(logits, bias, label, chosen, top);
  if (scale == 0.0f) return;  // the loss alone
  const float share = scale / total;
  for (int64_t i = 0; i < whole; i += W) store(logits + i, exp_fast(load(logits + i) + load(bias + i) - top) * share);
  if (rest) {
    const Floats last = load_some(logits + whole, rest) + load_some(bias + whole, rest) - top;
    store_some(logits + whole, exp_fast(last) * share, rest);
  }
  // The label's own element: 1 is taken away in fp32, before it is rounded.
  put(logits + label, (std::exp(chosen - top) / total - 1.0f) * scale);
}

template <typename T>
void all_rows(GROWTH_DS_ARGUMENTS) {
  for (int64_t r = begin; r < end; ++r) {
    T* row = static_cast<T*>(logits) + r * vocab;
    if (labels[r] >= 0 && labels[r] < vocab) {
      one_row(row, bias, vocab, labels[r], scale, loss + r, correct + r);
      continue;
    }
    loss[r] = 0.0f;
    correct[r] = 0;
    if (scale != 0.0f) std::memset(static_cast<void*>(row), 0, sizeof(T) * static_cast<size_t>(vocab));
  }
}

}  // namespace

void cross_entropy_rows_float(GROWTH_DS_ARGUMENTS) {
  all_rows<float>(logits, bias, labels, begin, end, vocab, scale, loss, correct);
}

void cross_entropy_rows_bf16(GROWTH_DS_ARGUMENTS) {
  all_rows<bf16>(logits, bias, labels, begin, end, vocab, scale, loss, correct);
}

}  // namespace growth_ds::GROWTH_DS_ISA
