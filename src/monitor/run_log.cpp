#include "monitor/run_log.h"

#include <spdlog/logger.h>
#include <spdlog/sinks/basic_file_sink.h>

#include "base/error.h"

namespace dsv3 {

RunLog::RunLog(const std::filesystem::path& path) {
  try {
    logger_ = std::make_shared<spdlog::logger>(
        "run", std::make_shared<spdlog::sinks::basic_file_sink_mt>(path.string()));
  } catch (const spdlog::spdlog_ex& error) {
    throw IoError(fmt::format("cannot open {}: {}", path.string(), error.what()));
  }
  logger_->set_pattern("%Y-%m-%d %H:%M:%S.%e %l: %v");
  logger_->flush_on(spdlog::level::trace);
}

void RunLog::info(std::string_view message) {
  logger_->info("{}", message);
}
void RunLog::warn(std::string_view message) {
  logger_->warn("{}", message);
}
void RunLog::error(std::string_view message) {
  logger_->error("{}", message);
}

}  // namespace dsv3
