// NaN and infinity in a flat buffer, range by range.
//
// A warp takes a tile of 128 elements, which belongs to one range because ranges start on multiples
// of it. Only a tile that holds something bad looks for its range (binary search) and adds to it
// (integer atomics: the same result in any order). Reads the buffer once, and only when the flag is
// set: otherwise each block reads 4 bytes and ends.

#include "kernels/detail/launch.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/optimizer.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kFullMask;
using detail::kWarp;

constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr int kPerLane = kNonFiniteTile / kWarp;
constexpr int64_t kMaxBlocks = 1024;

static_assert(sizeof(long long) == sizeof(int64_t));

/// The last range that starts at or before `element`.
__device__ int64_t range_of(const LocateNonFinite& p, int64_t element) {
  int64_t low = 0, high = p.num_ranges;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (p.starts[middle] <= element) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) locate_kernel(LocateNonFinite p, int64_t num_tiles) {
  if (p.only_if != nullptr && *p.only_if == 0) return;
  const T* const x = static_cast<const T*>(p.x);
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarp;
  const int64_t num_warps = int64_t{gridDim.x} * kWarpsPerBlock;
  for (int64_t tile = warp; tile < num_tiles; tile += num_warps) {
    const int64_t base = tile * kNonFiniteTile;
    int count = 0, first = 0;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int64_t i = base + k * kWarp + lane;
      const bool bad = i < p.size && !isfinite(detail::to_float(x[i]));
      const unsigned lanes = __ballot_sync(kFullMask, bad);
      if (count == 0 && lanes != 0) first = k * kWarp + __ffs(static_cast<int>(lanes)) - 1;
      count += __popc(lanes);
    }
    if (count == 0 || lane != 0) continue;
    const int64_t range = range_of(p, base);
    atomicAdd(reinterpret_cast<unsigned long long*>(p.counts + range),
              static_cast<unsigned long long>(count));
    atomicMin(reinterpret_cast<long long*>(p.first + range),
              static_cast<long long>(base + first - p.starts[range]));
  }
}

}  // namespace

void locate_non_finite(const LocateNonFinite& p, Stream stream) {
  if (p.size == 0) return;
  const int64_t num_tiles = (p.size + kNonFiniteTile - 1) / kNonFiniteTile;
  const int64_t wanted = (num_tiles + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const auto blocks = static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  detail::dispatch_float("locate_non_finite", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    locate_kernel<T><<<blocks, kThreads, 0, detail::cuda_stream(stream)>>>(p, num_tiles);
  });
  detail::check_launch("locate_non_finite");
}

}  // namespace dsv3::kernels::cuda
