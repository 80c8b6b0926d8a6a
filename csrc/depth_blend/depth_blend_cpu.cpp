#include "depth_blend.h"

#include <cstdlib>

namespace growth_ds::GROWTH_DS_ISA {
namespace {

constexpr int64_t VECTORS = COLUMNS / W;

// Memory of one call: `count` rows of COLUMNS floats, aligned.
struct Rows {
  float* data;
  explicit Rows(int64_t count)
      : data(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(count * COLUMNS) * sizeof(float)))) {}
  ~Rows() { std::free(data); }
  Rows(const Rows&) = delete;
  float* row(int64_t k) const { return data + k * COLUMNS; }
};

// `count` columns of every layer as floats, zeros behind them.
template <typename T>
void take(const T* from, int64_t layers, int64_t n, int64_t at, int64_t count, const Rows& to) {
  for (int64_t k = 0; k < layers; ++k) {
    for (int64_t v = 0; v < VECTORS; ++v) {
      const int64_t left = count - v * W;
      const T* place = from + k * n + at + v * W;
      store(to.row(k) + v * W, left >= W ? load(place) : left > 0 ? load_some(place, left) : splat(0.0f));
    }
  }
}

// out[j] = sum_i weight[j * by_new + i * by_old] * in[i], four vectors at a time.
template <typename T>
void mix(const Rows& in, int64_t inputs, const float* weight, int64_t by_new, int64_t by_old, T* out, int64_t outputs,
         int64_t n, int64_t at, int64_t count) {
  for (int64_t j = 0; j < outputs; ++j) {
    for (int64_t v = 0; v < VECTORS && v * W < count; v += 4) {
      Floats sums[4] = {};
      for (int64_t i = 0; i < inputs; ++i) {
        const Floats share = splat(weight[j * by_new + i * by_old]);
        for (int64_t u = 0; u < 4; ++u) sums[u] += share * load(in.row(i) + (v + u) * W);
      }
      for (int64_t u = 0; u < 4; ++u) {
        const int64_t left = count - (v + u) * W;
        T* place = out + j * n + at + (v + u) * W;
        if (left >= W)
          store(place, sums[u]);
        else if (left > 0)
          store_some(place, sums[u], left);
      }
    }
  }
}

// sums[j, i] += the products of COLUMNS columns, added in float and then in double.
void products(const Rows& grads, int64_t outputs, const Rows& in, int64_t inputs, double* sums) {
  for (int64_t j = 0; j < outputs; ++j) {
    const float* slope = grads.row(j);
    int64_t i = 0;
    for (; i + 4 <= inputs; i += 4) {
      Floats parts[4] = {};
      for (int64_t v = 0; v < VECTORS; ++v) {
        const Floats here = load(slope + v * W);
        for (int64_t u = 0; u < 4; ++u) parts[u] += here * load(in.row(i + u) + v * W);
      }
      for (int64_t u = 0; u < 4; ++u) sums[j * inputs + i + u] += static_cast<double>(sum(parts[u]));
    }
    for (; i < inputs; ++i) {
      Floats part = splat(0.0f);
      for (int64_t v = 0; v < VECTORS; ++v) part += load(slope + v * W) * load(in.row(i) + v * W);
      sums[j * inputs + i] += static_cast<double>(sum(part));
    }
  }
}

template <typename T>
void forward(GROWTH_DS_FORWARD) {
  const Rows in(old_layers);
  for (int64_t at = begin; at < end; at += COLUMNS) {
    const int64_t count = end - at < COLUMNS ? end - at : COLUMNS;
    take(static_cast<const T*>(layers), old_layers, n, at, count, in);
    mix(in, old_layers, weight, old_layers, 1, static_cast<T*>(out), new_layers, n, at, count);
  }
}

template <typename T>
void backward(GROWTH_DS_BACKWARD) {
  const Rows in(old_layers), grads(new_layers);
  for (int64_t at = begin; at < end; at += COLUMNS) {
    const int64_t count = end - at < COLUMNS ? end - at : COLUMNS;
    take(static_cast<const T*>(grad), new_layers, n, at, count, grads);
    if (of_layers) mix(grads, new_layers, weight, 1, old_layers, static_cast<T*>(of_layers), old_layers, n, at, count);
    if (of_weight) {
      take(static_cast<const T*>(layers), old_layers, n, at, count, in);
      products(grads, new_layers, in, old_layers, of_weight);
    }
  }
}

}  // namespace

void depth_blend_float(GROWTH_DS_FORWARD) {
  forward<float>(layers, weight, out, old_layers, new_layers, n, begin, end);
}

void depth_blend_bf16(GROWTH_DS_FORWARD) {
  forward<bf16>(layers, weight, out, old_layers, new_layers, n, begin, end);
}

void depth_blend_backward_float(GROWTH_DS_BACKWARD) {
  backward<float>(layers, weight, grad, of_layers, of_weight, old_layers, new_layers, n, begin, end);
}

void depth_blend_backward_bf16(GROWTH_DS_BACKWARD) {
  backward<bf16>(layers, weight, grad, of_layers, of_weight, old_layers, new_layers, n, begin, end);
}

}  // namespace growth_ds::GROWTH_DS_ISA
