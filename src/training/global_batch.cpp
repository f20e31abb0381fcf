#include "training/global_batch.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "base/error.h"
#include "ops/autograd.h"
#include "ops/cross_entropy.h"

namespace dsv3 {

TokenBatch to_device(const Batch& batch, const at::Device& device, bool mask_documents) {
  const ops::NoRecord guard;
  const int64_t count = batch.num_sequences * batch.sequence_length;
  const bool padded = std::ranges::find(batch.documents, kPaddingDocument) != batch.documents.end();
  const int64_t rows = mask_documents || padded ? 4 : 3;
  at::Tensor host =
      at::empty({rows, count}, at::TensorOptions(at::kInt).pinned_memory(device.is_cuda()));
  const std::vector<int32_t>* sources[] = {&batch.tokens, &batch.labels, &batch.positions,
                                           &batch.documents};
  for (int64_t row = 0; row < rows; ++row) {
    const auto& source = *sources[row];
    DSV3_CHECK(static_cast<int64_t>(source.size()) == count,
               "row {} of a batch holds {} of {} numbers", row, source.size(), count);
    std::ranges::copy(source, host.data_ptr<int32_t>() + row * count);
  }
  const at::Tensor all = device.is_cuda() ? host.to(device, at::kInt, /*non_blocking=*/true) : host;
  return {.num_sequences = batch.num_sequences,
          .sequence_length = batch.sequence_length,
          .tokens = all.select(0, 0),
          .labels = all.select(0, 1),
          .positions = all.select(0, 2),
          .documents = mask_documents ? all.select(0, 3) : at::Tensor(),
          .valid = padded ? all.select(0, 3).ne(kPaddingDocument) : at::Tensor()};
}

namespace {

/// Padding stands at the end of a sequence, so the first place tells whether it holds anything.
int64_t sequences_with_tokens(const Batch& batch) {
  int64_t count = 0;
  for (int64_t row = 0; row < batch.num_sequences; ++row) {
    const auto first = static_cast<size_t>(row * batch.sequence_length);
    if (batch.documents[first] != kPaddingDocument) ++count;
  }
  return count;
}

}  // namespace

GlobalBatch make_global_batch(std::vector<Batch> micro_batches, int64_t mtp_depths,
                              bool mask_documents) {
  GlobalBatch global;
  global.micro_batches = std::move(micro_batches);
  global.mtp_valid.assign(static_cast<size_t>(mtp_depths), 0);
  for (const auto& batch : global.micro_batches) {
    global.sequences += sequences_with_tokens(batch);
    global.tokens += batch.num_sequences * batch.sequence_length;
    const auto is_valid = [](int32_t label) { return label != kIgnoreLabelId; };
    global.valid += std::ranges::count_if(batch.labels, is_valid);
    if (mtp_depths == 0) continue;
    const TokenBatch host = to_device(batch, at::Device(at::kCPU), mask_documents);
    for (int64_t depth = 0; depth < mtp_depths; ++depth) {
      const at::Tensor labels = Model::mtp_labels(host, depth);
      const auto* begin = labels.data_ptr<int32_t>();
      global.mtp_valid[static_cast<size_t>(depth)] +=
          std::count_if(begin, begin + labels.numel(), is_valid);
    }
  }
  return global;
}

}  // namespace dsv3
