// growth_ds::short_attention and its backward: names, and the CPU binding.
#include "short_attention.h"

#ifdef GROWTH_DS_X86
#include <cpuid.h>
#endif

#include "../include/torch_stable.h"

namespace {

using torch::stable::Tensor;

growth_ds::HeadsView view(const Tensor& x) { return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

growth_ds::AttentionSizes sizes_of(const Tensor& q, const Tensor& k) {
  return {q.size(1), k.size(1), q.size(2), q.size(3)};
}

void short_attention(const Tensor& q, const Tensor& k, const Tensor& v, const growth_ds::Maybe& seen, const Tensor& out,
                     const Tensor& weights) {
  const auto kernel = GROWTH_DS_PICK(short_attention);
  const auto sizes = sizes_of(q, k);
  const auto queries = view(q), keys = view(k), values = view(v), to = view(out);
  const auto* counts = growth_ds::read<bool>(seen);
  void* shares = weights.mutable_data_ptr();
  torch::stable::parallel_for(0, q.size(0) * sizes.heads, 1, [&](int64_t begin, int64_t end) {
    kernel(queries, keys, values, counts, sizes, begin, end, to, shares);
  });
}

void short_attention_backward(const Tensor& of_out, const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& weights, const Tensor& of_q, const Tensor& of_k, const Tensor& of_v) {
  const auto kernel = GROWTH_DS_PICK(short_attention_backward);
  const auto sizes = sizes_of(q, k);
  const auto given = view(of_out), queries = view(q), keys = view(k), values = view(v);
  const auto to_q = view(of_q), to_k = view(of_k), to_v = view(of_v);
  const void* shares = weights.const_data_ptr();
  torch::stable::parallel_for(0, q.size(0) * sizes.heads, 1, [&](int64_t begin, int64_t end) {
    kernel(given, queries, keys, values, shares, sizes, begin, end, to_q, to_k, to_v);
  });
}

// Whether torch's products do better: its library uses the matrix unit (AMX) where the processor has one.
bool matrix_unit() {
#ifdef GROWTH_DS_X86
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1u);
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(growth_ds, library) {
  library.def("short_attention(Tensor q, Tensor k, Tensor v, Tensor? seen, Tensor(a!) out, Tensor(b!) weights) -> ()");
  library.def(
      "short_attention_backward(Tensor of_out, Tensor q, Tensor k, Tensor v, Tensor weights, Tensor(a!) of_q,"
      " Tensor(b!) of_k, Tensor(c!) of_v) -> ()");
  library.def("matrix_unit() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CPU, library) {
  library.impl("short_attention", TORCH_BOX(&short_attention));
  library.impl("short_attention_backward", TORCH_BOX(&short_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CompositeExplicitAutograd, library) {
  library.impl("matrix_unit", TORCH_BOX(&matrix_unit));
}
