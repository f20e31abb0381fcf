// Router's gradient: from the weights' and the balance loss's gradients to the logits', a warp for
// a few tokens at once.
//
// A lane holds kPerLane neighbouring experts (detail/route.cuh). The few chosen scores' gradients
// pass through a zeroed row in shared memory. Bytes moved: T·E words in, T·E out: 34 MB at 16,384
// tokens x 256 experts, 8 us of a copy: memory bound.

#include "kernels/detail/launch.cuh"
#include "kernels/detail/route.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kWarp;

constexpr int kWarps = 8;

/// Tokens that a warp takes at once: what they wait for (loads, sums over the lanes) they wait for
/// together.
template <int kPerLane>
inline constexpr int kTokens = kPerLane <= 2 ? 4 : 2;

/// The gradient with respect to the unbiased score `s` of the lane's choice; 0 for lanes without
/// one.
__device__ __forceinline__ float chosen_gradient(const RouterShape& shape, float dweight, float s) {
  const float dw = dweight * shape.scale;
  if (!shape.normalize) return dw;
  const float sum = detail::warp_sum(s) + 1e-20f;
  const float dot = detail::warp_sum(dw * s);
  return (dw - dot / sum) / sum;
}

/// A lane's choice of a token; expert < 0: none.
struct Choice {
  int expert;
  float dweight;
};
__device__ __forceinline__ Choice choice_of(const RouteBackward& p, int64_t token, int lane) {
  const int num_choices = p.shape.num_experts_per_token;
  if (p.dweights == nullptr || lane >= num_choices || token >= p.num_tokens) return {-1, 0.0f};
  const int64_t at = token * num_choices + lane;
  return {p.experts[at], p.dweights[at]};
}

/// ds += the weights' gradient at the chosen experts, `s` the token's scores. `row` is the warp's
/// scratch.
template <int kPerLane>
__device__ __forceinline__ void add_weight_gradient(const RouterShape& shape, const Choice& choice,
                                                    int lane, const float (&s)[kPerLane],
                                                    uint32_t* row, float (&ds)[kPerLane]) {
  const bool has = choice.expert >= 0;
  uint32_t items[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) items[i] = __float_as_uint(s[i]);
  detail::store_items(row, lane, items);
  __syncwarp();
  const float chosen = has ? __uint_as_float(row[choice.expert]) : 0.0f;
  const float d = chosen_gradient(shape, choice.dweight, chosen);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) items[i] = 0;
  detail::store_items(row, lane, items);
  __syncwarp();
  if (has) row[choice.expert] = __float_as_uint(d);  // the choices of a token are distinct
  __syncwarp();
  detail::load_items(row, lane, items);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) ds[i] += __uint_as_float(items[i]);
}

/// ds += dloss · (c - Σ c s / Σ s) / Σ s.
template <int kPerLane>
__device__ __forceinline__ void add_loss_gradient(float dloss, const float (&c)[kPerLane],
                                                  const float (&s)[kPerLane],
                                                  float (&ds)[kPerLane]) {
  float total = 0.0f, dot = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    total += s[i];
    dot = fmaf(c[i], s[i], dot);
  }
  total = detail::warp_sum(total) + 1e-20f;
  const float mean = detail::warp_sum(dot) / total;
  const float factor = dloss / total;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) ds[i] = fmaf(factor, c[i] - mean, ds[i]);
}

template <int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarp)
    route_backward_kernel(RouteBackward p, int64_t sequence_length, bool wide) {
  constexpr int kCount = kTokens<kPerLane>;
  __shared__ alignas(16) uint32_t rows[kWarps][kCount][kWarp * kPerLane];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = (int64_t{blockIdx.x} * kWarps + warp) * kCount;
  if (first >= p.num_tokens) return;
  const int num_experts = p.shape.num_experts;
  float s[kCount][kPerLane], c[kCount][kPerLane], ds[kCount][kPerLane] = {};
  Choice choice[kCount];
  bool counts[kCount];  // in the balance loss
  const float dloss = p.coefficients != nullptr ? *p.dloss : 0.0f;
  int64_t sequence = first / sequence_length;
#pragma unroll
  for (int a = 0; a < kCount; ++a) {
    const int64_t token = first + a;
    const bool exists = token < p.num_tokens;
    const int here = exists ? num_experts : 0;
    detail::load_row(p.scores + token * num_experts, here, lane, wide, 0.0f, s[a]);
    choice[a] = choice_of(p, token, lane);
    counts[a] = exists && p.coefficients != nullptr && (p.valid == nullptr || p.valid[token]);
    if (token >= (sequence + 1) * sequence_length) ++sequence;
    detail::load_row(p.coefficients + sequence * num_experts, counts[a] ? num_experts : 0, lane,
                     wide, 0.0f, c[a]);
  }
#pragma unroll
  for (int a = 0; a < kCount; ++a) {
    if (p.dweights != nullptr) {
      add_weight_gradient(p.shape, choice[a], lane, s[a], rows[warp][a], ds[a]);
    }
    if (counts[a]) add_loss_gradient(dloss, c[a], s[a], ds[a]);
    float dot = 0.0f;
    if (!p.shape.sigmoid) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) dot = fmaf(ds[a][i], s[a][i], dot);
      dot = detail::warp_sum(dot);
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      ds[a][i] = (p.shape.sigmoid ? ds[a][i] * (1.0f - s[a][i]) : ds[a][i] - dot) * s[a][i];
    }
  }
#pragma unroll
  for (int a = 0; a < kCount; ++a) {
    const int64_t token = first + a;
    const int here = token < p.num_tokens ? num_experts : 0;
    detail::store_row(p.dlogits + token * num_experts, here, lane, wide, ds[a]);
  }
}

}  // namespace

void route_backward(const RouteBackward& p, Stream stream) {
  check_router_shape(p.shape);
  if (p.num_tokens == 0) return;
  const bool wide = p.shape.num_experts % 4 == 0 && detail::aligned16(p.scores) &&
                    detail::aligned16(p.dlogits) && detail::aligned16(p.coefficients);
  detail::dispatch_experts_per_lane(p.shape.num_experts, [&](auto per_lane) {
    constexpr int64_t kOfBlock = kWarps * kTokens<per_lane()>;
    const auto blocks = static_cast<unsigned>((p.num_tokens + kOfBlock - 1) / kOfBlock);
    route_backward_kernel<per_lane()><<<blocks, kWarps * kWarp, 0, detail::cuda_stream(stream)>>>(
        p, p.num_tokens / p.num_sequences, wide);
  });
  detail::check_launch("route_backward");
}

}  // namespace dsv3::kernels::cuda
