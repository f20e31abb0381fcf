#pragma once

#include <cstdint>

namespace dsv3::kernels::detail {

/// How a cluster of thread blocks keeps rows of logits on chip. Each block holds a slice of the
/// row, in chunks that its warps take in turn; a warp passes its chunks of one row after the other
/// through a ring of stages, which are loaded, worked on and stored at the same time.
struct CrossEntropyPlan {
  int blocks = 0;     // of a cluster; 0: no plan fits, the row is read twice
  int64_t slice = 0;  // elements of a block; the last block's may be fewer
  int stages = 0;     // chunks that a warp holds

  static constexpr int kWarps = 16, kChunkBytes = 1024;
  /// Chunks of the next row that a warp reads before it needs the other warps' part of a row.
  static constexpr int kLag = 1;
  /// A warp holds a row, the lag, a chunk that is stored, and two at least that are loaded.
  static constexpr int most_chunks(int stages) { return stages - kLag - 3; }
  static constexpr int kSlots = 2;  // rows whose messages are on their way or being read

  static constexpr int64_t kMostSharedBytes = 227 * 1024;  // of a block on sm_90
  static constexpr int64_t message_bytes(int blocks) { return int64_t{blocks} * kWarps * 16; }
  /// The ring, the messages of two rows, and a barrier for each stage and each row's messages.
  static constexpr int64_t shared_bytes(int blocks, int stages) {
    return int64_t{stages} * kWarps * (kChunkBytes + 8) + kSlots * (message_bytes(blocks) + 8);
  }
};

/// A pure function of the row. Rows under 48 KB have no plan: a few hundred of them stand in the
/// second cache, which serves the second read.
inline CrossEntropyPlan cross_entropy_plan(int64_t vocab, int64_t element_size) {
  using Plan = CrossEntropyPlan;
  constexpr int64_t kWord = 16;
  const int64_t row_bytes = vocab * element_size;
  Plan plan;
  if (row_bytes < 48 * 1024 || row_bytes % kWord != 0) return plan;
  for (const int blocks : {1, 2, 4, 8}) {
    const int64_t slice = (row_bytes / kWord + blocks - 1) / blocks * kWord;
    const int64_t round = Plan::kWarps * Plan::kChunkBytes;
    int stages = 0;
    while (Plan::shared_bytes(blocks, stages + 1) <= Plan::kMostSharedBytes) ++stages;
    if ((slice + round - 1) / round > Plan::most_chunks(stages)) continue;
    plan.blocks = blocks;
    plan.slice = slice / element_size;
    plan.stages = stages;
    return plan;
  }
  return plan;
}

}  // namespace dsv3::kernels::detail
