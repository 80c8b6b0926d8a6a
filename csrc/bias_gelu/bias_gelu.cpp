// growth_ds::bias_gelu and its backward: names, and the CPU binding.
#include "bias_gelu.h"

#include <tuple>

#include "../include/torch_stable.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t GRAIN = 1 << 15;  // elements for which another thread is worth waking

bool is_bf16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

Tensor bias_gelu(const Tensor& x, const Tensor& bias, bool tanh) {
  const int64_t width = bias.numel(), rows = width ? x.numel() / width : 0;
  const auto kernel = is_bf16(x) ? GROWTH_DS_PICK(bias_gelu_bf16) : GROWTH_DS_PICK(bias_gelu_float);
  Tensor out = torch::stable::empty_like(x);
  const void *from = x.const_data_ptr(), *offsets = bias.const_data_ptr();
  void* to = out.mutable_data_ptr();
  torch::stable::parallel_for(0, rows, GRAIN / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    kernel(from, offsets, begin, end, width, tanh, to);
  });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& of_out, const Tensor& x, const Tensor& bias, bool tanh) {
  const int64_t width = bias.numel(), rows = width ? x.numel() / width : 0;
  const int64_t step = growth_ds::rows_of_block(rows), blocks = growth_ds::blocks_of(rows);
  const auto kernel = is_bf16(x) ? GROWTH_DS_PICK(bias_gelu_backward_bf16) : GROWTH_DS_PICK(bias_gelu_backward_float);
  const auto add = is_bf16(x) ? GROWTH_DS_PICK(bias_gelu_sum_bf16) : GROWTH_DS_PICK(bias_gelu_sum_float);
  Tensor of_x = torch::stable::empty_like(x), of_bias = torch::stable::empty_like(bias);
  Tensor partials = torch::stable::new_empty(x, {blocks, width}, ScalarType::Float);
  const void *slopes = of_out.const_data_ptr(), *from = x.const_data_ptr(), *offsets = bias.const_data_ptr();
  void *to = of_x.mutable_data_ptr(), *total = of_bias.mutable_data_ptr();
  auto* parts = static_cast<float*>(partials.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, GRAIN / (step * width + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t end = (b + 1) * step < rows ? (b + 1) * step : rows;
      kernel(slopes, from, offsets, b * step, end, width, tanh, to, parts + b * width);
    }
  });
  torch::stable::parallel_for(0, width, GRAIN / (blocks + 1) + 1, [&](int64_t begin, int64_t end) {
    add(parts, blocks, width, begin, end, total);
  });
  return {of_x, of_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(growth_ds, library) {
  library.def("bias_gelu(Tensor x, Tensor bias, bool tanh) -> Tensor");
  library.def("bias_gelu_backward(Tensor of_out, Tensor x, Tensor bias, bool tanh) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CPU, library) {
  library.impl("bias_gelu", TORCH_BOX(&bias_gelu));
  library.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
}
