#include "base/file.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace dsv3 {
namespace {

[[noreturn]] void io_error(const char* action, const std::filesystem::path& path) {
  const int code = errno;
  throw IoError(fmt::format("cannot {} {}: {}", action, path.string(), std::strerror(code)));
}

std::atomic<const FileFault::Fault*> installed_fault{nullptr};

/// True, with errno set, when a test wants this action to fail.
bool must_fail(FileAction action, const std::filesystem::path& path) {
  const FileFault::Fault* fault = installed_fault.load();
  const int code = fault == nullptr ? 0 : (*fault)(action, path);
  if (code != 0) errno = code;
  return code != 0;
}

/// fsync of something opened for reading; `what` stands in messages.
void sync_path(const std::filesystem::path& path, int flags, const char* open, const char* sync) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | flags);
  if (fd < 0) io_error(open, path);
  const int result = must_fail(FileAction::kSync, path) ? -1 : ::fsync(fd);
  const int code = errno;
  ::close(fd);
  errno = code;
  if (result != 0) io_error(sync, path);
}

}  // namespace

FileFault::FileFault(Fault fault) : fault_(std::move(fault)) {
  installed_fault = &fault_;
}

FileFault::~FileFault() {
  installed_fault = nullptr;
}

void sync_directory(const std::filesystem::path& directory) {
  sync_path(directory.empty() ? "." : directory, O_DIRECTORY, "open directory", "sync directory");
}

void sync_file(const std::filesystem::path& path) {
  sync_path(path, 0, "open", "sync");
}

void put_directory_in_place(const std::filesystem::path& temporary,
                            const std::filesystem::path& directory) {
  sync_directory(temporary);
  if (must_fail(FileAction::kRename, temporary)) io_error("rename", temporary);
  if (::rename(temporary.c_str(), directory.c_str()) != 0) {
    // The place is taken: both names change their content in one step, then the old one goes.
    if (::renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, directory.c_str(), RENAME_EXCHANGE) != 0)
      io_error("rename", temporary);
    sync_directory(directory.parent_path());
    std::filesystem::remove_all(temporary);
  }
  sync_directory(directory.parent_path());
}

uint64_t free_disk_bytes(const std::filesystem::path& path) {
  struct statvfs info {};
  if (::statvfs(path.c_str(), &info) != 0) io_error("ask for the free space of", path);
  return static_cast<uint64_t>(info.f_bavail) * info.f_frsize;
}

std::string read_file(const std::filesystem::path& path) {
  if (std::filesystem::is_directory(path))
    throw IoError(fmt::format("cannot read {}: it is a directory", path.string()));
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) io_error("open", path);
  std::string bytes;
  char buffer[1 << 16];
  ssize_t count = 0;
  while ((count = ::read(fd, buffer, sizeof buffer)) > 0)
    bytes.append(buffer, static_cast<size_t>(count));
  const int code = errno;
  ::close(fd);
  errno = code;
  if (count < 0) io_error("read", path);
  return bytes;
}

void write_file_atomically(const std::filesystem::path& path, std::string_view bytes) {
  AtomicFile file(path);
  file.write(bytes.data(), bytes.size());
  file.commit();
}

MappedFile::MappedFile(const std::filesystem::path& path) : path_(path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) io_error("open", path);
  struct stat info {};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd);
    throw IoError(fmt::format("cannot map {}: not a regular file", path.string()));
  }
  size_ = static_cast<size_t>(info.st_size);
  if (size_ > 0) {
    void* data = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED) {
      const int code = errno;
      ::close(fd);
      errno = code;
      io_error("map", path);
    }
    data_ = static_cast<const std::byte*>(data);
  }
  ::close(fd);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

AtomicFile::AtomicFile(std::filesystem::path path) : path_(std::move(path)), temporary_(path_) {
  temporary_ += ".tmp";
  if (!must_fail(FileAction::kCreate, temporary_))
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd_ < 0) io_error("create", temporary_);
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) {
    ::close(fd_);
    ::unlink(temporary_.c_str());
  }
}

void AtomicFile::write(const void* data, size_t size) {
  hash_.update(data, size);
  size_ += size;
  const auto* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t count =
        must_fail(FileAction::kWrite, temporary_) ? -1 : ::write(fd_, bytes, size);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) io_error("write", temporary_);
    bytes += count;
    size -= static_cast<size_t>(count);
  }
}

void AtomicFile::commit() {
  if (must_fail(FileAction::kSync, temporary_) || ::fsync(fd_) != 0) io_error("sync", temporary_);
  if (must_fail(FileAction::kRename, temporary_) ||
      ::rename(temporary_.c_str(), path_.c_str()) != 0)
    io_error("write", path_);
  if (::close(std::exchange(fd_, -1)) != 0) io_error("close", path_);
  sync_directory(path_.parent_path());
}

}  // namespace dsv3
