#pragma once

// Top-k over a row that a warp holds in registers: the router and the sequence balance loss.

#include <cstdint>
#include <type_traits>

#include "kernels/detail/launch.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda::detail {

inline constexpr uint32_t kNoKey = 0;

/// Unsigned integers in the order of the floats, all above kNoKey; NaN counts as -inf, -0 as +0.
__device__ __forceinline__ uint32_t ordered_key(float x) {
  const uint32_t bits = __float_as_uint(isnan(x) ? -INFINITY : x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// The lane holds the keys of items lane, lane + 32, …: returns the item with the largest key (of
/// equal ones the lowest item) to all lanes, and removes it.
template <int kPerLane>
__device__ __forceinline__ int take_largest(uint32_t (&keys)[kPerLane], int lane) {
  uint32_t best = keys[0];
  uint32_t item = lane;
#pragma unroll
  for (int i = 1; i < kPerLane; ++i) {
    if (keys[i] > best) {
      best = keys[i];
      item = lane + i * kWarp;
    }
  }
  const uint32_t largest = __reduce_max_sync(kFullMask, best);
  const uint32_t winner = __reduce_min_sync(kFullMask, best == largest ? item : 0xffffffffu);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (winner == static_cast<uint32_t>(lane + i * kWarp)) keys[i] = kNoKey;
  }
  return static_cast<int>(winner);
}

/// Calls fn with how many experts a lane holds, as a constant.
template <typename Fn>
void dispatch_experts_per_lane(int32_t num_experts, Fn&& fn) {
  if (num_experts <= 32) return fn(std::integral_constant<int, 1>());
  if (num_experts <= 64) return fn(std::integral_constant<int, 2>());
  if (num_experts <= 128) return fn(std::integral_constant<int, 4>());
  if (num_experts <= 256) return fn(std::integral_constant<int, 8>());
  return fn(std::integral_constant<int, kMaxExperts / kWarp>());
}

}  // namespace dsv3::kernels::cuda::detail
