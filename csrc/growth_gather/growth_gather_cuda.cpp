// growth_ds::growth_gather: the CUDA binding.
#include "growth_gather_cuda.h"

#include "../include/torch_cuda.h"
#include "growth_gather_sizes.h"

namespace {

using torch::stable::Tensor;

void growth_gather(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& sources,
                   const std::optional<Tensor>& factors, std::vector<int64_t> old_sizes, std::vector<int64_t> new_sizes,
                   int64_t begin, const Tensor& out) {
  const growth_ds::cuda::Stream here(weight);
  const growth_ds::Growth growth = growth_ds::checked(weight, sources, factors, old_sizes, new_sizes, begin, out);
  const float* x[3] = {static_cast<const float*>(weight.const_data_ptr()),
                       static_cast<const float*>(exp_avg.const_data_ptr()),
                       static_cast<const float*>(exp_avg_sq.const_data_ptr())};
  const auto* each = factors.has_value() ? static_cast<const double*>(factors->const_data_ptr()) : nullptr;
  const int error = growth_ds::cuda::growth_gather(
      growth, x, static_cast<const int64_t*>(sources.const_data_ptr()), each, sources.numel(), out.size(0),
      static_cast<float*>(out.mutable_data_ptr()), begin, out.size(1), here.get());
  growth_ds::cuda::check(error, "growth_gather");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CUDA, library) { library.impl("growth_gather", TORCH_BOX(&growth_gather)); }
