#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "config/config.h"

namespace dsv3 {

/// Everything that is wrong with a config, found in one reading. Each error is one line,
/// `FILE:LINE:COLUMN: key: what is wrong, what would be right`; `command line: key: …` for an
/// override. what() joins them with newlines.
struct ConfigErrors : std::invalid_argument {
  explicit ConfigErrors(std::vector<std::string> lines);
  std::vector<std::string> errors;
};

/// A DeepSpeed JSON to read beside the YAML.
struct DeepSpeedText {
  std::string text;
  std::string name;  // for errors
};

/// Reads a YAML file strictly and resolves it: preset, DeepSpeed JSON (`deepspeed` in the YAML or
/// the file given here; its values win over the YAML's, "auto" takes the YAML's), overrides
/// `key.path=value` (which win over both), derived defaults, cross checks.
/// Throws IoError when a file cannot be read, ConfigErrors when anything in it is wrong.
Config load_config(const std::filesystem::path& path,
                   const std::vector<std::string>& overrides = {},
                   const std::filesystem::path& deepspeed = {});

/// The same from text; `name` stands for the file in errors, and a `deepspeed: PATH` in the text is
/// relative to its directory.
Config load_config_text(std::string_view yaml, const std::string& name,
                        const std::vector<std::string>& overrides = {},
                        const std::optional<DeepSpeedText>& deepspeed = std::nullopt);

/// The whole config as YAML: every key, presets and derived values written out. Loads back to the
/// same Config.
std::string to_yaml(const Config& config);

/// Every key by its full path ("model.mla.num_heads") with its value: numbers, schedules of one
/// value among them, flags, and the rest as text. For tables of hyperparameters.
using FlatConfig = std::vector<std::pair<std::string, std::variant<bool, double, std::string>>>;
FlatConfig flatten(const Config& config);

/// The table of all keys in Markdown, as configs/README.md holds it.
std::string keys_as_markdown();

/// Checks ranges and the rules between keys of a config that was made or changed in code.
/// Throws ConfigErrors with lines `key: equation`.
void validate(const Config& config);

/// Processes that the layout asks for: tp · pp · cp · dp, where an unset dp is the smallest that
/// expert parallelism allows.
int64_t num_processes(const ParallelConfig& parallel);

/// Throws std::invalid_argument, with the equation and the overrides that fit one process, when the
/// layout asks for more than one.
void require_single_process(const ParallelConfig& parallel);

/// Throws std::invalid_argument, naming key and value, when a GPU's BF16 products cannot take the
/// model's widths: rows must start on 16 bytes, so the widths are multiples of 8.
void require_cuda_widths(const ModelConfig& model);

/// Sequences of the optimizer step that starts when `steps_done` and `tokens_done` are finished:
/// the schedule's value to the nearest multiple of micro_batch_size × max(1, dp), at least one
/// multiple.
int64_t global_batch_at(const Config& config, int64_t steps_done, int64_t tokens_done);

/// Names that `model.preset` takes, and the resolved config that each stands for.
std::span<const std::string_view> preset_names();
Config preset_config(std::string_view name);

}  // namespace dsv3
