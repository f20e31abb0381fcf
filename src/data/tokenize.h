#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <vector>

#include "data/documents.h"
#include "data/text.h"
#include "data/tokenizer.h"

namespace dsv3 {

/// How far a tokenisation has come.
struct TokenizeProgress {
  int64_t num_files = 0;
  int64_t files_done = 0;
  int64_t input_bytes = 0;  // size of all files as they lie on disk
  int64_t input_read = 0;   // of them read so far
  int64_t text_bytes = 0;   // bytes of the documents written so far
  int64_t num_documents = 0;
  int64_t num_tokens = 0;
};
/// Called by the thread that called the tokenisation, at most about ten times a second, and once at
/// the end.
using TokenizeProgressCallback = std::function<void(const TokenizeProgress&)>;

/// Receives documents in order: files as given, documents as they lie in them.
using DocumentSink = std::function<void(const std::vector<int32_t>& tokens, int64_t text_bytes)>;

/// Tokenises the documents of text and JSONL files on `num_workers` threads (>= 1). The order in
/// which `sink` sees them does not depend on the threads; neither does which error is thrown: the
/// first in the order of the files. Empty documents are left out. Returns the final counts.
TokenizeProgress tokenize_files(const std::vector<std::filesystem::path>& files,
                                const TextOptions& options, const Tokenizer& tokenizer,
                                int64_t num_workers, const DocumentSink& sink,
                                const TokenizeProgressCallback& progress = {});

/// tokenize_files() into a shard at `out` (data/shard.h), which appears whole or not at all.
TokenizeProgress tokenize_to_shard(const std::vector<std::filesystem::path>& files,
                                   const TextOptions& options, const Tokenizer& tokenizer,
                                   int64_t num_workers, const std::filesystem::path& out,
                                   const TokenizeProgressCallback& progress = {});

}  // namespace dsv3
