#include "config/load.h"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>

#include "base/error.h"
#include "base/file.h"
#include "config/deepspeed.h"
#include "config/draft.h"
#include "config/presets.h"

namespace dsv3 {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxReported = 100;

std::string joined(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += (text.empty() ? "" : "\n") + line;
  return text;
}

/// Key names come from the file too: long or multi-line ones are cut to what a line can hold.
std::string one_line(std::string text, size_t limit) {
  std::ranges::replace_if(
      text, [](char c) { return c == '\n' || c == '\r'; }, ' ');
  if (text.size() <= limit) return text;
  while (limit > 0 && (static_cast<unsigned char>(text[limit]) & 0xC0) == 0x80) --limit;
  return text.substr(0, limit) + "…";
}

/// A key as errors show it: in quotes where it would not read as one word.
std::string shown_key(const std::string& key) {
  const bool plain = !key.empty() && key.find_first_of(" \t\r\n:\"") == std::string::npos;
  return one_line(plain ? key : fmt::format("\"{}\"", key), 200);
}

/// Throws ConfigErrors with the issues in the order of the file; none when there are none.
void report(Issues& issues) {
  if (issues.empty()) return;
  // The files in the order in which they first complain.
  std::vector<std::string> sources;
  const auto rank = [&](const Issue& issue) {
    const std::string source = issue.place.source ? *issue.place.source : "";
    const auto found = std::ranges::find(sources, source);
    if (found != sources.end()) return found - sources.begin();
    sources.push_back(source);
    return static_cast<std::ptrdiff_t>(sources.size()) - 1;
  };
  for (const Issue& issue : issues.list) rank(issue);
  std::ranges::stable_sort(issues.list, {}, [&](const Issue& issue) {
    return std::tuple(rank(issue), issue.place.line, issue.place.column);
  });
  std::vector<std::string> lines;
  for (const Issue& issue : issues.list) {
    if (lines.size() == kMaxReported) {
      lines.push_back(fmt::format("{}: config: {} more errors", issue.place.text(),
                                  issues.list.size() - kMaxReported));
      break;
    }
    lines.push_back(fmt::format("{}: {}: {}", issue.place.text(), shown_key(issue.key),
                                one_line(issue.message, 2000)));
  }
  throw ConfigErrors(std::move(lines));
}

std::string read_config_file(const fs::path& path) {
  std::error_code ignored;
  const auto size = fs::is_regular_file(path, ignored) ? fs::file_size(path, ignored) : 0;
  require(size <= kMaxDocumentBytes, "{}: a config has at most {} bytes, this file has {}",
          path.string(), kMaxDocumentBytes, size);
  return read_file(path);
}

/// The preset that the tree names, read into the draft. False when the name is unknown.
bool read_preset(const Node& root, Draft& draft, Issues& issues) {
  const Node* model = root.find("model");
  const Node* node = model != nullptr ? model->find("preset") : nullptr;
  if (node == nullptr || node->is_null() || !node->is_scalar() || node->text.empty()) return true;
  const auto names = preset_names();
  const auto found = std::ranges::find(presets(), node->text, &Preset::name);
  if (found == presets().end()) {
    std::string list;
    for (const std::string_view name : names)
      list += fmt::format("{}{}", list.empty() ? "" : ", ", name);
    const std::string_view near = nearest(node->text, names);
    issues.add(
        node->place, "model.preset",
        fmt::format("unknown preset {}, {} (there are {})", node->describe(),
                    near.empty() ? "expected one of these" : fmt::format("did you mean {}?", near),
                    list));
    return false;
  }
  Issues inner;
  const auto tree =
      parse_yaml(found->yaml, std::make_shared<const std::string>(found->name), inner);
  DSV3_CHECK(tree && inner.empty(), "preset {} is no YAML", found->name);
  draft.read(*tree, true, inner);
  DSV3_CHECK(inner.empty(), "preset {}: {}: {}", found->name, inner.list.front().key,
             inner.list.front().message);
  return true;
}

/// Reads a tree to the end. What is wrong goes to `issues`; the draft is usable all the same.
Draft read_tree(const Node& root, Issues& issues) {
  Draft draft;
  const bool known_preset = read_preset(root, draft, issues);
  draft.read(root, false, issues);
  draft.read_schedules(issues);
  resolve(draft, issues);
  if (!known_preset) return draft;
  for (const BrokenRule& rule : broken_rules(draft.config)) {
    const bool spoilt =
        std::ranges::any_of(rule.keys, [&](std::string_view key) { return draft.has_failed(key); });
    if (!spoilt) issues.list.push_back(draft.blame(rule.keys, rule.message));
  }
  return draft;
}

/// Takes `deepspeed` out of the tree: the map inside it, or the file that it names.
std::optional<Node> take_deepspeed(Node& root, const fs::path& directory,
                                   const std::optional<DeepSpeedText>& given, Issues& issues) {
  std::optional<Node> written;
  if (const Node* node = root.find("deepspeed")) {
    written = *node;
    root.erase("deepspeed");
  }
  const auto parse = [&](const std::string& text, const std::string& name) {
    return parse_json(text, std::make_shared<const std::string>(name), issues);
  };
  if (given) return parse(given->text, given->name);
  if (!written || written->is_null()) return std::nullopt;
  if (!written->is_scalar()) return written;
  try {
    const fs::path path =
        written->place.line > 0 ? directory / written->text : fs::path(written->text);
    return parse(read_config_file(path), path.string());
  } catch (const std::runtime_error& error) {
    issues.add(written->place, "deepspeed", error.what());
  } catch (const std::invalid_argument& error) {
    issues.add(written->place, "deepspeed", error.what());
  }
  return std::nullopt;
}

}  // namespace

ConfigErrors::ConfigErrors(std::vector<std::string> lines)
    : std::invalid_argument(joined(lines)), errors(std::move(lines)) {}

Config load_config_text(std::string_view yaml, const std::string& name,
                        const std::vector<std::string>& overrides,
                        const std::optional<DeepSpeedText>& deepspeed) {
  Issues issues;
  auto tree = parse_yaml(yaml, std::make_shared<const std::string>(name), issues);
  if (!tree) report(issues);
  Node root = std::move(*tree);
  for (const std::string& text : overrides) apply_override(root, text, issues);
  const auto json = take_deepspeed(root, fs::path(name).parent_path(), deepspeed, issues);
  if (json) {
    Issues ignored;
    const Draft base = read_tree(root, ignored);
    apply_deepspeed(
        *json, base.config, [&](std::string_view key) { return base.is_written(key); }, root,
        issues);
    for (const std::string& text : overrides) apply_override(root, text, ignored);
    root.erase("deepspeed");
  }
  Draft draft = read_tree(root, issues);
  report(issues);
  return std::move(draft.config);
}

Config load_config(const fs::path& path, const std::vector<std::string>& overrides,
                   const fs::path& deepspeed) {
  std::optional<DeepSpeedText> json;
  if (!deepspeed.empty()) json = {read_config_file(deepspeed), deepspeed.string()};
  return load_config_text(read_config_file(path), path.string(), overrides, json);
}

std::span<const std::string_view> preset_names() {
  static const std::vector<std::string_view> names = [] {
    std::vector<std::string_view> names;
    for (const Preset& preset : presets()) names.push_back(preset.name);
    return names;
  }();
  return names;
}

Config preset_config(std::string_view name) {
  return load_config_text(fmt::format("model: {{preset: {}}}", name), std::string(name));
}

void validate(const Config& config) {
  std::vector<std::string> lines;
  Config copy = config;
  for (const Field& field : schema()) {
    const auto check = [&](double value) {
      if (!field.range.contains(value))
        lines.push_back(
            fmt::format("{}: must be {}, got {}", field.key, field.range.text(), value));
    };
    const Slot slot = field.slot(copy);
    if (const auto* integer = std::get_if<int64_t*>(&slot)) check(static_cast<double>(**integer));
    if (const auto* number = std::get_if<double*>(&slot)) check(**number);
    if (const auto* schedule = std::get_if<Schedule*>(&slot)) {
      for (const SchedulePiece& piece : (*schedule)->pieces) {
        check(piece.from);
        check(piece.to);
        if (piece.length < 1 && &piece != &(*schedule)->pieces.back())
          lines.push_back(fmt::format("{}: only the last piece may be open", field.key));
      }
      if ((*schedule)->pieces.empty())
        lines.push_back(fmt::format("{}: a schedule needs at least one piece", field.key));
    }
  }
  if (!lines.empty()) throw ConfigErrors(std::move(lines));
  for (const BrokenRule& rule : broken_rules(config))
    lines.push_back(fmt::format("{}: {}", rule.keys.front(), rule.message));
  if (!lines.empty()) throw ConfigErrors(std::move(lines));
}

}  // namespace dsv3
