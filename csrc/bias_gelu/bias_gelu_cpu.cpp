#include "../include/gelu_tail.h"
#include "bias_gelu.h"

namespace growth_ds::GROWTH_DS_ISA {
namespace {

constexpr float INV_SQRT_2PI = 0.39894228040143268f;
constexpr float TWICE = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float CUBE = 0.044715f;

constexpr float LOG2_E = 1.4426950408889634f;

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

// For 16 bits, where exp and a division would cost twice as much as the memory: share - 1/2 and slope - 1/2 are odd, so
// each is x times a polynomial of x^2, here of u = 2 x^2 / 25 - 1 for |x| <= 5 (least squares at 2,000 Chebyshev nodes,
// highest power first). Beyond, x is taken for +-5. Off by at most 2.9e-7 (share) and 7.1e-6 (slope); bf16 rounds at 2e-3.
constexpr float SHARE[] = {
    0.000589574222f, -0.00160602352f, 0.00177753833f, -0.00270449882f, 0.00635232823f, -0.0111465482f,
    0.0164303984f, -0.0232758764f, 0.0314360596f, -0.0404414274f, 0.0515209995f, -0.0702963322f, 0.141363785f};
constexpr float SLOPE[] = {
    -0.00456300285f, 0.0120472927f, -0.0107382135f, 0.0128091834f, -0.0341478065f, 0.0564075299f, -0.0682168379f,
    0.078298144f, -0.0843680054f, 0.0806996003f, -0.0717968419f, 0.0665451959f, -0.0751089975f, 0.142134085f};

template <int N>
GROWTH_DS_INLINE Floats odd(const float (&powers)[N], Floats x) {
  x = larger(smaller(x, splat(5.0f)), splat(-5.0f));
  const Floats u = x * x * 0.08f - 1.0f;
  Floats sum = splat(powers[0]);
  for (int i = 1; i < N; ++i) sum = sum * u + powers[i];
  return sum * x + 0.5f;
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

template <typename T, bool TANH>
GROWTH_DS_INLINE Floats share_of(Floats x) {
  if (TANH) return gelu_tanh(x).share;
  return sizeof(T) == 2 ? odd(SHARE, x) : gelu_erf(x).share;
}

template <typename T, bool TANH>
GROWTH_DS_INLINE Floats slope_of(Floats x) {
  if (TANH) return gelu_tanh(x).slope;
  return sizeof(T) == 2 ? odd(SLOPE, x) : gelu_erf(x).slope;
}

template <typename T, bool TANH>
void forward(const T* x, const T* bias, int64_t rows, int64_t width, T* out) {
  const int64_t whole = width - width % W, rest = width % W;
  for (int64_t r = 0; r < rows; ++r, x += width, out += width) {
    for (int64_t i = 0; i < whole; i += W) {
      const Floats in = load(x + i) + load(bias + i);
      store_fast(out + i, in * share_of<T, TANH>(in));
    }
    if (!rest) continue;
    const Floats in = load_some(x + whole, rest) + load_some(bias + whole, rest);
    store_some(out + whole, in * share_of<T, TANH>(in), rest);
  }
}

template <typename T, bool TANH>
void backward(const T* of_out, const T* x, const T* bias, int64_t rows, int64_t width, T* of_x, float* of_bias) {
  const int64_t whole = width - width % W, rest = width % W;
  std::memset(of_bias, 0, sizeof(float) * static_cast<size_t>(width));
  for (int64_t r = 0; r < rows; ++r, of_out += width, x += width, of_x += width) {
    for (int64_t i = 0; i < whole; i += W) {
      const Floats slope = load(of_out + i) * slope_of<T, TANH>(load(x + i) + load(bias + i));
      store_fast(of_x + i, slope);
      store(of_bias + i, load(of_bias + i) + slope);
    }
    if (!rest) continue;
    const Floats in = load_some(x + whole, rest) + load_some(bias + whole, rest);
    const Floats slope = load_some(of_out + whole, rest) * slope_of<T, TANH>(in);
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
