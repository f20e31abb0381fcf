#pragma once

// Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011): random words as a function of (key, counter), the same code on the host and the device.

#include <cstdint>

#ifdef __CUDACC__
#define DSV3_PHILOX_INLINE __host__ __device__ __forceinline__
#else
#define DSV3_PHILOX_INLINE inline
#endif

namespace dsv3::kernels::detail {

struct Philox4 {
  uint32_t word[4];
};

DSV3_PHILOX_INLINE Philox4 philox4x32(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  Philox4 c{{static_cast<uint32_t>(counter_low), static_cast<uint32_t>(counter_low >> 32),
             static_cast<uint32_t>(counter_high), static_cast<uint32_t>(counter_high >> 32)}};
  auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c.word[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * c.word[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.word[1] ^ k0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.word[3] ^ k1, static_cast<uint32_t>(a)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

/// A word's upper 24 bits in (0, 1] and in [0, 1): floats without rounding, so that the host's and
/// the device's logarithm start from the same number.
DSV3_PHILOX_INLINE float unit_above_zero(uint32_t word) {
  return static_cast<float>((word >> 8) + 1) * 0x1p-24f;
}
DSV3_PHILOX_INLINE float unit_below_one(uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24f;
}

}  // namespace dsv3::kernels::detail
