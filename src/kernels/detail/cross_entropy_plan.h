#pragma once

#include <cstdint>

namespace dsv3::kernels::detail {

/// How a cluster of thread blocks keeps rows of logits on chip: each block holds a slice of the
/// row, in `stages` buffers that are loaded, worked on and stored at the same time.
struct CrossEntropyPlan {
  int blocks = 0;           // of a cluster; 0: no plan fits, the row is read twice
  int64_t slice = 0;        // elements of a block; the last block's may be fewer
  int stages = 0;           // rows whose slices are on chip together
  int64_t stage_bytes = 0;  // from one stage to the next

  static constexpr int64_t kSharedBytes = 224 * 1024;  // of sm_90's 227 KB, asked for whole
};

/// A pure function of the row. Rows under 48 KB have no plan: a few hundred of them stand in the
/// second cache, which serves the second read. Slices of up to 36 KB leave room for 6 stages or
/// more; the widest cluster (8, the portable most) takes up to 44 KB with 5.
inline CrossEntropyPlan cross_entropy_plan(int64_t vocab, int64_t element_size) {
  constexpr int64_t kWord = 16;
  const int64_t row_bytes = vocab * element_size;
  CrossEntropyPlan plan;
  if (row_bytes < 48 * 1024 || row_bytes % kWord != 0) return plan;
  for (const int blocks : {2, 4, 8}) {
    const int64_t words = (row_bytes / kWord + blocks - 1) / blocks;
    const int64_t most = (blocks == 8 ? 44 : 36) * 1024;
    if (words * kWord > most) continue;
    plan.blocks = blocks;
    plan.slice = words * kWord / element_size;
    plan.stage_bytes = (words * kWord + 127) / 128 * 128;
    const int64_t fit = CrossEntropyPlan::kSharedBytes / plan.stage_bytes;
    plan.stages = static_cast<int>(fit < 8 ? fit : 8);
    return plan;
  }
  return plan;
}

}  // namespace dsv3::kernels::detail
