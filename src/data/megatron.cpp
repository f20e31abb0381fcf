#include "data/megatron.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"

namespace dsv3 {
namespace {

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr uint64_t kHeaderSize = 9 + 8 + 1 + 8 + 8;

struct ElementType {
  int64_t size;
  const char* name;
};

/// Megatron-core's DType codes 1–8.
constexpr ElementType kTypes[] = {{0, ""},        {1, "uint8"},   {1, "int8"},
                                  {2, "int16"},   {4, "int32"},   {8, "int64"},
                                  {8, "float64"}, {4, "float32"}, {2, "uint16"}};

template <typename T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

template <typename T>
void convert(const std::byte* from, int64_t count, int32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const T value = load<T>(from + i * static_cast<int64_t>(sizeof(T)));
    if constexpr (std::is_floating_point_v<T>) {
      const bool whole = value >= 0 && value < T(2147483648.0) && value == std::floor(value);
      out[i] = whole ? static_cast<int32_t>(value) : -1;
    } else if constexpr (sizeof(T) == 8) {
      out[i] = value >= 0 && value <= INT32_MAX ? static_cast<int32_t>(value) : -1;
    } else {
      out[i] = value;
    }
  }
}

std::filesystem::path with_suffix(std::filesystem::path prefix, const char* suffix) {
  return prefix += suffix;
}

}  // namespace

std::filesystem::path MegatronDocuments::find_prefix(const std::filesystem::path& path) {
  std::filesystem::path prefix = path;
  if (path.extension() == ".bin" || path.extension() == ".idx") prefix.replace_extension();
  for (const auto& candidate : {path, prefix})
    if (std::filesystem::is_regular_file(with_suffix(candidate, ".bin")) &&
        std::filesystem::is_regular_file(with_suffix(candidate, ".idx")))
      return candidate;
  return {};
}

MegatronDocuments::MegatronDocuments(const std::filesystem::path& prefix, int32_t end_token)
    : index_(with_suffix(prefix, ".idx")),
      data_(with_suffix(prefix, ".bin")),
      name_(prefix.string()) {
  const auto index = index_.bytes();
  if (index.size() < kHeaderSize) broken(fmt::format("{} bytes are too few", index.size()));
  const std::byte* at = index.data();
  if (std::memcmp(at, kMagic, sizeof kMagic) != 0) broken("it does not start with MMIDIDX");
  const auto version = load<uint64_t>(at + 9);
  if (version != 1) broken(fmt::format("it has version {}, this program reads 1", version));
  code_ = load<uint8_t>(at + 17);
  if (code_ < 1 || code_ > 8) broken(fmt::format("element type {}, expected 1 to 8", code_));
  token_size_ = kTypes[code_].size;

  const auto num_sequences = load<uint64_t>(at + 18), num_entries = load<uint64_t>(at + 26);
  const uint64_t room = index.size() - kHeaderSize;
  if (num_entries == 0 || num_sequences > room / 12 || num_entries > room / 8 ||
      num_sequences * 12 + num_entries * 8 > room)
    broken(fmt::format("{} sequences and {} document entries do not fit into its {} bytes",
                       num_sequences, num_entries, index.size()));
  num_sequences_ = static_cast<int64_t>(num_sequences);
  num_documents_ = static_cast<int64_t>(num_entries) - 1;
  lengths_ = at + kHeaderSize;
  pointers_ = lengths_ + num_sequences_ * 4;
  documents_ = pointers_ + num_sequences_ * 8;
  check_index();

  const auto ends_with_end = [&](int64_t document) {
    int32_t last = -1;
    if (length(document) > 0) read(document, length(document) - 1, 1, &last);
    return last == end_token;
  };
  have_end_tokens_ = num_documents_ > 0 && ends_with_end(0) && ends_with_end(num_documents_ - 1);
}

void MegatronDocuments::broken(const std::string& what) const {
  throw IoError(fmt::format("{}.idx: not a Megatron index: {}", name_, what));
}

void MegatronDocuments::check_index() {
  const auto data_size = static_cast<uint64_t>(data_.bytes().size());
  starts_.assign(1, 0);
  starts_.reserve(static_cast<size_t>(num_sequences_) + 1);
  for (int64_t s = 0; s < num_sequences_; ++s) {
    const int64_t length = sequence_length(s), pointer = sequence_pointer(s);
    if (length < 0 || pointer < 0 || static_cast<uint64_t>(pointer) > data_size ||
        static_cast<uint64_t>(length * token_size_) > data_size - static_cast<uint64_t>(pointer))
      broken(fmt::format("sequence {} ({} tokens of {} bytes at byte {}) leaves {}.bin ({} bytes)",
                         s, length, token_size_, pointer, name_, data_size));
    // At most 2^31 tokens for each of the index file's 12 bytes: this cannot overflow.
    starts_.push_back(starts_.back() + length);
  }
  for (int64_t d = 0; d <= num_documents_; ++d) {
    const int64_t first = first_sequence(d), previous = d == 0 ? 0 : first_sequence(d - 1);
    if (first < previous || first > num_sequences_ || (d == 0 && first != 0))
      broken(fmt::format("document {} starts at sequence {} of {}, after one at {}", d, first,
                         num_sequences_, previous));
  }
  num_tokens_ = starts_[static_cast<size_t>(first_sequence(num_documents_))];
}

int64_t MegatronDocuments::sequence_length(int64_t sequence) const {
  return load<int32_t>(lengths_ + sequence * 4);
}

int64_t MegatronDocuments::sequence_pointer(int64_t sequence) const {
  return load<int64_t>(pointers_ + sequence * 8);
}

int64_t MegatronDocuments::first_sequence(int64_t document) const {
  return load<int64_t>(documents_ + document * 8);
}

const char* MegatronDocuments::dtype_name() const {
  return kTypes[code_].name;
}

int64_t MegatronDocuments::length(int64_t document) const {
  DSV3_CHECK(document >= 0 && document < num_documents_, "document {} of {}", document,
             num_documents_);
  return starts_[static_cast<size_t>(first_sequence(document + 1))] -
         starts_[static_cast<size_t>(first_sequence(document))];
}

void MegatronDocuments::read(int64_t document, int64_t offset, int64_t count, int32_t* out) const {
  const int64_t length = this->length(document);
  DSV3_CHECK(offset >= 0 && count >= 0 && offset <= length && count <= length - offset,
             "tokens {}+{} of {}", offset, count, length);
  int64_t at = starts_[static_cast<size_t>(first_sequence(document))] + offset;
  auto sequence = std::upper_bound(starts_.begin(), starts_.end(), at) - starts_.begin() - 1;
  for (; count > 0; ++sequence) {
    const int64_t skip = at - starts_[static_cast<size_t>(sequence)];
    const int64_t take = std::min(count, sequence_length(sequence) - skip);
    const std::byte* from = data_.bytes().data() + sequence_pointer(sequence) + skip * token_size_;
    switch (code_) {
      case 1:
        convert<uint8_t>(from, take, out);
        break;
      case 2:
        convert<int8_t>(from, take, out);
        break;
      case 3:
        convert<int16_t>(from, take, out);
        break;
      case 4:
        convert<int32_t>(from, take, out);
        break;
      case 5:
        convert<int64_t>(from, take, out);
        break;
      case 6:
        convert<double>(from, take, out);
        break;
      case 7:
        convert<float>(from, take, out);
        break;
      default:
        convert<uint16_t>(from, take, out);
        break;
    }
    at += take, out += take, count -= take;
  }
}

}  // namespace dsv3
