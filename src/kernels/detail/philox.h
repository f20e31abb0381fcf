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

inline constexpr int kPhiloxRounds = 10;

/// A key as the rounds take it. Where many counters share one, it is worked out once: as a kernel's
/// parameter it costs no instruction.
struct PhiloxKey {
  uint32_t word[kPhiloxRounds][2];
};
DSV3_PHILOX_INLINE PhiloxKey philox_key(uint64_t key) {
  PhiloxKey rounds{};
  auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    rounds.word[round][0] = k0;
    rounds.word[round][1] = k1;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return rounds;
}

DSV3_PHILOX_INLINE Philox4 philox4x32(const PhiloxKey& key, uint64_t counter_low,
                                      uint64_t counter_high) {
  Philox4 c{{static_cast<uint32_t>(counter_low), static_cast<uint32_t>(counter_low >> 32),
             static_cast<uint32_t>(counter_high), static_cast<uint32_t>(counter_high >> 32)}};
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c.word[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * c.word[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.word[1] ^ key.word[round][0], static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.word[3] ^ key.word[round][1],
          static_cast<uint32_t>(a)}};
  }
  return c;
}
DSV3_PHILOX_INLINE Philox4 philox4x32(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  return philox4x32(philox_key(key), counter_low, counter_high);
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
