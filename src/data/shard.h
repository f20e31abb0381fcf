#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/file.h"
#include "data/documents.h"
#include "data/tokenizer.h"

namespace dsv3 {

class StreamingHash;

/// What a token shard says about itself.
struct ShardInfo {
  int64_t num_documents = 0;
  int64_t num_tokens = 0;
  int64_t text_bytes = 0;       // bytes of text that the documents were made from
  int32_t bytes_per_token = 2;  // 2 or 4
  std::string tokenizer;        // Tokenizer::name()
  uint64_t tokenizer_checksum = 0;
  uint64_t content_checksum = 0;  // XXH3 of the file up to its footer
};

// A shard, all numbers little-endian:
//   header   16 bytes   "DSV3TOK\0", u32 version = 1, u32 bytes per token (2 or 4)
//   tokens   num_tokens × u16 or u32, zero bytes up to a multiple of 8
//   offsets  (num_documents + 1) × u64: document d is tokens offsets[d] … offsets[d+1]-1
//   footer   128 bytes  u64 num_documents, num_tokens, text_bytes, tokenizer checksum, content
//                       checksum (all before the footer); char tokenizer[72]; u64 footer checksum
//                       (XXH3 of the 112 bytes before); "DSV3END\0"
// The counts stand at the end so that a writer streams and needs no second pass.
// End-of-document tokens are not stored.

/// Writes a shard; nothing stands at `path` until finish().
class ShardWriter {
 public:
  ShardWriter(const std::filesystem::path& path, const Tokenizer& tokenizer);
  ~ShardWriter();
  /// Appends one document. Throws std::invalid_argument on an id outside the vocabulary.
  void add(const std::vector<int32_t>& tokens, int64_t text_bytes);
  ShardInfo finish();

 private:
  void write(const void* data, size_t size);

  AtomicFile file_;
  ShardInfo info_;
  int64_t vocab_size_;
  std::vector<uint64_t> offsets_ = {0};
  std::string pending_;
  std::unique_ptr<StreamingHash> hash_;
};

/// A shard mapped into memory. Opening checks header, footer and every offset against the file's
/// size, so that no read leaves the file; verify() reads all of it. Throws IoError with the file's
/// name and what is wrong.
class TokenShard final : public Documents {
 public:
  explicit TokenShard(const std::filesystem::path& path);
  /// Whether the file starts like a shard.
  static bool is_shard(const std::filesystem::path& path);

  /// Throws IoError when the content does not have the checksum that the footer states.
  void verify() const;
  /// Throws std::invalid_argument when the shard was written by another tokenizer.
  void require_tokenizer(const Tokenizer& tokenizer) const;
  const ShardInfo& info() const { return info_; }

  const std::string& name() const override { return name_; }
  int64_t num_documents() const override { return info_.num_documents; }
  int64_t num_tokens() const override { return info_.num_tokens; }
  int64_t length(int64_t document) const override;
  void read(int64_t document, int64_t offset, int64_t count, int32_t* out) const override;

 private:
  [[noreturn]] void broken(const std::string& what) const;
  void check_offsets() const;
  uint64_t offset_of(int64_t document) const;

  MappedFile file_;
  std::string name_;
  ShardInfo info_;
  const std::byte* tokens_ = nullptr;
  const std::byte* offsets_ = nullptr;
};

}  // namespace dsv3
