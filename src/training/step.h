#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <array>
#include <optional>
#include <vector>

#include "model/model.h"
#include "ops/load_statistics.h"
#include "optim/adamw.h"
#include "training/global_batch.h"
#include "training/phase_timer.h"

namespace dsv3 {

/// What one optimizer step's gradients depend on beside the batch.
struct GradientOptions {
  at::Device device = at::Device(at::kCPU);
  bool mask_documents = false;
  Recompute recompute = Recompute::kNone;
  double balance_alpha = 0;  // of the sequence-wise balance loss
  double mtp_weight = 0;     // λ, scheduled
};

/// Sums of one step over its micro-batches, on the device; nothing has been waited for.
struct StepSums {
  at::Tensor scalars;  // [3 + 2·depths] FP64: loss, right guesses, balance loss, then loss and
                       // right guesses by depth
  ops::Load load;      // tokens per expert; its tensors are undefined without MoE layers
};

/// Forward and backward of every micro-batch: the gradients of
///   Σ loss / valid + Σ_depth λ/D · loss_depth / valid_depth + α/sequences · balance
/// are added to the parameters' buckets. All divisors are the global batch's, so the sum does not
/// depend on how the batch is split (NUMERICS traps 7, 16, 20). `timer` (may be null) is told where
/// forward and backward begin.
StepSums accumulate_gradients(const Model& model, const GlobalBatch& batch,
                              const GradientOptions& options, PhaseTimer* timer = nullptr);

/// 1 / count; 0 for a batch without a valid token (or sequence), which weighs nothing.
double one_over(int64_t count);

/// The numbers of one step that leave the device, in one small copy. docs/metrics.md has the
/// formulas.
struct StepNumbers {
  using Layer = std::array<double, kernels::kNumLoadStatistics>;

  double loss = 0, accuracy = 0, grad_norm = 0;
  int skip = 0;                              // why the step changed nothing (GradientNorm::skip)
  double update_to_weight = 0;               // NaN when nothing was updated
  std::vector<double> mtp_losses = {};       // by depth
  std::vector<double> mtp_acceptances = {};  // by depth
  double balance_loss = 0;                   // per sequence, mean over MoE layers; NaN without
  std::vector<Layer> layers = {};  // by MoE layer; kernels::LoadStatistic names the columns
  std::vector<std::vector<int64_t>> loads = {};  // [num_moe_layers][E], only when asked for
  PhaseSeconds seconds{};                        // zeros without a timer
};

/// What a step reports besides its sums.
struct StepReport {
  std::vector<at::Tensor> biases;  // of the router, by MoE layer; undefined where there is none
  bool with_loads = false;         // the tokens of every expert leave too
  std::optional<PhaseTimer> timer;
};

/// A copy of a step's numbers under way from the device; read it when the next step is queued.
class PendingNumbers {
 public:
  PendingNumbers(const StepSums& sums, const GradientNorm& norm, const GlobalBatch& batch,
                 StepReport report = {});
  /// Waits for this step (not for later ones) and returns its numbers. To be called once.
  StepNumbers wait();

 private:
  at::Tensor host_;  // pinned on CUDA
  std::optional<c10::Event> copied_;
  std::optional<PhaseTimer> timer_;
  int64_t valid_ = 0, sequences_ = 0, moe_layers_ = 0, num_experts_ = 0;
  bool with_loads_ = false;
  std::vector<int64_t> mtp_valid_;
};

}  // namespace dsv3
