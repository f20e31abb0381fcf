#include "config/schema.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>

#include "config/values.h"

namespace dsv3 {
namespace {

std::string_view section_of(std::string_view path) {
  const size_t dot = path.rfind('.');
  return dot == std::string_view::npos ? std::string_view() : path.substr(0, dot);
}

std::string_view name_of(std::string_view path) {
  const size_t dot = path.rfind('.');
  return dot == std::string_view::npos ? path : path.substr(dot + 1);
}

struct Index {
  std::vector<Field> fields;
  std::map<std::string_view, size_t> by_path;
  std::vector<std::string_view> sections;                           // in order of appearance
  std::map<std::string_view, std::vector<std::string_view>> names;  // section -> names within
};

void add_section(Index& index, std::string_view path) {
  if (path.empty() || std::ranges::find(index.sections, path) != index.sections.end()) return;
  add_section(index, section_of(path));
  index.sections.push_back(path);
  index.names[section_of(path)].push_back(name_of(path));
}

const Index& index() {
  static const Index built = [] {
    Index index;
    for (const auto fields : {detail::model_fields(), detail::run_fields()})
      index.fields.insert(index.fields.end(), fields.begin(), fields.end());
    for (size_t i = 0; i < index.fields.size(); ++i) {
      const Field& field = index.fields[i];
      add_section(index, section_of(field.key));
      index.by_path[field.key] = i;
      index.names[section_of(field.key)].push_back(name_of(field.key));
      for (const std::string_view alias : field.aliases) {
        index.by_path[alias] = i;
        index.names[section_of(alias)].push_back(name_of(alias));
      }
    }
    index.names[""].push_back("deepspeed");
    return index;
  }();
  return built;
}

/// Damerau-Levenshtein distance of neighbouring swaps, for short names.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> older(b.size() + 1), old(b.size() + 1), now(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) old[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    now[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      now[j] = std::min({old[j] + 1, now[j - 1] + 1, old[j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
        now[j] = std::min(now[j], older[j - 2] + 1);
    }
    std::swap(older, old);
    std::swap(old, now);
  }
  return old[b.size()];
}

/// A limit in its shortest form: 0, 4096, 1e9.
std::string number(double value) {
  if (std::abs(value) < 1e6 || value != std::floor(value)) return fmt::format("{}", value);
  const std::string digits = fmt::format("{:.0f}", value);
  const size_t zeros = digits.size() - 1 - digits.find_last_not_of('0');
  return zeros < 6 ? digits : fmt::format("{}e{}", digits.substr(0, digits.size() - zeros), zeros);
}

std::string allowed_text(const Field& field) {
  std::string text;
  for (const std::string_view choice : field.choices)
    text += fmt::format("{}{}", text.empty() ? "" : ", ", choice);
  return text.empty() ? field.range.text() : text;
}

std::string default_text(const Field& field, Config& defaults) {
  if (!field.derived.empty()) return std::string(field.derived);
  std::string value = print_value(field, defaults);
  return value == "\"\"" ? "empty" : value;
}

}  // namespace

namespace detail {
Slot slot_of(int64_t& value) {
  return &value;
}
Slot slot_of(double& value) {
  return &value;
}
Slot slot_of(bool& value) {
  return &value;
}
Slot slot_of(std::string& value) {
  return &value;
}
Slot slot_of(Schedule& value) {
  return &value;
}
Slot slot_of(std::vector<DataSource>& value) {
  return &value;
}
Slot slot_of(StepRange& value) {
  return &value;
}
}  // namespace detail

bool Range::contains(double value) const {
  const bool low = above_min ? value > min : value >= min;
  const bool high = below_max ? value < max : value <= max;
  return low && high && (!whole || value == std::floor(value));
}

std::string Range::text() const {
  // A limit that only guards against overflow is no news to the reader.
  const bool limited = max < 1e5;
  const std::string kind = whole ? "whole, " : "";
  if (min == -kUnlimited && max == kUnlimited) return whole ? "whole" : "";
  if (min > -kUnlimited && !limited)
    return kind + fmt::format("{} {}", above_min ? "more than" : "at least", number(min)) +
           (max < kUnlimited ? fmt::format(", at most {}", number(max)) : "");
  if (above_min || below_max)
    return kind + fmt::format("{} {} and {} {}", above_min ? "more than" : "at least", number(min),
                              below_max ? "less than" : "at most", number(max));
  return kind + fmt::format("between {} and {}", number(min), number(max));
}

std::span<const Field> schema() {
  return index().fields;
}

const Field* find_field(std::string_view path) {
  const auto found = index().by_path.find(path);
  return found == index().by_path.end() ? nullptr : &index().fields[found->second];
}

bool is_section(std::string_view path) {
  return std::ranges::find(index().sections, path) != index().sections.end();
}

std::string kind_of(const Field& field) {
  static constexpr const char* kKinds[] = {
      "integer", "number",   "true or false", "text",
      "word",    "schedule", "list of paths", "pair of integers"};
  Config any;
  const bool word = !field.choices.empty();
  return word ? "word" : kKinds[field.slot(any).index()];
}

std::string_view nearest(std::string_view name, std::span<const std::string_view> names) {
  constexpr size_t kLongest = 64;
  if (name.empty() || name.size() > kLongest) return "";
  std::string_view best;
  size_t best_distance = std::max<size_t>(2, name.size() / 3) + 1;
  for (const std::string_view candidate : names) {
    const size_t distance = edit_distance(name, candidate);
    const bool within = candidate.size() > distance;  // something must be shared
    if (within && distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

std::string suggest_key(std::string_view path) {
  const std::string_view section = section_of(path);
  const auto found = index().names.find(section);
  if (found == index().names.end()) return section.empty() ? "" : suggest_key(section);
  const auto full = [&](std::string_view name) {
    return section.empty() ? std::string(name) : fmt::format("{}.{}", section, name);
  };
  const std::string_view near = nearest(name_of(path), found->second);
  if (!near.empty()) return fmt::format("did you mean {}?", full(near));
  std::vector<std::string_view> paths;  // the same name in another section
  for (const auto& [candidate, position] : index().by_path) {
    if (name_of(candidate) == name_of(path)) return fmt::format("did you mean {}?", candidate);
  }
  for (const std::string_view candidate : index().sections) {
    if (name_of(candidate) == name_of(path)) return fmt::format("did you mean {}?", candidate);
  }
  for (const auto& [other, names] : index().names) {
    const std::string_view hit = nearest(name_of(path), names);
    if (!hit.empty() && edit_distance(hit, name_of(path)) <= 1)
      return fmt::format("did you mean {}{}{}?", other, other.empty() ? "" : ".", hit);
  }
  std::string list;
  for (const std::string_view name : found->second)
    list += fmt::format("{}{}", list.empty() ? "" : ", ", name);
  return section.empty() ? fmt::format("the sections are {}", list)
                         : fmt::format("{} has {}", section, list);
}

std::string keys_as_markdown() {
  std::string text;
  Config defaults;
  for (const std::string_view section : index().sections) {
    std::string rows;
    for (const Field& field : schema()) {
      if (section_of(field.key) != section) continue;
      std::string name = fmt::format("`{}`", name_of(field.key));
      for (const std::string_view alias : field.aliases) name += fmt::format(", `{}`", alias);
      rows +=
          fmt::format("| {} | {} | {} | {} | {} | {} |\n", name, kind_of(field),
                      default_text(field, defaults), field.unit, allowed_text(field), field.about);
    }
    if (rows.empty()) continue;
    text += fmt::format(
        "### {}\n\n| key | type | default | unit | allowed | meaning |\n|---|---|---|---|---|---|\n"
        "{}\n",
        section, rows);
  }
  return text;
}

}  // namespace dsv3
