// growth_ds::adamw_: the CUDA binding.
#include "adamw_cuda.h"

#include <optional>

#include "../include/torch_cuda.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using growth_ds::Maybe;
using growth_ds::read;

growth_ds::cuda::Kind kind_of(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "adamw_: a dtype it does not know");
  return type == ScalarType::BFloat16 ? growth_ds::cuda::BF16
         : type == ScalarType::Half   ? growth_ds::cuda::HALF
                                      : growth_ds::cuda::FLOAT;
}

void adamw_(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& grad,
            const Tensor& step, const Maybe& factor, const Maybe& multiplier, const Maybe& ends, const Maybe& low,
            double lr, double beta1, double beta2, double eps, double weight_decay) {
  const growth_ds::cuda::Stream here(weight);
  growth_ds::cuda::AdamW a{};
  a.weight = static_cast<float*>(weight.mutable_data_ptr());
  a.first = static_cast<float*>(exp_avg.mutable_data_ptr());
  a.second = static_cast<float*>(exp_avg_sq.mutable_data_ptr());
  a.grad = grad.const_data_ptr();
  a.grad_kind = kind_of(grad);
  a.step = static_cast<const float*>(step.const_data_ptr());
  a.factor = read<float>(factor);
  a.multiplier = read<float>(multiplier);
  a.ends = read<int64_t>(ends);
  a.segments = ends.has_value() ? ends->numel() : 0;
  a.numel = weight.numel();
  a.low = low.has_value() ? low->mutable_data_ptr() : nullptr;
  a.low_kind = low.has_value() ? kind_of(*low) : growth_ds::cuda::NONE;
  a.lr = lr;
  a.beta1 = beta1;
  a.beta2 = beta2;
  a.eps = eps;
  a.weight_decay = weight_decay;
  growth_ds::cuda::check(growth_ds::cuda::adamw(a, here.get()), "adamw_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CUDA, library) { library.impl("adamw_", TORCH_BOX(&adamw_)); }
