// Router's gradient: from the weights' and the balance loss's gradients to the logits', a warp per
// token.
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

/// The gradient with respect to the unbiased score `s` of the lane's choice; 0 for lanes without
/// one.
__device__ __forceinline__ float chosen_gradient(const RouterShape& shape, float dweight, float s) {
  const float dw = dweight * shape.scale;
  if (!shape.normalize) return dw;
  const float sum = detail::warp_sum(s) + 1e-20f;
  const float dot = detail::warp_sum(dw * s);
  return (dw - dot / sum) / sum;
}

/// ds += the weights' gradient at the chosen experts. `row` is the warp's scratch.
template <int kPerLane>
__device__ __forceinline__ void add_weight_gradient(const RouteBackward& p, int64_t token, int lane,
                                                    uint32_t* row, float (&ds)[kPerLane]) {
  const int num_choices = p.shape.num_experts_per_token;
  const bool has = lane < num_choices;
  const int expert = has ? p.experts[token * num_choices + lane] : 0;
  const float s = has ? p.scores[token * p.shape.num_experts + expert] : 0.0f;
  const float dweight = has ? p.dweights[token * num_choices + lane] : 0.0f;
  const float d = chosen_gradient(p.shape, dweight, s);
  uint32_t items[kPerLane] = {};
  detail::store_items(row, lane, items);
  __syncwarp();
  if (has) row[expert] = __float_as_uint(d);  // the choices of a token are distinct
  __syncwarp();
  detail::load_items(row, lane, items);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) ds[i] += __uint_as_float(items[i]);
}

/// ds += dloss · (c - Σ c s / Σ s) / Σ s.
template <int kPerLane>
__device__ __forceinline__ void add_loss_gradient(const RouteBackward& p, const float* row,
                                                  bool wide, int lane, const float (&s)[kPerLane],
                                                  float (&ds)[kPerLane]) {
  float c[kPerLane], total = 0.0f, dot = 0.0f;
  detail::load_row(row, p.shape.num_experts, lane, wide, 0.0f, c);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    total += s[i];
    dot = fmaf(c[i], s[i], dot);
  }
  total = detail::warp_sum(total) + 1e-20f;
  const float mean = detail::warp_sum(dot) / total;
  const float factor = *p.dloss / total;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) ds[i] = fmaf(factor, c[i] - mean, ds[i]);
}

template <int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarp)
    route_backward_kernel(RouteBackward p, unsigned sequence_length, bool wide) {
  __shared__ alignas(16) uint32_t rows[kWarps][kWarp * kPerLane];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t token = int64_t{blockIdx.x} * kWarps + warp;
  if (token >= p.num_tokens) return;
  const int num_experts = p.shape.num_experts;
  float s[kPerLane], ds[kPerLane] = {};
  detail::load_row(p.scores + token * num_experts, num_experts, lane, wide, 0.0f, s);
  if (p.dweights != nullptr) add_weight_gradient(p, token, lane, rows[warp], ds);
  if (p.coefficients != nullptr && (p.valid == nullptr || p.valid[token])) {
    const auto sequence = static_cast<unsigned>(token) / sequence_length;
    const float* const c = p.coefficients + int64_t{sequence} * num_experts;
    add_loss_gradient(p, c, wide, lane, s, ds);
  }
  float dot = 0.0f;
  if (!p.shape.sigmoid) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) dot = fmaf(ds[i], s[i], dot);
    dot = detail::warp_sum(dot);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    ds[i] = (p.shape.sigmoid ? ds[i] * (1.0f - s[i]) : ds[i] - dot) * s[i];
  }
  detail::store_row(p.dlogits + token * num_experts, num_experts, lane, wide, ds);
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
  const auto blocks = static_cast<unsigned>((p.num_tokens + kWarps - 1) / kWarps);
  const auto sequence_length = static_cast<unsigned>(p.num_tokens / p.num_sequences);
  detail::dispatch_experts_per_lane(p.shape.num_experts, [&](auto per_lane) {
    route_backward_kernel<per_lane()>
        <<<blocks, kWarps * kWarp, 0, detail::cuda_stream(stream)>>>(p, sequence_length, wide);
  });
  detail::check_launch("route_backward");
}

}  // namespace dsv3::kernels::cuda
