#pragma once

#include <filesystem>
#include <optional>
#include <string>

namespace dsv3 {

/// Throws std::invalid_argument when prepare_run_directory() would; changes nothing.
void require_free_directory(const std::filesystem::path& directory, bool overwrite);

/// Makes `directory` ready for a new run. One that already holds a run (a reported step or a
/// checkpoint) is refused with std::invalid_argument unless `overwrite`, which moves the old one
/// aside to the first free `directory`.1, .2, …; nothing is ever deleted. Returns where the old run
/// went. Throws IoError.
std::optional<std::filesystem::path> prepare_run_directory(const std::filesystem::path& directory,
                                                           bool overwrite);

/// Removes all but the newest `keep` checkpoints (step_N) of a run; 0 keeps all. The one just
/// written is the newest.
void prune_checkpoints(const std::filesystem::path& run, int64_t keep);

}  // namespace dsv3
