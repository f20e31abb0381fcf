#include "ops/load_statistics.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "base/error.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"

namespace dsv3::ops {

void add_load(Load& load, const at::Tensor& counts) {
  const NoRecord guard;
  check_shape(counts, "add_load", "counts", {-1, -1});
  check_int32(counts, "add_load", "counts", counts);
  if (!load.tokens.defined()) {
    load.tokens = at::zeros(counts.sizes(), counts.options().dtype(at::kLong));
    load.violations = at::zeros({counts.size(0)}, counts.options().dtype(at::kDouble));
  }
  check_shape(counts, "add_load", "counts", load.tokens.sizes());
  const at::Tensor rows = counts.contiguous();
  kernels::add_load({.num_layers = static_cast<int32_t>(rows.size(0)),
                     .num_experts = static_cast<int32_t>(rows.size(1)),
                     .counts = rows.const_data_ptr<int32_t>(),
                     .loads = load.tokens.mutable_data_ptr<int64_t>(),
                     .violations = load.violations.mutable_data_ptr<double>()},
                    stream_of(rows));
  ++load.num_micro_batches;
}

at::Tensor load_statistics(const Load& load, const std::vector<at::Tensor>& biases) {
  const NoRecord guard;
  check_shape(load.tokens, "load_statistics", "tokens", {-1, -1});
  const int64_t layers = load.tokens.size(0), experts = load.tokens.size(1);
  check_shape(load.violations, "load_statistics", "violations", {layers});
  require(static_cast<int64_t>(biases.size()) == layers,
          "[load_statistics] biases: expected {} (= layers), got {}", layers, biases.size());
  at::Tensor statistics =
      at::empty({layers, kernels::kNumLoadStatistics}, load.violations.options());
  for (int64_t first = 0; first < layers; first += kernels::kLoadStatisticsLayers) {
    const int64_t count = std::min<int64_t>(kernels::kLoadStatisticsLayers, layers - first);
    kernels::LoadStatistics p{
        .num_layers = static_cast<int32_t>(count),
        .num_experts = static_cast<int32_t>(experts),
        .num_micro_batches = static_cast<int32_t>(load.num_micro_batches),
        .loads = load.tokens.const_data_ptr<int64_t>() + first * experts,
        .violations = load.violations.const_data_ptr<double>() + first,
        .biases = {},
        .statistics = statistics.mutable_data_ptr<double>() + first * kernels::kNumLoadStatistics};
    for (int64_t i = 0; i < count; ++i) {
      const at::Tensor& bias = biases[static_cast<size_t>(first + i)];
      if (!bias.defined()) continue;
      check_shape(bias, "load_statistics", "bias", {experts});
      require(bias.scalar_type() == at::kFloat && bias.is_contiguous() &&
                  bias.device() == load.tokens.device(),
              "[load_statistics] bias: expected a contiguous Float tensor on {}, got {} on {}",
              load.tokens.device().str(), c10::toString(bias.scalar_type()), bias.device().str());
      p.biases[i] = bias.const_data_ptr<float>();
    }
    kernels::load_statistics(p, stream_of(load.tokens));
  }
  return statistics;
}

}  // namespace dsv3::ops
