#pragma once

// What every launcher and kernel of ours shares: the stream, the check after a launch, warp
// reductions.

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

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

/// Of the current device; 0 where it does not say.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  return count;
}

/// Whether the current device has what sm_90 brought.
inline bool has_sm90() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

/// Launches the second kernel of an operator while the first one, which calls
/// ptx::let_second_begin(), still runs (programmatic dependent launch). It calls
/// ptx::wait_for_first() before it reads what the first wrote, and in one block at least, so that
/// it does not end before the first. Before sm_90 one after the other.
template <typename... Params>
void launch_second(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                   std::type_identity_t<Params>... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = has_sm90() ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);
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
