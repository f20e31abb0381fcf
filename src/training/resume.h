#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "config/config.h"
#include "training/training_state.h"

namespace dsv3 {

/// Where a run that was there before goes on.
struct ResumePoint {
  std::filesystem::path checkpoint;  // empty: nothing was saved yet, the run starts again
  TrainingState state;               // of the checkpoint; step 0 without one
  Config config;                     // the run's, as it was when that was written
};

/// The newest checkpoint of the run in `directory`, or that of `from_step`, every byte checked;
/// nothing where the directory holds no run. A damaged checkpoint is never passed over in silence:
/// IoError names it, its files with causes, and the command that goes on from the newest whole one.
/// std::invalid_argument where `from_step` does not exist, or the directory holds a run without a
/// config.
std::optional<ResumePoint> find_resume_point(const std::filesystem::path& directory,
                                             std::optional<int64_t> from_step);

/// The state of the newest checkpoint without any check of the rest; nothing where there is none or
/// it cannot be read.
std::optional<TrainingState> peek_training_state(const std::filesystem::path& directory);

/// Compares the config of a run with the one it is to go on with. Returns one line for each key
/// that differs and may: what only sets the pace, the length, the place or the reports of the
/// training that is to come. Throws std::invalid_argument that names every other one: those decide
/// what the saved numbers mean.
std::vector<std::string> allowed_changes(const Config& saved, const Config& now,
                                         const std::filesystem::path& directory);

/// `dsv3 train DIRECTORY`, quoted for a shell where that is needed.
std::string resume_command(const std::filesystem::path& directory);

}  // namespace dsv3
