// growth_ds::growth_gather: the CPU binding.
#include "growth_gather.h"

#include <optional>
#include <vector>

#include "../include/torch_stable.h"
#include "growth_gather_sizes.h"

namespace {

using torch::stable::Tensor;

void growth_gather(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& sources,
                   const std::optional<Tensor>& factors, std::vector<int64_t> old_sizes, std::vector<int64_t> new_sizes,
                   int64_t begin, const Tensor& out) {
  const growth_ds::Growth growth = growth_ds::checked(weight, sources, factors, old_sizes, new_sizes, begin, out);
  const auto* units = static_cast<const int64_t*>(sources.const_data_ptr());
  const auto kernel = GROWTH_DS_PICK(growth_gather);
  const int64_t kinds = out.size(0), count = out.size(1), entries = sources.numel();
  const Tensor* given[] = {&weight, &exp_avg, &exp_avg_sq};
  for (int64_t kind = 0; kind < kinds; ++kind) {
    const auto* x = static_cast<const float*>(given[kind]->const_data_ptr());
    const double* each =
        factors.has_value() ? static_cast<const double*>(factors->const_data_ptr()) + kind * entries : nullptr;
    float* to = static_cast<float*>(out.mutable_data_ptr()) + kind * count;
    torch::stable::parallel_for(0, count, 1 << 15, [&](int64_t from, int64_t until) {
      kernel(growth, x, units, each, to, begin, from, until);
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(growth_ds, library) {
  library.def(
      "growth_gather(Tensor weight, Tensor exp_avg, Tensor exp_avg_sq, Tensor sources, Tensor? factors,"
      " int[] old_sizes, int[] new_sizes, int begin, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CPU, library) { library.impl("growth_gather", TORCH_BOX(&growth_gather)); }
