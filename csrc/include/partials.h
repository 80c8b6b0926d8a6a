// Sums over rows, to the last bit the same on any number of threads: rows are cut into blocks that depend on their
// number alone, a block adds its rows in order into a partial of its own, and the partials are added in order.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace growth_ds {

constexpr int64_t BLOCKS = 64;  // at most; enough for any CPU, and few enough to be cheap beside the rows

inline int64_t rows_of_block(int64_t rows) { return rows > BLOCKS ? (rows + BLOCKS - 1) / BLOCKS : 1; }
inline int64_t blocks_of(int64_t rows) { return (rows + rows_of_block(rows) - 1) / rows_of_block(rows); }

namespace GROWTH_DS_ISA {

// out (columns [begin, end) of width) = the sum of partials (blocks, width).
template <typename T>
void add_partials(const float* partials, int64_t blocks, int64_t width, int64_t begin, int64_t end, T* out) {
  for (int64_t i = begin; i < end; i += W) {
    const int64_t count = end - i < W ? end - i : W;
    Floats chains[4] = {};  // short chains round less
    for (int64_t b = 0; b < blocks; ++b) {
      const float* from = partials + b * width + i;
      chains[b % 4] += count == W ? load(from) : load_some(from, count);
    }
    const Floats total = (chains[0] + chains[1]) + (chains[2] + chains[3]);
    count == W ? store(out + i, total) : store_some(out + i, total, count);
  }
}

}  // namespace GROWTH_DS_ISA
}  // namespace growth_ds
