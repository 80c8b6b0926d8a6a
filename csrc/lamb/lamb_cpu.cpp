#include "lamb.h"

namespace growth_ds::GROWTH_DS_ISA {
namespace {

typedef double Doubles __attribute__((vector_size(8 * W)));

double sum_of(Doubles x) {
  double parts[W];
  std::memcpy(parts, &x, sizeof parts);
  for (int64_t step = W / 2; step > 0; step /= 2)
    for (int64_t i = 0; i < step; ++i) parts[i] += parts[i + step];
  return parts[0];
}

struct Tile {
  const Adam& adam;
  float left, decay, factor;
  const float* weight;
  float *first, *second, *grad;
  Doubles weights, updates;

  GROWTH_DS_INLINE void one(Tile& t, int64_t i, int64_t count, Floats times) {
    Floats first = load_upto(t.first + i, count), second = load_upto(t.second + i, count);
    const Floats weight = load_upto(t.weight + i, count);
    const Floats slope = load_upto(t.grad + i, count) * t.factor;
    const Floats update = adam_direction(t.adam, slope, first, second) / t.left * times + weight * t.decay;
    store_upto(t.first + i, first, count);
    store_upto(t.second + i, second, count);
    store_upto(t.grad + i, update, count);
    // beyond `count` a weight is 0, and so are moments and update
    const Doubles w = __builtin_convertvector(weight, Doubles), u = __builtin_convertvector(update, Doubles);
    t.weights += w * w;
    t.updates += u * u;
  }

  void same(int64_t begin, int64_t end, float times) {
    int64_t i = begin;
    for (; i + W <= end; i += W) one(*this, i, W, splat(times));
    if (i < end) one(*this, i, end - i, splat(times));
  }

  void own(int64_t begin, int64_t end, const float* each) {
    int64_t i = begin;
    for (; i + W <= end; i += W) one(*this, i, W, load(each + i));
    if (i < end) one(*this, i, end - i, load_some(each + i, end - i));
  }
};

}  // namespace

void lamb_update(GROWTH_DS_UPDATE) {
  for (int64_t at = begin; at < end; ++at) {
    int64_t from = tiles[3 * at + 1];
    const int64_t until = tiles[3 * at + 2];
    Tile tile{adam, left, decay, factor, weight, first, second, grad, Doubles{}, Doubles{}};
    if (tiles[3 * at] >= 0) {
      if (multiplier == nullptr) {
        tile.same(from, until, 1.0f);
      } else if (ends == nullptr) {
        tile.own(from, until, multiplier);
      } else {
        for (int64_t k = stretch_of(from, ends, segments); from < until && k < segments; ++k) {
          const int64_t stop = ends[k] < until ? ends[k] : until;
          tile.same(from, stop, multiplier[k]);
          from = stop;
        }
      }
    }
    partials[at] = sum_of(tile.weights);
    partials[count + at] = sum_of(tile.updates);
  }
}

void lamb_apply(GROWTH_DS_APPLY) {
  for (int64_t at = begin; at < end; ++at) {
    const int64_t row = tiles[3 * at], until = tiles[3 * at + 2];
    const float rate = row < 0 ? 0.0f : rates[row];
    for (int64_t i = tiles[3 * at + 1]; i < until; i += W) {
      const int64_t count = until - i;
      if (row >= 0) {
        const Floats moved = load_upto(weight + i, count) - load_upto(update + i, count) * rate;
        store_upto(weight + i, moved, count);
        if (low) store_upto(static_cast<bf16*>(low) + i, moved, count);
      }
      store_upto(update + i, splat(0.0f), count);
    }
  }
}

}  // namespace growth_ds::GROWTH_DS_ISA
