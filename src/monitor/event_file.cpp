#include "monitor/event_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace dsv3 {
namespace {

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit)
      value = (value & 1) != 0 ? (value >> 1) ^ 0x82F63B78u : value >> 1;
    table[i] = value;
  }
  return table;
}

uint32_t masked(uint32_t crc) {
  return std::rotr(crc, 15) + 0xa282ead8u;
}

template <typename T>
void append_little_endian(std::string& out, T value) {
  for (size_t i = 0; i < sizeof(T); ++i) out.push_back(static_cast<char>(value >> (8 * i) & 0xff));
}

}  // namespace

uint32_t crc32c(std::string_view bytes) {
  static constexpr auto kTable = make_table();
  uint32_t crc = 0xffffffffu;
  for (const char c : bytes) crc = kTable[(crc ^ static_cast<uint8_t>(c)) & 0xff] ^ (crc >> 8);
  return ~crc;
}

RecordFile::RecordFile(std::filesystem::path path) : path_(std::move(path)) {
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) throw IoError(fmt::format("cannot open {}: {}", path_.string(), strerror(errno)));
}

RecordFile::~RecordFile() {
  try {
    flush();
  } catch (const IoError&) {  // a destructor must not throw
  }
  ::close(fd_);
}

void RecordFile::append(std::string_view record) {
  std::string length;
  append_little_endian(length, static_cast<uint64_t>(record.size()));
  pending_ += length;
  append_little_endian(pending_, masked(crc32c(length)));
  pending_ += record;
  append_little_endian(pending_, masked(crc32c(record)));
}

void RecordFile::flush() {
  constexpr size_t kMostKept = size_t{64} << 20;
  size_t done = 0;
  while (done < pending_.size()) {
    const ssize_t written = ::write(fd_, pending_.data() + done, pending_.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      const int error = errno;
      // A reader must never meet half a record.
      if (done > 0 && (::ftruncate(fd_, size_) != 0 || ::lseek(fd_, size_, SEEK_SET) < 0))
        pending_.clear();
      if (pending_.size() > kMostKept) pending_.clear();
      throw IoError(fmt::format("cannot write {}: {}", path_.string(), strerror(error)));
    }
    done += static_cast<size_t>(written);
  }
  size_ += static_cast<int64_t>(done);
  pending_.clear();
}

}  // namespace dsv3
