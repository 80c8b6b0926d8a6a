// growth_ds::adamw_: the CPU binding.
#include "adamw.h"

#include <algorithm>
#include <optional>

#include "../include/torch_stable.h"

namespace {

using torch::stable::Tensor;
using growth_ds::Maybe;
using growth_ds::read;

constexpr int64_t BLOCK = 4096;  // elements: threads begin at multiples of it, so that vectors stay aligned

void adamw_(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& grad,
            const Tensor& step, const Maybe& factor, const Maybe& multiplier, const Maybe& ends, const Maybe& low,
            double lr, double beta1, double beta2, double eps, double weight_decay) {
  const int64_t numel = weight.numel();
  STD_TORCH_CHECK(exp_avg.numel() == numel && exp_avg_sq.numel() == numel && grad.numel() == numel,
                  "adamw_: tensors of different sizes");
  const double count = *static_cast<const float*>(step.const_data_ptr());
  const growth_ds::Adam adam(beta1, beta2, eps, count);
  const auto kept = static_cast<float>(1.0 - lr * weight_decay);
  const auto size = static_cast<float>(lr / (1.0 - std::pow(beta1, count)));
  const float times = factor.has_value() ? *read<float>(factor) : 1.0f;
  const auto kernel = grad.scalar_type() == torch::headeronly::ScalarType::BFloat16 ? GROWTH_DS_PICK(adamw_bf16)
                                                                                    : GROWTH_DS_PICK(adamw_float);
  auto* w = static_cast<float*>(weight.mutable_data_ptr());
  auto* m = static_cast<float*>(exp_avg.mutable_data_ptr());
  auto* v = static_cast<float*>(exp_avg_sq.mutable_data_ptr());
  const void* g = grad.const_data_ptr();
  void* copy = low.has_value() ? low->mutable_data_ptr() : nullptr;
  const auto *each = read<float>(multiplier);
  const auto *until = read<int64_t>(ends);
  const int64_t segments = ends.has_value() ? ends->numel() : 0;
  torch::stable::parallel_for(0, (numel + BLOCK - 1) / BLOCK, 8, [&](int64_t begin, int64_t end) {
    kernel(adam, kept, size, w, m, v, g, times, each, until, segments, copy, begin * BLOCK,
           std::min(end * BLOCK, numel));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(growth_ds, library) {
  library.def(
      "adamw_(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor step, Tensor? factor,"
      " Tensor? multiplier, Tensor? ends, Tensor(d!)? low, float lr, float beta1, float beta2, float eps,"
      " float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CPU, library) { library.impl("adamw_", TORCH_BOX(&adamw_)); }
