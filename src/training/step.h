#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <optional>
#include <vector>

#include "model/model.h"
#include "optim/adamw.h"
#include "training/global_batch.h"

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
  at::Tensor loads;    // [num_moe_layers, E] int64: tokens per expert; undefined without MoE layers
};

/// Forward and backward of every micro-batch: the gradients of
///   Σ loss / valid + Σ_depth λ/D · loss_depth / valid_depth + α/sequences · balance
/// are added to the parameters' buckets. All divisors are the global batch's, so the sum does not
/// depend on how the batch is split (NUMERICS traps 7, 16, 20).
StepSums accumulate_gradients(const Model& model, const GlobalBatch& batch,
                              const GradientOptions& options);

/// 1 / count; 0 for a batch without a valid token (or sequence), which weighs nothing.
double one_over(int64_t count);

/// The numbers of one step that leave the device, in one small copy.
struct StepNumbers {
  double loss = 0, accuracy = 0, grad_norm = 0;
  int skip = 0;                             // why the step changed nothing (GradientNorm::skip)
  double mtp_loss = 0, mtp_acceptance = 0;  // NaN without MTP; the loss is the mean over depths
  double balance_loss = 0;                  // per sequence, mean over MoE layers; NaN without
  double max_violation = 0, load_imbalance = 0;  // NaN without MoE layers
};

/// A copy of a step's numbers under way from the device; read it when the next step is queued.
class PendingNumbers {
 public:
  PendingNumbers(const StepSums& sums, const GradientNorm& norm, const GlobalBatch& batch);
  /// Waits for this step (not for later ones) and returns its numbers. To be called once.
  StepNumbers wait();

 private:
  at::Tensor host_;  // pinned on CUDA
  std::optional<c10::Event> copied_;
  int64_t valid_ = 0, sequences_ = 0, moe_layers_ = 0;
  std::vector<int64_t> mtp_valid_;
};

}  // namespace dsv3
