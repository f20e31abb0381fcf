#pragma once

// The next tile of a block on its way to shared memory while the block works at this one, so that
// memory is never idle: blocks stay, and go round over the tiles. A thread asks for the words that
// it will itself use, and for no others; no barrier is needed. Note: a load from memory comes back
// behind the copies that were asked for before it. One register that is spilled costs a third of
// the speed.

#include "kernels/detail/fp8_tile.cuh"
#include "kernels/detail/ptx.cuh"

namespace dsv3::kernels::cuda::detail {

/// Tiles of kMatrices matrices of 16-bit numbers, a thread's share as in TileValues.
template <int kBand, int kMatrices>
class TileRing {
 public:
  static constexpr int kThreads = 16 * kTile / kBand;
  static constexpr int kBytes = kMatrices * kBand * kThreads * 16;

  /// `shared` [kBytes], at a multiple of 128: copies that skip the registers are slow elsewhere.
  __device__ __forceinline__ explicit TileRing(void* shared)
      : words_(static_cast<uint4*>(shared) + threadIdx.x) {}

  /// Asks for row j of the thread's share of a matrix; zeros where it does not exist.
  __device__ __forceinline__ void ask(int matrix, int j, const void* x, bool exists) const {
    ptx::async_copy16_or_zeros(ptx::shared_address(words_ + place(matrix, j)), x, exists);
  }
  /// What was asked for, after ptx::async_wait. It must be used before its place is asked for
  /// again.
  __device__ __forceinline__ uint4 word(int matrix, int j) const {
    return words_[place(matrix, j)];
  }

 private:
  static constexpr __device__ __forceinline__ int place(int matrix, int j) {
    return (matrix * kBand + j) * kThreads;
  }
  uint4* words_;
};

/// Blocks of `threads` with a ring of `bytes` that fill the device; 0 = shared memory is too small.
template <typename Kernel>
unsigned ring_blocks(Kernel* kernel, int threads, int bytes) {
  int blocks = 0;
  const bool known =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) ==
          cudaSuccess &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                           cudaSharedmemCarveoutMaxShared) == cudaSuccess &&
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes) == cudaSuccess;
  if (!known) {
    cudaGetLastError();  // the kernel without a ring tells of a device that has failed
    return 0;
  }
  return static_cast<unsigned>(blocks * multiprocessors());
}

}  // namespace dsv3::kernels::cuda::detail
