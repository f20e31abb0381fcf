#include "training/evaluate.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <numbers>

#include "base/error.h"
#include "training/global_batch.h"

namespace dsv3 {

Evaluation evaluate(const Model& model, Loader& loader, const EvaluationOptions& options) {
  const c10::AutoGradMode no_gradients(false);
  const auto start = std::chrono::steady_clock::now();
  std::vector<int64_t> id_bytes;
  for (int64_t id = 0; id < loader.tokenizer().vocab_size(); ++id)
    id_bytes.push_back(
        static_cast<int64_t>(loader.tokenizer().bytes_of(static_cast<int32_t>(id)).size()));

  Evaluation result;
  at::Tensor sums;  // [2] FP64 on the device: nats, right guesses
  const LossScales scales{
      .main = at::full({}, 1.0, at::TensorOptions(at::kFloat).device(options.device)),
      .mtp = {},
      .balance = {}};
  loader.rewind();
  int64_t num_batches = loader.num_batches(options.sequences_per_batch);
  if (options.num_batches > 0) num_batches = std::min(num_batches, options.num_batches);
  for (int64_t count = 0; count < num_batches; ++count) {
    if (options.stop_requested && options.stop_requested()) return {.complete = false};
    if (options.progress) options.progress(count, num_batches);
    const Batch batch = loader.next(options.sequences_per_batch);
    for (const int32_t label : batch.labels) {
      if (label == kIgnoreLabelId) continue;
      ++result.tokens;
      result.bytes += id_bytes[static_cast<size_t>(label)];
    }
    const auto output = model.loss(to_device(batch, options.device, options.mask_documents), scales,
                                   Recompute::kNone);
    const at::Tensor batch_sums =
        at::stack({output.loss_sum.to(at::kDouble), output.correct.to(at::kDouble)});
    sums = sums.defined() ? sums + batch_sums : batch_sums;
  }
  require(result.tokens > 0, "there is nothing to evaluate: the split holds no tokens");
  const at::Tensor host = sums.cpu();
  const double nats = host.data_ptr<double>()[0];
  const auto tokens = static_cast<double>(result.tokens);
  result.loss = nats / tokens;
  result.bits_per_byte = result.bytes > 0
                             ? nats / std::numbers::ln2 / static_cast<double>(result.bytes)
                             : std::numeric_limits<double>::quiet_NaN();
  result.accuracy = host.data_ptr<double>()[1] / tokens;
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace dsv3
