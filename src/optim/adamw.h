#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
#include <vector>

#include "base/dtype.h"
#include "nn/companion.h"
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

/// What a step is judged by beside its gradients.
struct StepGuard {
  at::Tensor losses = {};  // [n] FP64 on the device, of the global batch: one that is not finite
                           // skips the step; undefined: none
  double loss_scale = 1;   // losses[0] · loss_scale is the loss per token …
  double loss_limit = std::numeric_limits<double>::infinity();  // … that may not exceed this
};

/// What is decided of one step, on the device.
struct GradientNorm {
  at::Tensor norm;  // scalar FP32: over all buckets, before clipping
  at::Tensor skip;  // scalar int32: 0, or why the step changes nothing: kernels::kSkipNotFinite,
                    // kernels::kSkipSpike
  at::Tensor moved = {};  // [2] FP64, filled by the update: Σ (w after - w before)² and
                          // Σ (w before)² over all trained parameters; zeros when skipped
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
  /// norm that is not finite skips the update: weights, moments and the count of updates stay.
  /// The same as apply() after decide().
  GradientNorm step(double learning_rate, const StepGuard& guard = {});

  /// The first half of a step: the norm of the gradients, and whether it is taken.
  GradientNorm decide(const StepGuard& guard);
  /// The second half: the update, unless skipped, and zero gradients. Fills norm.moved.
  void apply(double learning_rate, GradientNorm& norm);

  /// Takes the buckets' values as the master weights and as the running mean: to be called after
  /// weights were loaded or filled.
  void reset_masters();

  /// One for each bucket: the FP32 masters where there are some, else the bucket's values.
  std::vector<at::Tensor> weights() const;

  /// Steps that were not skipped: those that the bias corrections count. Waits for the device.
  int64_t steps_done() const;

  /// The state for a checkpoint: "exp_avg", "exp_avg_sq" and, where there are such, "master" and
  /// "running_mean".
  /// The tensors are the optimizer's own: filling them, with restore_steps(), continues a saved
  /// run.
  std::vector<Companion> state() const;
  /// Steps behind the loaded state: all of them, which random rounding depends on, and those that
  /// were not skipped, which enter the correction of the moments' bias.
  void restore_steps(int64_t begun, int64_t done);

  /// The running mean of bucket `index`'s weights, [numel] FP32, updated by step() in the same pass
  /// (m = decay · m + (1 - decay) · w); undefined without ema_decay.
  const at::Tensor& ema(size_t index) const { return states_[index].ema; }

 private:
  struct State {
    at::Tensor master;      // [numel] FP32; undefined when the bucket is FP32
    at::Tensor exp_avg;     // [numel]
    at::Tensor exp_avg_sq;  // [numel]
    at::Tensor ema;         // [numel] FP32; undefined without ema_decay
    int64_t first_index;    // of its element 0 among all buckets' elements: for random rounding
  };

  GradientNorm gradient_norm();
  /// Leaves the bucket's parts of how far it moved in `moved`.
  void update(const Bucket& bucket, const State& state, double learning_rate,
              const GradientNorm& norm, const at::Tensor& moved);

  std::vector<Bucket>& buckets_;
  AdamWOptions options_;
  std::vector<State> states_;  // one for each bucket
  at::Tensor partials_;        // scratch of the norm
  at::Tensor sums_;            // [buckets] FP64
  at::Tensor clip_factor_;     // [1] FP32
  at::Tensor moved_;           // [parts, 2] FP64: how far the weights moved, bucket by bucket
  at::Tensor updates_;         // [1] int64: steps not skipped; counted where that is decided
  at::Tensor corrections_;     // [2] FP32
  int64_t steps_begun_ = 0;    // skipped ones included
};

}  // namespace dsv3
