#include "training/run_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>

#include "base/error.h"
#include "base/file.h"

namespace dsv3 {
namespace fs = std::filesystem;
namespace {

fs::path without_trailing_slash(const fs::path& path) {
  return path.has_filename() ? path : path.parent_path();
}

void require_no_file(const fs::path& directory) {
  require(!fs::exists(directory) || fs::is_directory(directory),
          "{} is a file; a run needs a directory", directory.string());
}

IoError cannot_prepare(const fs::path& directory, const fs::filesystem_error& error) {
  return IoError(fmt::format("cannot prepare {}: {}", directory.string(), error.code().message()));
}

/// Whether a line of metrics.jsonl is whole and belongs to a step up to `step`.
bool keeps(std::string_view line, int64_t step) {
  const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return false;
  const auto found = json.find("step");
  return found != json.end() && found->is_number_integer() && found->get<int64_t>() <= step;
}

}  // namespace

bool holds_run(const fs::path& directory) {
  const fs::path metrics = directory / "metrics.jsonl", checkpoints = directory / "checkpoints";
  return (fs::is_regular_file(metrics) && fs::file_size(metrics) > 0) ||
         (fs::is_directory(checkpoints) && !fs::is_empty(checkpoints));
}

std::optional<fs::path> prepare_run_directory(const fs::path& given) {
  const fs::path directory = without_trailing_slash(given);
  std::optional<fs::path> moved;
  try {
    require_no_file(directory);
    if (holds_run(directory)) {
      for (int i = 1; !moved; ++i) {
        fs::path aside = directory;
        aside += fmt::format(".{}", i);
        if (!fs::exists(aside)) moved = aside;
      }
      fs::rename(directory, *moved);
    }
    fs::create_directories(directory / "checkpoints");
  } catch (const fs::filesystem_error& error) {
    throw cannot_prepare(directory, error);
  }
  return moved;
}

int64_t drop_metrics_after(const fs::path& metrics, int64_t step) {
  if (!fs::exists(metrics)) return 0;
  const std::string text = read_file(metrics);
  std::string kept;
  int64_t dropped = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t newline = text.find('\n', begin);
    const size_t end = newline == std::string::npos ? text.size() : newline;
    const auto line = std::string_view(text).substr(begin, end - begin);
    if (newline != std::string::npos && keeps(line, step)) {
      kept += line;
      kept += '\n';
    } else {
      ++dropped;
    }
    begin = end + 1;
  }
  if (dropped > 0) write_file_atomically(metrics, kept);
  return dropped;
}

RunLock::RunLock(const fs::path& directory) {
  const fs::path path = directory / ".lock";
  fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd_ < 0)
    throw IoError(fmt::format("cannot write to {}: {}", directory.string(), std::strerror(errno)));
  if (::flock(fd_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;
  ::close(fd_);
  throw IoError(fmt::format("another process is training in {}", directory.string()));
}

RunLock::~RunLock() {
  if (fd_ >= 0) ::close(fd_);
}

std::unique_ptr<RunLock> begin_run_directory(const fs::path& directory) {
  try {
    require_no_file(directory);
    fs::create_directories(directory / "checkpoints");
  } catch (const fs::filesystem_error& error) {
    throw cannot_prepare(directory, error);
  }
  auto lock = std::make_unique<RunLock>(directory);
  if (holds_run(directory))
    throw IoError(
        fmt::format("another process has begun a run in {} meanwhile; go on with it, or "
                    "choose another directory with --out",
                    directory.string()));
  return lock;
}

}  // namespace dsv3
