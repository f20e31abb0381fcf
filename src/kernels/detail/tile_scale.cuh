#pragma once

// A tile's scale on the device: the bits of kernels::detail::tile_scale (e4m3.h) without a branch,
// which IEEE divisions take for numbers at the ends of the range, so that the scales of several
// tiles are worked out side by side.

#include "kernels/detail/e4m3.h"
#include "kernels/detail/ptx.cuh"

namespace dsv3::kernels::cuda::detail {

/// Quotients are corrected by their exact remainders (P. Markstein, Computation of elementary
/// functions on the IBM RISC System/6000 processor, 1990), which rounds them as a division does:
/// compared for every mantissa on sm_90. top ≥ 2^-100; a top above 2^64 is brought nearer first, so
/// that no step leaves the range of normal numbers.
__device__ __forceinline__ kernels::detail::TileScale tile_scale(float amax,
                                                                 const ScaleRule& rule) {
  constexpr float kMax = kernels::detail::kE4m3Max, kInverse = 1.0f / kMax;
  const float top = amax > rule.min_amax ? amax : rule.min_amax;
  const bool infinite = top > 0x1.fffffep127f;
  const float guess = top * kInverse;
  float scale = fmaf(fmaf(-guess, kMax, top), kInverse, guess);
  scale = infinite ? top : scale;
  float inverse;
  if (rule.power_of_two) {
    const uint32_t up = (__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u;
    scale = __uint_as_float(up);
    inverse = __uint_as_float((254u << 23) - up);
  } else {
    const float nearer = top > 0x1p64f ? 0x1p-64f : 1.0f;
    const float divisor = top * nearer;
    float reciprocal = ptx::reciprocal_approx(divisor);
    reciprocal = fmaf(reciprocal, fmaf(-divisor, reciprocal, 1.0f), reciprocal);
    const float quotient = kMax * reciprocal;
    inverse = fmaf(fmaf(-quotient, divisor, kMax), reciprocal, quotient) * nearer;
  }
  return {scale, infinite ? 0.0f : inverse};
}

}  // namespace dsv3::kernels::cuda::detail
