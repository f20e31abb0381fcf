#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

namespace dsv3 {

/// Whether a run is in `directory`: a reported step or a checkpoint. What failed before that left
/// nothing to lose.
bool holds_run(const std::filesystem::path& directory);

/// Makes `directory` ready for a new run. One that already holds a run is moved aside to the first
/// free `directory`.1, .2, …; nothing is ever deleted. Returns where the old run went. Throws
/// std::invalid_argument when `directory` is a file, IoError.
std::optional<std::filesystem::path> prepare_run_directory(const std::filesystem::path& directory);

/// Drops the lines of a metrics.jsonl that lie beyond `step`, and a last one that was cut off, in
/// one step: a reader finds the old file or the new one. Returns how many lines went. Does nothing
/// where there is no such file. Throws IoError.
int64_t drop_metrics_after(const std::filesystem::path& metrics, int64_t step);

/// Keeps two processes from training in one directory: holds DIRECTORY/.lock until it goes away,
/// with the process at the latest. Where the file system knows no locks, it holds nothing.
class RunLock {
 public:
  /// Throws IoError when another process holds the lock, or the directory cannot be written.
  explicit RunLock(const std::filesystem::path& directory);
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  int fd_ = -1;
};

/// Makes `directory`, which held no run when this process looked, ready for a new one and locks it.
/// Throws std::invalid_argument when it is a file, IoError, also when another process has begun a
/// run there meanwhile: that run is not touched.
std::unique_ptr<RunLock> begin_run_directory(const std::filesystem::path& directory);

}  // namespace dsv3
