// For the CPU kernels, which know nothing of torch: vectors of floats, and a choice of instruction sets.
//
// setup.py compiles every *_cpu.cpp once for each instruction set, in a namespace named after it (GROWTH_DS_ISA), and the
// binding takes the best that the processor has: one build runs on every x86-64 machine. GCC and Clang lower the
// vectors below to whatever the set offers. Other processors get `base` alone.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef GROWTH_DS_X86
#include <immintrin.h>
#endif

#ifndef GROWTH_DS_ISA
#define GROWTH_DS_ISA base
#endif
#define GROWTH_DS_INLINE static inline __attribute__((always_inline))

// Declares a kernel for each instruction set; GROWTH_DS_PICK(name) is the one to call.
#ifdef GROWTH_DS_X86
#define GROWTH_DS_DECLARE(name, ...)                                                                                   \
  namespace base {                                                                                                     \
  void name(__VA_ARGS__);                                                                                              \
  }                                                                                                                    \
  namespace v3 {                                                                                                       \
  void name(__VA_ARGS__);                                                                                              \
  }                                                                                                                    \
  namespace v4 {                                                                                                       \
  void name(__VA_ARGS__);                                                                                              \
  }                                                                                                                    \
  namespace v5 {                                                                                                       \
  void name(__VA_ARGS__);                                                                                              \
  }
#define GROWTH_DS_PICK(name)                                                                                           \
  (growth_ds::isa() == 5   ? growth_ds::v5::name                                                                       \
   : growth_ds::isa() == 4 ? growth_ds::v4::name                                                                       \
   : growth_ds::isa() == 3 ? growth_ds::v3::name                                                                       \
                           : growth_ds::base::name)
#else
#define GROWTH_DS_DECLARE(name, ...)                                                                                   \
  namespace base {                                                                                                     \
  void name(__VA_ARGS__);                                                                                              \
  }
#define GROWTH_DS_PICK(name) (growth_ds::base::name)
#endif

namespace growth_ds {

// 5: AVX-512 and its BF16, 4: AVX-512 (x86-64-v4), 3: AVX2 and FMA (x86-64-v3), 0: neither. GROWTH_DS_ISA=0|3|4 in the
// environment takes less than there is, for tests.
inline int isa() {
#ifdef GROWTH_DS_X86
  static const int best = [] {
    const char* asked = std::getenv("GROWTH_DS_ISA");
    const int most = asked ? std::atoi(asked) : 5;
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    const bool v5 = v4 && __builtin_cpu_supports("avx512bf16");
    return v5 && most >= 5 ? 5 : v4 && most >= 4 ? 4 : v3 && most >= 3 ? 3 : 0;
  }();
  return best;
#else
  return 0;
#endif
}

namespace GROWTH_DS_ISA {

struct bf16 {
  uint16_t bits;
};

// Floats a vector: as the registers have it, for GCC takes longer ones to pieces.
#if defined(__AVX512BW__)
constexpr int64_t W = 16;
#elif defined(__AVX2__)
constexpr int64_t W = 8;
#else
constexpr int64_t W = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint64_t Longs __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

GROWTH_DS_INLINE Floats splat(float x) { return x - Floats{}; }

GROWTH_DS_INLINE Floats load(const float* from) {
  Floats out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

GROWTH_DS_INLINE void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// GCC 12 widens and narrows in two halves; one instruction does it. (The forms with a full mask: it warns of its own
// headers for the others.)
#ifdef __AVX512BW__
GROWTH_DS_INLINE Words widen(Halves x) { return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x); }
GROWTH_DS_INLINE Halves narrow(Words x) { return (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x); }
#else
GROWTH_DS_INLINE Words widen(Halves x) { return __builtin_convertvector(x, Words); }
GROWTH_DS_INLINE Halves narrow(Words x) { return __builtin_convertvector(x, Halves); }
#endif

GROWTH_DS_INLINE Floats load(const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Floats)(widen(halves) << 16);
}

// To nearest, ties to even, as torch does; a NaN stays one.
GROWTH_DS_INLINE void store(bf16* to, Floats x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Halves halves = narrow((x == x) ? rounded : Words{} + 0x7fc0u);
  std::memcpy(to, &halves, sizeof halves);
}

// The same, but for numbers below 1e-38, which may become 0.
GROWTH_DS_INLINE void store_fast(bf16* to, Floats x) {
#ifdef __AVX512BF16__
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(to, &halves, sizeof halves);
#else
  store(to, x);
#endif
}
GROWTH_DS_INLINE void store_fast(float* to, Floats x) { store(to, x); }

// The first `count` < W of them; `fill` in the others.
template <typename T>
GROWTH_DS_INLINE Floats load_some(const T* from, int64_t count, float fill = 0.0f) {
  T some[W] = {};
  std::memcpy(some, from, sizeof(T) * static_cast<size_t>(count));
  Floats out = load(some);
  for (int64_t i = count; i < W; ++i) out[i] = fill;
  return out;
}

template <typename T>
GROWTH_DS_INLINE void store_some(T* to, Floats x, int64_t count) {
  T some[W];
  store(some, x);
  std::memcpy(to, some, sizeof(T) * static_cast<size_t>(count));
}

template <typename T>
GROWTH_DS_INLINE float get(const T* from) {
  return load_some(from, 1)[0];
}

template <typename T>
GROWTH_DS_INLINE void put(T* to, float x) {
  store_some(to, splat(x), 1);
}

GROWTH_DS_INLINE Floats select(Ints where, Floats yes, Floats no) { return where ? yes : no; }

// b where either is NaN.
#ifdef __AVX512BW__
GROWTH_DS_INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
GROWTH_DS_INLINE Floats smaller(Floats a, Floats b) { return (Floats)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
#else
GROWTH_DS_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
GROWTH_DS_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
#endif

GROWTH_DS_INLINE float sum(Floats x) {
  float parts[W], total = 0.0f;
  store(parts, x);
  for (int64_t step = W / 2; step > 0; step /= 2)
    for (int64_t i = 0; i < step; ++i) parts[i] += parts[i + step];
  total = parts[0];
  return total;
}

GROWTH_DS_INLINE float largest(Floats x) {
  float parts[W];
  store(parts, x);
  float top = parts[0];
  for (int64_t i = 1; i < W; ++i) top = parts[i] > top ? parts[i] : top;
  return top;
}

// The products of the lower halves of each.
GROWTH_DS_INLINE Longs multiply_halves(Longs a, Longs b) {
#if !defined(GROWTH_DS_X86)
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#elif defined(__AVX512BW__)
  return (Longs)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (Longs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#endif
}

// e^x to about 1 ulp for -87 <= x <= 88, which x is clamped to (e^-87 is 1.6e-38). Cody and Waite's reduction by ln 2 in
// two parts and Cephes' polynomial of degree 5.
GROWTH_DS_INLINE Floats exp_fast(Floats x) {
  x = larger(smaller(x, splat(88.0f)), splat(-87.0f));
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats whole = shifted - magic;
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Ints power = (__builtin_convertvector(whole, Ints) + 127) << 23;
  return (p * r * r + r + 1.0f) * (Floats)power;
}

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

}  // namespace GROWTH_DS_ISA
}  // namespace growth_ds
