#include "config/values.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

namespace dsv3 {
namespace {

std::string join(std::span<const std::string_view> words) {
  std::string text;
  for (const std::string_view word : words)
    text += fmt::format("{}{}", text.empty() ? "" : ", ", word);
  return text;
}

bool wrong(const Node& node, std::string_view key, Issues& issues, std::string_view expected) {
  issues.add(node.place, detail::shown(node, key),
             fmt::format("expected {}, got {}", expected, node.describe()));
  return false;
}

bool read_bool(const Node& node, std::string_view key, bool& value, Issues& issues) {
  const bool plain = node.is_scalar() && !node.quoted;
  if (plain && (node.text == "true" || node.text == "True" || node.text == "TRUE")) {
    value = true;
  } else if (plain && (node.text == "false" || node.text == "False" || node.text == "FALSE")) {
    value = false;
  } else {
    return wrong(node, key, issues, "true or false");
  }
  return true;
}

bool read_word(const Node& node, std::string_view key, std::span<const std::string_view> choices,
               size_t& index, Issues& issues) {
  const auto found = node.is_scalar() ? std::ranges::find(choices, node.text) : choices.end();
  if (found == choices.end()) {
    const std::string_view near = node.is_scalar() ? nearest(node.text, choices) : "";
    const std::string hint = near.empty() ? "" : fmt::format("; did you mean {}?", near);
    issues.add(node.place, detail::shown(node, key),
               fmt::format("expected one of {}, got {}{}", join(choices), node.describe(), hint));
    return false;
  }
  index = static_cast<size_t>(found - choices.begin());
  return true;
}

bool read_text(const Node& node, std::string_view key, const Field& field, std::string& value,
               Issues& issues) {
  if (!field.choices.empty()) {
    size_t index = 0;
    if (!read_word(node, key, field.choices, index, issues)) return false;
    value = field.choices[index];
    return true;
  }
  if (!node.is_scalar() && !node.is_null()) return wrong(node, key, issues, "a text");
  value = node.is_null() ? "" : node.text;
  return true;
}

/// [first, last]; [] and null are none.
bool read_step_range(const Node& node, std::string_view key, StepRange& range, Issues& issues) {
  if (node.is_null() || (node.is_sequence() && node.items.empty())) {
    range = {};
    return true;
  }
  std::optional<int64_t> ends[2];
  if (node.is_sequence() && node.items.size() == 2)
    for (size_t i = 0; i < 2; ++i) {
      const Node& item = node.items[i];
      if (item.is_scalar() && !item.quoted) ends[i] = parse_integer(item.text);
    }
  if (!ends[0] || !ends[1] || *ends[0] < 1 || *ends[1] < *ends[0])
    return wrong(node, key, issues, "[FIRST, LAST] with 1 <= FIRST <= LAST");
  range = {*ends[0], *ends[1]};
  return true;
}

bool read_source(const Node& node, std::string_view key, DataSource& source, Issues& issues) {
  if (node.is_scalar() && !node.is_null()) {
    source.path = node.text;
  } else if (node.is_map()) {
    bool good = true;
    static constexpr std::string_view kNames[] = {"path", "weight"};
    for (const Node& item : node.items) {
      const std::string path = fmt::format("{}.{}", key, item.key);
      if (item.key == "path" && item.is_scalar() && !item.is_null()) {
        source.path = item.text;
      } else if (item.key == "path") {
        good = wrong(item, path, issues, "a path");
      } else if (item.key == "weight") {
        const Range weight{.min = 0, .max = 1e9, .above_min = true};
        const auto value = detail::number_from(item, path, weight, issues);
        good = good && value.has_value();
        source.weight = value.value_or(1.0);
      } else {
        const std::string_view near = nearest(item.key, kNames);
        issues.add(item.key_place, path,
                   near.empty() ? "unknown key, a source has path and weight"
                                : fmt::format("unknown key, did you mean {}?", near));
        good = false;
      }
    }
    if (!good) return false;
  } else {
    return wrong(node, key, issues, "a path or {path: …, weight: …}");
  }
  if (source.path.empty()) return wrong(node, key, issues, "a path that is not empty");
  return true;
}

bool read_sources(const Node& node, std::string_view key, std::vector<DataSource>& value,
                  Issues& issues) {
  std::vector<DataSource> sources;
  bool good = true;
  if (node.is_sequence()) {
    for (const Node& item : node.items)
      good = read_source(item, key, sources.emplace_back(), issues) && good;
  } else if (!node.is_null()) {
    good = read_source(node, key, sources.emplace_back(), issues);
  }
  if (good) value = std::move(sources);
  return good;
}

}  // namespace

namespace detail {

std::string_view shown(const Node& node, std::string_view key) {
  return node.label.empty() ? key : std::string_view(node.label);
}

std::optional<double> number_from(const Node& node, std::string_view key, const Range& range,
                                  Issues& issues) {
  const auto value = node.is_scalar() && !node.quoted ? parse_number(node.text) : std::nullopt;
  if (!value) {
    wrong(node, key, issues, range.whole ? "a whole number" : "a finite number");
    return std::nullopt;
  }
  if (!range.contains(*value)) {
    issues.add(node.place, shown(node, key),
               fmt::format("must be {}, got {}", range.text(), node.describe()));
    return std::nullopt;
  }
  return value;
}

std::optional<int64_t> integer_from(const Node& node, std::string_view key, const Range& range,
                                    Issues& issues) {
  const auto value = node.is_scalar() && !node.quoted ? parse_integer(node.text) : std::nullopt;
  if (!value) {
    const bool number = node.is_scalar() && !node.quoted && parse_number(node.text).has_value();
    const std::string limits = range.text();
    wrong(node, key, issues,
          number && !limits.empty() ? fmt::format("a whole number, {}", limits) : "an integer");
    return std::nullopt;
  }
  if (!range.contains(static_cast<double>(*value))) {
    issues.add(node.place, shown(node, key),
               fmt::format("must be {}, got {}", range.text(), node.describe()));
    return std::nullopt;
  }
  return value;
}

}  // namespace detail

std::optional<double> parse_number(std::string_view text) {
  if (text.starts_with('+')) text.remove_prefix(1);
  const std::string_view digits = text.starts_with('-') ? text.substr(1) : text;
  const bool begins = !digits.empty() && (std::isdigit(static_cast<unsigned char>(digits[0])) ||
                                          (digits[0] == '.' && digits.size() > 1));
  if (!begins) return std::nullopt;
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole_text = end == text.data() + text.size();
  if (error != std::errc() || !whole_text || !std::isfinite(value)) return std::nullopt;
  return value;
}

std::optional<int64_t> parse_integer(std::string_view text) {
  if (text.starts_with('+')) text.remove_prefix(1);
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc() && end == text.data() + text.size()) return value;
  constexpr double kExact = 9007199254740992.0;  // 2^53
  const auto number = parse_number(text);
  if (!number || *number != std::floor(*number) || std::abs(*number) > kExact) return std::nullopt;
  return static_cast<int64_t>(*number);
}

bool read_value(const Node& node, std::string_view key, const Field& field, Config& config,
                Issues& issues) {
  const Slot slot = field.slot(config);
  if (const auto* integer = std::get_if<int64_t*>(&slot)) {
    if (field.zero_is_null && node.is_null()) {
      **integer = 0;
      return true;
    }
    const auto value = detail::integer_from(node, key, field.range, issues);
    if (value) **integer = *value;
    return value.has_value();
  }
  if (const auto* number = std::get_if<double*>(&slot)) {
    const auto value = detail::number_from(node, key, field.range, issues);
    if (value) **number = *value;
    return value.has_value();
  }
  if (const auto* flag = std::get_if<bool*>(&slot)) return read_bool(node, key, **flag, issues);
  if (const auto* text = std::get_if<std::string*>(&slot))
    return read_text(node, key, field, **text, issues);
  if (const auto* choice = std::get_if<Choice>(&slot)) {
    size_t index = 0;
    if (!read_word(node, key, field.choices, index, issues)) return false;
    *choice->index = static_cast<uint8_t>(index);
    return true;
  }
  if (const auto* range = std::get_if<StepRange*>(&slot))
    return read_step_range(node, key, **range, issues);
  return read_sources(node, key, *std::get<std::vector<DataSource>*>(slot), issues);
}

}  // namespace dsv3
