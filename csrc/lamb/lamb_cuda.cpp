// growth_ds::lamb_update_ and growth_ds::lamb_apply_: the CUDA bindings.
#include "lamb_cuda.h"

#include <optional>

#include "../include/torch_cuda.h"

namespace {

using torch::stable::Tensor;
using growth_ds::Maybe;
using growth_ds::read;

void lamb_update_(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& grad,
                  const Tensor& step, const Maybe& factor, const Maybe& multiplier, const Maybe& ends,
                  const Tensor& tiles, const Tensor& starts, const Tensor& partials, const Tensor& squares,
                  double beta1, double beta2, double eps, double weight_decay) {
  const growth_ds::cuda::Stream here(weight);
  growth_ds::cuda::LambUpdate a{};
  a.weight = static_cast<const float*>(weight.const_data_ptr());
  a.first = static_cast<float*>(exp_avg.mutable_data_ptr());
  a.second = static_cast<float*>(exp_avg_sq.mutable_data_ptr());
  a.grad = static_cast<float*>(grad.mutable_data_ptr());
  a.step = static_cast<const float*>(step.const_data_ptr());
  a.factor = read<float>(factor);
  a.multiplier = read<float>(multiplier);
  a.ends = read<int64_t>(ends);
  a.segments = ends.has_value() ? ends->numel() : 0;
  a.tiles = static_cast<const int64_t*>(tiles.const_data_ptr());
  a.starts = static_cast<const int64_t*>(starts.const_data_ptr());
  a.count = tiles.size(0);
  a.rows = starts.numel() - 1;
  a.partials = static_cast<double*>(partials.mutable_data_ptr());
  a.squares = static_cast<double*>(squares.mutable_data_ptr());
  a.beta1 = beta1;
  a.beta2 = beta2;
  a.eps = eps;
  a.weight_decay = weight_decay;
  growth_ds::cuda::check(growth_ds::cuda::lamb_update(a, here.get()), "lamb_update_");
}

void lamb_apply_(const Tensor& weight, const Tensor& update, const Tensor& tiles, const Tensor& rates,
                 const Maybe& low) {
  const growth_ds::cuda::Stream here(weight);
  growth_ds::cuda::LambApply a{};
  a.weight = static_cast<float*>(weight.mutable_data_ptr());
  a.update = static_cast<float*>(update.mutable_data_ptr());
  a.tiles = static_cast<const int64_t*>(tiles.const_data_ptr());
  a.count = tiles.size(0);
  a.rates = static_cast<const float*>(rates.const_data_ptr());
  a.low = low.has_value() ? low->mutable_data_ptr() : nullptr;
  a.low_is_half = low.has_value() && low->scalar_type() == torch::headeronly::ScalarType::Half;
  growth_ds::cuda::check(growth_ds::cuda::lamb_apply(a, here.get()), "lamb_apply_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CUDA, library) {
  library.impl("lamb_update_", TORCH_BOX(&lamb_update_));
  library.impl("lamb_apply_", TORCH_BOX(&lamb_apply_));
}
