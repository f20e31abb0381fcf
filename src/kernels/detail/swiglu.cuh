#pragma once

// SwiGLU of one number, the same bits in every kernel: its products are not joined with additions.

#include <cuda_bf16.h>

#include <type_traits>

#include "kernels/detail/ptx.cuh"

namespace dsv3::kernels::cuda::detail {

/// 1 / (1 + e^-x). BF16 takes the approximate exponential and division (errors of a few 2^-22, far
/// below its rounding), because the exact ones would bind memory-bound kernels to arithmetic.
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (std::is_same_v<T, float>) return 1.0f / (1.0f + expf(-x));
  constexpr float kLog2E = 1.4426950408889634f;
  return ptx::reciprocal_approx(1.0f + ptx::exp2_approx(-kLog2E * x));
}

template <typename T>
__device__ __forceinline__ float swiglu_value(float gate, float up, float row_weight) {
  return __fmul_rn(__fmul_rn(__fmul_rn(gate, sigmoid<T>(gate)), up), row_weight);
}

/// Adds silu(gate) · up · dy to the row weight's share; replaces gate and up by their gradients.
template <typename T>
__device__ __forceinline__ void swiglu_gradient(float& gate, float& up, float dy, float row_weight,
                                                float& share) {
  const float s = sigmoid<T>(gate), silu = __fmul_rn(gate, s);
  const float d = __fmul_rn(dy, row_weight);
  share = fmaf(__fmul_rn(silu, up), dy, share);
  gate = __fmul_rn(__fmul_rn(d, up), fmaf(silu, 1.0f - s, s));
  up = __fmul_rn(d, silu);
}

}  // namespace dsv3::kernels::cuda::detail
