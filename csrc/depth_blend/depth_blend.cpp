// growth_ds::depth_blend and growth_ds::depth_blend_backward: the CPU bindings.
#include "depth_blend.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "../include/torch_stable.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t CHUNK = 1 << 14;  // columns whose part of the weight's gradient is summed apart

bool is_bf16(const Tensor& tensor) { return tensor.scalar_type() == torch::headeronly::ScalarType::BFloat16; }

void depth_blend(const Tensor& layers, const Tensor& weight, const Tensor& out) {
  const int64_t old_layers = layers.size(0), n = layers.size(1), new_layers = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == old_layers && out.size(0) == new_layers && out.size(1) == n,
                  "depth_blend: sizes do not fit");
  const auto kernel = is_bf16(layers) ? GROWTH_DS_PICK(depth_blend_bf16) : GROWTH_DS_PICK(depth_blend_float);
  const void* x = layers.const_data_ptr();
  const auto* w = static_cast<const float*>(weight.const_data_ptr());
  void* y = out.mutable_data_ptr();
  torch::stable::parallel_for(0, (n + CHUNK - 1) / CHUNK, 1, [&](int64_t begin, int64_t end) {
    kernel(x, w, y, old_layers, new_layers, n, begin * CHUNK, std::min(end * CHUNK, n));
  });
}

void depth_blend_backward(const Tensor& layers, const Tensor& weight, const Tensor& grad,
                          const std::optional<Tensor>& of_layers, const std::optional<Tensor>& of_weight) {
  const int64_t old_layers = layers.size(0), n = layers.size(1), new_layers = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == old_layers && grad.size(0) == new_layers && grad.size(1) == n,
                  "depth_blend_backward: sizes do not fit");
  const auto kernel =
      is_bf16(layers) ? GROWTH_DS_PICK(depth_blend_backward_bf16) : GROWTH_DS_PICK(depth_blend_backward_float);
  const void *x = layers.const_data_ptr(), *g = grad.const_data_ptr();
  const auto* w = static_cast<const float*>(weight.const_data_ptr());
  void* dx = of_layers.has_value() ? of_layers->mutable_data_ptr() : nullptr;
  const int64_t chunks = (n + CHUNK - 1) / CHUNK, size = old_layers * new_layers;
  std::vector<double> parts(of_weight.has_value() ? static_cast<size_t>(chunks * size) : 0, 0.0);
  double* sums = of_weight.has_value() ? parts.data() : nullptr;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      kernel(x, w, g, dx, sums ? sums + chunk * size : nullptr, old_layers, new_layers, n, chunk * CHUNK,
             std::min((chunk + 1) * CHUNK, n));
  });
  if (sums == nullptr) return;
  auto* dw = static_cast<float*>(of_weight->mutable_data_ptr());
  for (int64_t k = 0; k < size; ++k) {
    double total = 0.0;  // in the chunks' order, whatever the threads
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[chunk * size + k];
    dw[k] = static_cast<float>(total);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(growth_ds, library) {
  library.def("depth_blend(Tensor layers, Tensor weight, Tensor(a!) out) -> ()");
  library.def(
      "depth_blend_backward(Tensor layers, Tensor weight, Tensor grad, Tensor(a!)? of_layers, Tensor(b!)? of_weight)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CPU, library) {
  library.impl("depth_blend", TORCH_BOX(&depth_blend));
  library.impl("depth_blend_backward", TORCH_BOX(&depth_blend_backward));
}
