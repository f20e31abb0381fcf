#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>

namespace dsv3 {

/// The bytes of a plain, gzip or zstd file, told apart by its first bytes; several compressed
/// members in a row are read as one. Throws IoError naming the file where it cannot be read, is
/// broken, or ends within a member.
class CompressedInput {
 public:
  explicit CompressedInput(std::filesystem::path path);
  ~CompressedInput();
  CompressedInput(const CompressedInput&) = delete;
  CompressedInput& operator=(const CompressedInput&) = delete;

  /// Appends some bytes to `out`; false at the end.
  bool read(std::string& out);
  /// Bytes of the file, as it lies on disk, taken in so far.
  int64_t input_read() const { return input_read_; }

 private:
  struct Gzip;
  struct Zstd;
  [[noreturn]] void broken(const char* kind, const std::string& what) const;
  bool refill();
  bool inflate_gzip(std::string& out);
  bool inflate_zstd(std::string& out);

  std::filesystem::path path_;
  std::FILE* file_ = nullptr;
  std::string input_;
  size_t at_ = 0;           // first byte of input_ not yet taken
  bool in_member_ = false;  // a compressed member has begun and not ended
  int64_t input_read_ = 0;
  std::unique_ptr<Gzip> gzip_;
  std::unique_ptr<Zstd> zstd_;
};

}  // namespace dsv3
