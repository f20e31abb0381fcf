// Router: scores, group-limited biased top-k, weights, counts and the sums of the sequence-wise
// balance loss in one pass over the logits, a warp per token. DeepSeek-V3 technical report
// (arXiv:2412.19437) §2.1.2.
//
// A lane holds kPerLane neighbouring experts in registers, so that at V3's 256 experts in 8 groups
// a group is 4 lanes: its two best are found by 8 local steps and 2 exchanges. A block takes one
// chunk of a sequence (detail/router.h), its warps the chunk's tokens in turn; shares of the loss
// stay in registers until the chunk is done and are then added over the warps in order. A second,
// small kernel adds the chunks of each sequence, in order, and counts what is countable with
// integers. Bytes moved: T·E words in, T·(E + 2K) out: 34 MB at 16,384 tokens x 256 experts, 8 us
// of a copy. By instructions: about 600 integer operations a token with the loss's own selection,
// 400 without, at half the issue rate: 20 to 25 us on 132 multiprocessors. So the time goes into
// the selections.

#include "kernels/detail/launch.cuh"
#include "kernels/detail/route.cuh"
#include "kernels/detail/router.h"
#include "kernels/detail/vector.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kFullMask;
using detail::kWarp;
using kernels::detail::RouterChunks;
using kernels::detail::RouterPartials;

/// 1024 threads leave each 64 registers, which hold up to 8 experts; 16 need twice as many.
template <int kPerLane>
constexpr int kWarpsOf = kPerLane <= 8 ? 32 : 16;

struct Launch {
  RouterChunks chunks;
  RouterPartials partials;
  bool wide;            // rows of logits and scores are 16-byte aligned
  int lanes_per_group;  // a power of two where groups are whole lanes, else 0
};

template <int kPerLane>
struct Shared {
  alignas(16) uint32_t rows[kWarpsOf<kPerLane>][kWarp * kPerLane];  // a scratch row per warp
  float bias[kWarp * kPerLane];
  int raw[kWarp * kPerLane];
  int chosen[kWarp * kPerLane];
  int valid;
};

/// s of the lane's experts from their logits (-inf where there is none): sigmoid, or softmax over
/// the warp's row.
template <int kPerLane>
__device__ __forceinline__ void affinities(bool sigmoid, float (&s)[kPerLane]) {
  if (sigmoid) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) s[i] = __fdividef(1.0f, 1.0f + expf(-s[i]));
    return;
  }
  float largest = s[0], sum = 0.0f;
#pragma unroll
  for (int i = 1; i < kPerLane; ++i) largest = fmaxf(largest, s[i]);
  largest = detail::warp_max(largest);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    s[i] = expf(s[i] - largest);
    sum += s[i];
  }
  const float inverse = 1.0f / detail::warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) s[i] *= inverse;
}

__device__ __forceinline__ void add_to_best_two(float x, float& best, float& second) {
  second = fmaxf(second, fminf(best, x));
  best = fmaxf(best, x);
}

/// Whether the lane's group is among the topk_group best. A group is lanes_per_group whole lanes.
template <int kPerLane>
__device__ __forceinline__ bool in_chosen_group(const RouterShape& shape, int lanes_per_group,
                                                const float (&biased)[kPerLane], int lane) {
  float best = -INFINITY, second = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) add_to_best_two(biased[i], best, second);
  for (int step = 1; step < lanes_per_group; step *= 2) {
    const float other_best = __shfl_xor_sync(kFullMask, best, step);
    const float other_second = __shfl_xor_sync(kFullMask, second, step);
    second = fmaxf(fmaxf(second, other_second), fminf(best, other_best));
    best = fmaxf(best, other_best);
  }
  const bool two = shape.group_score_top2 && shape.num_experts > shape.n_group;
  const uint32_t mine = detail::ordered_key(two ? best + second : best);
  const int group = lane / lanes_per_group;
  int better = 0;
  for (int g = 0; g < shape.n_group; ++g) {
    const uint32_t other = __shfl_sync(kFullMask, mine, g * lanes_per_group);
    better += other + (g < group ? 1u : 0u) > mine;  // a tie goes to the lower group
  }
  return better < shape.topk_group;
}

/// The same for groups of any size: bit g of the result. `row` is the warp's scratch.
template <int kPerLane>
__device__ uint64_t chosen_groups(const RouterShape& shape, const float (&biased)[kPerLane],
                                  int lane, uint32_t* row) {
  const int size = shape.num_experts / shape.n_group;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) row[lane * kPerLane + i] = __float_as_uint(biased[i]);
  __syncwarp();
  uint32_t keys[2] = {detail::kNoKey, detail::kNoKey};  // of groups lane and lane + 32
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int group = lane + i * kWarp;
    if (group >= shape.n_group) continue;
    float best = -INFINITY, second = -INFINITY;
    for (int e = 0; e < size; ++e) {
      add_to_best_two(__uint_as_float(row[group * size + e]), best, second);
    }
    keys[i] = detail::ordered_key(shape.group_score_top2 && size > 1 ? best + second : best);
  }
  __syncwarp();
  uint64_t chosen = 0;
  for (int k = 0; k < shape.topk_group; ++k) {
    const uint32_t largest = __reduce_max_sync(kFullMask, max(keys[0], keys[1]));
    const unsigned low = __ballot_sync(kFullMask, keys[0] == largest);
    const unsigned high = __ballot_sync(kFullMask, keys[1] == largest);
    const int group = low != 0 ? __ffs(low) - 1 : __ffs(high) - 1 + kWarp;
    if (lane == group) keys[0] = detail::kNoKey;
    if (lane + kWarp == group) keys[1] = detail::kNoKey;
    chosen |= uint64_t{1} << group;
  }
  return chosen;
}

/// Ordered keys of the biased scores, -inf where the group is not chosen, kNoKey behind the last
/// expert.
template <int kPerLane>
__device__ __forceinline__ void selection_keys(const RouteForward& p, const Launch& launch,
                                               const float (&s)[kPerLane], const float* bias,
                                               int lane, uint32_t* row,
                                               uint32_t (&keys)[kPerLane]) {
  const RouterShape& shape = p.shape;
  float biased[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    // Not contracted with the product that made s: the choice is by the scores as written. NaN
    // becomes -inf.
    biased[i] = fmaxf(__fadd_rn(s[i], bias[lane * kPerLane + i]), -INFINITY);
  }
  if (shape.topk_group < shape.n_group) {
    if (launch.lanes_per_group > 0) {
      const bool open = in_chosen_group(shape, launch.lanes_per_group, biased, lane);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) biased[i] = open ? biased[i] : -INFINITY;
    } else {
      const uint64_t chosen = chosen_groups(shape, biased, lane, row);
      const int size = shape.num_experts / shape.n_group;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int group = min((lane * kPerLane + i) / size, kMaxGroups - 1);
        if (!(chosen >> group & 1)) biased[i] = -INFINITY;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t key = detail::ordered_key(biased[i]);
    keys[i] = lane * kPerLane + i < shape.num_experts ? key : detail::kNoKey;
  }
}

/// Writes the choice of one token; returns lane k's expert, -1 for lanes without a choice.
template <int kPerLane>
__device__ __forceinline__ int choose(const RouteForward& p, const Launch& launch, int64_t token,
                                      const float (&s)[kPerLane], const float* bias, int lane,
                                      uint32_t* row) {
  const int num_choices = p.shape.num_experts_per_token;
  uint32_t keys[kPerLane];
  selection_keys(p, launch, s, bias, lane, row, keys);
  const int expert = detail::select_largest(keys, num_choices, lane, row);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) keys[i] = __float_as_uint(s[i]);
  detail::store_items(row, lane, keys);
  __syncwarp();
  float weight = expert >= 0 ? __uint_as_float(row[expert]) : 0.0f;
  __syncwarp();
  if (p.shape.normalize) weight /= detail::warp_sum(weight) + 1e-20f;
  if (expert >= 0) {
    p.experts[token * num_choices + lane] = expert;
    p.weights[token * num_choices + lane] = weight * p.shape.scale;
  }
  return expert;
}

/// The expert of lane k's raw choice (no bias, no groups), -1 for lanes without one.
template <int kPerLane>
__device__ __forceinline__ int choose_raw(int num_experts, int num_choices,
                                          const float (&s)[kPerLane], int lane, uint32_t* row) {
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    // Scores are not negative: their bits are in order. NaN counts as 0.
    const uint32_t key = __float_as_uint(fmaxf(s[i], 0.0f)) + 1;
    keys[i] = lane * kPerLane + i < num_experts ? key : detail::kNoKey;
  }
  return detail::select_largest(keys, num_choices, lane, row);
}

/// The chunk's shares and counts go to its place in the scratch; the block is past a barrier.
template <int kPerLane, bool kBalance>
__device__ void write_partials(const Launch& launch, int num_experts, Shared<kPerLane>& shared) {
  const int64_t first = int64_t{blockIdx.x} * num_experts;
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    launch.partials.chosen[first + e] = shared.chosen[e];
    if constexpr (kBalance) {
      float sum = 0.0f;
      for (int w = 0; w < kWarpsOf<kPerLane>; ++w) sum += __uint_as_float(shared.rows[w][e]);
      launch.partials.sums[first + e] = sum;
      launch.partials.raw[first + e] = shared.raw[e];
    }
  }
  if (kBalance && threadIdx.x == 0) launch.partials.valid[blockIdx.x] = shared.valid;
}

template <int kPerLane>
__device__ __forceinline__ void clear_shared(const RouteForward& p, Shared<kPerLane>& shared) {
  for (int e = threadIdx.x; e < kWarp * kPerLane; e += blockDim.x) {
    shared.bias[e] = p.bias != nullptr && e < p.shape.num_experts ? p.bias[e] : 0.0f;
    shared.raw[e] = 0;
    shared.chosen[e] = 0;
  }
  if (threadIdx.x == 0) shared.valid = 0;
}

template <int kPerLane, bool kBalance>
__global__ void __launch_bounds__(kWarpsOf<kPerLane>* kWarp, 1)
    route_forward_kernel(RouteForward p, Launch launch) {
  __shared__ Shared<kPerLane> shared;
  constexpr int kWarps = kWarpsOf<kPerLane>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int num_experts = p.shape.num_experts, num_choices = p.shape.num_experts_per_token;
  uint32_t* const row = shared.rows[warp];
  clear_shared(p, shared);
  if (blockIdx.x == 0 && p.counts != nullptr) {  // what the second kernel adds to
    for (int e = threadIdx.x; e < num_experts; e += blockDim.x) p.counts[e] = 0;
    if (threadIdx.x == 0) *launch.partials.ticket = 0;
  }
  if (kBalance && blockIdx.x == 0 && threadIdx.x == 0) *launch.partials.ticket = 0;
  __syncthreads();

  const int64_t sequence = blockIdx.x / launch.chunks.per_sequence;
  const int64_t begin = int64_t{blockIdx.x % launch.chunks.per_sequence} * launch.chunks.tokens;
  const int64_t end = min(launch.chunks.sequence_length, begin + launch.chunks.tokens);
  const bool raw_is_chosen = p.bias == nullptr && p.shape.topk_group == p.shape.n_group;
  float sums[kPerLane] = {};
  int num_valid = 0;
  for (int64_t t = begin + warp; t < end; t += kWarps) {
    const int64_t token = sequence * launch.chunks.sequence_length + t;
    float s[kPerLane];
    detail::load_row(p.logits + token * num_experts, num_experts, lane, launch.wide, -INFINITY, s);
    affinities(p.shape.sigmoid, s);
    detail::store_row(p.scores + token * num_experts, num_experts, lane, launch.wide, s);
    const int expert = choose(p, launch, token, s, shared.bias, lane, row);
    if (expert >= 0) atomicAdd(&shared.chosen[expert], 1);
    if constexpr (kBalance) {
      if (p.valid != nullptr && !p.valid[token]) continue;
      ++num_valid;
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) total += s[i];
      const float inverse = 1.0f / (detail::warp_sum(total) + 1e-20f);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) sums[i] = fmaf(s[i], inverse, sums[i]);
      const int raw = raw_is_chosen ? expert : choose_raw(num_experts, num_choices, s, lane, row);
      if (raw >= 0) atomicAdd(&shared.raw[raw], 1);
    }
  }
  if constexpr (kBalance) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) row[lane * kPerLane + i] = __float_as_uint(sums[i]);
    if (lane == 0) atomicAdd(&shared.valid, num_valid);
  }
  __syncthreads();
  write_partials<kPerLane, kBalance>(launch, num_experts, shared);
}

constexpr int kFinishThreads = 1024;

struct ExpertTotals {
  float sum;
  int raw, chosen;
};

/// Adds up one expert's chunks slice, slice + num_slices, … of the sequence.
__device__ __forceinline__ ExpertTotals add_chunks(const RouterPartials& partials, bool balance,
                                                   int64_t first_chunk, int num_chunks,
                                                   int num_experts, int expert, int slice,
                                                   int num_slices) {
  ExpertTotals totals{0.0f, 0, 0};
#pragma unroll 4
  for (int chunk = slice; chunk < num_chunks; chunk += num_slices) {
    const int64_t item = (first_chunk + chunk) * num_experts + expert;
    totals.chosen += partials.chosen[item];
    if (balance) {
      totals.sum += partials.sums[item];
      totals.raw += partials.raw[item];
    }
  }
  return totals;
}

/// The block that comes last adds the sequences' losses, in their order.
__device__ void add_losses(const RouteForward& p, const RouterPartials& partials, float loss) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partials.losses[blockIdx.x] = loss;
    __threadfence();
    last = atomicAdd(partials.ticket, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x >= kWarp) return;
  __threadfence();
  float sum = 0.0f;
  for (int64_t b = threadIdx.x; b < p.num_sequences; b += kWarp) sum += __ldcg(partials.losses + b);
  sum = detail::warp_sum(sum);
  if (threadIdx.x == 0) *p.loss = sum;
}

/// A block per sequence: counts, coefficients and the sequence's loss.
__global__ void __launch_bounds__(kFinishThreads)
    route_finish_kernel(RouteForward p, RouterChunks chunks, RouterPartials partials) {
  __shared__ ExpertTotals slices[kFinishThreads];
  __shared__ float warp_losses[kFinishThreads / kWarp];
  __shared__ int num_valid;
  const int num_experts = p.shape.num_experts;
  const int num_slices = kFinishThreads / num_experts;
  const int expert = threadIdx.x % num_experts, slice = threadIdx.x / num_experts;
  const int64_t first_chunk = int64_t{blockIdx.x} * chunks.per_sequence;
  const bool balance = p.coefficients != nullptr;
  if (threadIdx.x == 0) num_valid = 0;
  if (slice < num_slices) {
    slices[threadIdx.x] = add_chunks(partials, balance, first_chunk, chunks.per_sequence,
                                     num_experts, expert, slice, num_slices);
  }
  __syncthreads();
  if (balance) {
    int valid = 0;
    for (int c = threadIdx.x; c < chunks.per_sequence; c += kFinishThreads) {
      valid += partials.valid[first_chunk + c];
    }
    if (valid != 0) atomicAdd(&num_valid, valid);
  }
  __syncthreads();
  float loss = 0.0f;
  if (threadIdx.x < num_experts) {
    ExpertTotals totals = slices[threadIdx.x];
    for (int i = 1; i < num_slices; ++i) {
      const ExpertTotals other = slices[i * num_experts + threadIdx.x];
      totals.sum += other.sum;
      totals.raw += other.raw;
      totals.chosen += other.chosen;
    }
    if (p.counts != nullptr && totals.chosen != 0) atomicAdd(p.counts + expert, totals.chosen);
    if (balance) {
      const float coefficient = kernels::detail::balance_coefficient(
          num_experts, p.shape.num_experts_per_token, totals.raw, num_valid);
      p.coefficients[int64_t{blockIdx.x} * num_experts + expert] = coefficient;
      loss = coefficient * totals.sum;
    }
  }
  if (!balance) return;
  loss = detail::warp_sum(loss);
  if (threadIdx.x % kWarp == 0) warp_losses[threadIdx.x / kWarp] = loss;
  __syncthreads();
  if (threadIdx.x < kWarp) loss = detail::warp_sum(warp_losses[threadIdx.x]);
  add_losses(p, partials, loss);
}
static_assert(kFinishThreads == kWarp * kWarp && kFinishThreads >= kMaxExperts);

/// Lanes of a group where groups are whole lanes, a power of two of them; else 0.
int lanes_per_group(const RouterShape& shape, int per_lane) {
  const int size = shape.num_experts / shape.n_group, lanes = size / per_lane;
  return size % per_lane == 0 && (lanes & (lanes - 1)) == 0 ? lanes : 0;
}

void clear(const RouteForward& p, cudaStream_t stream) {
  const size_t row = sizeof(float) * p.shape.num_experts;
  const auto zero = [&](void* pointer, size_t bytes) {
    if (pointer == nullptr) return;
    const cudaError_t error = cudaMemsetAsync(pointer, 0, bytes, stream);
    if (error != cudaSuccess) {
      kernels::detail::raise_cuda("route_forward", "memset failed", cudaGetErrorString(error));
    }
  };
  zero(p.counts, row);
  zero(p.coefficients, row * p.num_sequences);
  if (p.coefficients != nullptr) zero(p.loss, sizeof(float));
}

}  // namespace

void route_forward(const RouteForward& p, Stream stream) {
  kernels::detail::check_route(p);
  const auto cuda = detail::cuda_stream(stream);
  if (p.num_tokens == 0) return clear(p, cuda);
  const RouterChunks chunks = kernels::detail::router_chunks(p.num_tokens, p.num_sequences);
  const bool balance = p.coefficients != nullptr;
  Launch launch{.chunks = chunks,
                .partials = kernels::detail::router_partials(p, chunks),
                .wide = p.shape.num_experts % 4 == 0 && detail::aligned16(p.logits) &&
                        detail::aligned16(p.scores),
                .lanes_per_group = 0};
  detail::dispatch_experts_per_lane(p.shape.num_experts, [&](auto per_lane) {
    constexpr int kPerLane = per_lane();
    launch.lanes_per_group = lanes_per_group(p.shape, kPerLane);
    auto* const kernel =
        balance ? route_forward_kernel<kPerLane, true> : route_forward_kernel<kPerLane, false>;
    kernel<<<static_cast<unsigned>(chunks.count), kWarpsOf<kPerLane> * kWarp, 0, cuda>>>(p, launch);
  });
  detail::check_launch("route_forward");
  if (!balance && p.counts == nullptr) return;
  route_finish_kernel<<<static_cast<unsigned>(p.num_sequences), kFinishThreads, 0, cuda>>>(
      p, chunks, launch.partials);
  detail::check_launch("route_forward");
}

}  // namespace dsv3::kernels::cuda
