// growth_ds::bias_dropout_residual_layer_norm and its backward: the CUDA binding. The seed stays on the device.
#include "bias_dropout_residual_layer_norm_cuda.h"

#include <optional>
#include <tuple>

#include "../include/philox.h"
#include "../include/torch_cuda.h"

namespace {

using growth_ds::cuda::Dropout;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using growth_ds::Maybe;
using growth_ds::read;

const float* floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

Dropout dropout(const Maybe& seed, double p) {
  const auto* where = read<int64_t>(seed);
  return {where, growth_ds::dropout_threshold(p), static_cast<float>(1.0 / (1.0 - p))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Maybe& bias, const Maybe& residual,
                                                   const Tensor& gamma, const Tensor& beta, const Maybe& share,
                                                   const Maybe& seed, double p, double eps) {
  const growth_ds::cuda::Stream stream(x);
  const int64_t width = gamma.numel(), rows = width ? x.numel() / width : 0;
  const bool keeps = bias || residual || seed;  // otherwise z is x
  Tensor y = torch::stable::empty_like(x);
  Tensor z = keeps ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor mean = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  const growth_ds::cuda::NormForward task{x.const_data_ptr(),
                                          read<void>(bias),
                                          read<void>(residual),
                                          gamma.const_data_ptr(),
                                          beta.const_data_ptr(),
                                          read<float>(share),
                                          y.mutable_data_ptr(),
                                          keeps ? z.mutable_data_ptr() : nullptr,
                                          static_cast<float*>(mean.mutable_data_ptr()),
                                          static_cast<float*>(rstd.mutable_data_ptr()),
                                          rows,
                                          width,
                                          static_cast<float>(eps),
                                          dropout(seed, p)};
  growth_ds::cuda::check(growth_ds::cuda::norm_forward(growth_ds::cuda::type_of(x), task, stream.get()));
  return {y, z, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& of_y, const Tensor& z, const Tensor& mean,
                                                            const Tensor& rstd, const Tensor& gamma,
                                                            const Maybe& share, const Maybe& seed, double p,
                                                            bool with_bias, bool with_residual) {
  const growth_ds::cuda::Stream stream(z);
  const int64_t width = gamma.numel(), rows = mean.numel();
  const bool two = seed && with_residual;
  Tensor of_x = torch::stable::empty_like(z);
  Tensor of_residual = two ? torch::stable::empty_like(z) : torch::stable::new_empty(z, {0});
  Tensor of_gamma = torch::stable::empty_like(gamma), of_beta = torch::stable::empty_like(gamma);
  Tensor of_bias = torch::stable::new_empty(gamma, {with_bias ? width : 0});
  Tensor partials =
      torch::stable::new_empty(z, {growth_ds::cuda::norm_partials(rows, width), 3, width}, ScalarType::Float);
  const growth_ds::cuda::NormBackward task{of_y.const_data_ptr(),
                                           z.const_data_ptr(),
                                           gamma.const_data_ptr(),
                                           read<float>(share),
                                           floats(mean),
                                           floats(rstd),
                                           of_x.mutable_data_ptr(),
                                           two ? of_residual.mutable_data_ptr() : nullptr,
                                           of_gamma.mutable_data_ptr(),
                                           of_beta.mutable_data_ptr(),
                                           with_bias ? of_bias.mutable_data_ptr() : nullptr,
                                           static_cast<float*>(partials.mutable_data_ptr()),
                                           rows,
                                           width,
                                           dropout(seed, p)};
  growth_ds::cuda::check(growth_ds::cuda::norm_backward(growth_ds::cuda::type_of(z), task, stream.get()));
  return {of_x, of_residual, of_gamma, of_beta, of_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CUDA, library) {
  library.impl("bias_dropout_residual_layer_norm", TORCH_BOX(&forward));
  library.impl("bias_dropout_residual_layer_norm_backward", TORCH_BOX(&backward));
}
