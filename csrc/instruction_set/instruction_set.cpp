// growth_ds::instruction_set: which of the CPU kernels are taken here (5: AVX-512 with BF16, 4: AVX-512, 3: AVX2, 0: the base), for doctor.
#include "../include/cpu.h"
#include "../include/torch_stable.h"

namespace {

int64_t instruction_set() { return growth_ds::isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(growth_ds, library) { library.def("instruction_set() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(growth_ds, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&instruction_set));
}
