#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace dsv3 {

/// Ids with a meaning of their own; they decode to no bytes. -1 where a tokenizer has none.
struct SpecialTokens {
  int32_t end_of_document = -1;  // also eos; stands before the first token of a stream as well
  int32_t pad = -1;              // fills the tail of the last sequence; never a label
  int32_t bos = -1;
  int32_t fim_prefix = -1;  // fill-in-the-middle markers (technical report §4.1)
  int32_t fim_suffix = -1;
  int32_t fim_middle = -1;
};

/// Turns bytes into ids and back. decode(encode(x)) == x for every byte string x. Thread safe.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  /// What `data.tokenizer` said; stored in shards.
  virtual const std::string& name() const = 0;
  /// Ids are 0 … vocab_size()-1, special and reserved ones included.
  virtual int64_t vocab_size() const = 0;
  virtual const SpecialTokens& specials() const = 0;
  /// Differs between tokenizers that give different ids to some text; stored in shards.
  virtual uint64_t checksum() const = 0;

  /// Appends the ids of `text` to `ids`; adds no special token.
  virtual void encode(std::string_view text, std::vector<int32_t>& ids) const = 0;
  /// Bytes of one id; empty for special and reserved ids. Throws std::invalid_argument outside
  /// 0 … vocab_size()-1.
  virtual std::string_view bytes_of(int32_t id) const = 0;

  std::vector<int32_t> encode(std::string_view text) const;
  std::string decode(std::span<const int32_t> ids) const;
};

/// Ids 0–255 are the bytes; 256 end of document, 257 pad, 258 bos, 259 / 260 / 261 FIM prefix /
/// suffix / middle; 262 and 263 are reserved, so that the vocabulary of 264 is a multiple of 8.
class ByteTokenizer final : public Tokenizer {
 public:
  ByteTokenizer();
  using Tokenizer::encode;
  const std::string& name() const override { return name_; }
  int64_t vocab_size() const override { return 264; }
  const SpecialTokens& specials() const override { return specials_; }
  uint64_t checksum() const override;
  void encode(std::string_view text, std::vector<int32_t>& ids) const override;
  std::string_view bytes_of(int32_t id) const override;

 private:
  std::string name_ = "bytes";
  SpecialTokens specials_;
  std::string bytes_;  // the 256 bytes in order, for bytes_of
};

/// Ids that another program made (a Megatron pair, say), taken as they are: "ids:V" or "ids:V:EOD",
/// with V ids of which EOD (default V - 1) ends documents and pads. They stand for no text:
/// encode() throws std::invalid_argument, bytes_of() is empty.
class IdTokenizer final : public Tokenizer {
 public:
  /// Throws std::invalid_argument when `spec` has another form or EOD is not one of the ids.
  explicit IdTokenizer(const std::string& spec);
  using Tokenizer::encode;
  const std::string& name() const override { return name_; }
  int64_t vocab_size() const override { return vocab_size_; }
  const SpecialTokens& specials() const override { return specials_; }
  uint64_t checksum() const override;
  void encode(std::string_view text, std::vector<int32_t>& ids) const override;
  std::string_view bytes_of(int32_t id) const override;

 private:
  std::string name_;
  int64_t vocab_size_ = 0;
  SpecialTokens specials_;
};

/// The tokenizer that `data.tokenizer` names: "bytes" or "ids:V[:EOD]". Throws
/// std::invalid_argument otherwise.
std::unique_ptr<Tokenizer> make_tokenizer(const std::string& spec);

/// Text of ids that arrive one by one, for printing while a model generates. Every string returned
/// is whole UTF-8: an unfinished character is held back, bytes that can never become one turn into
/// U+FFFD.
class StreamDecoder {
 public:
  /// `tokenizer` must outlive the decoder.
  explicit StreamDecoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  /// What can be printed once `id` has arrived; may be empty.
  std::string push(int32_t id);
  /// What is still held back, as U+FFFD; the decoder is then empty.
  std::string finish();

 private:
  const Tokenizer& tokenizer_;
  std::string held_;
};

}  // namespace dsv3
