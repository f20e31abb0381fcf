#include "monitor/jsonl.h"

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace dsv3 {

std::string to_json_line(const Record& record) {
  nlohmann::ordered_json line;
  line["step"] = record.step;
  for (const auto& [name, value] : record.values) line[name] = value;
  return line.dump();
}

JsonlSink::JsonlSink(std::filesystem::path path)
    : path_(std::move(path)), file_(path_, std::ios::app) {
  if (!file_)
    throw IoError(fmt::format("cannot open {}: {}", path_.string(), std::strerror(errno)));
}

void JsonlSink::write(const Record& record) {
  file_ << to_json_line(record) << '\n' << std::flush;
  if (!file_)
    throw IoError(fmt::format("cannot write {}: {}", path_.string(), std::strerror(errno)));
}

}  // namespace dsv3
