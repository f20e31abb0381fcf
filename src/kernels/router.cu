// Router: scores, group-limited biased top-k and weights of one token per warp, and the gradient.
//
// A lane holds the experts lane, lane + 32, … in registers (at most kMaxExperts / 32 = 16); scores
// also stand in shared memory, where groups are scanned and chosen scores looked up. A selection is
// two warp reductions: the largest key, then the lowest expert that has it. Bytes moved: T·E words
// in, T·(E + 2K) out; at E = 256, K = 8 memory bound. DeepSeek-V3 technical report
// (arXiv:2412.19437) §2.1.2.

#include "kernels/detail/launch.cuh"
#include "kernels/detail/route.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kFullMask;
using detail::kWarp;

constexpr int kWarpsPerBlock = 4;

/// One word of padding per 32, so that lanes that scan groups of 32 experts meet different banks.
__device__ __forceinline__ int padded(int expert) {
  return expert + expert / kWarp;
}
constexpr int kPaddedExperts = kMaxExperts + kMaxExperts / kWarp;

/// Fills keys[i] with the ordered keys of the biased scores, the lowest possible one where the
/// group is not chosen.
template <int kPerLane>
__device__ void limit_to_groups(const RouterShape& shape, const float* biased, int lane,
                                uint32_t (&keys)[kPerLane]) {
  const int group_size = shape.num_experts / shape.n_group;
  uint32_t group_keys[2];  // of groups lane and lane + 32
  for (int i = 0; i < 2; ++i) {
    const int group = lane + i * kWarp;
    group_keys[i] = detail::kNoKey;
    if (group >= shape.n_group) continue;
    float best = -INFINITY, second = -INFINITY;
    for (int e = 0; e < group_size; ++e) {
      const float x = biased[padded(group * group_size + e)];
      if (x > best) {
        second = best;
        best = x;
      } else if (x > second) {
        second = x;
      }
    }
    const bool two = shape.group_score_top2 && group_size > 1;
    group_keys[i] = detail::ordered_key(two ? best + second : best);
  }
  uint64_t chosen = 0;
  for (int k = 0; k < shape.topk_group; ++k) {
    const int group = detail::take_largest(group_keys, lane);
    chosen |= uint64_t{1} << group;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + i * kWarp;
    if (expert < shape.num_experts && !(chosen >> (expert / group_size) & 1)) {
      keys[i] = detail::ordered_key(-INFINITY);
    }
  }
}

/// s[i] of the lane's experts: sigmoid, or softmax over the row.
template <int kPerLane>
__device__ void affinities(const RouterShape& shape, const float* logits, int lane,
                           float (&s)[kPerLane]) {
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + i * kWarp;
    s[i] = expert < shape.num_experts ? logits[expert] : -INFINITY;
    largest = fmaxf(largest, s[i]);
  }
  if (shape.sigmoid) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) s[i] = 1.0f / (1.0f + expf(-s[i]));
    return;
  }
  largest = detail::warp_max(largest);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    s[i] = lane + i * kWarp < shape.num_experts ? expf(s[i] - largest) : 0.0f;
    sum += s[i];
  }
  sum = detail::warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) s[i] /= sum;
}

template <int kPerLane>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) route_forward_kernel(RouteForward p) {
  __shared__ float shared_scores[kWarpsPerBlock][kPaddedExperts];
  __shared__ float shared_biased[kWarpsPerBlock][kPaddedExperts];
  const int lane = threadIdx.x % kWarp;
  float* const scores = shared_scores[threadIdx.x / kWarp];
  float* const biased = shared_biased[threadIdx.x / kWarp];
  const int64_t token = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarp;
  if (token >= p.num_tokens) return;
  const int num_experts = p.shape.num_experts;

  float s[kPerLane];
  affinities(p.shape, p.logits + token * num_experts, lane, s);
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + i * kWarp;
    keys[i] = detail::kNoKey;
    if (expert >= num_experts) continue;
    const float b = p.bias == nullptr ? s[i] : s[i] + p.bias[expert];
    scores[padded(expert)] = s[i];
    biased[padded(expert)] = b;
    keys[i] = detail::ordered_key(b);
    p.scores[token * num_experts + expert] = s[i];
  }
  __syncwarp();
  if (p.shape.topk_group < p.shape.n_group) limit_to_groups(p.shape, biased, lane, keys);

  const int num_choices = p.shape.num_experts_per_token;
  int mine = 0;
  for (int k = 0; k < num_choices; ++k) {
    const int expert = detail::take_largest(keys, lane);
    if (lane == k) mine = expert;
  }
  float weight = lane < num_choices ? scores[padded(mine)] : 0.0f;
  if (p.shape.normalize) weight /= detail::warp_sum(weight) + 1e-20f;
  if (lane < num_choices) {
    p.experts[token * num_choices + lane] = mine;
    p.weights[token * num_choices + lane] = weight * p.shape.scale;
  }
}

/// The gradient of the lane's choice with respect to its unbiased score; 0 for lanes without a
/// choice.
__device__ float chosen_gradient(const RouterShape& shape, const float* dweights,
                                 const float* scores, int expert, int lane) {
  const bool has = lane < shape.num_experts_per_token;
  const float dw = has ? dweights[lane] * shape.scale : 0.0f;
  if (!shape.normalize) return dw;
  const float s = has ? scores[expert] : 0.0f;
  const float sum = detail::warp_sum(s) + 1e-20f;
  const float dot = detail::warp_sum(dw * s);
  return has ? (dw - dot / sum) / sum : 0.0f;
}

template <int kPerLane>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) route_backward_kernel(RouteBackward p) {
  __shared__ float shared_ds[kWarpsPerBlock][kMaxExperts];
  const int lane = threadIdx.x % kWarp;
  float* const ds = shared_ds[threadIdx.x / kWarp];
  const int64_t token = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarp;
  if (token >= p.num_tokens) return;
  const int num_experts = p.shape.num_experts;
  const int num_choices = p.shape.num_experts_per_token;
  const float* const scores = p.scores + token * num_experts;

  float s[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + i * kWarp;
    if (expert >= num_experts) continue;
    s[i] = scores[expert];
    ds[expert] = p.dscores == nullptr ? 0.0f : p.dscores[token * num_experts + expert];
  }
  __syncwarp();
  if (p.dweights != nullptr) {
    const int expert = lane < num_choices ? p.experts[token * num_choices + lane] : 0;
    const float d =
        chosen_gradient(p.shape, p.dweights + token * num_choices, scores, expert, lane);
    if (lane < num_choices) ds[expert] += d;  // the choices of a token are distinct
    __syncwarp();
  }
  float dot = 0.0f;
  if (!p.shape.sigmoid) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane + i * kWarp < num_experts) dot += ds[lane + i * kWarp] * s[i];
    }
    dot = detail::warp_sum(dot);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + i * kWarp;
    if (expert >= num_experts) continue;
    const float slope = p.shape.sigmoid ? ds[expert] * (1.0f - s[i]) : ds[expert] - dot;
    p.dlogits[token * num_experts + expert] = slope * s[i];
  }
}

int blocks_for(int64_t num_tokens) {
  return static_cast<int>((num_tokens + kWarpsPerBlock - 1) / kWarpsPerBlock);
}

}  // namespace

void route_forward(const RouteForward& p, Stream stream) {
  check_router_shape(p.shape);
  if (p.num_tokens == 0) return;
  detail::dispatch_experts_per_lane(p.shape.num_experts, [&](auto per_lane) {
    route_forward_kernel<per_lane()>
        <<<blocks_for(p.num_tokens), kWarpsPerBlock * kWarp, 0, detail::cuda_stream(stream)>>>(p);
  });
  detail::check_launch("route_forward");
}

void route_backward(const RouteBackward& p, Stream stream) {
  check_router_shape(p.shape);
  if (p.num_tokens == 0) return;
  detail::dispatch_experts_per_lane(p.shape.num_experts, [&](auto per_lane) {
    route_backward_kernel<per_lane()>
        <<<blocks_for(p.num_tokens), kWarpsPerBlock * kWarp, 0, detail::cuda_stream(stream)>>>(p);
  });
  detail::check_launch("route_backward");
}

}  // namespace dsv3::kernels::cuda
