// AdamW over a flat range: one pass, 8 elements per thread, 16-byte accesses, every load of a
// thread in flight before the first is used.
//
// Bytes an element: FP32 weights, gradients and moments 28; BF16 weights, gradients and moments 14;
// BF16 weights and gradients with FP32 master and moments 30; zeroing the gradients in the same
// pass adds their write, an EMA its read and write. Memory bound: about 60 instructions an element
// are counted against the 110 that fit beside 16 bytes, and three Philox calls for eight elements
// (random rounding of BF16 weights and moments) add 30. How far the weights moved is summed on the
// way, one part for each block. Loshchilov & Hutter 2019, arXiv:1711.05101.

#include <algorithm>

#include "kernels/detail/adamw.cuh"
#include "kernels/detail/launch.cuh"

namespace dsv3::kernels::cuda {
namespace {

using detail::AdamWFactors;
using detail::kVector;
using detail::kWarp;
using detail::Moved;

constexpr int kThreads = 256;
constexpr int kWarpElements = kWarp * kVector;

/// The block's sums into its part. Every thread of the block calls it.
__device__ void store_moved(const Moved& moved, double* partial) {
  __shared__ double shared[2][kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const double update = detail::warp_sum(moved.update), weight = detail::warp_sum(moved.weight);
  if (lane == 0) {
    shared[0][warp] = update;
    shared[1][warp] = weight;
  }
  __syncthreads();
  if (threadIdx.x >= 2) return;
  double sum = 0.0;
  for (int i = 0; i < kThreads / kWarp; ++i) sum += shared[threadIdx.x][i];
  partial[threadIdx.x] = sum;
}

/// The two quads of this thread among the warp's elements from `begin` on.
template <bool kSplit>
__device__ __forceinline__ detail::Quads quads_at(int64_t begin) {
  const int lane = threadIdx.x % kWarp;
  const int64_t first = begin + lane * (kSplit ? kVector / 2 : kVector);
  return {{first, first + (kSplit ? kWarpElements / 2 : kVector / 2)}, {true, true}};
}

/// vector_size is a multiple of kWarpElements. Where numbers are rounded at random a thread reads
/// its next elements before the long arithmetic of these.
template <typename Types>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(AdamW p, AdamWFactors f, int64_t vector_size) {
  using G = typename Types::Gradient;
  constexpr bool kSplit = Types::kSplit, kAhead = Types::kStochastic;
  const bool skip = p.skip != nullptr && *p.skip != 0;
  detail::take_corrections(p, f);
  const float gradient_scale = p.gradient_scale != nullptr ? *p.gradient_scale : 1.0f;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t num_threads = int64_t{gridDim.x} * kThreads, step = num_threads * kVector;
  int64_t i = (thread - threadIdx.x % kWarp) * kVector;
  Moved moved;
  detail::Loaded<Types> next;
  if (kAhead && !skip && i < vector_size) {
    detail::load_quads<Types, kSplit>(p, quads_at<kSplit>(i), next);
  }
  for (; i < vector_size; i += step) {
    const detail::Quads q = quads_at<kSplit>(i);
    if (!skip) {
      if (!kAhead) detail::load_quads<Types, kSplit>(p, q, next);
      const detail::Loaded<Types> x = next;
      if (kAhead && i + step < vector_size) {
        detail::load_quads<Types, kSplit>(p, quads_at<kSplit>(i + step), next);
      }
      float w[kVector];
      detail::update_quads<Types, kSplit>(p, f, gradient_scale, q, x, w, &moved);
    }
    if (p.zero_gradients) detail::store_quads<kSplit>(static_cast<G*>(p.gradients), q, {});
  }
  for (int64_t i = vector_size + thread; i < p.size; i += num_threads) {
    if (!skip) detail::update1<Types>(p, f, gradient_scale, i, &moved);
    if (p.zero_gradients) static_cast<G*>(p.gradients)[i] = detail::from_float<G>(0.0f);
  }
  if (p.partials != nullptr) store_moved(moved, p.partials + 2 * int64_t{blockIdx.x});
}

/// As many blocks as fit at once where threads read ahead, else one for each step.
template <typename Types>
int64_t most_blocks() {
  if constexpr (!Types::kStochastic) return int64_t{1} << 30;
  int device = 0, multiprocessors = 1, blocks = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, adamw_kernel<Types>, kThreads, 0);
  return int64_t{multiprocessors} * std::max(blocks, 1);
}

}  // namespace

void adamw(const AdamW& p, Stream stream) {
  kernels::detail::check_adamw(p);
  if (p.size == 0) return;
  const int64_t vector_size = detail::adamw_aligned(p) ? p.size / kWarpElements * kWarpElements : 0;
  const int64_t steps = vector_size > 0 ? (p.size + kVector - 1) / kVector : p.size;
  const AdamWFactors factors = kernels::detail::adamw_factors(p);
  detail::dispatch_adamw(p, [&](auto types) {
    using Types = decltype(types);
    // With parts as many blocks as parts: 25 waves at the most, so that the last one weighs little.
    const int64_t blocks = p.partials != nullptr
                               ? adamw_partials(p.size)
                               : std::min(most_blocks<Types>(), (steps + kThreads - 1) / kThreads);
    adamw_kernel<Types>
        <<<static_cast<unsigned>(blocks), kThreads, 0, detail::cuda_stream(stream)>>>(p, factors,
                                                                                      vector_size);
  });
  detail::check_launch("adamw");
}

}  // namespace dsv3::kernels::cuda
