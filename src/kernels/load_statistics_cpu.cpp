// Loads of experts and what they say, on the host: a few thousand numbers a step, one thread.

#include <algorithm>
#include <cmath>

#include "kernels/routing.h"

namespace dsv3::kernels::cpu {
namespace {

struct Sums {
  int64_t total = 0, largest = 0, used = 0;
};

template <typename T>
Sums sums_of(const T* loads, int32_t num_experts) {
  Sums sums;
  for (int32_t i = 0; i < num_experts; ++i) {
    sums.total += loads[i];
    sums.largest = std::max<int64_t>(sums.largest, loads[i]);
    sums.used += loads[i] > 0;
  }
  return sums;
}

double violation(const Sums& sums, int32_t num_experts) {
  if (sums.total == 0) return 0.0;
  return static_cast<double>(sums.largest) * num_experts / static_cast<double>(sums.total) - 1.0;
}

double spread(const float* bias, int32_t num_experts) {
  if (bias == nullptr) return 0.0;
  const auto [low, high] = std::minmax_element(bias, bias + num_experts);
  return double{*high} - double{*low};
}

}  // namespace

void add_load(const AddLoad& p) {
  for (int32_t layer = 0; layer < p.num_layers; ++layer) {
    const int64_t row = int64_t{layer} * p.num_experts;
    for (int32_t i = 0; i < p.num_experts; ++i) p.loads[row + i] += p.counts[row + i];
    p.violations[layer] += violation(sums_of(p.counts + row, p.num_experts), p.num_experts);
  }
}

void load_statistics(const LoadStatistics& p) {
  const double experts = p.num_experts;
  for (int32_t layer = 0; layer < p.num_layers; ++layer) {
    const int64_t* const loads = p.loads + int64_t{layer} * p.num_experts;
    double* const out = p.statistics + int64_t{layer} * kNumLoadStatistics;
    const Sums sums = sums_of(loads, p.num_experts);
    const auto total = static_cast<double>(sums.total);
    const double mean = total / experts;
    double squares = 0.0, entropy = 0.0;
    for (int32_t i = 0; i < p.num_experts; ++i) {
      const auto load = static_cast<double>(loads[i]);
      squares += (load - mean) * (load - mean);
      if (loads[i] > 0) entropy -= load / total * std::log(load / total);
    }
    const bool any = sums.total > 0;
    out[kMaxViolation] = violation(sums, p.num_experts);
    out[kMicroViolation] =
        p.num_micro_batches > 0 ? p.violations[layer] / p.num_micro_batches : 0.0;
    out[kLoadImbalance] = any ? std::sqrt(squares / experts) / mean : 0.0;
    out[kEntropy] = !any ? 0.0 : p.num_experts == 1 ? 1.0 : entropy / std::log(experts);
    out[kUtilization] = static_cast<double>(sums.used) / experts;
    out[kBiasSpread] = spread(p.biases[layer], p.num_experts);
  }
}

}  // namespace dsv3::kernels::cpu
