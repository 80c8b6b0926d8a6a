// growth_ds::depth_blend and growth_ds::depth_blend_backward: the CUDA bindings.
#include "depth_blend_cuda.h"

#include <optional>

#include "../include/torch_cuda.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

growth_ds::cuda::Kind kind_of(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "depth_blend: a dtype it does not know");
  return type == ScalarType::BFloat16 ? growth_ds::cuda::BF16
         : type == ScalarType::Half   ? growth_ds::cuda::HALF
                                      : growth_ds::cuda::FLOAT;
}

void depth_blend(const Tensor& layers, const Tensor& weight, const Tensor& out) {
  const int64_t old_layers = layers.size(0), n = layers.size(1), new_layers = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == old_layers && out.size(0) == new_layers && out.size(1) == n,
                  "depth_blend: sizes do not fit");
  const growth_ds::cuda::Stream here(layers);
  const int error = growth_ds::cuda::depth_blend(
      layers.const_data_ptr(), static_cast<const float*>(weight.const_data_ptr()), old_layers, 1,
      out.mutable_data_ptr(), old_layers, new_layers, n, kind_of(layers), here.get());
  growth_ds::cuda::check(error, "depth_blend");
}

void depth_blend_backward(const Tensor& layers, const Tensor& weight, const Tensor& grad,
                          const std::optional<Tensor>& of_layers, const std::optional<Tensor>& of_weight) {
  const int64_t old_layers = layers.size(0), n = layers.size(1), new_layers = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == old_layers && grad.size(0) == new_layers && grad.size(1) == n,
                  "depth_blend_backward: sizes do not fit");
  const growth_ds::cuda::Stream here(layers);
  if (of_layers.has_value())
    growth_ds::cuda::check(
        growth_ds::cuda::depth_blend(grad.const_data_ptr(), static_cast<const float*>(weight.const_data_ptr()), 1,
                                     old_layers, of_layers->mutable_data_ptr(), new_layers, old_layers, n,
                                     kind_of(layers), here.get()),
        "depth_blend_backward");
  if (!of_weight.has_value()) return;
  const Tensor partials = torch::stable::new_empty(
      layers, {growth_ds::cuda::blend_blocks(n), old_layers * new_layers}, ScalarType::Double);
  growth_ds::cuda::check(
      growth_ds::cuda::depth_blend_weight(layers.const_data_ptr(), grad.const_data_ptr(),
                                          static_cast<float*>(of_weight->mutable_data_ptr()),
                                          static_cast<double*>(partials.mutable_data_ptr()), old_layers, new_layers, n,
                                          kind_of(layers), here.get()),
      "depth_blend_backward");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CUDA, library) {
  library.impl("depth_blend", TORCH_BOX(&depth_blend));
  library.impl("depth_blend_backward", TORCH_BOX(&depth_blend_backward));
}
