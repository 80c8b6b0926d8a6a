#include "square_sum.h"

namespace growth_ds::GROWTH_DS_ISA {
namespace {

// As long as a register, so half as many numbers: GCC takes longer ones to pieces.
typedef float Some __attribute__((vector_size(2 * W)));
typedef double Doubles __attribute__((vector_size(4 * W)));

GROWTH_DS_INLINE void add_squares(Floats x, Doubles* sums) {
  Some halves[2];
  std::memcpy(halves, &x, sizeof x);
  for (int64_t k = 0; k < 2; ++k) {
    const Doubles wide = __builtin_convertvector(halves[k], Doubles);
    sums[k] += wide * wide;
  }
}

template <typename T>
void run(GROWTH_DS_SQUARES) {
  const T* from = static_cast<const T*>(x);
  Doubles sums[4] = {};  // an addition takes four cycles: four at a time
  int64_t i = begin;
  for (; i + 2 * W <= end; i += 2 * W) {
    add_squares(load(from + i), sums);
    add_squares(load(from + i + W), sums + 2);
  }
  for (; i < end; i += W) add_squares(end - i >= W ? load(from + i) : load_some(from + i, end - i), sums);
  const Doubles all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0.0;
  for (int64_t k = 0; k < W / 2; ++k) sum += all[k];
  *total = sum;
}

}  // namespace

void square_sum_float(GROWTH_DS_SQUARES) { run<float>(x, begin, end, total); }
void square_sum_bf16(GROWTH_DS_SQUARES) { run<bf16>(x, begin, end, total); }

}  // namespace growth_ds::GROWTH_DS_ISA
