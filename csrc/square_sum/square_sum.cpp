// growth_ds::square_sum: the CPU binding.
#include "square_sum.h"

#include <algorithm>
#include <vector>

#include "../include/torch_stable.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t BLOCK = 1 << 16;  // elements that are summed apart

void square_sum(const Tensor& x, const Tensor& out) {
  const int64_t numel = x.numel(), blocks = (numel + BLOCK - 1) / BLOCK;
  const auto kernel = x.scalar_type() == torch::headeronly::ScalarType::BFloat16 ? GROWTH_DS_PICK(square_sum_bf16)
                                                                                 : GROWTH_DS_PICK(square_sum_float);
  const void* from = x.const_data_ptr();
  std::vector<double> parts(static_cast<size_t>(blocks));
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      kernel(from, k * BLOCK, std::min((k + 1) * BLOCK, numel), &parts[static_cast<size_t>(k)]);
  });
  double total = 0.0;  // in order, whatever the threads
  for (const double part : parts) total += part;
  *static_cast<double*>(out.mutable_data_ptr()) = total;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(growth_ds, library) { library.def("square_sum(Tensor x, Tensor(a!) out) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CPU, library) { library.impl("square_sum", TORCH_BOX(&square_sum)); }
