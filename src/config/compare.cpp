#include "config/compare.h"

#include "config/schema.h"
#include "config/values.h"

namespace dsv3 {
namespace {

/// Lists of several lines on one, cut where they are long.
std::string on_one_line(const std::string& text) {
  constexpr size_t kLongest = 160;
  std::string line;
  for (const char c : text) {
    const bool space = c == ' ' || c == '\n';
    if (!space) line += c;
    if (space && !line.empty() && line.back() != ' ') line += ' ';
  }
  return line.size() <= kLongest ? line : line.substr(0, kLongest) + " …";
}

}  // namespace

std::vector<ConfigDifference> config_differences(const Config& first, const Config& second) {
  Config a = first, b = second;
  std::vector<ConfigDifference> differences;
  for (const Field& field : schema()) {
    const std::string x = print_value(field, a), y = print_value(field, b);
    if (x != y) differences.push_back({std::string(field.key), on_one_line(x), on_one_line(y)});
  }
  return differences;
}

}  // namespace dsv3
