#pragma once

// Top-k over a row that a warp holds in registers, expert lane · kPerLane + i in item i of a lane.

#include <cstdint>
#include <type_traits>

#include "kernels/detail/launch.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda::detail {

inline constexpr uint32_t kNoKey = 0;

/// Unsigned integers in the order of the floats, all above kNoKey; NaN counts as -inf, -0 as +0.
__device__ __forceinline__ uint32_t ordered_key(float x) {
  const uint32_t bits = __float_as_uint(fmaxf(x, -INFINITY) + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ void exchange(uint32_t& first, uint32_t& second) {
  const uint32_t larger = max(first, second);
  second = min(first, second);
  first = larger;
}

/// Batcher's odd-even merge of the items kFirst, kFirst + kStep, … of kCount.
template <int kFirst, int kCount, int kStep, int kSize>
__device__ __forceinline__ void merge_halves(uint32_t (&keys)[kSize]) {
  if constexpr (2 * kStep < kCount) {
    merge_halves<kFirst, kCount, 2 * kStep>(keys);
    merge_halves<kFirst + kStep, kCount, 2 * kStep>(keys);
#pragma unroll
    for (int i = kFirst + kStep; i + kStep < kFirst + kCount; i += 2 * kStep) {
      exchange(keys[i], keys[i + kStep]);
    }
  } else {
    exchange(keys[kFirst], keys[kFirst + kStep]);
  }
}

/// Descending order, 19 exchanges for 8 keys.
template <int kFirst, int kCount, int kSize>
__device__ __forceinline__ void sort_descending(uint32_t (&keys)[kSize]) {
  if constexpr (kCount > 1) {
    sort_descending<kFirst, kCount / 2>(keys);
    sort_descending<kFirst + kCount / 2, kCount / 2>(keys);
    merge_halves<kFirst, kCount, 1>(keys);
  }
}

/// The lane's kPerLane items of a row of 32 · kPerLane words in shared memory.
template <int kPerLane>
__device__ __forceinline__ void store_items(uint32_t* row, int lane,
                                            const uint32_t (&items)[kPerLane]) {
  if constexpr (kPerLane % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      *reinterpret_cast<uint4*>(row + lane * kPerLane + i) =
          make_uint4(items[i], items[i + 1], items[i + 2], items[i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) row[lane * kPerLane + i] = items[i];
  }
}

template <int kPerLane>
__device__ __forceinline__ void load_items(const uint32_t* row, int lane,
                                           uint32_t (&items)[kPerLane]) {
  if constexpr (kPerLane % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(row + lane * kPerLane + i);
      items[i] = four.x, items[i + 1] = four.y, items[i + 2] = four.z, items[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) items[i] = row[lane * kPerLane + i];
  }
}

/// To lane k < count: the expert with the k-th largest key, of equal ones the lower first; -1 to
/// the other lanes. `row` [32 · kPerLane] is the warp's scratch in shared memory, free on entry and
/// on return.
///
/// Each lane sorts its keys; then, count times, the largest head of all lanes is taken by one
/// reduction and popped by its lane. Only keys are sorted, not their places: those are found at the
/// end, for all choices at once, lane k looking through the unsorted keys of the lane that won
/// round k.
template <int kPerLane>
__device__ __forceinline__ int select_largest(uint32_t (&keys)[kPerLane], int count, int lane,
                                              uint32_t* row) {
  store_items(row, lane, keys);
  sort_descending<0, kPerLane>(keys);
  const unsigned lanes_below = (1u << lane) - 1;
  uint32_t my_key = kNoKey;
  unsigned my_heads = 0;
  for (int k = 0; k < count; ++k) {
    const uint32_t largest = __reduce_max_sync(kFullMask, keys[0]);
    const unsigned heads = __ballot_sync(kFullMask, keys[0] == largest);
    if (lane == k) {
      my_key = largest;
      my_heads = heads;
    }
    if (keys[0] == largest && (heads & lanes_below) == 0) {
#pragma unroll
      for (int i = 0; i + 1 < kPerLane; ++i) keys[i] = keys[i + 1];
      keys[kPerLane - 1] = kNoKey;
    }
  }
  // The lowest lane wins a tie and goes on winning it until its equal keys are used up: so equal
  // keys of one lane come out in consecutive rounds, and `skip` says how many came before.
  const int owner = __ffs(my_heads) - 1;
  const uint32_t key_before = __shfl_up_sync(kFullMask, my_key, 1);
  const int owner_before = __shfl_up_sync(kFullMask, owner, 1);
  const unsigned again =
      __ballot_sync(kFullMask, lane > 0 && key_before == my_key && owner_before == owner);
  int skip = __clz(static_cast<int>(~(again << (kWarp - 1 - lane))));
  __syncwarp();
  int place = 0;
  if (lane < count) {
    uint32_t theirs[kPerLane];
    load_items(row, owner, theirs);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (theirs[i] != my_key) continue;
      if (skip == 0) place = i;
      --skip;
    }
  }
  __syncwarp();
  return lane < count ? owner * kPerLane + place : -1;
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

/// The lane's kPerLane elements of a row of `count` floats, `rest` behind its end. `wide` when rows
/// are 16-byte aligned (then count is a multiple of 4).
template <int kPerLane>
__device__ __forceinline__ void load_row(const float* row, int count, int lane, bool wide,
                                         float rest, float (&x)[kPerLane]) {
  const int first = lane * kPerLane;
  if (kPerLane % 4 == 0 && wide) {
#pragma unroll
    for (int i = 0; i + 3 < kPerLane; i += 4) {
      float4 four = make_float4(rest, rest, rest, rest);
      if (first + i < count) four = *reinterpret_cast<const float4*>(row + first + i);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] = first + i < count ? row[first + i] : rest;
}

template <int kPerLane>
__device__ __forceinline__ void store_row(float* row, int count, int lane, bool wide,
                                          const float (&x)[kPerLane]) {
  const int first = lane * kPerLane;
  if (kPerLane % 4 == 0 && wide) {
#pragma unroll
    for (int i = 0; i + 3 < kPerLane; i += 4) {
      if (first + i < count) {
        *reinterpret_cast<float4*>(row + first + i) =
            make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (first + i < count) row[first + i] = x[i];
  }
}

}  // namespace dsv3::kernels::cuda::detail
