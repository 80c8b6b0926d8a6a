// growth_ds::bias_dropout_residual_layer_norm and its backward: names, and the CPU binding.
#include "bias_dropout_residual_layer_norm.h"

#include <optional>
#include <tuple>

#include "../include/torch_stable.h"

namespace {

using growth_ds::Dropout;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using growth_ds::Maybe;
using growth_ds::read;

constexpr int64_t GRAIN = 1 << 14;  // elements for which another thread is worth waking

const float* floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
bool is_bf16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

Dropout dropout(const Maybe& seed, double p) {
  if (!seed) return {0, 0, 1.0f};
  const auto value = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  return {value, growth_ds::dropout_threshold(p), static_cast<float>(1.0 / (1.0 - p))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Maybe& bias, const Maybe& residual,
                                                   const Tensor& gamma, const Tensor& beta, const Maybe& share,
                                                   const Maybe& seed, double p, double eps) {
  const int64_t width = gamma.numel(), rows = width ? x.numel() / width : 0;
  const bool keeps = bias || residual || seed;  // otherwise z is x
  Tensor y = torch::stable::empty_like(x);
  Tensor z = keeps ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor mean = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  const growth_ds::NormForward task{x.const_data_ptr(),
                                    read<void>(bias),
                                    read<void>(residual),
                                    gamma.const_data_ptr(),
                                    beta.const_data_ptr(),
                                    read<float>(share),
                                    y.mutable_data_ptr(),
                                    keeps ? z.mutable_data_ptr() : nullptr,
                                    static_cast<float*>(mean.mutable_data_ptr()),
                                    static_cast<float*>(rstd.mutable_data_ptr()),
                                    width,
                                    static_cast<float>(eps),
                                    dropout(seed, p)};
  const auto kernel = is_bf16(x) ? GROWTH_DS_PICK(norm_forward_bf16) : GROWTH_DS_PICK(norm_forward_float);
  torch::stable::parallel_for(0, rows, GRAIN / (width + 1) + 1,
                              [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
  return {y, z, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& of_y, const Tensor& z, const Tensor& mean,
                                                            const Tensor& rstd, const Tensor& gamma,
                                                            const Maybe& share, const Maybe& seed, double p,
                                                            bool with_bias, bool with_residual) {
  const int64_t width = gamma.numel(), rows = mean.numel();
  const int64_t step = growth_ds::rows_of_block(rows), blocks = growth_ds::blocks_of(rows);
  const bool two = seed && with_residual;
  Tensor of_x = torch::stable::empty_like(z);
  Tensor of_residual = two ? torch::stable::empty_like(z) : torch::stable::new_empty(z, {0});
  Tensor of_gamma = torch::stable::empty_like(gamma), of_beta = torch::stable::empty_like(gamma);
  Tensor of_bias = torch::stable::new_empty(gamma, {with_bias ? width : 0});
  Tensor partials = torch::stable::new_empty(z, {blocks, 3, width}, ScalarType::Float);
  const growth_ds::NormBackward task{of_y.const_data_ptr(),
                                     z.const_data_ptr(),
                                     gamma.const_data_ptr(),
                                     read<float>(share),
                                     floats(mean),
                                     floats(rstd),
                                     of_x.mutable_data_ptr(),
                                     two ? of_residual.mutable_data_ptr() : nullptr,
                                     width,
                                     dropout(seed, p),
                                     with_bias};
  const auto kernel = is_bf16(z) ? GROWTH_DS_PICK(norm_backward_bf16) : GROWTH_DS_PICK(norm_backward_float);
  const auto add = is_bf16(z) ? GROWTH_DS_PICK(norm_sum_bf16) : GROWTH_DS_PICK(norm_sum_float);
  auto* parts = static_cast<float*>(partials.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, GRAIN / (step * width + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      kernel(task, b * step, (b + 1) * step < rows ? (b + 1) * step : rows, parts + b * 3 * width);
  });
  void* totals[] = {of_gamma.mutable_data_ptr(), of_beta.mutable_data_ptr(), of_bias.mutable_data_ptr()};
  torch::stable::parallel_for(0, width, GRAIN / (3 * blocks + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t which = 0; which < (with_bias ? 3 : 2); ++which)
      add(parts + which * width, blocks, 3 * width, begin, end, totals[which]);
  });
  return {of_x, of_residual, of_gamma, of_beta, of_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(growth_ds, library) {
  library.def(
      "bias_dropout_residual_layer_norm(Tensor x, Tensor? bias, Tensor? residual, Tensor gamma, Tensor beta,"
      " Tensor? share, Tensor? seed, float p, float eps) -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)");
  library.def(
      "bias_dropout_residual_layer_norm_backward(Tensor of_y, Tensor z, Tensor mean, Tensor rstd, Tensor gamma,"
      " Tensor? share, Tensor? seed, float p, bool with_bias, bool with_residual)"
      " -> (Tensor of_x, Tensor of_residual, Tensor of_gamma, Tensor of_beta, Tensor of_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CPU, library) {
  library.impl("bias_dropout_residual_layer_norm", TORCH_BOX(&forward));
  library.impl("bias_dropout_residual_layer_norm_backward", TORCH_BOX(&backward));
}
