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

template <typename Types>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(AdamW p, AdamWFactors f, int64_t vector_size) {
  using G = typename Types::Gradient;
  const bool skip = p.skip != nullptr && *p.skip != 0;
  detail::take_corrections(p, f);
  const float gradient_scale = p.gradient_scale != nullptr ? *p.gradient_scale : 1.0f;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t num_threads = int64_t{gridDim.x} * kThreads;
  const float zeros[kVector] = {};
  Moved moved;
  for (int64_t i = thread * kVector; i < vector_size; i += num_threads * kVector) {
    float w[kVector];
    if (!skip) detail::update8<Types>(p, f, gradient_scale, i, w, &moved);
    if (p.zero_gradients) detail::store8(static_cast<G*>(p.gradients) + i, zeros);
  }
  for (int64_t i = vector_size + thread; i < p.size; i += num_threads) {
    if (!skip) detail::update1<Types>(p, f, gradient_scale, i, &moved);
    if (p.zero_gradients) static_cast<G*>(p.gradients)[i] = detail::from_float<G>(0.0f);
  }
  if (p.partials != nullptr) store_moved(moved, p.partials + 2 * int64_t{blockIdx.x});
}

}  // namespace

void adamw(const AdamW& p, Stream stream) {
  kernels::detail::check_adamw(p);
  if (p.size == 0) return;
  const int64_t vector_size = detail::adamw_aligned(p) ? p.size / kVector * kVector : 0;
  const int64_t steps = vector_size > 0 ? (p.size + kVector - 1) / kVector : p.size;
  constexpr int64_t kMostBlocks = int64_t{1} << 30;
  // With parts as many blocks as parts: 25 waves at the most, so that the last one weighs little.
  const int64_t blocks = p.partials != nullptr
                             ? adamw_partials(p.size)
                             : std::min(kMostBlocks, (steps + kThreads - 1) / kThreads);
  const auto grid = static_cast<unsigned>(blocks);
  const AdamWFactors factors = kernels::detail::adamw_factors(p);
  detail::dispatch_adamw(p, [&](auto types) {
    adamw_kernel<decltype(types)>
        <<<grid, kThreads, 0, detail::cuda_stream(stream)>>>(p, factors, vector_size);
  });
  detail::check_launch("adamw");
}

}  // namespace dsv3::kernels::cuda
