#include "checkpoint/catalogue.h"

#include <algorithm>
#include <system_error>

#include "base/error.h"
#include "base/file.h"

namespace dsv3 {

namespace fs = std::filesystem;

namespace {

fs::path root_of(const fs::path& run) {
  return run / "checkpoints";
}

void move_directory(const fs::path& from, const fs::path& to) {
  std::error_code error;
  fs::rename(from, to, error);
  if (error)
    throw IoError(
        fmt::format("cannot move {} to {}: {}", from.string(), to.string(), error.message()));
}

void remove_directory(const fs::path& path) {
  std::error_code error;
  fs::remove_all(path, error);
  if (error) throw IoError(fmt::format("cannot remove {}: {}", path.string(), error.message()));
}

/// `wanted`, or the first of wanted.1, wanted.2, … that is free.
fs::path free_name(const fs::path& wanted) {
  fs::path name = wanted;
  for (int i = 1; fs::exists(name); ++i) {
    name = wanted;
    name += fmt::format(".{}", i);
  }
  return name;
}

}  // namespace

fs::path checkpoint_directory(const fs::path& run, int64_t step) {
  return root_of(run) / fmt::format("step_{}", step);
}

std::vector<CheckpointEntry> checkpoints_of(const fs::path& run) {
  std::vector<CheckpointEntry> found;
  const fs::path root = root_of(run);
  if (!fs::exists(root)) return found;
  try {
    for (const auto& entry : fs::directory_iterator(root)) {
      const int64_t step = step_of(entry.path());
      if (step >= 0 && entry.is_directory()) found.push_back({step, entry.path()});
    }
  } catch (const fs::filesystem_error& error) {
    throw IoError(fmt::format("cannot list {}: {}", root.string(), error.code().message()));
  }
  std::ranges::sort(found, {}, &CheckpointEntry::step);
  return found;
}

fs::path latest_checkpoint(const fs::path& run) {
  const auto found = checkpoints_of(run);
  require(!found.empty(), "{} holds no checkpoint (expected {})", run.string(),
          (root_of(run) / "step_N").string());
  return found.back().path;
}

std::optional<CheckpointEntry> newest_whole(const fs::path& run, int64_t below) {
  auto found = checkpoints_of(run);
  std::ranges::reverse(found);
  for (const auto& entry : found) {
    if (entry.step < below && find_damage(entry.path, Check::kChecksums).empty()) return entry;
  }
  return std::nullopt;
}

void require_undamaged(const fs::path& checkpoint) {
  const int64_t step = step_of(checkpoint);
  const bool of_a_run = step >= 0 && checkpoint.parent_path().filename() == "checkpoints";
  if (!of_a_run && !fs::exists(checkpoint / kManifestName) &&
      !fs::exists(checkpoint / "state.json"))
    return;
  const auto damage = find_damage(checkpoint, Check::kChecksums);
  if (damage.empty()) return;
  std::string text = fmt::format("{} is damaged: {}", checkpoint.string(), fmt::join(damage, "; "));
  if (step >= 0) {
    const auto good = newest_whole(checkpoint.parent_path().parent_path(), step);
    text += good ? fmt::format("; the newest whole one before it is {}", good->path.string())
                 : std::string("; there is no whole one before it");
  }
  throw IoError(text);
}

void prune_checkpoints(const fs::path& run, int64_t keep_last, int64_t keep_every) {
  if (keep_last <= 0) return;
  auto found = checkpoints_of(run);
  for (int64_t i = 0; i + keep_last < static_cast<int64_t>(found.size()); ++i) {
    const CheckpointEntry& entry = found[static_cast<size_t>(i)];
    if (keep_every > 0 && entry.step % keep_every == 0) continue;
    const fs::path doomed =
        entry.path.parent_path() / ("." + entry.path.filename().string() + ".removed.tmp");
    remove_directory(doomed);
    move_directory(entry.path, doomed);
    remove_directory(doomed);
  }
}

int64_t remove_stale(const fs::path& run) {
  int64_t count = 0;
  std::vector<fs::path> stale;
  if (!fs::exists(root_of(run))) return 0;
  for (const auto& entry : fs::directory_iterator(root_of(run))) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(".step_") && name.ends_with(".tmp")) stale.push_back(entry.path());
  }
  for (const auto& path : stale) {
    remove_directory(path);
    ++count;
  }
  return count;
}

std::vector<fs::path> set_aside_after(const fs::path& run, int64_t step) {
  std::vector<fs::path> moved;
  auto found = checkpoints_of(run);
  std::ranges::reverse(found);  // killed on the way, the newest that is left is still the wrong one
  for (const auto& entry : found) {
    if (entry.step <= step) break;
    const fs::path aside = run / "set_aside";
    fs::create_directories(aside);
    moved.push_back(free_name(aside / entry.path.filename()));
    move_directory(entry.path, moved.back());
  }
  if (!moved.empty()) sync_directory(root_of(run));
  return moved;
}

}  // namespace dsv3
