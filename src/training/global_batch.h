#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "data/batch.h"
#include "model/model.h"

namespace dsv3 {

/// The sequences of one optimizer step, on the host, with the counts that its losses are divided
/// by. All of it is fetched before the first forward, so that every micro-batch knows the whole
/// step's counts.
struct GlobalBatch {
  std::vector<Batch> micro_batches;
  int64_t sequences = 0;           // without those that are all padding
  int64_t tokens = 0;              // input positions
  int64_t valid = 0;               // labels that count
  std::vector<int64_t> mtp_valid;  // the same for each MTP depth
};

/// Counts what `micro_batches` hold. mask_documents: MTP labels stop at the ends of documents
/// (NUMERICS trap 15).
GlobalBatch make_global_batch(std::vector<Batch> micro_batches, int64_t mtp_depths,
                              bool mask_documents);

/// The micro-batch as tensors on `device`: one copy, from pinned memory and without waiting on
/// CUDA. `documents` stays undefined unless mask_documents, `valid` unless there is padding.
TokenBatch to_device(const Batch& batch, const at::Device& device, bool mask_documents);

}  // namespace dsv3
