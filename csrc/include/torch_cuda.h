// For the CUDA bindings: the device and stream that torch works on, and errors of launches.
#pragma once

#include "torch_stable.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace growth_ds {

// Makes the tensor's device the current one while it lives, and knows torch's stream there.
class __attribute__((visibility("hidden"))) OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }

  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline void check_launch(int error, const char* name) {
  STD_TORCH_CHECK(error == 0, name, ": CUDA error ", error);
}

}  // namespace growth_ds
