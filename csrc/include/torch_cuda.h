// For the CUDA bindings: the stream that torch works on, and the check after a launch.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "torch_stable.h"
#include "type.h"

namespace growth_ds::cuda {

// Made first of all: the device of the tensor is the current one until it goes.
class __attribute__((visibility("hidden"))) Stream {
 public:
  explicit Stream(const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  void* get() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// `error`: what a launcher returned, null when all went well.
inline void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "growth_ds: ", error ? error : ""); }

// The same for launchers that return CUDA's own number.
inline void check(int error, const char* name) { STD_TORCH_CHECK(error == 0, name, ": CUDA error ", error); }

inline Type type_of(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::Half:
      return Type::float16;
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "growth_ds: float32, float16 or bfloat16 is needed");
      return Type::bfloat16;
  }
}

}  // namespace growth_ds::cuda
