// LAMB in two passes: 28 bytes an element for updates and norms, 18 for the step with its 16-bit copy (4 more for zeros).
//
// A block has a tile, whose elements are one parameter's; its squared norms are summed in double, in an order that does
// not depend on what else runs. A third, small kernel adds the tiles of each row in order.
#include "../include/adam.cuh"
#include "lamb_cuda.h"

namespace growth_ds::cuda {
namespace {

constexpr int THREADS = 256;

struct Update {
  const float* weight;
  float *first, *second, *grad;
  const float *step, *factor, *multiplier;
  const int64_t *ends, *tiles;
  int64_t segments, count;
  double* partials;
  AdamOptions options;
  float decay;
  bool aligned;
};

__device__ double block_sum(double x) {
  __shared__ double parts[THREADS / 32];
  for (int step = 16; step > 0; step /= 2) x += __shfl_down_sync(0xffffffffu, x, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0)
    for (int k = 0; k < THREADS / 32; ++k) total += parts[k];
  return total;
}

template <bool SCALED>
__device__ void update_four(const Update& a, const Adam& adam, float factor, int64_t i, int count, bool aligned,
                            double sums[2]) {
  float weight[4], first[4], second[4], slope[4], times[4];
  load_four(a.weight, i, count, aligned, weight);
  load_four(a.first, i, count, aligned, first);
  load_four(a.second, i, count, aligned, second);
  load_four(a.grad, i, count, aligned, slope);
  if (SCALED) load_multipliers(a.multiplier, a.ends, a.segments, i, count, aligned, times);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float direction = adam_direction(adam, slope[k] * factor, first[k], second[k]) / adam.left;
    if (SCALED) direction *= times[k];
    slope[k] = direction + weight[k] * a.decay;
    if (k < count) {
      sums[0] += static_cast<double>(weight[k]) * weight[k];
      sums[1] += static_cast<double>(slope[k]) * slope[k];
    }
  }
  store_four(a.first, i, count, aligned, first);
  store_four(a.second, i, count, aligned, second);
  store_four(a.grad, i, count, aligned, slope);
}

template <bool SCALED>
__global__ void __launch_bounds__(THREADS) update_kernel(Update a) {
  const Adam adam = adam_of(a.options, a.step);
  const float factor = a.factor ? *a.factor : 1.0f;
  for (int64_t at = blockIdx.x; at < a.count; at += gridDim.x) {
    double sums[2] = {0.0, 0.0};
    if (a.tiles[3 * at] >= 0) {
      const int64_t begin = a.tiles[3 * at + 1], end = a.tiles[3 * at + 2];
      // Parameters begin anywhere in a flat tensor: what stands before the first aligned four goes by itself.
      const int64_t whole = begin + 3 < end ? (begin + 3) / 4 * 4 : end;
      if (threadIdx.x == 0 && begin < whole)
        update_four<SCALED>(a, adam, factor, begin, static_cast<int>(whole - begin < 4 ? whole - begin : 4), false, sums);
      for (int64_t i = whole + 4 * threadIdx.x; i < end; i += 4 * THREADS)
        update_four<SCALED>(a, adam, factor, i, static_cast<int>(end - i < 4 ? end - i : 4), a.aligned, sums);
    }
    const double weights = block_sum(sums[0]), updates = block_sum(sums[1]);
    if (threadIdx.x == 0) {
      a.partials[at] = weights;
      a.partials[a.count + at] = updates;
    }
  }
}

__global__ void sum_kernel(const double* partials, const int64_t* starts, int64_t rows, int64_t count, double* squares) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= 2 * rows) return;
  const int64_t row = k % rows, kind = k / rows;
  double total = 0.0;
  for (int64_t at = starts[row]; at < starts[row + 1]; ++at) total += partials[kind * count + at];
  squares[k] = total;
}

template <typename L>
__device__ void apply_four(float* weight, float* update, L* low, float rate, bool moves, int64_t i, int count,
                           bool aligned) {
  if (moves) {
    float value[4], moved[4];
    load_four(weight, i, count, aligned, value);
    load_four(update, i, count, aligned, moved);
#pragma unroll
    for (int k = 0; k < 4; ++k) value[k] -= moved[k] * rate;
    store_four(weight, i, count, aligned, value);
    if (low) store_four(low, i, count, aligned, value);
  }
  const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  store_four(update, i, count, aligned, zeros);
}

template <typename L>
__global__ void __launch_bounds__(THREADS)
    apply_kernel(float* weight, float* update, const int64_t* tiles, int64_t tile_count, const float* rates, L* low,
                 bool aligned) {
  for (int64_t at = blockIdx.x; at < tile_count; at += gridDim.x) {
    const int64_t row = tiles[3 * at], begin = tiles[3 * at + 1], end = tiles[3 * at + 2];
    const float rate = row < 0 ? 0.0f : rates[row];
    const int64_t whole = begin + 3 < end ? (begin + 3) / 4 * 4 : end;
    if (threadIdx.x == 0 && begin < whole)
      apply_four(weight, update, low, rate, row >= 0, begin, static_cast<int>(whole - begin < 4 ? whole - begin : 4),
                 false);
    for (int64_t i = whole + 4 * threadIdx.x; i < end; i += 4 * THREADS)
      apply_four(weight, update, low, rate, row >= 0, i, static_cast<int>(end - i < 4 ? end - i : 4), aligned);
  }
}

int blocks_for(int64_t tiles) { return static_cast<int>(tiles < 65536 ? tiles : 65536); }

}  // namespace

int lamb_update(const LambUpdate& g, void* raw) {
  auto* stream = static_cast<cudaStream_t>(raw);
  Update a{g.weight, g.first, g.second, g.grad, g.step, g.factor, g.multiplier, g.ends, g.tiles, g.segments, g.count,
           g.partials, {g.beta1, g.beta2, static_cast<float>(g.eps)}, static_cast<float>(g.weight_decay), true};
  for (const float* each : {a.weight, static_cast<const float*>(a.first), static_cast<const float*>(a.second),
                            static_cast<const float*>(a.grad), g.ends ? nullptr : a.multiplier})
    a.aligned = a.aligned && is_aligned(each, 16);
  if (g.count > 0) {
    if (a.multiplier)
      update_kernel<true><<<blocks_for(g.count), THREADS, 0, stream>>>(a);
    else
      update_kernel<false><<<blocks_for(g.count), THREADS, 0, stream>>>(a);
  }
  if (g.rows > 0)
    sum_kernel<<<static_cast<int>((2 * g.rows + 63) / 64), 64, 0, stream>>>(g.partials, g.starts, g.rows, g.count,
                                                                            g.squares);
  return static_cast<int>(cudaGetLastError());
}

int lamb_apply(const LambApply& g, void* raw) {
  if (g.count == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(raw);
  const bool aligned = is_aligned(g.weight, 16) && is_aligned(g.update, 16) && is_aligned(g.low, 8);
  if (g.low_is_half)
    apply_kernel<<<blocks_for(g.count), THREADS, 0, stream>>>(g.weight, g.update, g.tiles, g.count, g.rates,
                                                              static_cast<__half*>(g.low), aligned);
  else
    apply_kernel<<<blocks_for(g.count), THREADS, 0, stream>>>(g.weight, g.update, g.tiles, g.count, g.rates,
                                                              static_cast<__nv_bfloat16*>(g.low), aligned);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace growth_ds::cuda
