// AdamW over a flat range: one pass, 8 elements per thread, 16-byte accesses, every load of a
// thread in flight before the first is used.
//
// Bytes an element: FP32 weights, gradients and moments 28; BF16 weights, gradients and moments 14;
// BF16 weights and gradients with FP32 master and moments 30; zeroing the gradients in the same
// pass adds their write, an EMA its read and write. Memory bound: about 60 instructions an element
// are counted against the 110 that fit beside 16 bytes, and three Philox calls for eight elements
// (random rounding of BF16 weights and moments) add 30. How far the weights moved is summed on the
// way, one part for each block. Loshchilov & Hutter 2019, arXiv:1711.05101.

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
static_assert(kThreads * kVector == kAdamWPart);

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

/// Blocks of a multiprocessor. Random rounding takes many registers, if it is let.
template <typename Types>
inline constexpr int kBlocks = Types::kSplit || !Types::kStochastic ? 1 : 4;

/// A part to a block, in order: blocks that stay and go round drift apart, and memory then has more
/// pages open than it likes (4 to 10 % on an H200). vector_size is a multiple of kWarpElements.
template <typename Types>
__global__ void __launch_bounds__(kThreads, kBlocks<Types>)
    adamw_kernel(AdamW p, AdamWFactors f, typename Types::Key key, int64_t vector_size) {
  using G = typename Types::Gradient;
  constexpr bool kSplit = Types::kSplit;
  const bool skip = p.skip != nullptr && *p.skip != 0;
  detail::take_corrections(p, f);
  const float gradient_scale = p.gradient_scale != nullptr ? *p.gradient_scale : 1.0f;
  const int64_t begin = int64_t{blockIdx.x} * kAdamWPart;
  const int64_t i = begin + threadIdx.x / kWarp * kWarpElements;
  Moved moved;
  if (i < vector_size) {
    const detail::Quads q = quads_at<kSplit>(i);
    if (!skip) {
      detail::Loaded<Types> x;
      detail::load_quads<Types, kSplit>(p, q, x);
      float w[kVector];
      detail::update_quads<Types, kSplit>(p, f, key, gradient_scale, q, x, w, &moved);
    }
    if (p.zero_gradients) detail::store_quads<kSplit>(static_cast<G*>(p.gradients), q, {});
  }
  const int64_t end = min(begin + kAdamWPart, p.size);
  for (int64_t j = max(begin, vector_size) + threadIdx.x; j < end; j += kThreads) {
    if (!skip) detail::update1<Types>(p, f, key, gradient_scale, j, &moved);
    if (p.zero_gradients) static_cast<G*>(p.gradients)[j] = detail::from_float<G>(0.0f);
  }
  if (p.partials != nullptr) store_moved(moved, p.partials + 2 * int64_t{blockIdx.x});
}

}  // namespace

void adamw(const AdamW& p, Stream stream) {
  kernels::detail::check_adamw(p);
  if (p.size == 0) return;
  const int64_t vector_size = detail::adamw_aligned(p) ? p.size / kWarpElements * kWarpElements : 0;
  const auto blocks = static_cast<unsigned>(adamw_partials(p.size));
  const AdamWFactors factors = kernels::detail::adamw_factors(p);
  detail::dispatch_adamw(p, [&](auto types) {
    using Types = decltype(types);
    adamw_kernel<Types><<<blocks, kThreads, 0, detail::cuda_stream(stream)>>>(
        p, factors, detail::rounding_key<Types>(p), vector_size);
  });
  detail::check_launch("adamw");
}

}  // namespace dsv3::kernels::cuda
