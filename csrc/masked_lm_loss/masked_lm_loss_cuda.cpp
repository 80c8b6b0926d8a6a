// growth_ds::cross_entropy_: the CUDA binding.
#include "masked_lm_loss_cuda.h"

#include "../include/torch_cuda.h"

namespace {

using torch::stable::Tensor;

void cross_entropy_(const Tensor& logits, const Tensor& bias, const Tensor& labels, double scale, const Tensor& loss,
                    const Tensor& correct) {
  const growth_ds::cuda::Stream stream(logits);
  growth_ds::cuda::check(growth_ds::cuda::cross_entropy(
      growth_ds::cuda::type_of(logits), logits.mutable_data_ptr(), static_cast<const float*>(bias.const_data_ptr()),
      static_cast<const int64_t*>(labels.const_data_ptr()), logits.size(0), logits.size(1), static_cast<float>(scale),
      static_cast<float*>(loss.mutable_data_ptr()), static_cast<uint8_t*>(correct.mutable_data_ptr()), stream.get()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CUDA, library) { library.impl("cross_entropy_", TORCH_BOX(&cross_entropy_)); }
