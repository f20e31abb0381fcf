#pragma once

// Rows shared out to groups of threads, half or whole warps; narrow rows stand several to a block.
// Only the width decides, so that sums are taken in an order that it alone decides.

#include <type_traits>

#include "kernels/detail/launch.cuh"

namespace dsv3::kernels::cuda::detail {

/// kGroup threads hold a row, kRows rows make a block of kThreads: as many as kMost threads allow.
template <int kGroupThreads, int kMost = 256>
struct RowGroups {
  static constexpr int kGroup = kGroupThreads;
  static constexpr int kRows = kGroup < kMost && kMost % kGroup == 0 ? kMost / kGroup : 1;
  static constexpr int kThreads = kGroup * kRows;
};

/// Calls fn(RowGroups) with the smallest group that holds rows of `vectors`, `per_thread` of them
/// to a thread; returns false where 1024 threads cannot. 7·2^n: DeepSeek-V3's D = 7168 leaves no
/// thread idle.
template <typename Fn>
bool dispatch_rows(int64_t vectors, int per_thread, Fn&& fn) {
  const auto fits = [&](int group) { return vectors <= int64_t{group} * per_thread; };
  if (fits(16)) return fn(RowGroups<16>()), true;
  if (fits(32)) return fn(RowGroups<32>()), true;
  if (fits(64)) return fn(RowGroups<64>()), true;
  if (fits(128)) return fn(RowGroups<128>()), true;
  if (fits(224)) return fn(RowGroups<224>()), true;
  if (fits(256)) return fn(RowGroups<256>()), true;
  if (fits(448)) return fn(RowGroups<448>()), true;
  if (fits(1024)) return fn(RowGroups<1024>()), true;
  return false;
}

/// The sums of kCount values over the threads of a row, to all of them, in a fixed order. `shared`
/// [kCount · warps of the block] must not be in use: alternate between two when calling in a loop.
/// All threads of the block call it together.
template <typename Rows, int kCount>
__device__ __forceinline__ void row_sums(float (&values)[kCount], float* shared) {
  constexpr int kBlockWarps = Rows::kThreads / kWarp, kWarps = Rows::kGroup / kWarp;
  if constexpr (Rows::kGroup <= kWarp) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = warp_sum<Rows::kGroup>(values[i]);
  } else {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = warp_sum(values[i]);
      if (lane == 0) shared[i * kBlockWarps + warp] = values[i];
    }
    __syncthreads();
    const int mine = warp / kWarps * kWarps + lane;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = warp_sum(lane < kWarps ? shared[i * kBlockWarps + mine] : 0.0f);
    }
  }
}
template <typename Rows>
__device__ __forceinline__ float row_sum(float value, float* shared) {
  float values[1] = {value};
  row_sums<Rows>(values, shared);
  return values[0];
}

/// The bits that row_sum has with twice as many threads to a row, from what threads t and
/// t + kGroup would add. `shared` [2 · warps of the block].
template <typename Rows>
__device__ __forceinline__ float row_sum_of_two(float first, float second, float* shared) {
  if constexpr (2 * Rows::kGroup <= kWarp) {
    return warp_sum<Rows::kGroup>(first + second);
  } else {
    constexpr int kWarps = Rows::kGroup / kWarp;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float* const row = shared + 2 * (warp / kWarps * kWarps);
    first = warp_sum(first);
    second = warp_sum(second);
    if (lane == 0) row[warp % kWarps] = first, row[kWarps + warp % kWarps] = second;
    __syncthreads();
    float sum = lane < 2 * kWarps ? row[lane] : 0.0f;
    if constexpr (2 * kWarps > kWarp) sum += row[lane + kWarp];  // 1024 threads: all there are
    return warp_sum(sum);
  }
}

}  // namespace dsv3::kernels::cuda::detail
