// Philox4x32-10 (Salmon et al. 2011), by which element (row, column) of a dropout mask depends on the seed alone: word
// column % 4 of counter (column / 4, low and high half of row, 0) under the key `seed`. The element is kept where the
// word is >= threshold = p 2^32. growth_ds/ops/philox.py is the same in torch's operations.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GROWTH_DS_PHILOX __host__ __device__ __forceinline__
#else
#define GROWTH_DS_PHILOX static inline __attribute__((always_inline))
#endif

namespace growth_ds {

// The four words of a counter, in place.
GROWTH_DS_PHILOX void philox(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u, b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// p 2^32, rounded; 0 <= p < 1.
inline uint32_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0 + 0.5;
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
}

}  // namespace growth_ds
