// growth_ds::bias_gelu and its backward: the CUDA binding.
#include "bias_gelu_cuda.h"

#include <tuple>

#include "../include/torch_cuda.h"

namespace {

using growth_ds::cuda::check;
using growth_ds::cuda::type_of;
using torch::stable::Tensor;

Tensor bias_gelu(const Tensor& x, const Tensor& bias, bool tanh) {
  const growth_ds::cuda::Stream stream(x);
  const int64_t width = bias.numel(), rows = width ? x.numel() / width : 0;
  Tensor out = torch::stable::empty_like(x);
  check(growth_ds::cuda::bias_gelu(type_of(x), x.const_data_ptr(), bias.const_data_ptr(), rows, width, tanh,
                                   out.mutable_data_ptr(), stream.get()));
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& of_out, const Tensor& x, const Tensor& bias, bool tanh) {
  const growth_ds::cuda::Stream stream(x);
  const int64_t width = bias.numel(), rows = width ? x.numel() / width : 0;
  Tensor of_x = torch::stable::empty_like(x), of_bias = torch::stable::empty_like(bias);
  Tensor partials = torch::stable::new_empty(x, {growth_ds::cuda::bias_gelu_partials(rows, width), width},
                                             torch::headeronly::ScalarType::Float);
  check(growth_ds::cuda::bias_gelu_backward(type_of(x), of_out.const_data_ptr(), x.const_data_ptr(),
                                            bias.const_data_ptr(), rows, width, tanh, of_x.mutable_data_ptr(),
                                            of_bias.mutable_data_ptr(),
                                            static_cast<float*>(partials.mutable_data_ptr()), stream.get()));
  return {of_x, of_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CUDA, library) {
  library.impl("bias_gelu", TORCH_BOX(&bias_gelu));
  library.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
}
