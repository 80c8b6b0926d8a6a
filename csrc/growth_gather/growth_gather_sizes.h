// What both bindings check, and the sizes as the kernels want them.
#pragma once

#include <optional>
#include <vector>

#include "../include/torch_stable.h"
#include "growth_gather.h"

namespace growth_ds {

inline Growth checked(const torch::stable::Tensor& x, const torch::stable::Tensor& sources,
                      const std::optional<torch::stable::Tensor>& factors, const std::vector<int64_t>& old_sizes,
                      const std::vector<int64_t>& new_sizes, int64_t begin, const torch::stable::Tensor& out) {
  Growth growth{};
  growth.axes = static_cast<int64_t>(old_sizes.size());
  STD_TORCH_CHECK(growth.axes >= 1 && growth.axes <= MOST_AXES && old_sizes.size() == new_sizes.size(),
                  "growth_gather: between 1 and 8 axes");
  int64_t entries = 0, before = 1, after = 1;
  for (int64_t a = 0; a < growth.axes; ++a) {
    growth.old_size[a] = old_sizes[a];
    growth.new_size[a] = new_sizes[a];
    growth.offset[a] = entries;
    entries += new_sizes[a];
    before *= old_sizes[a];
    after *= new_sizes[a];
  }
  STD_TORCH_CHECK(sources.numel() == entries && x.numel() == before, "growth_gather: sizes do not fit");
  STD_TORCH_CHECK(!factors.has_value() || factors->numel() == out.size(0) * entries, "growth_gather: too few factors");
  STD_TORCH_CHECK(begin >= 0 && begin + out.size(1) <= after && out.size(0) <= 3, "growth_gather: beyond the tensor");
  return growth;
}

}  // namespace growth_ds
