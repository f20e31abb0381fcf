#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace dsv3::ops {

/// What AdamW keeps of a flat range of n elements: contiguous tensors [n] of one device.
struct AdamWRange {
  at::Tensor weights;              // FP32 or BF16; float64 with all others: the reference's body
  at::Tensor master = {};          // FP32 beside BF16 weights, which are then its rounding; or none
  at::Tensor gradients;            // FP32 or BF16
  at::Tensor exp_avg, exp_avg_sq;  // FP32 or BF16, both alike
  at::Tensor ema = {};             // a running mean of the weights, FP32 or BF16; or none
};

/// One step; what stands in a tensor is read where the range lies, so that no step waits for the
/// host.
struct AdamWStep {
  double learning_rate;
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay = 0.0;  // of elements before decay_end; the rest has none
  int64_t decay_end = INT64_MAX;
  double ema_decay = 0.0;
  double correction1 = 0.0, correction2 = 0.0;  // 1 - β1^step, 1 - β2^step
  at::Tensor corrections = {};                  // [2] FP32 in place of both; or none
  at::Tensor gradient_scale = {};               // [1] FP32, the clip factor; none = 1
  at::Tensor skip = {};                         // [1] int32: non-zero changes nothing; none = 0
  bool zero_gradients = false;                  // also when skipped
  bool stochastic_rounding = false;             // of BF16, as kernels/optimizer.h says
  uint64_t seed = 0, step = 0;                  // of its random bits
  int64_t first_index = 0;                      // of element 0 among all of the run
  at::Tensor moved = {};  // [kernels::adamw_partials(n), 2] FP64, filled with parts of how far the
                          // weights moved; or none
};

/// One AdamW step in place, in one pass over memory (arXiv:1711.05101; the formula:
/// kernels/optimizer.h). Throws std::invalid_argument where tensors do not belong together.
void adamw_(const AdamWRange& range, const AdamWStep& step);

namespace reference {
/// The range after the step in float64, from the stored values, nothing rounded; `moved` is left
/// alone. Waits for the device.
AdamWRange adamw(const AdamWRange& range, const AdamWStep& step);
}  // namespace reference

}  // namespace dsv3::ops
