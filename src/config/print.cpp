#include <fmt/format.h>

#include <algorithm>

#include "config/load.h"
#include "config/values.h"

namespace dsv3 {
namespace {

uint32_t decode(std::string_view character) {
  const auto byte = [&](size_t i) {
    return static_cast<uint32_t>(static_cast<unsigned char>(character[i]));
  };
  switch (character.size()) {
    case 2:
      return (byte(0) & 0x1F) << 6 | (byte(1) & 0x3F);
    case 3:
      return (byte(0) & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
    case 4:
      return (byte(0) & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 |
             (byte(3) & 0x3F);
    default:
      return byte(0);
  }
}

/// Characters that YAML's own grammar calls printable, without line breaks and byte-order marks.
bool printable(uint32_t code) {
  if (code < 0x20 || (code >= 0x7F && code < 0xA0)) return false;
  return code != 0x2028 && code != 0x2029 && code != 0xFEFF && code != 0xFFFE && code != 0xFFFF;
}

std::string quote(std::string_view text) {
  std::string quoted = "\"";
  while (!text.empty()) {
    const size_t length = std::max<size_t>(1, detail::utf8_length(text));
    const std::string_view character = text.substr(0, length);
    const uint32_t code = decode(character);
    if (code == '"' || code == '\\') {
      quoted += fmt::format("\\{}", character);
    } else if (code == '\n') {
      quoted += "\\n";
    } else if (printable(code)) {
      quoted += character;
    } else {
      quoted += fmt::format("\\u{:04x}", code);
    }
    text.remove_prefix(length);
  }
  return quoted + '"';
}

std::string print_sources(const std::vector<DataSource>& sources, int indent) {
  if (sources.empty()) return "[]";
  std::string text;
  for (const DataSource& source : sources) {
    text += fmt::format("\n{:{}}- {{path: {}, weight: {}}}", "", indent, print_text(source.path),
                        print_number(source.weight));
  }
  return text;
}

std::string_view section_of(std::string_view path) {
  return path.substr(0, path.rfind('.'));
}

}  // namespace

std::string print_number(double value) {
  std::string text = fmt::format("{}", value);
  if (text.find('.') != std::string::npos) return text;
  const size_t exponent = text.find('e');
  text.insert(exponent == std::string::npos ? text.size() : exponent, ".0");
  return text;
}

std::string print_text(std::string_view text) {
  const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
  bool plain = !text.empty() && (letter(text[0]) || text[0] == '/');
  for (const char c : text)
    plain = plain &&
            (letter(c) || (c >= '0' && c <= '9') || c == '/' || c == '.' || c == '_' || c == '-');
  for (const std::string_view word :
       {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}) {
    plain = plain && !std::equal(text.begin(), text.end(), word.begin(), word.end(),
                                 [](char a, char b) { return (a | 0x20) == b; });
  }
  return plain ? std::string(text) : quote(text);
}

std::string print_value(const Field& field, Config& config, int indent) {
  const Slot slot = field.slot(config);
  if (const auto* integer = std::get_if<int64_t*>(&slot)) {
    return field.zero_is_null && **integer == 0 ? "null" : fmt::format("{}", **integer);
  }
  if (const auto* number = std::get_if<double*>(&slot)) return print_number(**number);
  if (const auto* flag = std::get_if<bool*>(&slot)) return **flag ? "true" : "false";
  if (const auto* text = std::get_if<std::string*>(&slot)) return print_text(**text);
  if (const auto* choice = std::get_if<Choice>(&slot))
    return std::string(field.choices[*choice->index]);
  if (const auto* schedule = std::get_if<Schedule*>(&slot))
    return print_schedule(**schedule, indent);
  if (const auto* range = std::get_if<StepRange*>(&slot)) {
    const StepRange& steps = **range;
    return steps.first == 0 ? "[]" : fmt::format("[{}, {}]", steps.first, steps.last);
  }
  return print_sources(*std::get<std::vector<DataSource>*>(slot), indent);
}

std::string to_yaml(const Config& config) {
  Config copy = config;
  std::string text;
  std::string_view open;  // the section that was printed last
  for (const Field& field : schema()) {
    const std::string_view section = section_of(field.key);
    const size_t dot = section.find('.');
    if (section != open) {
      const std::string_view top = section.substr(0, dot);
      if (open.substr(0, open.find('.')) != top) text += fmt::format("{}:\n", top);
      if (dot != std::string_view::npos) text += fmt::format("  {}:\n", section.substr(dot + 1));
      open = section;
    }
    const int indent = dot == std::string_view::npos ? 2 : 4;
    const std::string value = print_value(field, copy, indent + 2);
    text += fmt::format("{:{}}{}:{}{}\n", "", indent, field.key.substr(section.size() + 1),
                        value.starts_with('\n') ? "" : " ", value);
  }
  return text;
}

FlatConfig flatten(const Config& config) {
  Config copy = config;
  FlatConfig flat;
  for (const Field& field : schema()) {
    const Slot slot = field.slot(copy);
    auto& value = flat.emplace_back(field.key, false).second;
    if (const auto* integer = std::get_if<int64_t*>(&slot)) {
      value = static_cast<double>(**integer);
    } else if (const auto* number = std::get_if<double*>(&slot)) {
      value = **number;
    } else if (const auto* flag = std::get_if<bool*>(&slot)) {
      value = **flag;
    } else if (const auto* text = std::get_if<std::string*>(&slot)) {
      value = **text;
    } else if (const auto* schedule = std::get_if<Schedule*>(&slot);
               schedule != nullptr && (*schedule)->is_constant()) {
      value = (*schedule)->at(0, 0);
    } else {
      std::string printed = print_value(field, copy);
      std::ranges::replace(printed, '\n', ' ');
      value = printed.substr(std::min(printed.size(), printed.find_first_not_of(' ')));
    }
  }
  return flat;
}

}  // namespace dsv3
