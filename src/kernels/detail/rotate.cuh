#pragma once

// The rotation of pairs.

namespace dsv3::kernels::cuda::detail {

/// Rotates the pairs of v (kVec elements, even) by the angles cs; `sign` = -1 rotates back.
template <int kVec>
__device__ __forceinline__ void rotate(float (&v)[kVec], const float (&cs)[kVec], float sign) {
#pragma unroll
  for (int i = 0; i < kVec; i += 2) {
    const float a = v[i], b = v[i + 1], c = cs[i], s = sign * cs[i + 1];
    v[i] = a * c - b * s;
    v[i + 1] = b * c + a * s;
  }
}

/// The same with the angles in memory, kVec = 2.
__device__ __forceinline__ void rotate_pair(float (&v)[2], const float* cos_sin, float sign) {
  const float cs[2] = {cos_sin[0], cos_sin[1]};
  rotate<2>(v, cs, sign);
}

}  // namespace dsv3::kernels::cuda::detail
