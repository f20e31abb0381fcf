#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace dsv3 {

/// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78) of the bytes.
uint32_t crc32c(std::string_view bytes);

/// An append-only file of records as TensorFlow frames them (TFRecord): length (8 bytes, little
/// endian), masked CRC-32C of the length, the bytes, masked CRC-32C of the bytes; masked = rotated
/// right by 15, plus 0xa282ead8. Records gather in memory until flush().
class RecordFile {
 public:
  /// Creates `path`. Throws IoError.
  explicit RecordFile(std::filesystem::path path);
  /// Flushes; what cannot be written is lost.
  ~RecordFile();
  RecordFile(const RecordFile&) = delete;
  RecordFile& operator=(const RecordFile&) = delete;

  void append(std::string_view record);
  /// Throws IoError; the file then ends with the last whole flush, and what did not fit is kept for
  /// the next one (up to 64 MB, then it is dropped).
  void flush();

 private:
  std::filesystem::path path_;
  int fd_ = -1;
  int64_t size_ = 0;  // of what was flushed
  std::string pending_;
};

}  // namespace dsv3
