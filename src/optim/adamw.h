#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "base/dtype.h"
#include "nn/parameter.h"

namespace dsv3 {

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;         // of the buckets' decayed range; 0 for the rest
  double clip = 1.0;                 // largest global gradient norm; 0 = no clipping
  bool master_weights = true;        // FP32 copies of BF16 buckets; FP32 buckets need none
  DType moment_dtype = DType::kF32;  // kF32 or kBF16
  bool stochastic_rounding = false;  // of BF16 weights without masters and of BF16 moments
  uint64_t seed = 0;                 // of that rounding
  double ema_decay = 0;              // of an FP32 running mean of the weights; 0 = none is kept
};

/// What one step leaves on the device.
struct GradientNorm {
  at::Tensor norm;        // scalar FP32: over all buckets, before clipping
  at::Tensor not_finite;  // scalar int32: 1 when the norm was NaN or infinite; the step then
                          // changed nothing
  at::Tensor moved;  // [2] FP64: Σ (w after - w before)² and Σ (w before)² over all trained
                     // parameters; zeros when the step changed nothing
};

/// AdamW over a parameter set's flat buckets (technical report §4.2; the formula:
/// kernels/optimizer.h). Owns the moments and, for BF16 weights, the FP32 master weights, laid out
/// like the buckets.
class AdamW {
 public:
  /// Keeps a reference to `buckets`, which must be allocated with gradients, and takes their values
  /// as masters.
  AdamW(std::vector<Bucket>& buckets, const AdamWOptions& options);

  /// One step from the gradients in the buckets, which are zero afterwards. The gradient norm
  /// counts each parameter once, clipping happens on the device; nothing waits for the device. A
  /// norm that is not finite skips the update.
  GradientNorm step(double learning_rate);

  /// Takes the buckets' values as the master weights and as the running mean: to be called after
  /// weights were loaded or filled.
  void reset_masters();

  /// The running mean of bucket `index`'s weights, [numel] FP32, updated by step() in the same pass
  /// (m = decay · m + (1 - decay) · w); undefined without ema_decay.
  const at::Tensor& ema(size_t index) const { return states_[index].ema; }

  int64_t steps_done() const { return steps_done_; }

 private:
  struct State {
    at::Tensor master;      // [numel] FP32; undefined when the bucket is FP32
    at::Tensor exp_avg;     // [numel]
    at::Tensor exp_avg_sq;  // [numel]
    at::Tensor ema;         // [numel] FP32; undefined without ema_decay
    int64_t first_index;    // of its element 0 among all buckets' elements: for random rounding
  };

  GradientNorm gradient_norm();
  /// Leaves the bucket's parts of how far it moved at `partials`.
  void update(const Bucket& bucket, const State& state, double learning_rate,
              const GradientNorm& norm, double* partials);

  std::vector<Bucket>& buckets_;
  AdamWOptions options_;
  std::vector<State> states_;  // one for each bucket
  at::Tensor partials_;        // scratch of the norm
  at::Tensor sums_;            // [buckets] FP64
  at::Tensor clip_factor_;     // [1] FP32
  at::Tensor moved_;           // [parts, 2] FP64: how far the weights moved, bucket by bucket
  int64_t steps_done_ = 0;
};

}  // namespace dsv3
