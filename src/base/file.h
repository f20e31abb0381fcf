#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>

#include "base/hash.h"

namespace dsv3 {

/// The whole file as bytes. Throws IoError with the path and the system's reason.
std::string read_file(const std::filesystem::path& path);

/// Writes to `path`.tmp, fsyncs, renames over `path`, fsyncs the directory: a reader sees the old
/// file or the new one, never a part. Throws IoError; the old file is then still whole.
void write_file_atomically(const std::filesystem::path& path, std::string_view bytes);

/// fsyncs a directory, so that what was created or renamed in it stays. Throws IoError.
void sync_directory(const std::filesystem::path& directory);

/// fsyncs a file that others wrote. Throws IoError.
void sync_file(const std::filesystem::path& path);

/// Puts the finished directory `temporary` in the place of `directory` in one step and syncs the
/// parent; what stood there before (if anything) is then removed. Throws IoError: `directory` is
/// then as before.
void put_directory_in_place(const std::filesystem::path& temporary,
                            const std::filesystem::path& directory);

/// Bytes that an ordinary user may still write to the file system of `path` (which must exist).
/// Throws IoError.
uint64_t free_disk_bytes(const std::filesystem::path& path);

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

  /// Of what was written so far: bytes, and their XXH3.
  uint64_t size() const { return size_; }
  uint64_t checksum() const { return hash_.digest(); }

 private:
  std::filesystem::path path_, temporary_;
  int fd_ = -1;
  uint64_t size_ = 0;
  StreamingHash hash_;
};

/// What writing a file asks of the system.
enum class FileAction : uint8_t { kCreate, kWrite, kSync, kRename };

/// A disk that fails, for tests: while it lives, `fault` is asked before each action of this header
/// that changes a file or directory, from whatever thread; an errno other than 0 makes the action
/// fail as if the system had said so. One at a time.
class FileFault {
 public:
  using Fault = std::function<int(FileAction action, const std::filesystem::path& path)>;
  explicit FileFault(Fault fault);
  ~FileFault();
  FileFault(const FileFault&) = delete;
  FileFault& operator=(const FileFault&) = delete;

 private:
  Fault fault_;
};

}  // namespace dsv3
