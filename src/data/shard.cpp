#include "data/shard.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <fstream>

#include "base/error.h"
#include "data/hash.h"

namespace dsv3 {
namespace {

static_assert(std::endian::native == std::endian::little, "shards are read in place");

constexpr char kMagic[8] = {'D', 'S', 'V', '3', 'T', 'O', 'K', '\0'};
constexpr char kEnd[8] = {'D', 'S', 'V', '3', 'E', 'N', 'D', '\0'};
constexpr uint32_t kVersion = 1;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t bytes_per_token;
};
static_assert(sizeof(Header) == 16);

struct Footer {
  uint64_t num_documents, num_tokens, text_bytes, tokenizer_checksum, content_checksum;
  char tokenizer[72];
  uint64_t checksum;  // of the fields above
  char end[8];
};
static_assert(sizeof(Footer) == 128);

uint64_t checksum_of(const Footer& footer) {
  return hash_bytes({reinterpret_cast<const char*>(&footer), offsetof(Footer, checksum)}, 0);
}

template <typename T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

}  // namespace

ShardWriter::ShardWriter(const std::filesystem::path& path, const Tokenizer& tokenizer)
    : file_(path), vocab_size_(tokenizer.vocab_size()), hash_(std::make_unique<StreamingHash>()) {
  require(tokenizer.name().size() < sizeof(Footer::tokenizer),
          "the tokenizer's name '{}' is longer than a shard can state", tokenizer.name());
  info_.bytes_per_token = vocab_size_ <= 65536 ? 2 : 4;
  info_.tokenizer = tokenizer.name();
  info_.tokenizer_checksum = tokenizer.checksum();
  Header header{{}, kVersion, static_cast<uint32_t>(info_.bytes_per_token)};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  write(&header, sizeof header);
}

ShardWriter::~ShardWriter() = default;

void ShardWriter::write(const void* data, size_t size) {
  hash_->update(data, size);
  file_.write(data, size);
}

void ShardWriter::add(const std::vector<int32_t>& tokens, int64_t text_bytes) {
  for (const int32_t id : tokens) {
    require(id >= 0 && id < vocab_size_, "token id {} is outside the tokenizer's 0..{}", id,
            vocab_size_ - 1);
    const auto wide = static_cast<uint32_t>(id);
    // Little-endian: the low bytes come first.
    pending_.append(reinterpret_cast<const char*>(&wide),
                    static_cast<size_t>(info_.bytes_per_token));
  }
  offsets_.push_back(offsets_.back() + tokens.size());
  info_.text_bytes += text_bytes;
  if (pending_.size() >= (size_t{1} << 20)) {
    write(pending_.data(), pending_.size());
    pending_.clear();
  }
}

ShardInfo ShardWriter::finish() {
  const auto used = offsets_.back() * static_cast<uint64_t>(info_.bytes_per_token);
  pending_.append((8 - used % 8) % 8, '\0');
  write(pending_.data(), pending_.size());
  write(offsets_.data(), offsets_.size() * sizeof(uint64_t));
  info_.num_documents = static_cast<int64_t>(offsets_.size()) - 1;
  info_.num_tokens = static_cast<int64_t>(offsets_.back());
  info_.content_checksum = hash_->digest();

  Footer footer{};
  footer.num_documents = static_cast<uint64_t>(info_.num_documents);
  footer.num_tokens = offsets_.back();
  footer.text_bytes = static_cast<uint64_t>(info_.text_bytes);
  footer.tokenizer_checksum = info_.tokenizer_checksum;
  footer.content_checksum = info_.content_checksum;
  std::memcpy(footer.tokenizer, info_.tokenizer.data(), info_.tokenizer.size());
  footer.checksum = checksum_of(footer);
  std::memcpy(footer.end, kEnd, sizeof kEnd);
  file_.write(&footer, sizeof footer);
  file_.commit();
  return info_;
}

bool TokenShard::is_shard(const std::filesystem::path& path) {
  // Note: what is read from a pipe is gone for the reader that comes after.
  if (!std::filesystem::is_regular_file(path)) return false;
  std::ifstream file(path, std::ios::binary);
  char magic[sizeof kMagic] = {};
  return file.read(magic, sizeof magic) && std::memcmp(magic, kMagic, sizeof kMagic) == 0;
}

void TokenShard::broken(const std::string& what) const {
  throw IoError(
      fmt::format("{}: not a whole token shard: {}; tokenise its text again", name_, what));
}

TokenShard::TokenShard(const std::filesystem::path& path) : file_(path), name_(path.string()) {
  const auto bytes = file_.bytes();
  const uint64_t size = bytes.size();
  if (size < sizeof(Header) + sizeof(uint64_t) + sizeof(Footer))
    broken(fmt::format("{} bytes are too few", size));
  const auto header = load<Header>(bytes.data());
  const auto footer = load<Footer>(bytes.data() + size - sizeof(Footer));
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) broken("it does not start like one");
  if (header.version != kVersion)
    broken(fmt::format("it has version {}, this program reads {}", header.version, kVersion));
  if (header.bytes_per_token != 2 && header.bytes_per_token != 4)
    broken(fmt::format("{} bytes per token, expected 2 or 4", header.bytes_per_token));
  if (std::memcmp(footer.end, kEnd, sizeof kEnd) != 0) broken("its end is missing");
  if (footer.checksum != checksum_of(footer)) broken("its footer is damaged");

  // Division instead of multiplication: counts of a hostile file must not overflow.
  const uint64_t content = size - sizeof(Header) - sizeof(Footer);
  if (footer.num_tokens > content / header.bytes_per_token)
    broken(fmt::format("{} tokens do not fit into its {} bytes", footer.num_tokens, size));
  const uint64_t token_bytes = (footer.num_tokens * header.bytes_per_token + 7) / 8 * 8;
  if (token_bytes > content || (content - token_bytes) % 8 != 0 ||
      (content - token_bytes) / 8 == 0 || (content - token_bytes) / 8 - 1 != footer.num_documents)
    broken(fmt::format("{} documents and {} tokens do not make its {} bytes", footer.num_documents,
                       footer.num_tokens, size));
  if (footer.text_bytes > static_cast<uint64_t>(INT64_MAX)) broken("its count of bytes is damaged");
  if (footer.tokenizer[sizeof footer.tokenizer - 1] != '\0')
    broken("its tokenizer's name is damaged");

  info_ = {.num_documents = static_cast<int64_t>(footer.num_documents),
           .num_tokens = static_cast<int64_t>(footer.num_tokens),
           .text_bytes = static_cast<int64_t>(footer.text_bytes),
           .bytes_per_token = static_cast<int32_t>(header.bytes_per_token),
           .tokenizer = footer.tokenizer,
           .tokenizer_checksum = footer.tokenizer_checksum,
           .content_checksum = footer.content_checksum};
  tokens_ = bytes.data() + sizeof(Header);
  offsets_ = tokens_ + token_bytes;
  check_offsets();
}

void TokenShard::check_offsets() const {
  uint64_t previous = 0;
  for (int64_t d = 0; d <= info_.num_documents; ++d) {
    const uint64_t offset = offset_of(d);
    if (offset < previous || (d == 0 && offset != 0))
      broken(fmt::format("document {} starts at token {}, before {}", d, offset, previous));
    previous = offset;
  }
  if (previous != static_cast<uint64_t>(info_.num_tokens))
    broken(fmt::format("its documents end at token {} of {}", previous, info_.num_tokens));
}

void TokenShard::verify() const {
  const auto bytes = file_.bytes();
  const uint64_t found =
      hash_bytes({reinterpret_cast<const char*>(bytes.data()), bytes.size() - sizeof(Footer)}, 0);
  if (found != info_.content_checksum)
    broken(fmt::format("its content has checksum {:016x}, its footer states {:016x}", found,
                       info_.content_checksum));
}

void TokenShard::require_tokenizer(const Tokenizer& tokenizer) const {
  require(info_.tokenizer_checksum == tokenizer.checksum(),
          "{}: was tokenised with '{}', but data.tokenizer is '{}'{}; tokenise the text again or "
          "set data.tokenizer",
          name_, info_.tokenizer, tokenizer.name(),
          info_.tokenizer == tokenizer.name() ? " in another version" : "");
}

uint64_t TokenShard::offset_of(int64_t document) const {
  return load<uint64_t>(offsets_ + document * 8);
}

int64_t TokenShard::length(int64_t document) const {
  DSV3_CHECK(document >= 0 && document < info_.num_documents, "document {} of {}", document,
             info_.num_documents);
  return static_cast<int64_t>(offset_of(document + 1) - offset_of(document));
}

void TokenShard::read(int64_t document, int64_t offset, int64_t count, int32_t* out) const {
  const int64_t length = this->length(document);
  DSV3_CHECK(offset >= 0 && count >= 0 && offset <= length && count <= length - offset,
             "tokens {}+{} of {}", offset, count, length);
  const int64_t first = static_cast<int64_t>(offset_of(document)) + offset;
  if (info_.bytes_per_token == 2) {
    for (int64_t i = 0; i < count; ++i) out[i] = load<uint16_t>(tokens_ + (first + i) * 2);
  } else if (count > 0) {  // memcpy must not see the null of an empty vector
    std::memcpy(out, tokens_ + first * 4, static_cast<size_t>(count) * 4);
  }
}

}  // namespace dsv3
