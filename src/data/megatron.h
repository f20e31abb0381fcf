#pragma once

#include <filesystem>
#include <string>

#include "base/file.h"
#include "data/documents.h"

namespace dsv3 {

/// A pair PREFIX.bin, PREFIX.idx as Megatron-LM's IndexedDataset writes it (MMIDIDX, version 1),
/// mapped into memory. A document is the sequences between two entries of the document index.
/// Opening checks every count, length, pointer and document entry against the sizes of the two
/// files. Throws IoError naming the file and what is wrong.
class MegatronDocuments final : public Documents {
 public:
  /// `end_token`: the tokenizer's end-of-document id; where the first and the last document end
  /// with it, have_end_tokens() is true (Megatron's --append-eod).
  MegatronDocuments(const std::filesystem::path& prefix, int32_t end_token);
  /// PREFIX, PREFIX.bin or PREFIX.idx → PREFIX when both files of the pair exist, else empty.
  static std::filesystem::path find_prefix(const std::filesystem::path& path);

  const std::string& name() const override { return name_; }
  int64_t num_documents() const override { return num_documents_; }
  int64_t num_tokens() const override { return num_tokens_; }
  int64_t length(int64_t document) const override;
  /// Ids of 64-bit and float files that are no whole number in int32 read as -1.
  void read(int64_t document, int64_t offset, int64_t count, int32_t* out) const override;
  bool have_end_tokens() const override { return have_end_tokens_; }

  int64_t num_sequences() const { return num_sequences_; }
  /// Megatron's name of the element type, for example "uint16".
  const char* dtype_name() const;

 private:
  [[noreturn]] void broken(const std::string& what) const;
  void check_index();
  int64_t sequence_length(int64_t sequence) const;
  int64_t sequence_pointer(int64_t sequence) const;
  int64_t first_sequence(int64_t document) const;

  MappedFile index_, data_;
  std::string name_;
  int code_ = 0;
  int64_t token_size_ = 0, num_sequences_ = 0, num_documents_ = 0, num_tokens_ = 0;
  const std::byte* lengths_ = nullptr;    // int32 [num_sequences]
  const std::byte* pointers_ = nullptr;   // int64 [num_sequences], bytes into .bin
  const std::byte* documents_ = nullptr;  // int64 [num_documents + 1], into sequences
  std::vector<int64_t> starts_;           // [num_sequences + 1] tokens before each sequence
  bool have_end_tokens_ = false;
};

}  // namespace dsv3
