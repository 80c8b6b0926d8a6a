// growth_ds::lamb_update_ and growth_ds::lamb_apply_: the CPU bindings.
#include "lamb.h"

#include <optional>

#include "../include/torch_stable.h"

namespace {

using torch::stable::Tensor;
using growth_ds::Maybe;
using growth_ds::read;

void lamb_update_(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& grad,
                  const Tensor& step, const Maybe& factor, const Maybe& multiplier, const Maybe& ends,
                  const Tensor& tiles, const Tensor& starts, const Tensor& partials, const Tensor& squares,
                  double beta1, double beta2, double eps, double weight_decay) {
  STD_TORCH_CHECK(exp_avg.numel() == weight.numel() && exp_avg_sq.numel() == weight.numel() &&
                      grad.numel() == weight.numel(),
                  "lamb_update_: tensors of different sizes");
  const double made = *static_cast<const float*>(step.const_data_ptr());
  const growth_ds::Adam adam(beta1, beta2, eps, made);
  const auto left = static_cast<float>(1.0 - std::pow(beta1, made));
  const float times = factor.has_value() ? *read<float>(factor) : 1.0f;
  const auto* w = static_cast<const float*>(weight.const_data_ptr());
  auto* m = static_cast<float*>(exp_avg.mutable_data_ptr());
  auto* v = static_cast<float*>(exp_avg_sq.mutable_data_ptr());
  auto* g = static_cast<float*>(grad.mutable_data_ptr());
  const auto *each = read<float>(multiplier);
  const auto *until = read<int64_t>(ends);
  const int64_t segments = ends.has_value() ? ends->numel() : 0, count = tiles.size(0);
  const auto* places = static_cast<const int64_t*>(tiles.const_data_ptr());
  auto* parts = static_cast<double*>(partials.mutable_data_ptr());
  const auto kernel = GROWTH_DS_PICK(lamb_update);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    kernel(adam, left, static_cast<float>(weight_decay), w, m, v, g, times, each, until, segments, places, count,
           parts, begin, end);
  });
  // In order, so that the sums do not depend on the threads.
  const auto* first = static_cast<const int64_t*>(starts.const_data_ptr());
  auto* sums = static_cast<double*>(squares.mutable_data_ptr());
  const int64_t rows = starts.numel() - 1;
  for (int64_t kind = 0; kind < 2; ++kind) {
    for (int64_t row = 0; row < rows; ++row) {
      double total = 0.0;
      for (int64_t at = first[row]; at < first[row + 1]; ++at) total += parts[kind * count + at];
      sums[kind * rows + row] = total;
    }
  }
}

void lamb_apply_(const Tensor& weight, const Tensor& update, const Tensor& tiles, const Tensor& rates,
                 const Maybe& low) {
  auto* w = static_cast<float*>(weight.mutable_data_ptr());
  auto* u = static_cast<float*>(update.mutable_data_ptr());
  const auto* places = static_cast<const int64_t*>(tiles.const_data_ptr());
  const auto* each = static_cast<const float*>(rates.const_data_ptr());
  void* copy = low.has_value() ? low->mutable_data_ptr() : nullptr;
  const auto kernel = GROWTH_DS_PICK(lamb_apply);
  torch::stable::parallel_for(
      0, tiles.size(0), 1, [&](int64_t begin, int64_t end) { kernel(w, u, places, each, copy, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(growth_ds, library) {
  library.def(
      "lamb_update_(Tensor weight, Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor(c!) grad, Tensor step,"
      " Tensor? factor, Tensor? multiplier, Tensor? ends, Tensor tiles, Tensor starts, Tensor(d!) partials,"
      " Tensor(e!) squares, float beta1, float beta2, float eps, float weight_decay) -> ()");
  library.def("lamb_apply_(Tensor(a!) weight, Tensor(b!) update, Tensor tiles, Tensor rates, Tensor(c!)? low) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CPU, library) {
  library.impl("lamb_update_", TORCH_BOX(&lamb_update_));
  library.impl("lamb_apply_", TORCH_BOX(&lamb_apply_));
}
