#pragma once

// E4M3 and the scales of its tiles, the same bits on the host and every device (kernels/quantize.h
// has the rules). Straight arithmetic on bit patterns without branches, so that host loops
// vectorise. Note: a compiler must not join x · inverse with an addition: hosts compile users of
// this with -ffp-contract=off, and nothing here adds to a product.

#include <cstdint>

#include "kernels/quantize.h"

#ifdef __CUDACC__
#define DSV3_E4M3_INLINE __host__ __device__ __forceinline__
#else
#include <bit>
#define DSV3_E4M3_INLINE inline __attribute__((always_inline))
#endif

namespace dsv3::kernels::detail {

inline constexpr float kE4m3Max = 448.0f;

DSV3_E4M3_INLINE uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#elif defined(__CUDACC__)
  union {
    float f;
    uint32_t u;
  } both{x};
  return both.u;
#else
  return std::bit_cast<uint32_t>(x);
#endif
}
DSV3_E4M3_INLINE float bits_float(uint32_t x) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(x);
#elif defined(__CUDACC__)
  union {
    uint32_t u;
    float f;
  } both{x};
  return both.f;
#else
  return std::bit_cast<float>(x);
#endif
}

/// Nearest even, saturating (infinity too); NaN becomes 0x7f whatever its sign.
DSV3_E4M3_INLINE uint32_t e4m3_code(float x) {
  const uint32_t bits = float_bits(x), all = bits & 0x7fffffffu;
  const uint32_t magnitude = all < 0x43e00000u ? all : 0x43e00000u;  // 448, the largest
  // From 2^-6 on: keep 3 bits of the mantissa, exponent 127 becomes 7.
  const uint32_t rounded = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
  const uint32_t normal = rounded - (120u << 3);
  // Below: multiples of 2^-9, which is what the last bit of 2^14 counts.
  const uint32_t tiny = float_bits(bits_float(magnitude) + 16384.0f) - 0x46800000u;
  uint32_t code = magnitude < 0x3c800000u ? tiny : normal;
  code |= (bits >> 24) & 0x80u;
  return all > 0x7f800000u ? 0x7fu : code;
}

/// e4m3_code of a product by its tile's inverse: of |x| ≤ 449, which saturates by rounding alone,
/// or NaN. Adding a power of two whose last bit counts 2^(e-3) rounds a number of exponent e (-6
/// below 2^-6); what is added is 7 · 8 more, so that 8 · the exponent's bits complete the code
/// modulo 128.
DSV3_E4M3_INLINE uint32_t e4m3_scaled_code(float x) {
  const uint32_t bits = float_bits(x < 480.0f ? x : 480.0f);  // NaN: 480 would be 0x7f
  const uint32_t exponent = bits & 0x7f800000u, least = 121u << 23;
  const uint32_t counted = exponent > least ? exponent : least;
  const uint32_t step = counted + (20u << 23) + 56u;
  const uint32_t sum = float_bits(bits_float(bits & 0x7fffffffu) + bits_float(step));
  return ((sum + (counted >> 20)) & 0x7fu) | ((bits >> 24) & 0x80u);
}

/// The number of a code; exact.
DSV3_E4M3_INLINE float e4m3_value(uint32_t code) {
  const uint32_t magnitude = code & 0x7fu, sign = (code & 0x80u) << 24;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  const uint32_t tiny = float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f);
  const uint32_t bits = magnitude < 8u ? tiny : normal;
  return bits_float((magnitude == 0x7fu ? 0x7fc00000u : bits) | sign);
}

struct TileScale {
  float scale, inverse;
};

/// Note: host and device divide and round alike; nvcc's default division is IEEE's.
DSV3_E4M3_INLINE TileScale tile_scale(float amax, const ScaleRule& rule) {
  const float top = amax > rule.min_amax ? amax : rule.min_amax;
  float scale = top / kE4m3Max, inverse = kE4m3Max / top;
  if (rule.power_of_two) {
    const uint32_t up = (float_bits(scale) + 0x7fffffu) & 0x7f800000u;
    scale = bits_float(up);
    inverse = 1.0f / scale;
  }
  return {scale, inverse};
}

}  // namespace dsv3::kernels::detail
