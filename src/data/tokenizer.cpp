#include "data/tokenizer.h"

#include <charconv>

#include "base/error.h"
#include "data/hash.h"

namespace dsv3 {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

struct Utf8Prefix {
  size_t length = 0;      // bytes that belong together
  bool complete = false;  // a whole character; else unfinished (more may come) or invalid
  bool invalid = false;
};

/// What the first bytes of `text` (not empty) are, by the table of well-formed sequences of the
/// Unicode standard (§3.9, table 3-7).
Utf8Prefix utf8_prefix(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {1, true, false};
  size_t length = 0;
  uint8_t low = 0x80, high = 0xBF;  // allowed second byte
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {1, false, true};
  }
  for (size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {i, false, false};
    if (byte(i) < low || byte(i) > high) return {i, false, true};
    low = 0x80, high = 0xBF;
  }
  return {length, true, false};
}

}  // namespace

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> ids;
  encode(text, ids);
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string text;
  for (const int32_t id : ids) text += bytes_of(id);
  return text;
}

ByteTokenizer::ByteTokenizer()
    : specials_{.end_of_document = 256,
                .pad = 257,
                .bos = 258,
                .fim_prefix = 259,
                .fim_suffix = 260,
                .fim_middle = 261} {
  for (int byte = 0; byte < 256; ++byte) bytes_ += static_cast<char>(byte);
}

uint64_t ByteTokenizer::checksum() const {
  return hash_bytes("bytes:1", 0);
}

void ByteTokenizer::encode(std::string_view text, std::vector<int32_t>& ids) const {
  ids.reserve(ids.size() + text.size());
  for (const char c : text) ids.push_back(static_cast<uint8_t>(c));
}

std::string_view ByteTokenizer::bytes_of(int32_t id) const {
  require(id >= 0 && id < vocab_size(), "token id {} is outside the tokenizer's 0..{}", id,
          vocab_size() - 1);
  return id < 256 ? std::string_view(bytes_).substr(static_cast<size_t>(id), 1)
                  : std::string_view();
}

IdTokenizer::IdTokenizer(const std::string& spec) : name_(spec) {
  constexpr int64_t kMost = 16777216;  // as model.vocab_size
  std::string_view rest = std::string_view(spec).substr(std::string_view("ids:").size());
  const auto number = [&rest](int64_t& value) {
    const auto [stop, error] = std::from_chars(rest.data(), rest.data() + rest.size(), value);
    rest.remove_prefix(static_cast<size_t>(stop - rest.data()));
    return error == std::errc();
  };
  bool good = number(vocab_size_) && vocab_size_ > 0 && vocab_size_ <= kMost;
  int64_t end = vocab_size_ - 1;
  if (good && rest.starts_with(':')) {
    rest.remove_prefix(1);
    good = number(end) && end >= 0 && end < vocab_size_;
  }
  require(good && rest.empty(),
          "tokenizer: '{}', but ids are given as ids:V or ids:V:EOD, V ids (1 to {}) of which EOD "
          "ends documents, e.g. ids:50257:50256",
          spec, kMost);
  specials_.end_of_document = specials_.pad = static_cast<int32_t>(end);
}

uint64_t IdTokenizer::checksum() const {
  return hash_bytes(name_, 0);
}

void IdTokenizer::encode(std::string_view text, std::vector<int32_t>&) const {
  require(text.empty(), "tokenizer: '{}' has ids only and cannot encode text", name_);
}

std::string_view IdTokenizer::bytes_of(int32_t id) const {
  require(id >= 0 && id < vocab_size_, "token id {} is outside the tokenizer's 0..{}", id,
          vocab_size_ - 1);
  return {};
}

std::unique_ptr<Tokenizer> make_tokenizer(const std::string& spec) {
  if (spec == "bytes") return std::make_unique<ByteTokenizer>();
  if (spec.starts_with("ids:")) return std::make_unique<IdTokenizer>(spec);
  invalid(
      "tokenizer: '{}' is not known; there are bytes, and ids:V[:EOD] for token ids that another "
      "program made (a Hugging Face tokenizer.json is not supported yet)",
      spec);
}

std::string StreamDecoder::push(int32_t id) {
  held_ += tokenizer_.bytes_of(id);
  std::string text;
  size_t at = 0;
  while (at < held_.size()) {
    const auto rest = std::string_view(held_).substr(at);
    const Utf8Prefix prefix = utf8_prefix(rest);
    if (!prefix.complete && !prefix.invalid) break;
    text += prefix.complete ? rest.substr(0, prefix.length) : kReplacement;
    at += prefix.length;
  }
  held_.erase(0, at);
  return text;
}

std::string StreamDecoder::finish() {
  const bool unfinished = !held_.empty();
  held_.clear();
  return std::string(unfinished ? kReplacement : std::string_view());
}

}  // namespace dsv3
