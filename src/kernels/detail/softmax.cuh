#pragma once

// Sums of exponentials whose parts are joined: by threads, warps, blocks and parts of a vocabulary.
//
// Exponentials are powers of two, 2^(x·log2 e - k), with k the whole number at or above the
// largest x·log2 e seen: one FMA and one instruction each. The FMA rounds once, near the largest
// logit to less than 2^-24, and joining two sums multiplies by an exact power of two.

#include <cmath>

#include "kernels/detail/launch.cuh"
#include "kernels/detail/ptx.cuh"

namespace dsv3::kernels::cuda::detail {

inline constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

/// k for a largest logit; 0 where none was seen.
__device__ __forceinline__ float reference_power(float largest) {
  return largest == -INFINITY ? 0.0f : ceilf(largest * kLog2E);
}
/// e^x · 2^-k.
__device__ __forceinline__ float scaled_exp(float x, float k) {
  return ptx::exp2_approx(fmaf(x, kLog2E, -k));
}

/// Of some of a row's logits. An aggregate without initialisers, so that it can be shared.
struct Softmax {
  float largest;    // -inf for none
  float sum;        // Σ e^logit · 2^-reference_power(largest)
  unsigned argmax;  // id of the largest, of equal ones the lowest; ~0 for none

  /// `sum` as it would be if `top` ≥ largest were the largest.
  __device__ float sum_under(float top) const {
    if (largest == top || largest == -INFINITY) return sum;
    return sum * ptx::exp2_approx(reference_power(largest) - reference_power(top));
  }
  __device__ void merge(const Softmax& other) {
    const float top = fmaxf(largest, other.largest);
    const bool theirs =
        other.largest > largest || (other.largest == largest && other.argmax < argmax);
    if (theirs) argmax = other.argmax;
    sum = sum_under(top) + other.sum_under(top);
    largest = top;
  }
  /// log Σ e^logit - logit.
  __device__ float loss(float logit) const {
    const float rest = log2f(sum) - fmaf(largest, kLog2E, -reference_power(largest));
    return kLn2 * rest + (largest - logit);
  }
};

__device__ __forceinline__ Softmax empty_softmax() {
  return {-INFINITY, 0.0f, ~0u};
}

__device__ __forceinline__ Softmax warp_merge(Softmax s) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    Softmax other;
    other.largest = __shfl_xor_sync(kFullMask, s.largest, mask);
    other.sum = __shfl_xor_sync(kFullMask, s.sum, mask);
    other.argmax = __shfl_xor_sync(kFullMask, s.argmax, mask);
    s.merge(other);
  }
  return s;
}

}  // namespace dsv3::kernels::cuda::detail
