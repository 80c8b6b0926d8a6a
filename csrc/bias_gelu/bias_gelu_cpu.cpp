#include "../include/gelu_tail.h"
#include "bias_gelu.h"

namespace growth_ds::GROWTH_DS_ISA {
namespace {

constexpr float INV_SQRT_2PI = 0.39894228040143268f;
constexpr float TWICE = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float CUBE = 0.044715f;

constexpr float LOG2_E = 1.4426950408889634f;

// 2^x for x <= 0, to 2e-9 before rounding; below -125 it is 2^-125. (exp_fast goes both ways and takes 7 steps more.)
GROWTH_DS_INLINE Floats power_of_two(Floats x) {
  x = larger(splat(-125.0f), x);  // a NaN stays one
  const Floats shifted = x + 12582912.0f;  // 1.5 * 2^23: its lowest bits are the whole number nearest to x
  const Floats r = x - (shifted - 12582912.0f);
  Floats p = r * 0.000153458122f + 0.00133999315f;
  p = p * r + 0.00961848896f;
  p = p * r + 0.0555032878f;
  p = p * r + 0.240226469f;
  p = p * r + 0.693147206f;
  p = p * r + 1.0f;
  return (Floats)((Words)p + ((Words)shifted << 23));  // into the exponent
}

struct Gelu {
  Floats share;  // y = x * share
  Floats slope;  // dy/dx
};

// share = Phi(x), the normal distribution: below 0 its tail, which keeps its relative precision, else 1 - tail.
GROWTH_DS_INLINE Gelu gelu_erf(Floats x) {
  const Floats size = (Floats)((Words)x & 0x7fffffffu);
  const Floats bell = power_of_two(x * x * (-0.5f * LOG2_E));
  const Floats t = 1.0f / (size * GROWTH_DS_TAIL_STEP + 1.0f);
  const Floats tail = GROWTH_DS_TAIL(t) * bell;
  const Floats share = select((Ints)(x > 0.0f), 1.0f - tail, tail);
  return {share, x * (bell * INV_SQRT_2PI) + share};
}

// share = (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3): with e = exp(-2 |u|), 1 / (1 + e) or, below 0, the
// rest e / (1 + e), which neither cancels nor overflows.
GROWTH_DS_INLINE Gelu gelu_tanh(Floats x) {
  const Floats square = x * x, size = (Floats)((Words)x & 0x7fffffffu);
  const Floats e = power_of_two(size * (square * (-LOG2_E * TWICE * CUBE) - LOG2_E * TWICE));
  const Floats large = 1.0f / (e + 1.0f), small = e * large;
  const Floats share = select((Ints)(x > 0.0f), large, small);
  const Floats steep = square * (3.0f * TWICE * CUBE) + TWICE;  // 2 du/dx
  return {share, x * (large * small) * steep + share};
}

template <bool TANH>
GROWTH_DS_INLINE Gelu gelu(Floats x) {
  return TANH ? gelu_tanh(x) : gelu_erf(x);
}

template <typename T, bool TANH>
void forward(const T* x, const T* bias, int64_t rows, int64_t width, T* out) {
  const int64_t whole = width - width % W, rest = width % W;
  for (int64_t r = 0; r < rows; ++r, x += width, out += width) {
    for (int64_t i = 0; i < whole; i += W) {
      const Floats in = load(x + i) + load(bias + i);
      store(out + i, in * gelu<TANH>(in).share);
    }
    if (!rest) continue;
    const Floats in = load_some(x + whole, rest) + load_some(bias + whole, rest);
    store_some(out + whole, in * gelu<TANH>(in).share, rest);
  }
}

template <typename T, bool TANH>
void backward(const T* of_out, const T* x, const T* bias, int64_t rows, int64_t width, T* of_x, float* of_bias) {
  const int64_t whole = width - width % W, rest = width % W;
  std::memset(of_bias, 0, sizeof(float) * static_cast<size_t>(width));
  for (int64_t r = 0; r < rows; ++r, of_out += width, x += width, of_x += width) {
    for (int64_t i = 0; i < whole; i += W) {
      const Floats slope = load(of_out + i) * gelu<TANH>(load(x + i) + load(bias + i)).slope;
      store(of_x + i, slope);
      store(of_bias + i, load(of_bias + i) + slope);
    }
    if (!rest) continue;
    const Floats in = load_some(x + whole, rest) + load_some(bias + whole, rest);
    const Floats slope = load_some(of_out + whole, rest) * gelu<TANH>(in).slope;
    store_some(of_x + whole, slope, rest);
    store_some(of_bias + whole, load_some(of_bias + whole, rest) + slope, rest);
  }
}

template <typename T>
void forward_any(GROWTH_DS_FORWARD) {
  const auto kernel = tanh ? forward<T, true> : forward<T, false>;
  const int64_t skip = begin * width;
  kernel(static_cast<const T*>(x) + skip, static_cast<const T*>(bias), end - begin, width,
         static_cast<T*>(out) + skip);
}

template <typename T>
void backward_any(GROWTH_DS_BACKWARD) {
  const auto kernel = tanh ? backward<T, true> : backward<T, false>;
  const int64_t skip = begin * width;
  kernel(static_cast<const T*>(of_out) + skip, static_cast<const T*>(x) + skip, static_cast<const T*>(bias),
         end - begin, width, static_cast<T*>(of_x) + skip, of_bias);
}

}  // namespace

void bias_gelu_float(GROWTH_DS_FORWARD) { forward_any<float>(x, bias, begin, end, width, tanh, out); }
void bias_gelu_bf16(GROWTH_DS_FORWARD) { forward_any<bf16>(x, bias, begin, end, width, tanh, out); }

void bias_gelu_backward_float(GROWTH_DS_BACKWARD) {
  backward_any<float>(of_out, x, bias, begin, end, width, tanh, of_x, of_bias);
}

void bias_gelu_backward_bf16(GROWTH_DS_BACKWARD) {
  backward_any<bf16>(of_out, x, bias, begin, end, width, tanh, of_x, of_bias);
}

void bias_gelu_sum_float(GROWTH_DS_SUM) {
  add_partials(partials, blocks, width, begin, end, static_cast<float*>(out));
}

void bias_gelu_sum_bf16(GROWTH_DS_SUM) { add_partials(partials, blocks, width, begin, end, static_cast<bf16*>(out)); }

}  // namespace growth_ds::GROWTH_DS_ISA
