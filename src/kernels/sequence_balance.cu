// Sequence-wise balance loss (technical report §2.1.2, eq. 17–20) and its gradient, a warp per
// token.
//
// Forward: block (chunk, sequence) counts its tokens' raw top-K and sums s / Σs per expert, in
// registers per warp, then over its warps in order; a second kernel adds the chunks in order. Reads
// T·E words. Backward reads and writes T·E words.

#include "kernels/detail/launch.cuh"
#include "kernels/detail/route.cuh"
#include "kernels/detail/sequence_balance.h"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kWarp;
using kernels::detail::BalancePartials;
using kernels::detail::kBalanceChunk;

constexpr int kWarps = 8;

template <int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarp)
    balance_partials_kernel(SequenceBalanceForward p, BalancePartials partials) {
  extern __shared__ float
      shared[];  // [kWarps][E] sums, then [kWarps][E] counts, then [kWarps] valid tokens
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int num_experts = p.num_experts;
  const int64_t sequence = blockIdx.y;
  const int64_t end = min(p.sequence_length, (int64_t{blockIdx.x} + 1) * kBalanceChunk);
  float sums[kPerLane] = {};
  int counts[kPerLane] = {};
  int num_valid = 0;
  for (int64_t t = int64_t{blockIdx.x} * kBalanceChunk + warp; t < end; t += kWarps) {
    const int64_t token = sequence * p.sequence_length + t;
    if (p.valid != nullptr && !p.valid[token]) continue;
    ++num_valid;
    float s[kPerLane];
    uint32_t keys[kPerLane];
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = lane + i * kWarp;
      const bool has = expert < num_experts;
      s[i] = has ? p.scores[token * num_experts + expert] : 0.0f;
      keys[i] = has ? detail::ordered_key(s[i]) : detail::kNoKey;
      total += s[i];
    }
    const float inverse = 1.0f / (detail::warp_sum(total) + 1e-20f);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sums[i] += s[i] * inverse;
    for (int k = 0; k < p.num_experts_per_token; ++k) {
      const int winner = detail::take_largest(keys, lane);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) counts[i] += winner == lane + i * kWarp;
    }
  }
  float* const shared_sums = shared;
  int* const shared_counts = reinterpret_cast<int*>(shared + kWarps * num_experts);
  int* const shared_valid = shared_counts + kWarps * num_experts;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + i * kWarp;
    if (expert >= num_experts) continue;
    shared_sums[warp * num_experts + expert] = sums[i];
    shared_counts[warp * num_experts + expert] = counts[i];
  }
  if (lane == 0) shared_valid[warp] = num_valid;
  __syncthreads();
  const int64_t chunk = sequence * gridDim.x + blockIdx.x;
  for (int expert = threadIdx.x; expert < num_experts; expert += blockDim.x) {
    float sum = 0.0f;
    int count = 0;
    for (int w = 0; w < kWarps; ++w) {
      sum += shared_sums[w * num_experts + expert];
      count += shared_counts[w * num_experts + expert];
    }
    partials.sums[chunk * num_experts + expert] = sum;
    partials.counts[chunk * num_experts + expert] = count;
  }
  if (threadIdx.x == 0) {
    int total = 0;
    for (int w = 0; w < kWarps; ++w) total += shared_valid[w];
    partials.valid[chunk] = total;
  }
}

/// One block: coefficients of every (sequence, expert), then the loss in a fixed order.
__global__ void __launch_bounds__(1024)
    balance_finish_kernel(SequenceBalanceForward p, BalancePartials partials, int num_chunks) {
  __shared__ float warp_losses[kWarp];
  float loss = 0.0f;
  const int64_t num_items = p.num_sequences * p.num_experts;
  for (int64_t item = threadIdx.x; item < num_items; item += blockDim.x) {
    const int64_t sequence = item / p.num_experts, expert = item % p.num_experts;
    float sum = 0.0f;
    int64_t count = 0, num_valid = 0;
    for (int c = 0; c < num_chunks; ++c) {
      const int64_t chunk = sequence * num_chunks + c;
      sum += partials.sums[chunk * p.num_experts + expert];
      count += partials.counts[chunk * p.num_experts + expert];
      num_valid += partials.valid[chunk];
    }
    const float coefficient = kernels::detail::balance_coefficient(
        p.num_experts, p.num_experts_per_token, count, num_valid);
    p.coefficients[item] = coefficient;
    loss += coefficient * sum;
  }
  loss = detail::warp_sum(loss);
  if (threadIdx.x % kWarp == 0) warp_losses[threadIdx.x / kWarp] = loss;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    loss = threadIdx.x < blockDim.x / kWarp ? warp_losses[threadIdx.x] : 0.0f;
    loss = detail::warp_sum(loss);
    if (threadIdx.x == 0) *p.loss = loss;
  }
}

__global__ void __launch_bounds__(kWarps* kWarp)
    balance_backward_kernel(SequenceBalanceBackward p, int64_t num_tokens) {
  const int lane = threadIdx.x % kWarp;
  const int64_t token = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (token >= num_tokens) return;
  const float* const s = p.scores + token * p.num_experts;
  const float* const c = p.coefficients + token / p.sequence_length * p.num_experts;
  float* const ds = p.dscores + token * p.num_experts;
  const bool valid = p.valid == nullptr || p.valid[token];
  float total = 0.0f, dot = 0.0f;
  for (int e = lane; e < p.num_experts; e += kWarp) {
    total += s[e];
    dot += c[e] * s[e];
  }
  total = detail::warp_sum(total) + 1e-20f;
  const float mean = detail::warp_sum(dot) / total;
  const float factor = valid ? *p.dloss / total : 0.0f;
  for (int e = lane; e < p.num_experts; e += kWarp) {
    ds[e] = valid ? factor * (c[e] - mean) : 0.0f;
  }
}

}  // namespace

void sequence_balance_forward(const SequenceBalanceForward& p, Stream stream) {
  kernels::detail::check_balance_shape(p);
  const auto cuda = detail::cuda_stream(stream);
  const auto partials = kernels::detail::balance_partials(p);
  const int num_chunks = kernels::detail::balance_chunks(p.sequence_length);
  if (p.num_sequences > 0 && num_chunks > 0) {
    const size_t shared = kWarps * (2 * p.num_experts + 1) * sizeof(float);
    const dim3 grid(num_chunks, static_cast<unsigned>(p.num_sequences));
    detail::dispatch_experts_per_lane(p.num_experts, [&](auto per_lane) {
      balance_partials_kernel<per_lane()><<<grid, kWarps * kWarp, shared, cuda>>>(p, partials);
    });
    detail::check_launch("sequence_balance_forward");
  }
  balance_finish_kernel<<<1, 1024, 0, cuda>>>(p, partials, num_chunks);
  detail::check_launch("sequence_balance_forward");
}

void sequence_balance_backward(const SequenceBalanceBackward& p, Stream stream) {
  const int64_t num_tokens = p.num_sequences * p.sequence_length;
  if (num_tokens == 0) return;
  const auto blocks = static_cast<unsigned>((num_tokens + kWarps - 1) / kWarps);
  balance_backward_kernel<<<blocks, kWarps * kWarp, 0, detail::cuda_stream(stream)>>>(p,
                                                                                      num_tokens);
  detail::check_launch("sequence_balance_backward");
}

}  // namespace dsv3::kernels::cuda
