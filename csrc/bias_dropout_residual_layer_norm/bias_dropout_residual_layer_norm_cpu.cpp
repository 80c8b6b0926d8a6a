#include <cmath>
#include <cstdlib>

#include "bias_dropout_residual_layer_norm.h"

namespace growth_ds::GROWTH_DS_ISA {
namespace {

constexpr int64_t GROUP = 4 * W;  // columns that one vector of Philox counters serves

int64_t padded(int64_t width) { return (width + GROUP - 1) / GROUP * GROUP; }

// Rows of fp32, zero at first and, past `width`, for ever: sums run over whole groups. malloc and not std::vector, whose
// code the linker would take from any of the instruction sets.
class Rows {
 public:
  Rows(int64_t count, int64_t width) : stride_(padded(width)) {
    const size_t bytes = sizeof(float) * static_cast<size_t>(count * stride_) + 64;
    block_ = std::malloc(bytes);
    if (block_ == nullptr) std::abort();
    std::memset(block_, 0, bytes);
    first_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(block_) + 63) & ~static_cast<uintptr_t>(63));
  }
  ~Rows() { std::free(block_); }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;
  float* operator[](int64_t row) { return first_ + row * stride_; }

 private:
  int64_t stride_;
  void* block_;
  float* first_;
};

// f(i, count) for every vector of the row; count < W in the last one alone. Inlined twice, with a constant count once.
template <typename F>
GROWTH_DS_INLINE void each(int64_t width, F f) {
  int64_t i = 0;
  for (; i + W <= width; i += W) f(i, W);
  if (i < width) f(i, width - i);
}

template <typename T>
GROWTH_DS_INLINE Floats take(const T* from, int64_t count) {
  return count >= W ? load(from) : load_some(from, count);
}

template <typename T>
GROWTH_DS_INLINE void give(T* to, Floats x, int64_t count) {
  count >= W ? store_fast(to, x) : store_some(to, x, count);
}

// Upper and lower half of x * by.
GROWTH_DS_INLINE void multiply(Words x, uint32_t by, Words* high, Words* low) {
  const Longs factor = Longs{} + by, even = multiply_halves((Longs)x, factor);
  const Longs odd = multiply_halves((Longs)x >> 32, factor), upper = Longs{} + 0xffffffff00000000u;
  *high = (Words)((even >> 32) | (odd & upper));
  *low = (Words)((even & ~upper) | (odd << 32));
}

// philox() of W counters at a time; the seed's multiples are the same for all.
GROWTH_DS_INLINE void philox_lanes(Words (&c)[4], uint64_t seed) {
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    Words high_a, low_a, high_b, low_b;
    multiply(c[0], 0xD2511F53u, &high_a, &low_a);
    multiply(c[2], 0xCD9E8D57u, &high_b, &low_b);
    c[0] = high_b ^ c[1] ^ k0;
    c[2] = high_a ^ c[3] ^ k1;
    c[1] = low_b;
    c[3] = low_a;
  }
}

// keep (padded): scale where the element is kept, else 0.
void fill_keep(const Dropout& dropout, int64_t row, int64_t width, float* keep) {
  Words lanes;
  for (int64_t lane = 0; lane < W; ++lane) lanes[lane] = static_cast<uint32_t>(lane);
  for (int64_t i = 0; i < width; i += GROUP) {
    Words c[4] = {lanes + static_cast<uint32_t>(i / 4), Words{} + static_cast<uint32_t>(row),
                  Words{} + static_cast<uint32_t>(row >> 32), Words{}};
    philox_lanes(c, dropout.seed);
    alignas(64) float words[4][W];
    for (int word = 0; word < 4; ++word)
      store(words[word], select((Ints)(c[word] >= dropout.threshold), splat(dropout.scale), splat(0.0f)));
    for (int64_t lane = 0; lane < W; ++lane)
      for (int64_t word = 0; word < 4; ++word) keep[i + 4 * lane + word] = words[word][lane];
  }
}

// The weights of mean and variance, zero past `width`.
void fill_share(const float* from, int64_t width, float* share) {
  for (int64_t i = 0; i < width; ++i) share[i] = from ? from[i] : 1.0f / static_cast<float>(width);
}

// f(i) summed over the vectors of a padded row, in four chains.
template <typename F>
GROWTH_DS_INLINE float total(int64_t width, F f) {
  Floats a = splat(0.0f), b = a, c = a, d = a;
  for (int64_t i = 0; i < width; i += GROUP) {
    a += f(i);
    b += f(i + W);
    c += f(i + 2 * W);
    d += f(i + 3 * W);
  }
  return sum((a + b) + (c + d));
}

// z of a row in fp32, and its copy in T where the task keeps one.
template <typename T, bool DROPOUT>
GROWTH_DS_INLINE void make_z(const NormForward& task, int64_t row, const float* keep, float* z) {
  const int64_t skip = row * task.width;
  const T *x = static_cast<const T*>(task.x) + skip, *bias = static_cast<const T*>(task.bias);
  const T* residual = task.residual ? static_cast<const T*>(task.residual) + skip : nullptr;
  T* copy = task.z ? static_cast<T*>(task.z) + skip : nullptr;
  each(task.width, [&](int64_t i, int64_t count) {
    Floats in = take(x + i, count);
    if (bias) in += take(bias + i, count);
    if (DROPOUT) in *= load(keep + i);
    if (residual) in += take(residual + i, count);
    if (copy) {
      give(copy + i, in, count);
      in = take(copy + i, count);  // as rounded: the backward knows no other
    }
    store(z + i, in);  // past the width: zeros
  });
}

template <typename T, bool DROPOUT>
void forward(const NormForward& task, int64_t begin, int64_t end) {
  const int64_t width = task.width;
  Rows rows(3, width);
  float *z = rows[0], *share = rows[1], *keep = rows[2];
  fill_share(task.share, width, share);
  const T *gamma = static_cast<const T*>(task.gamma), *beta = static_cast<const T*>(task.beta);
  for (int64_t r = begin; r < end; ++r) {
    if (DROPOUT) fill_keep(task.dropout, r, width, keep);
    make_z<T, DROPOUT>(task, r, keep, z);
    const float mean = total(width, [&](int64_t i) { return load(z + i) * load(share + i); });
    const float variance = total(width, [&](int64_t i) {
      const Floats apart = load(z + i) - mean;
      return apart * apart * load(share + i);
    });
    const float rstd = 1.0f / std::sqrt(variance + task.eps);
    task.mean[r] = mean;
    task.rstd[r] = rstd;
    T* y = static_cast<T*>(task.y) + r * width;
    each(width, [&](int64_t i, int64_t count) {
      give(y + i, (load(z + i) - mean) * rstd * take(gamma + i, count) + take(beta + i, count), count);
    });
  }
}

// With n = (z - mean) rstd, a = of_y gamma and the share s of an element: of_z = rstd (a - s sum(a) - s n sum(a n)).
template <typename T, bool DROPOUT>
void backward(const NormBackward& task, int64_t begin, int64_t end, float* sums) {
  const int64_t width = task.width;
  std::memset(sums, 0, sizeof(float) * static_cast<size_t>(3 * width));
  float *of_gamma = sums, *of_beta = sums + width, *of_bias = sums + 2 * width;
  Rows rows(4, width);
  float *n = rows[0], *a = rows[1], *share = rows[2], *keep = rows[3];
  fill_share(task.share, width, share);
  const T* gamma = static_cast<const T*>(task.gamma);
  for (int64_t r = begin; r < end; ++r) {
    const T *of_y = static_cast<const T*>(task.of_y) + r * width, *z = static_cast<const T*>(task.z) + r * width;
    const float mean = task.mean[r], rstd = task.rstd[r];
    each(width, [&](int64_t i, int64_t count) {
      const Floats slope = take(of_y + i, count), normal = (take(z + i, count) - mean) * rstd;
      store(n + i, normal);
      store(a + i, slope * take(gamma + i, count));  // past the width: zeros
      give(of_gamma + i, take(of_gamma + i, count) + slope * normal, count);
      give(of_beta + i, take(of_beta + i, count) + slope, count);
    });
    const float straight = total(width, [&](int64_t i) { return load(a + i); });
    const float along = total(width, [&](int64_t i) { return load(a + i) * load(n + i); });
    if (DROPOUT) fill_keep(task.dropout, r, width, keep);
    T* of_x = static_cast<T*>(task.of_x) + r * width;
    T* of_residual = task.of_residual ? static_cast<T*>(task.of_residual) + r * width : nullptr;
    each(width, [&](int64_t i, int64_t count) {
      Floats of_z = (load(a + i) - (load(n + i) * along + straight) * load(share + i)) * rstd;
      if (of_residual) give(of_residual + i, of_z, count);
      if (DROPOUT) of_z *= load(keep + i);
      give(of_x + i, of_z, count);
      if (task.with_bias) give(of_bias + i, take(of_bias + i, count) + of_z, count);
    });
  }
}

template <typename T>
void forward_any(const NormForward& task, int64_t begin, int64_t end) {
  task.dropout.threshold ? forward<T, true>(task, begin, end) : forward<T, false>(task, begin, end);
}

template <typename T>
void backward_any(const NormBackward& task, int64_t begin, int64_t end, float* sums) {
  task.dropout.threshold ? backward<T, true>(task, begin, end, sums) : backward<T, false>(task, begin, end, sums);
}

}  // namespace

void norm_forward_float(const NormForward& task, int64_t begin, int64_t end) { forward_any<float>(task, begin, end); }
void norm_forward_bf16(const NormForward& task, int64_t begin, int64_t end) { forward_any<bf16>(task, begin, end); }

void norm_backward_float(const NormBackward& task, int64_t begin, int64_t end, float* sums) {
  backward_any<float>(task, begin, end, sums);
}

void norm_backward_bf16(const NormBackward& task, int64_t begin, int64_t end, float* sums) {
  backward_any<bf16>(task, begin, end, sums);
}

void norm_sum_float(GROWTH_DS_SUM) { add_partials(partials, blocks, stride, begin, end, static_cast<float*>(out)); }
void norm_sum_bf16(GROWTH_DS_SUM) { add_partials(partials, blocks, stride, begin, end, static_cast<bf16*>(out)); }

}  // namespace growth_ds::GROWTH_DS_ISA
