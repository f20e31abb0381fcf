#include "training/run_directory.h"

#include <algorithm>
#include <charconv>
#include <system_error>
#include <vector>

#include "base/error.h"

namespace dsv3 {
namespace fs = std::filesystem;
namespace {

/// A run is there once a step was reported or weights were saved; one that failed before that left
/// nothing to lose.
bool holds_run(const fs::path& directory) {
  const fs::path metrics = directory / "metrics.jsonl", checkpoints = directory / "checkpoints";
  return (fs::is_regular_file(metrics) && fs::file_size(metrics) > 0) ||
         (fs::is_directory(checkpoints) && !fs::is_empty(checkpoints));
}

fs::path without_trailing_slash(const fs::path& path) {
  return path.has_filename() ? path : path.parent_path();
}

/// N of "step_N", -1 for other names.
int64_t step_of(const fs::path& checkpoint) {
  const std::string name = checkpoint.filename().string();
  constexpr std::string_view kPrefix = "step_";
  if (!name.starts_with(kPrefix)) return -1;
  int64_t step = -1;
  const char* end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(name.data() + kPrefix.size(), end, step);
  return error == std::errc() && stop == end ? step : -1;
}

}  // namespace

void require_free_directory(const fs::path& given, bool overwrite) {
  const fs::path directory = without_trailing_slash(given);
  require(!fs::exists(directory) || fs::is_directory(directory),
          "{} is a file; a run needs a directory", directory.string());
  require(overwrite || !holds_run(directory),
          "{} already holds a run; choose another with --out, or --overwrite to move it aside",
          directory.string());
}

std::optional<fs::path> prepare_run_directory(const fs::path& given, bool overwrite) {
  const fs::path directory = without_trailing_slash(given);
  std::optional<fs::path> moved;
  try {
    require_free_directory(directory, overwrite);
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
    throw IoError(fmt::format("cannot prepare {}: {}", directory.string(), error.code().message()));
  }
  return moved;
}

void prune_checkpoints(const fs::path& run, int64_t keep) {
  if (keep <= 0) return;
  std::vector<std::pair<int64_t, fs::path>> found;
  try {
    for (const auto& entry : fs::directory_iterator(run / "checkpoints")) {
      const int64_t step = step_of(entry.path());
      if (step >= 0 && entry.is_directory()) found.emplace_back(step, entry.path());
    }
    std::ranges::sort(found, std::greater<>());
    for (size_t i = static_cast<size_t>(keep); i < found.size(); ++i)
      fs::remove_all(found[i].second);
  } catch (const fs::filesystem_error& error) {
    throw IoError(fmt::format("cannot remove old checkpoints: {}", error.what()));
  }
}

}  // namespace dsv3
