#include "model/model.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <c10/core/GradMode.h>

#include "base/error.h"
#include "moe/balance.h"
#include "ops/autograd.h"
#include "ops/checkpoint.h"
#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/linear.h"
#include "ops/range.h"
#include "ops/rms_norm.h"

namespace dsv3 {
namespace {

/// x moved `shift` positions to the left within each sequence; the tail is filled with `fill`.
at::Tensor shift_left(const at::Tensor& x, int64_t num_sequences, int64_t shift, int32_t fill) {
  const at::Tensor rows = x.view({num_sequences, -1});
  const int64_t length = rows.size(1);
  at::Tensor shifted = at::full_like(rows, fill);
  if (shift < length) {
    shifted.narrow(1, 0, length - shift).copy_(rows.narrow(1, shift, length - shift));
  }
  return shifted.view({-1});
}

/// What a forward gathers beside its activations.
void add_statistics(const MoeStatistics& statistics, std::vector<at::Tensor>& counts,
                    at::Tensor& balance) {
  if (statistics.counts.defined()) counts.push_back(statistics.counts);
  if (statistics.balance_loss.defined()) {
    balance = balance.defined() ? balance + statistics.balance_loss : statistics.balance_loss;
  }
}

at::Tensor attend(const Block& block, const ops::Remakable& x, const ForwardContext& context) {
  const ops::Range range("mla");
  return block.mla.forward(x, context);
}

at::Tensor feed_forward(const Block& block, const ops::Remakable& x, const ForwardContext& context,
                        MoeStatistics* statistics) {
  const ops::Range range(block.is_moe ? "moe" : "mlp");
  return block.is_moe ? block.moe.forward(x, context, statistics) : block.mlp.forward(x, context);
}

}  // namespace

void Model::show(int64_t layer, const char* name, const at::Tensor& activation) const {
  if (!probe_ || ops::recomputing()) return;
  const ops::NoRecord guard;
  probe_(layer, name, activation.detach());
}

at::Tensor Model::mtp_labels(const TokenBatch& batch, int64_t depth) {
  const ops::NoRecord guard;
  const int64_t shift = depth + 1;
  at::Tensor labels = shift_left(batch.labels, batch.num_sequences, shift, ops::kIgnoreLabel);
  if (!batch.documents.defined()) return labels;
  const at::Tensor later = shift_left(batch.documents, batch.num_sequences, shift, -1);
  return at::where(later.eq(batch.documents), labels, at::full_like(labels, ops::kIgnoreLabel));
}

at::Tensor Model::mtp_valid(const TokenBatch& batch, int64_t depth) {
  const ops::NoRecord guard;
  const int64_t shift = depth + 1;
  const at::Tensor valid =
      batch.valid.defined()
          ? batch.valid
          : at::ones({batch.tokens.size(0)}, batch.tokens.options().dtype(at::kBool));
  const at::Tensor shifted = shift_left(valid, batch.num_sequences, shift, 0);
  if (!batch.documents.defined()) return shifted;
  const at::Tensor later = shift_left(batch.documents, batch.num_sequences, shift, -1);
  return shifted.logical_and(later.eq(batch.documents));
}

ForwardContext Model::make_context(const TokenBatch& batch, Recompute recompute,
                                   LatentCache* cache) const {
  const int64_t tokens = batch.num_sequences * batch.sequence_length;
  require(batch.tokens.dim() == 1 && batch.tokens.size(0) == tokens,
          "[model] tokens: expected [{}] (= {} sequences × {}), got {} elements", tokens,
          batch.num_sequences, batch.sequence_length, batch.tokens.numel());
  const int64_t positions = cache != nullptr ? cache->capacity() : batch.sequence_length;
  if (!cos_sin_.defined() || cos_sin_.size(0) < positions) {
    cos_sin_ =
        rope_table(config_.rope, config_.mla.qk_rope_head_dim, positions).to(batch.tokens.device());
  }
  ForwardContext context;
  context.num_sequences = batch.num_sequences;
  context.sequence_length = batch.sequence_length;
  context.positions = batch.positions;
  context.documents = batch.documents;
  context.valid = batch.valid;
  context.cos_sin = cos_sin_;
  context.recompute = recompute;
  context.cache = cache;
  return context;
}

std::pair<at::Tensor, MoeStatistics> Model::run_block(const Block& block, const at::Tensor& x,
                                                      const ForwardContext& context) const {
  MoeStatistics statistics;
  const ops::Range range("layer", block.layer);
  const auto body = [this, &block](const at::Tensor& input, const ForwardContext& c,
                                   MoeStatistics* moe_statistics) {
    const ops::Remakable normed =
        ops::rms_norm(input, block.input_norm->weight, config_.rms_norm_eps);
    const at::Tensor attended = attend(block, c.keep_or_remake(normed), c);
    show(block.layer, "attention", attended);
    const auto [sum, normed_sum] =
        ops::add_rms_norm(attended, input, block.post_attention_norm->weight, config_.rms_norm_eps);
    const ops::Remakable y = c.keep_or_remake(normed_sum);
    const at::Tensor fed = feed_forward(block, y, c, moe_statistics);
    show(block.layer, block.is_moe ? "moe" : "mlp", fed);
    at::Tensor output = sum + fed;
    show(block.layer, "block", output);
    return output;
  };
  if (context.recompute != Recompute::kFull) {
    at::Tensor y = body(x, context, &statistics);
    return {y, statistics};
  }
  // Note: the closure outlives this call; it must not hold references to locals.
  ForwardContext inner = context;
  inner.recompute = Recompute::kNone;
  const auto counts = std::make_shared<at::Tensor>();
  const auto outputs = ops::checkpoint(
      [this, &block, inner, counts, body](const at::Tensor& input) -> std::vector<at::Tensor> {
        MoeStatistics found;
        at::Tensor y = body(input, inner, &found);
        if (found.counts.defined()) *counts = found.counts;
        return {y, found.balance_loss};
      },
      x);
  return {outputs[0], {*counts, outputs[1]}};
}

LossOutput Model::loss(const TokenBatch& batch, const LossScales& scales,
                       Recompute recompute) const {
  const ForwardContext context = make_context(batch, recompute, nullptr);
  LossOutput output;
  std::vector<at::Tensor> counts;
  at::Tensor balance;

  at::Tensor x = ops::embedding(batch.tokens, embedding_->weight);
  show(-1, "embedding", x);
  for (const auto& block : blocks_) {
    auto [y, statistics] = run_block(block, x, context);
    x = y;
    if (block.is_moe) add_statistics(statistics, counts, balance);
  }
  at::Tensor hidden = ops::rms_norm(x, final_norm_->weight, config_.rms_norm_eps).value;
  show(config_.num_layers, "final_norm", hidden);
  const ops::HeadLoss main =
      ops::head_cross_entropy(hidden, head_->weight, batch.labels, scales.main);
  output.objective = main.objective;
  output.loss_sum = main.loss_sum;
  output.correct = main.correct;

  at::Tensor previous = config_.mtp.input_after_final_norm ? hidden : x;
  const size_t depths = std::min(mtp_.size(), scales.mtp.size());
  for (size_t depth = 0; depth < depths; ++depth) {
    const MtpModule& module = mtp_[depth];
    const auto shift = static_cast<int64_t>(depth) + 1;
    const at::Tensor tokens = shift_left(batch.tokens, batch.num_sequences, shift, 0);
    // Note: embedding first, as in the released weights, the reverse of the report's print
    // (NUMERICS trap 13).
    const at::Tensor joined =
        at::cat({ops::rms_norm(ops::embedding(tokens, embedding_->weight),
                               module.embedding_norm->weight, config_.rms_norm_eps)
                     .value,
                 ops::rms_norm(previous, module.hidden_norm->weight, config_.rms_norm_eps).value},
                1);
    ForwardContext shifted = context;
    shifted.valid = mtp_valid(batch, static_cast<int64_t>(depth));
    auto [y, statistics] =
        run_block(module.block, ops::linear(joined, module.projection->weight), shifted);
    if (module.block.is_moe) add_statistics(statistics, counts, balance);
    hidden = ops::rms_norm(y, module.final_norm->weight, config_.rms_norm_eps).value;
    const ops::HeadLoss loss = ops::head_cross_entropy(
        hidden, head_->weight, mtp_labels(batch, static_cast<int64_t>(depth)), scales.mtp[depth]);
    output.objective = output.objective + loss.objective;
    output.mtp_loss_sums.push_back(loss.loss_sum);
    output.mtp_correct.push_back(loss.correct);
    previous = config_.mtp.input_after_final_norm ? hidden : y;
  }

  if (balance.defined()) {
    output.balance_sum = balance.detach();
    if (scales.balance.defined()) output.objective = output.objective + scales.balance * balance;
  }
  if (!counts.empty()) output.expert_counts = at::stack(counts);
  return output;
}

at::Tensor Model::logits(const TokenBatch& batch, LatentCache* cache) const {
  const c10::AutoGradMode no_gradients(false);
  const ForwardContext context = make_context(batch, Recompute::kNone, cache);
  at::Tensor x = ops::embedding(batch.tokens, embedding_->weight);
  for (const auto& block : blocks_) x = run_block(block, x, context).first;
  return ops::linear(ops::rms_norm(x, final_norm_->weight, config_.rms_norm_eps).value,
                     head_->weight);
}

void Model::update_router_biases(const at::Tensor& loads, double update_rate,
                                 const at::Tensor& skip) {
  for (size_t i = 0; i < router_biases_.size(); ++i) {
    if (router_biases_[i] == nullptr) continue;
    at::Tensor bias = router_biases_[i]->value();
    update_router_bias(bias, loads.select(0, static_cast<int64_t>(i)), update_rate, skip);
  }
}

std::vector<at::Tensor> Model::router_biases() const {
  std::vector<at::Tensor> biases;
  for (const auto* bias : router_biases_)
    biases.push_back(bias != nullptr ? bias->value() : at::Tensor());
  return biases;
}

LatentCache Model::make_cache(int64_t num_sequences, int64_t capacity) const {
  return {config_.num_layers, num_sequences, capacity,
          config_.mla.kv_lora_rank + config_.mla.qk_rope_head_dim,
          embedding_->value().options().requires_grad(false)};
}

}  // namespace dsv3
