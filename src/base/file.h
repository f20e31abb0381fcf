#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace dsv3 {

/// The whole file as bytes. Throws IoError with the path and the system's reason.
std::string read_file(const std::filesystem::path& path);

/// Writes to `path`.tmp, fsyncs, renames over `path`, fsyncs the directory: a reader sees the old
/// file or the new one, never a part. Throws IoError; the old file is then still whole.
void write_file_atomically(const std::filesystem::path& path, std::string_view bytes);

/// fsyncs a directory, so that what was created or renamed in it stays. Throws IoError.
void sync_directory(const std::filesystem::path& directory);

/// A file mapped read-only into memory. Throws IoError when it cannot be opened or mapped.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// A file written beside its final name and renamed onto it by commit(); removed if never
/// committed.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t size);
  /// fsync, rename, fsync of the directory. Throws IoError.
  void commit();

 private:
  std::filesystem::path path_, temporary_;
  int fd_ = -1;
};

}  // namespace dsv3
