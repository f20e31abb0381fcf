#pragma once

// Rows shared out to groups of threads: 32 … 1024 threads of a block hold one row in registers.

#include <algorithm>
#include <type_traits>

#include "kernels/detail/launch.cuh"
#include "kernels/detail/vector.cuh"

namespace dsv3::kernels::cuda::detail {

/// Sums of `value` over each group of kGroup threads, to all of them, in a fixed order. `shared`
/// [warps of the block] must not be in use: alternate between two when calling in a loop. All
/// threads of the block call it together.
template <int kGroup>
__device__ __forceinline__ float group_sum(float value, float* shared) {
  value = warp_sum(value);
  if constexpr (kGroup == kWarp) return value;
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) shared[warp] = value;
  __syncthreads();
  constexpr int kWarps = kGroup / kWarp;
  const int first = warp / kWarps * kWarps;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += shared[first + i];
  return sum;
}

/// Threads of a block whose groups have kGroup threads.
template <int kGroup>
inline constexpr int kGroupBlock = kGroup < 256 ? 256 : kGroup;

/// Calls fn with the smallest group (a constant) that holds `vectors` at `per_thread` each; returns
/// false when even 1024 threads do not.
template <typename Fn>
bool dispatch_group(int64_t vectors, int per_thread, Fn&& fn) {
  const auto fits = [&](int group) { return vectors <= int64_t{group} * per_thread; };
  if (fits(32)) return fn(std::integral_constant<int, 32>()), true;
  if (fits(64)) return fn(std::integral_constant<int, 64>()), true;
  if (fits(128)) return fn(std::integral_constant<int, 128>()), true;
  if (fits(256)) return fn(std::integral_constant<int, 256>()), true;
  if (fits(512)) return fn(std::integral_constant<int, 512>()), true;
  if (fits(1024)) return fn(std::integral_constant<int, 1024>()), true;
  return false;
}

/// A grid over (columns, rows) for kernels that loop over rows: threads along the columns first.
struct RowGrid {
  dim3 grid, block;
};
inline RowGrid row_grid(int64_t rows, int64_t columns) {
  unsigned width = 32;
  while (width < 256 && width < columns) width *= 2;
  const unsigned height = 256 / width;
  const int64_t down = std::min<int64_t>((rows + height - 1) / height, 65535);
  return {dim3(static_cast<unsigned>((columns + width - 1) / width), static_cast<unsigned>(down)),
          dim3(width, height)};
}

/// kVec elements (8, or 1 where alignment forbids) between memory and FP32 registers.
template <int kVec, typename T>
__device__ __forceinline__ void load_n(const T* x, float (&v)[kVec]) {
  if constexpr (kVec == kVector) {
    load8(x, v);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = to_float(x[i]);
  }
}
template <int kVec, typename T>
__device__ __forceinline__ void store_n(T* x, const float (&v)[kVec]) {
  if constexpr (kVec == kVector) {
    store8(x, v);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = from_float<T>(v[i]);
  }
}

}  // namespace dsv3::kernels::cuda::detail
