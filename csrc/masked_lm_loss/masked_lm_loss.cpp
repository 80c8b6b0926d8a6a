// growth_ds::cross_entropy_: the CPU binding. The head's products are torch's: growth_ds/ops/masked_lm_loss.py.
#include "masked_lm_loss.h"

#include "../include/torch_stable.h"

namespace {

using torch::stable::Tensor;

void cross_entropy_(const Tensor& logits, const Tensor& bias, const Tensor& labels, double scale, const Tensor& loss,
                    const Tensor& correct) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const auto kernel = logits.scalar_type() == torch::headeronly::ScalarType::BFloat16
                          ? GROWTH_DS_PICK(cross_entropy_rows_bf16)
                          : GROWTH_DS_PICK(cross_entropy_rows_float);
  void* data = logits.mutable_data_ptr();
  const auto* offsets = static_cast<const float*>(bias.const_data_ptr());
  const auto* chosen = static_cast<const int64_t*>(labels.const_data_ptr());
  auto* losses = static_cast<float*>(loss.mutable_data_ptr());
  auto* hits = static_cast<uint8_t*>(correct.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    kernel(data, offsets, chosen, begin, end, vocab, static_cast<float>(scale), losses, hits);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(growth_ds, library) {
  library.def(
      "cross_entropy_(Tensor(a!) logits, Tensor bias, Tensor labels, float scale, Tensor(b!) loss, Tensor(c!) correct)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CPU, library) { library.impl("cross_entropy_", TORCH_BOX(&cross_entropy_)); }
