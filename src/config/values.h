#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "config/document.h"
#include "config/schema.h"

// Single values: from a node of a document into a field, and from a field to YAML.
namespace dsv3 {

/// What the reader of a value may need besides its node.
struct ReadContext {
  Issues& issues;
  int64_t training_steps = 0;  // length of schedules that do not state theirs
};

/// A schedule as written: `absolute[i]` says that piece i's length is the count at which it ends
/// (until_steps, until_tokens), to be made relative once its beginning is known.
struct WrittenSchedule {
  Schedule schedule;
  std::vector<bool> absolute;
};

/// Numbers of YAML 1.2's core schema; nothing for other text, infinities, NaN and overflow. An
/// integer may be written 1.0e13 as long as it is whole and below 2^53 in magnitude.
std::optional<double> parse_number(std::string_view text);
std::optional<int64_t> parse_integer(std::string_view text);

/// Writes the node's value into the field of `config`. On a wrong type, word or range: an issue
/// that names `key` and what is right; the field keeps its value, and the result is false.
/// Schedules go to read_schedule() instead.
bool read_value(const Node& node, std::string_view key, const Field& field, Config& config,
                Issues& issues);

/// A schedule from a number, a list of pieces or a map with `type`; nothing, with issues, when
/// wrong.
std::optional<WrittenSchedule> read_schedule(const Node& node, std::string_view key,
                                             const Range& range, const ReadContext& context);

/// The shortest decimal form that reads back to the same double, and to a float in every YAML.
std::string print_number(double value);
/// Plain where YAML reads it as the same text, otherwise in double quotes with escapes.
std::string print_text(std::string_view text);
/// The field's value on one line, or starting with a newline followed by list items indented for a
/// key at depth `indent`.
std::string print_value(const Field& field, Config& config, int indent = 0);
std::string print_schedule(const Schedule& schedule, int indent);

namespace detail {
/// Reads a number in range from a scalar node; an issue and nothing otherwise.
std::optional<double> number_from(const Node& node, std::string_view key, const Range& range,
                                  Issues& issues);
std::optional<int64_t> integer_from(const Node& node, std::string_view key, const Range& range,
                                    Issues& issues);
/// The name of a node in errors: its label, where it has one, instead of the path.
std::string_view shown(const Node& node, std::string_view key);
}  // namespace detail

}  // namespace dsv3
