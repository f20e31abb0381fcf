#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dsv3 {

/// Tokenised documents in a fixed order: a shard, a Megatron pair, memory, or several of them.
/// Immutable and thread safe.
class Documents {
 public:
  virtual ~Documents() = default;

  /// What errors call it, for example the file.
  virtual const std::string& name() const = 0;
  virtual int64_t num_documents() const = 0;
  /// Tokens of all documents.
  virtual int64_t num_tokens() const = 0;
  /// Tokens of one document; 0 <= document < num_documents().
  virtual int64_t length(int64_t document) const = 0;
  /// Copies tokens offset … offset+count-1 of a document to `out`. The range must lie within it.
  /// Ids are as stored: a damaged file may hold ids outside the vocabulary.
  virtual void read(int64_t document, int64_t offset, int64_t count, int32_t* out) const = 0;
  /// Whether the documents were written with their end-of-document token.
  virtual bool have_end_tokens() const { return false; }

  /// All tokens of one document.
  std::vector<int32_t> tokens(int64_t document) const;
};

/// Documents held in memory.
class MemoryDocuments final : public Documents {
 public:
  explicit MemoryDocuments(std::string name) : name_(std::move(name)) {}
  void add(const std::vector<int32_t>& tokens);

  const std::string& name() const override { return name_; }
  int64_t num_documents() const override { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t num_tokens() const override { return offsets_.back(); }
  int64_t length(int64_t document) const override;
  void read(int64_t document, int64_t offset, int64_t count, int32_t* out) const override;

 private:
  std::string name_;
  std::vector<int32_t> tokens_;
  std::vector<int64_t> offsets_ = {0};
};

/// Several documents lists one after the other.
class ConcatenatedDocuments final : public Documents {
 public:
  /// At least one part; all with or all without end tokens, else std::invalid_argument.
  ConcatenatedDocuments(std::string name, std::vector<std::shared_ptr<const Documents>> parts);

  const std::string& name() const override { return name_; }
  int64_t num_documents() const override { return first_.back(); }
  int64_t num_tokens() const override { return num_tokens_; }
  int64_t length(int64_t document) const override;
  void read(int64_t document, int64_t offset, int64_t count, int32_t* out) const override;
  bool have_end_tokens() const override { return parts_.front()->have_end_tokens(); }

 private:
  size_t part_of(int64_t document) const;

  std::string name_;
  std::vector<std::shared_ptr<const Documents>> parts_;
  std::vector<int64_t> first_;  // [parts + 1] index of each part's first document
  int64_t num_tokens_ = 0;
};

}  // namespace dsv3
