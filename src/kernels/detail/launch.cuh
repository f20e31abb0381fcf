#pragma once

// What every launcher and kernel of ours shares: the stream, the check after a launch, warp
// reductions.

#include <cuda_runtime.h>

#include <cstdint>

#include "base/stream.h"
#include "kernels/detail/raise.h"

namespace dsv3::kernels::cuda::detail {

inline constexpr int kWarp = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

inline cudaStream_t cuda_stream(Stream stream) {
  return static_cast<cudaStream_t>(stream.handle);
}

/// Throws CudaError naming the operation when its launch was refused.
inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    kernels::detail::raise_cuda(name, "launch failed", cudaGetErrorString(error));
  }
}

/// Sums over each kLanes neighbouring lanes in a fixed (butterfly) order; every lane gets the
/// result.
template <int kLanes = kWarp, typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kFullMask, x, mask);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullMask, x, mask));
  }
  return x;
}

}  // namespace dsv3::kernels::cuda::detail
