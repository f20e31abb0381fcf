#include "monitor/jsonl.h"

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace dsv3 {

namespace {

/// Milliseconds are enough, and short.
double rounded(double unix_seconds) {
  return std::round(unix_seconds * 1000) / 1000;
}

double now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

}  // namespace

std::string to_json_line(const Record& record, double unix_seconds) {
  nlohmann::ordered_json line;
  line["time"] = rounded(unix_seconds);
  line["step"] = record.step;
  for (const auto& [name, value] : record.values) line[name] = value;
  for (const auto& table : record.tables) line[table.name] = table.counts;
  return line.dump();
}

std::string to_json_line(const Event& event, double unix_seconds) {
  nlohmann::ordered_json line;
  line["time"] = rounded(unix_seconds);
  line["step"] = event.step;
  line["event"] = event.name;
  for (const auto& [key, value] : event.details)
    std::visit([&line, &key](const auto& held) { line[key] = held; }, value);
  // A path or a message may hold bytes that are no UTF-8: they are replaced, not refused.
  return line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

JsonlSink::JsonlSink(std::filesystem::path path)
    : path_(std::move(path)), file_(path_, std::ios::app) {
  if (!file_)
    throw IoError(fmt::format("cannot open {}: {}", path_.string(), std::strerror(errno)));
}

void JsonlSink::write(const Record& record) {
  write_line(to_json_line(record, now()));
}

void JsonlSink::write(const Event& event) {
  write_line(to_json_line(event, now()));
}

void JsonlSink::write_line(const std::string& line) {
  file_ << line << '\n' << std::flush;
  if (!file_)
    throw IoError(fmt::format("cannot write {}: {}", path_.string(), std::strerror(errno)));
}

}  // namespace dsv3
