#pragma once

#include <cstdint>
#include <vector>

namespace dsv3 {

inline constexpr int32_t kIgnoreLabelId = -100;

/// Which sample of which source a sequence is; Loader::describe() tells its documents.
struct SampleOrigin {
  int32_t source = -1;  // of the loader's sources; -1: padding only
  int64_t index = 0;    // sample of that source, counted over epochs
};

/// B packed sequences of S tokens on the host, row by row.
struct Batch {
  int64_t num_sequences = 0;       // B
  int64_t sequence_length = 0;     // S
  std::vector<int32_t> tokens;     // [B·S]
  std::vector<int32_t> labels;     // [B·S] the next token, or kIgnoreLabelId
  std::vector<int32_t> positions;  // [B·S] restart at each document when masking across documents
  std::vector<int32_t> documents;  // [B·S] index of the document within its sequence
  std::vector<SampleOrigin> origins = {};  // [B]; empty: not known
};

}  // namespace dsv3
