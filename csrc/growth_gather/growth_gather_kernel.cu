// One thread an element and turn; weight and both moments of it share their index.
#include "growth_gather_cuda.h"

namespace growth_ds::cuda {
namespace {

constexpr int THREADS = 256;

struct Given {
  Growth growth;
  const float* x[3];
  const int64_t* source;
  const double* factors;
  int64_t entries, begin, count;
  float* out;
};

template <int KINDS>
__global__ void __launch_bounds__(THREADS) kernel(Given g) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < g.count; i += stride) {
    int64_t rest = g.begin + i, from = 0, step = 1, entry[MOST_AXES];
#pragma unroll
    for (int a = MOST_AXES - 1; a >= 0; --a) {
      if (a >= g.growth.axes) continue;
      const int64_t next = rest / g.growth.new_size[a];
      entry[a] = g.growth.offset[a] + rest - next * g.growth.new_size[a];
      rest = next;
      from += g.source[entry[a]] * step;
      step *= g.growth.old_size[a];
    }
#pragma unroll
    for (int kind = 0; kind < KINDS; ++kind) {
      float value = g.x[kind][from];
      if (g.factors) {
        double factor = 1.0;  // in the order of the axes, so that its bits are the CPU's
#pragma unroll
        for (int a = 0; a < MOST_AXES; ++a)
          if (a < g.growth.axes) factor *= g.factors[kind * g.entries + entry[a]];
        value *= static_cast<float>(factor);
      }
      g.out[kind * g.count + i] = value;
    }
  }
}

}  // namespace

int growth_gather(const Growth& growth, const float* const x[3], const int64_t* source, const double* factors,
                  int64_t entries, int64_t kinds, float* out, int64_t begin, int64_t count, void* raw) {
  if (count == 0) return 0;
  auto* stream = static_cast<cudaStream_t>(raw);
  const Given given{growth, {x[0], x[1], x[2]}, source, factors, entries, begin, count, out};
  const int64_t wanted = (count + THREADS - 1) / THREADS;
  const int blocks = static_cast<int>(wanted < 65536 ? wanted : 65536);
  if (kinds == 3)
    kernel<3><<<blocks, THREADS, 0, stream>>>(given);
  else if (kinds == 2)
    kernel<2><<<blocks, THREADS, 0, stream>>>(given);
  else
    kernel<1><<<blocks, THREADS, 0, stream>>>(given);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace growth_ds::cuda
