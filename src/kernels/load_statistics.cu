// Loads of experts and what they say: a warp per layer, lanes over its experts.
//
// A few KB per launch; the launch is what it costs, so that everything about a layer is one pass of
// one warp. Sums of integers, and of FP64 in the fixed order of the butterfly: the same bits on
// every run.

#include <cmath>

#include "kernels/detail/launch.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kWarp;

__device__ __forceinline__ int64_t warp_max_int(int64_t x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const int64_t other = __shfl_xor_sync(detail::kFullMask, x, mask);
    x = x > other ? x : other;
  }
  return x;
}

/// Largest · E / total - 1, 0 without tokens.
__device__ __forceinline__ double violation(int64_t total, int64_t largest, int num_experts) {
  if (total == 0) return 0.0;
  return static_cast<double>(largest) * num_experts / static_cast<double>(total) - 1.0;
}

__global__ void __launch_bounds__(kWarp) add_load_kernel(AddLoad p) {
  const int64_t row = int64_t{blockIdx.x} * p.num_experts;
  int64_t total = 0, largest = 0;
  for (int i = static_cast<int>(threadIdx.x); i < p.num_experts; i += kWarp) {
    const int64_t count = p.counts[row + i];
    p.loads[row + i] += count;
    total += count;
    largest = largest > count ? largest : count;
  }
  total = detail::warp_sum(total);
  largest = warp_max_int(largest);
  if (threadIdx.x == 0) p.violations[blockIdx.x] += violation(total, largest, p.num_experts);
}

/// max - min over the warp's lanes and strides.
__device__ double bias_spread(const float* bias, int num_experts) {
  float high = -INFINITY, low = INFINITY;
  for (int i = static_cast<int>(threadIdx.x); i < num_experts; i += kWarp) {
    high = fmaxf(high, bias[i]);
    low = fminf(low, bias[i]);
  }
  return static_cast<double>(detail::warp_max(high)) + static_cast<double>(detail::warp_max(-low));
}

__global__ void __launch_bounds__(kWarp) load_statistics_kernel(LoadStatistics p) {
  const int layer = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x);
  const int64_t* const loads = p.loads + int64_t{layer} * p.num_experts;
  int64_t total = 0, largest = 0, used = 0;
  for (int i = lane; i < p.num_experts; i += kWarp) {
    const int64_t load = loads[i];
    total += load;
    largest = largest > load ? largest : load;
    used += load > 0;
  }
  total = detail::warp_sum(total);
  largest = warp_max_int(largest);
  used = detail::warp_sum(used);
  const double experts = p.num_experts, all = static_cast<double>(total), mean = all / experts;
  double squares = 0.0, entropy = 0.0;
  for (int i = lane; i < p.num_experts; i += kWarp) {
    const double load = static_cast<double>(loads[i]);
    squares += (load - mean) * (load - mean);
    if (load > 0.0) entropy -= load / all * log(load / all);
  }
  squares = detail::warp_sum(squares);
  entropy = detail::warp_sum(entropy);
  const float* const bias = p.biases[layer];
  const double spread = bias != nullptr ? bias_spread(bias, p.num_experts) : 0.0;
  if (lane != 0) return;
  const bool any = total > 0;
  double* const out = p.statistics + int64_t{layer} * kNumLoadStatistics;
  out[kMaxViolation] = violation(total, largest, p.num_experts);
  out[kMicroViolation] = p.num_micro_batches > 0 ? p.violations[layer] / p.num_micro_batches : 0.0;
  out[kLoadImbalance] = any ? sqrt(squares / experts) / mean : 0.0;
  out[kEntropy] = !any ? 0.0 : p.num_experts == 1 ? 1.0 : entropy / log(experts);
  out[kUtilization] = static_cast<double>(used) / experts;
  out[kBiasSpread] = spread;
}

}  // namespace

void add_load(const AddLoad& p, Stream stream) {
  if (p.num_layers == 0) return;
  add_load_kernel<<<static_cast<unsigned>(p.num_layers), kWarp, 0, detail::cuda_stream(stream)>>>(
      p);
  detail::check_launch("add_load");
}

void load_statistics(const LoadStatistics& p, Stream stream) {
  if (p.num_layers == 0) return;
  load_statistics_kernel<<<static_cast<unsigned>(p.num_layers), kWarp, 0,
                           detail::cuda_stream(stream)>>>(p);
  detail::check_launch("load_statistics");
}

}  // namespace dsv3::kernels::cuda
