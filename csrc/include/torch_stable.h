// For the bindings: torch's stable ABI alone, so that one build serves every torch from 2.10 on and compiles in seconds.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace growth_ds {

using Maybe = std::optional<torch::stable::Tensor>;

// What an optional tensor holds, null for none.
template <typename T>
inline const T* read(const Maybe& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace growth_ds
