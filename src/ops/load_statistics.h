#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "kernels/routing.h"

namespace dsv3::ops {

/// Tokens per expert of one optimizer step, gathered over its micro-batches on the device.
struct Load {
  at::Tensor tokens;      // [L, E] int64; undefined before the first micro-batch
  at::Tensor violations;  // [L] FP64: Σ over micro-batches of max / mean - 1 of the micro-batch
  int64_t num_micro_batches = 0;
};

/// Adds a micro-batch's counts [L, E] int32. One small kernel; nothing meets the host.
void add_load(Load& load, const at::Tensor& counts);

/// [L, kernels::kNumLoadStatistics] FP64 on the load's device: kernels/routing.h names the columns.
/// biases: one tensor [E] FP32 for each layer, undefined where a layer has none.
at::Tensor load_statistics(const Load& load, const std::vector<at::Tensor>& biases);

}  // namespace dsv3::ops
