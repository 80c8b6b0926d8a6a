#include "adamw.h"

namespace growth_ds::GROWTH_DS_ISA {
namespace {

// A stretch whose elements have their own multipliers (`each`), or all the same.
template <typename G>
struct Stretch {
  const Adam& adam;
  float kept, size;
  float *weight, *first, *second;
  const G* grad;
  float factor;
  bf16* low;

  GROWTH_DS_INLINE void one(const Stretch& s, int64_t i, int64_t count, Floats times) {
    Floats first = load_upto(s.first + i, count), second = load_upto(s.second + i, count);
    const Floats slope = load_upto(s.grad + i, count) * s.factor;
    const Floats update = adam_direction(s.adam, slope, first, second) * times;
    const Floats weight = load_upto(s.weight + i, count) * s.kept - update * s.size;
    store_upto(s.first + i, first, count);
    store_upto(s.second + i, second, count);
    store_upto(s.weight + i, weight, count);
    if (s.low) store_upto(s.low + i, weight, count);
  }

  void same(int64_t begin, int64_t end, float times) const {
    int64_t i = begin;
    for (; i + W <= end; i += W) one(*this, i, W, splat(times));
    if (i < end) one(*this, i, end - i, splat(times));
  }

  void own(int64_t begin, int64_t end, const float* each) const {
    int64_t i = begin;
    for (; i + W <= end; i += W) one(*this, i, W, load(each + i));
    if (i < end) one(*this, i, end - i, load_some(each + i, end - i));
  }
};

template <typename G>
void run(GROWTH_DS_ARGUMENTS) {
  const Stretch<G> s{adam, kept, size, weight, first, second, static_cast<const G*>(grad), factor,
                     static_cast<bf16*>(low)};
  if (multiplier == nullptr) return s.same(begin, end, 1.0f);
  if (ends == nullptr) return s.own(begin, end, multiplier);
  for (int64_t k = stretch_of(begin, ends, segments); begin < end && k < segments; ++k) {
    const int64_t until = ends[k] < end ? ends[k] : end;
    s.same(begin, until, multiplier[k]);
    begin = until;
  }
}

}  // namespace

void adamw_float(GROWTH_DS_ARGUMENTS) {
  run<float>(adam, kept, size, weight, first, second, grad, factor, multiplier, ends, segments, low, begin, end);
}

void adamw_bf16(GROWTH_DS_ARGUMENTS) {
  run<bf16>(adam, kept, size, weight, first, second, grad, factor, multiplier, ends, segments, low, begin, end);
}

}  // namespace growth_ds::GROWTH_DS_ISA
