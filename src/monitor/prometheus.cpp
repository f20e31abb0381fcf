#include "monitor/prometheus.h"

#include <fmt/format.h>

#include <cmath>

#include "base/error.h"
#include "base/file.h"

namespace dsv3 {
namespace {

constexpr auto kWriteEvery = std::chrono::seconds(5);

std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '\n') {
      out += "\\n";
      continue;
    }
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out;
}

std::string number(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
  return fmt::format("{}", value);
}

/// "moe/max_vio/layer_3" → {"dsv3_moe_max_vio", ",layer=\"3\""}.
std::pair<std::string, std::string> split(std::string_view name) {
  std::string label;
  for (const std::string_view kind : {"layer", "depth"}) {
    const std::string mark = fmt::format("/{}_", kind);
    const size_t found = name.rfind(mark);
    if (found == std::string_view::npos) continue;
    label = fmt::format(",{}=\"{}\"", kind, name.substr(found + mark.size()));
    name = name.substr(0, found);
  }
  std::string family = "dsv3_";
  for (const char c : name)
    family += (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ? c : '_';
  return {family, label};
}

}  // namespace

PrometheusSink::PrometheusSink(std::filesystem::path path, std::string run)
    : path_(std::move(path)), run_(std::move(run)) {
  write_file_atomically(path_, text());
}

PrometheusSink::~PrometheusSink() {
  try {
    write_file_atomically(path_, text());
  } catch (const IoError&) {  // a destructor must not throw
  }
}

std::string PrometheusSink::text() const {
  std::string out;
  for (const auto& [family, samples] : families_) {
    out += fmt::format("# TYPE {} gauge\n", family);
    for (const auto& [labels, value] : samples)
      out += fmt::format("{}{{run=\"{}\"{}}} {}\n", family, escaped(run_), labels, number(value));
  }
  return out;
}

void PrometheusSink::write(const Record& record) {
  families_["dsv3_step"][""] = static_cast<double>(record.step);
  for (const auto& [name, value] : record.values) {
    const auto [family, labels] = split(name);
    families_[family][labels] = value;
  }
  const auto now = std::chrono::steady_clock::now();
  if (now - written_ < kWriteEvery) return;
  written_ = now;
  write_file_atomically(path_, text());
}

}  // namespace dsv3
