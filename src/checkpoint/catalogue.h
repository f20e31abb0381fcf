#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/manifest.h"

// The checkpoints of a run's directory: RUN/checkpoints/step_N. No LibTorch here.
namespace dsv3 {

struct CheckpointEntry {
  int64_t step = 0;
  std::filesystem::path path;
};

/// RUN/checkpoints/step_N.
std::filesystem::path checkpoint_directory(const std::filesystem::path& run, int64_t step);

/// Every directory step_N of a run, by step; whole or not. Half-written and half-removed ones have
/// other names and are never seen. Empty when the run has none. Throws IoError.
std::vector<CheckpointEntry> checkpoints_of(const std::filesystem::path& run);

/// The checkpoint of the highest step. Throws std::invalid_argument when there is none.
std::filesystem::path latest_checkpoint(const std::filesystem::path& run);

/// The newest checkpoint below `below` that is whole, every byte checked.
std::optional<CheckpointEntry> newest_whole(const std::filesystem::path& run, int64_t below);

/// Throws IoError unless the checkpoint is whole: names each damaged file with its cause and, where
/// it stands in a run, the newest whole checkpoint before it. A directory elsewhere than in a run
/// with neither manifest.json nor state.json (plain weights) passes.
void require_undamaged(const std::filesystem::path& checkpoint);

/// Removes all but the newest `keep_last` checkpoints (0 keeps all) and those whose step is a
/// multiple of `keep_every` (0 = none). Each is renamed before it is removed, so that no half of it
/// is ever taken for a checkpoint. Throws IoError.
void prune_checkpoints(const std::filesystem::path& run, int64_t keep_last, int64_t keep_every);

/// Removes what a killed save or removal left behind. Returns how many there were.
int64_t remove_stale(const std::filesystem::path& run);

/// Moves the checkpoints above `step` to RUN/set_aside/, where nothing looks for them: a run that
/// goes on from an earlier one must not find them later. Returns the new places.
std::vector<std::filesystem::path> set_aside_after(const std::filesystem::path& run, int64_t step);

}  // namespace dsv3
