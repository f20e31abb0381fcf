#pragma once

#include <filesystem>
#include <memory>
#include <string_view>

namespace spdlog {
class logger;
}

namespace dsv3 {

/// log.txt of a run: dated lines, flushed one by one.
class RunLog {
 public:
  /// Appends to `path`. Throws IoError when it cannot be opened.
  explicit RunLog(const std::filesystem::path& path);
  void info(std::string_view message);
  void warn(std::string_view message);
  void error(std::string_view message);

 private:
  std::shared_ptr<spdlog::logger> logger_;
};

}  // namespace dsv3
