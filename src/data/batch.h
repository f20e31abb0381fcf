#pragma once

#include <cstdint>
#include <vector>

namespace dsv3 {

inline constexpr int32_t kIgnoreLabelId = -100;

/// B packed sequences of S tokens on the host, row by row.
struct Batch {
  int64_t num_sequences = 0;       // B
  int64_t sequence_length = 0;     // S
  std::vector<int32_t> tokens;     // [B·S]
  std::vector<int32_t> labels;     // [B·S] the next token, or kIgnoreLabelId
  std::vector<int32_t> positions;  // [B·S] restart at each document when masking across documents
  std::vector<int32_t> documents;  // [B·S] index of the document within its sequence
};

}  // namespace dsv3
