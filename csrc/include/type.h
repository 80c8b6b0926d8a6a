// The element types of the CUDA kernels, for bindings that do not see CUDA's headers.
#pragma once

namespace growth_ds::cuda {

enum class Type { float32, float16, bfloat16 };

}  // namespace growth_ds::cuda
