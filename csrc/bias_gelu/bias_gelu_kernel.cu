// gelu(x + bias) and its gradients. A thread keeps its columns (a pack, or one where packs do not fit) and walks down the
// rows, so that bias is read once and the bias' gradient stays in registers; then the threads' sums are added in order.
#include <algorithm>

#include "../include/cuda_rows.h"
#include "../include/gelu_tail.h"
#include "bias_gelu_cuda.h"

namespace growth_ds::cuda {
namespace {

constexpr int THREADS = 128;
constexpr int64_t WALKERS = 2048;  // blocks that share the columns and rows: some 16 a multiprocessor

struct Gelu {
  float share, slope;  // y = x * share; dy/dx
};

__device__ __forceinline__ float power(float x, float) { return expf(x); }
template <typename T>
__device__ __forceinline__ float power(float x, T) {
  return __expf(x);  // within 1e-6 of it here: enough for 16 bits
}

template <typename T, bool TANH>
__device__ __forceinline__ Gelu gelu(float x) {
  if (TANH) {  // share = (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))
    const float square = x * x;
    const float raised = power(fminf(-x * (square * 0.0713548162726f + 1.5957691216057f), 80.0f), T{});
    const float share = __fdividef(1.0f, 1.0f + raised);
    return {share, x * share * (raised * share) * (square * 0.2140644488178f + 1.5957691216057f) + share};
  }
  const float bell = power(x * x * -0.5f, T{});
  const float t = __fdividef(1.0f, fabsf(x) * GROWTH_DS_TAIL_STEP + 1.0f);
  const float tail = GROWTH_DS_TAIL(t) * bell;
  const float share = x > 0.0f ? 1.0f - tail : tail;
  return {share, x * (bell * 0.39894228040143268f) + share};
}

// Eight columns or one: what a thread holds.
template <typename T, bool PACKED>
struct Columns;
template <typename T>
struct Columns<T, true> {
  static constexpr int COUNT = N;
  static __device__ __forceinline__ Pack<T> load(const T* from) { return cuda::load(from); }
  static __device__ __forceinline__ void store(T* to, const Pack<T>& x) { cuda::store(to, x); }
};
template <typename T>
struct Columns<T, false> {
  static constexpr int COUNT = 1;
  static __device__ __forceinline__ Pack<T> load(const T* from) {
    Pack<T> out;
    out.at[0] = *from;
    return out;
  }
  static __device__ __forceinline__ void store(T* to, const Pack<T>& x) { *to = x.at[0]; }
};

template <typename T, bool TANH, bool PACKED>
__global__ void __launch_bounds__(THREADS) forward(const T* __restrict__ x, const T* __restrict__ bias, int64_t rows,
                                                   int64_t width, T* __restrict__ out) {
  using Of = Columns<T, PACKED>;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * Of::COUNT;
  if (column >= width) return;
  const Pack<T> offset = Of::load(bias + column);
  for (int64_t r = blockIdx.y * blockDim.y + threadIdx.y; r < rows; r += gridDim.y * blockDim.y) {
    Pack<T> values = Of::load(x + r * width + column);
#pragma unroll
    for (int i = 0; i < Of::COUNT; ++i) {
      const float in = wide(values.at[i]) + wide(offset.at[i]);
      values.at[i] = narrow<T>(in * gelu<T, TANH>(in).share);
    }
    Of::store(out + r * width + column, values);
  }
}

template <typename T, bool TANH, bool PACKED>
__global__ void __launch_bounds__(THREADS) backward(const T* __restrict__ of_out, const T* __restrict__ x,
                                                    const T* __restrict__ bias, int64_t rows, int64_t width,
                                                    T* __restrict__ of_x, float* __restrict__ partials) {
  using Of = Columns<T, PACKED>;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * Of::COUNT;
  if (column >= width) return;
  const Pack<T> offset = Of::load(bias + column);
  float sums[Of::COUNT] = {};
  const int64_t walker = blockIdx.y * blockDim.y + threadIdx.y;
  for (int64_t r = walker; r < rows; r += gridDim.y * blockDim.y) {
    Pack<T> values = Of::load(x + r * width + column);
    const Pack<T> slopes = Of::load(of_out + r * width + column);
#pragma unroll
    for (int i = 0; i < Of::COUNT; ++i) {
      const float slope = wide(slopes.at[i]) * gelu<T, TANH>(wide(values.at[i]) + wide(offset.at[i])).slope;
      sums[i] += slope;
      values.at[i] = narrow<T>(slope);
    }
    Of::store(of_x + r * width + column, values);
  }
#pragma unroll
  for (int i = 0; i < Of::COUNT; ++i) partials[walker * width + column + i] = sums[i];
}

struct Shape {
  dim3 block, grid;
};

// Threads side by side over the columns; narrow rows share a block.
Shape shape(int64_t rows, int64_t width, int count) {
  const int64_t threads = (width + count - 1) / count;
  int across = WARP;
  while (across < THREADS && across < threads) across *= 2;
  const int down = THREADS / across;
  const int64_t blocks_across = (threads + across - 1) / across;
  const int64_t blocks_down = std::min<int64_t>((rows + down - 1) / down, std::max<int64_t>(1, WALKERS / blocks_across));
  return {dim3(across, down), dim3(static_cast<unsigned>(blocks_across), static_cast<unsigned>(blocks_down))};
}

template <bool VALUE>
struct Constant {
  static constexpr bool value = VALUE;
};

// f with compile-time flags.
template <typename F>
void with_flags(bool tanh, bool packed, F f) {
  if (tanh) return packed ? f(Constant<true>{}, Constant<true>{}) : f(Constant<true>{}, Constant<false>{});
  return packed ? f(Constant<false>{}, Constant<true>{}) : f(Constant<false>{}, Constant<false>{});
}

}  // namespace

const char* bias_gelu(Type type, const void* x, const void* bias, int64_t rows, int64_t width, bool tanh, void* out,
                      void* stream) {
  if (rows == 0 || width == 0) return nullptr;
  const bool packed = width % N == 0 && aligned(x) && aligned(bias) && aligned(out);
  const Shape s = shape(rows, width, packed ? N : 1);
  with_type(type, [&](auto element) {
    using T = decltype(element);
    with_flags(tanh, packed, [&](auto t, auto p) {
      forward<T, decltype(t)::value, decltype(p)::value><<<s.grid, s.block, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(x), static_cast<const T*>(bias), rows, width, static_cast<T*>(out));
    });
  });
  return launch_error();
}

int64_t bias_gelu_partials(int64_t rows, int64_t width) {
  if (rows == 0 || width == 0) return 0;
  const Shape packs = shape(rows, width, N), ones = shape(rows, width, 1);
  return std::max<int64_t>(packs.grid.y * packs.block.y, ones.grid.y * ones.block.y);
}

const char* bias_gelu_backward(Type type, const void* of_out, const void* x, const void* bias, int64_t rows,
                               int64_t width, bool tanh, void* of_x, void* of_bias, float* partials, void* stream) {
  if (width == 0) return nullptr;
  const bool packed = width % N == 0 && aligned(of_out) && aligned(x) && aligned(bias) && aligned(of_x);
  const Shape s = shape(std::max<int64_t>(rows, 1), width, packed ? N : 1);
  const auto queue = static_cast<cudaStream_t>(stream);
  with_type(type, [&](auto element) {
    using T = decltype(element);
    if (rows > 0)
      with_flags(tanh, packed, [&](auto t, auto p) {
        backward<T, decltype(t)::value, decltype(p)::value><<<s.grid, s.block, 0, queue>>>(
            static_cast<const T*>(of_out), static_cast<const T*>(x), static_cast<const T*>(bias), rows, width,
            static_cast<T*>(of_x), partials);
      });
    const int64_t walkers = rows > 0 ? static_cast<int64_t>(s.grid.y) * s.block.y : 0;
    launch_add_partials<T>(partials, walkers, width, width, static_cast<T*>(of_bias), queue);
  });
  return launch_error();
}

}  // namespace growth_ds::cuda
