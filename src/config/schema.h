#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "config/config.h"

// The one description of a config's keys. Reading, printing, range checks, the key table of
// configs/README.md and the suggestion of a near key all derive from it.
namespace dsv3 {

/// An enumeration inside a Config: its index into the field's `choices`.
struct Choice {
  uint8_t* index;
};

/// A field of a Config by its kind.
using Slot = std::variant<int64_t*, double*, bool*, std::string*, Choice, Schedule*,
                          std::vector<DataSource>*, StepRange*>;

inline constexpr double kUnlimited = std::numeric_limits<double>::infinity();

/// Allowed values of a number, or of every value that a schedule takes.
struct Range {
  double min = -kUnlimited;
  double max = kUnlimited;
  bool above_min = false;  // min itself is not allowed
  bool below_max = false;  // max itself is not allowed
  bool whole = false;      // a schedule of whole numbers

  bool contains(double value) const;
  /// "at least 1", "between 0 and 1", "more than 0", …; empty without limits.
  std::string text() const;
};

struct Field {
  std::string_view key;    // full path
  Slot (*slot)(Config&);   // the field inside a config
  std::string_view unit;   // "" = none
  std::string_view about;  // meaning
  Range range = {};
  std::span<const std::string_view> choices = {};  // of an enumeration or a string
  std::span<const std::string_view> aliases = {};  // other full paths for the same field
  std::string_view derived = {};                   // default that depends on other keys, in words
  bool zero_is_null = false;                       // `null` is another way to write 0
};

/// Every field, grouped by section, in the order of printing.
std::span<const Field> schema();

/// The field that `path` names, by key or alias; null when there is none.
const Field* find_field(std::string_view path);

/// Whether `path` is a section ("model", "model.mla", …).
bool is_section(std::string_view path);

/// The value's kind in words: "integer", "number", "true or false", "schedule", ….
std::string kind_of(const Field& field);

/// For an unknown `path`: "did you mean …?" or the keys that its section has.
std::string suggest_key(std::string_view path);

/// The nearest of `names` by edit distance, or "" when none is near.
std::string_view nearest(std::string_view name, std::span<const std::string_view> names);

/// The table of all keys in Markdown, one table per section: key, type, default, unit, allowed
/// values, meaning. configs/README.md holds it, and a test compares the two.
std::string keys_as_markdown();

namespace detail {
std::span<const Field> model_fields();
std::span<const Field> run_fields();
Slot slot_of(int64_t& value);
Slot slot_of(double& value);
Slot slot_of(bool& value);
Slot slot_of(std::string& value);
Slot slot_of(Schedule& value);
Slot slot_of(std::vector<DataSource>& value);
Slot slot_of(StepRange& value);
template <typename Enum>
requires std::is_enum_v<Enum> Slot slot_of(Enum& value) {
  static_assert(sizeof(Enum) == 1);
  return Choice{reinterpret_cast<uint8_t*>(&value)};
}
}  // namespace detail

}  // namespace dsv3
