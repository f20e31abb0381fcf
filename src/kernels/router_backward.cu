// Router's gradient: from the weights' and the balance loss's gradients to the logits'.
//
// A group of 4 … 32 lanes has a token, a lane kPerLane neighbouring experts and its share of the
// choices; all loads are in flight before the first use. The chosen scores and their gradients pass
// through shared memory. Bytes moved: T·E words in, T·E out: 34 MB at 16,384 tokens x 256 experts,
// 8 us of a copy: memory bound.

#include "kernels/detail/launch.cuh"
#include "kernels/detail/route.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kWarp;

constexpr int kThreads = 256;

/// A token's lanes, and a lane's experts.
template <int kLanes, int kExperts>
struct Group {
  static constexpr int kGroup = kLanes, kPerLane = kExperts;
  static constexpr int kTokens = kThreads / kGroup;                                // of a block
  static constexpr int kOfLane = kMaxChoices > kGroup ? kMaxChoices / kGroup : 1;  // choices
};

/// The choices of a lane: number lane + i · kGroup of its token.
template <typename G>
struct Choices {
  int expert[G::kOfLane];  // -1: none
  float dweight[G::kOfLane];

  __device__ __forceinline__ void load(const RouteBackward& p, int64_t token, int lane) {
    const int num_choices = p.shape.num_experts_per_token;
#pragma unroll
    for (int i = 0; i < G::kOfLane; ++i) {
      const int k = lane + i * G::kGroup;
      const bool has = token < p.num_tokens && k < num_choices;
      expert[i] = has ? p.experts[token * num_choices + k] : -1;
      dweight[i] = has ? p.dweights[token * num_choices + k] : 0.0f;
    }
  }
};

/// ds += the weights' gradient at the chosen experts. `scores` and `gradients` [experts] are the
/// token's, free to use.
template <typename G>
__device__ __forceinline__ void add_weight_gradient(const RouterShape& shape,
                                                    const Choices<G>& choices, int lane,
                                                    float* scores, float* gradients,
                                                    const float (&s)[G::kPerLane],
                                                    float (&ds)[G::kPerLane]) {
  constexpr int kPerLane = G::kPerLane, kWidth = G::kGroup * kPerLane;
  detail::store_row(scores, kWidth, lane, true, s);
  detail::store_row(gradients, kWidth, lane, true, ds);
  __syncwarp();
  float chosen[G::kOfLane], sum = 0.0f, dot = 0.0f;
#pragma unroll
  for (int i = 0; i < G::kOfLane; ++i) {
    chosen[i] = choices.expert[i] >= 0 ? scores[choices.expert[i]] : 0.0f;
    sum += chosen[i];
    dot = fmaf(choices.dweight[i] * shape.scale, chosen[i], dot);
  }
  sum = detail::warp_sum<G::kGroup>(sum) + 1e-20f;
  dot = detail::warp_sum<G::kGroup>(dot);
#pragma unroll
  for (int i = 0; i < G::kOfLane; ++i) {
    const float dw = choices.dweight[i] * shape.scale;
    const float d = shape.normalize ? (dw - dot / sum) / sum : dw;
    // The choices of a token are distinct.
    if (choices.expert[i] >= 0) gradients[choices.expert[i]] = d;
  }
  __syncwarp();
  detail::load_row(gradients, kWidth, lane, true, 0.0f, ds);
}

/// ds += dloss · (c - Σ c s / Σ s) / Σ s where the token counts.
template <typename G>
__device__ __forceinline__ void add_loss_gradient(float dloss, bool counts,
                                                  const float (&c)[G::kPerLane],
                                                  const float (&s)[G::kPerLane],
                                                  float (&ds)[G::kPerLane]) {
  float total = 0.0f, dot = 0.0f;
#pragma unroll
  for (int i = 0; i < G::kPerLane; ++i) {
    total += s[i];
    dot = fmaf(c[i], s[i], dot);
  }
  total = detail::warp_sum<G::kGroup>(total) + 1e-20f;
  const float mean = detail::warp_sum<G::kGroup>(dot) / total;
  const float factor = dloss / total;
#pragma unroll
  for (int i = 0; i < G::kPerLane; ++i) {
    if (counts) ds[i] = fmaf(factor, c[i] - mean, ds[i]);
  }
}

/// `wide`: rows are 16-byte aligned.
template <typename G>
__global__ void __launch_bounds__(kThreads)
    route_backward_kernel(RouteBackward p, unsigned sequence_length, bool wide) {
  constexpr int kPerLane = G::kPerLane;
  __shared__ alignas(16) float rows[2][G::kTokens][G::kGroup * kPerLane];
  const int lane = threadIdx.x % G::kGroup, slot = threadIdx.x / G::kGroup;
  const int64_t token = int64_t{blockIdx.x} * G::kTokens + slot;
  const bool exists = token < p.num_tokens, has_loss = p.coefficients != nullptr;
  const int num_experts = p.shape.num_experts, count = exists ? num_experts : 0;
  float s[kPerLane], c[kPerLane] = {}, ds[kPerLane] = {}, dloss = 0.0f;
  detail::load_row(p.scores + token * num_experts, count, lane, wide, 0.0f, s);
  bool counts = exists;
  if (has_loss) {
    const auto sequence = static_cast<unsigned>(token) / sequence_length;
    detail::load_row(p.coefficients + int64_t{sequence} * num_experts, count, lane, wide, 0.0f, c);
    dloss = *p.dloss;
    if (p.valid != nullptr && exists) counts = p.valid[token];
  }
  if (p.dweights != nullptr) {
    Choices<G> choices;
    choices.load(p, token, lane);
    add_weight_gradient<G>(p.shape, choices, lane, rows[0][slot], rows[1][slot], s, ds);
  }
  if (has_loss) add_loss_gradient<G>(dloss, counts, c, s, ds);
  float dot = 0.0f;
  if (!p.shape.sigmoid) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) dot = fmaf(ds[i], s[i], dot);
    dot = detail::warp_sum<G::kGroup>(dot);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    ds[i] = (p.shape.sigmoid ? ds[i] * (1.0f - s[i]) : ds[i] - dot) * s[i];
  }
  detail::store_row(p.dlogits + token * num_experts, count, lane, wide, ds);
}

/// Calls fn with the Group that holds so many experts.
template <typename Fn>
void dispatch_group(int32_t num_experts, Fn&& fn) {
  if (num_experts <= 16) return fn(Group<4, 4>());
  if (num_experts <= 32) return fn(Group<8, 4>());
  if (num_experts <= 64) return fn(Group<16, 4>());
  if (num_experts <= 128) return fn(Group<32, 4>());
  if (num_experts <= 256) return fn(Group<32, 8>());
  return fn(Group<32, kMaxExperts / kWarp>());
}

}  // namespace

void route_backward(const RouteBackward& p, Stream stream) {
  check_router_shape(p.shape);
  if (p.num_tokens == 0) return;
  const bool wide = p.shape.num_experts % 4 == 0 && detail::aligned16(p.scores) &&
                    detail::aligned16(p.dlogits) && detail::aligned16(p.coefficients);
  if (p.num_tokens > UINT32_MAX) {
    kernels::detail::raise_invalid("route_backward", "more than 2^32 tokens");
  }
  const auto sequence_length = static_cast<unsigned>(p.num_tokens / p.num_sequences);
  dispatch_group(p.shape.num_experts, [&](auto group) {
    using G = decltype(group);
    const auto blocks = static_cast<unsigned>((p.num_tokens + G::kTokens - 1) / G::kTokens);
    route_backward_kernel<G>
        <<<blocks, kThreads, 0, detail::cuda_stream(stream)>>>(p, sequence_length, wide);
  });
  detail::check_launch("route_backward");
}

}  // namespace dsv3::kernels::cuda
