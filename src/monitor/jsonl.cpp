#include "monitor/jsonl.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <tuple>

#include "base/error.h"

namespace dsv3 {

namespace {

/// Milliseconds are enough, and short.
double rounded(double seconds) {
  return std::round(seconds * 1000) / 1000;
}

/// Cuts a regular file behind its last newline.
void cut_half_line(int fd) {
  const off_t size = ::lseek(fd, 0, SEEK_END);
  std::array<char, 4096> block{};
  for (off_t end = size; end > 0;) {
    const off_t begin = std::max<off_t>(0, end - static_cast<off_t>(block.size()));
    const ssize_t read = ::pread(fd, block.data(), static_cast<size_t>(end - begin), begin);
    if (read != end - begin) return;
    for (off_t i = end; i > begin; --i) {
      if (block[static_cast<size_t>(i - begin - 1)] != '\n') continue;
      if (i < size) std::ignore = ::ftruncate(fd, i);
      return;
    }
    end = begin;
  }
  if (size > 0) std::ignore = ::ftruncate(fd, 0);
}

}  // namespace

double unix_seconds() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

std::string to_json_line(const Record& record, double time) {
  nlohmann::ordered_json line;
  line["time"] = rounded(time);
  line["step"] = record.step;
  for (const auto& [name, value] : record.values) line[name] = value;
  for (const auto& table : record.tables) line[table.name] = table.counts;
  return line.dump();
}

std::string to_json_line(const Event& event, double time) {
  nlohmann::ordered_json line;
  line["time"] = rounded(time);
  line["step"] = event.step;
  line["event"] = event.name;
  for (const auto& [key, value] : event.details)
    std::visit([&line, &key](const auto& held) { line[key] = held; }, value);
  // A path or a message may hold bytes that are no UTF-8: they are replaced, not refused.
  return line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

JsonlSink::JsonlSink(std::filesystem::path path) : path_(std::move(path)) {
  fd_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd_ < 0) throw IoError(fmt::format("cannot open {}: {}", path_.string(), strerror(errno)));
  cut_half_line(fd_);
}

JsonlSink::~JsonlSink() {
  ::close(fd_);
}

void JsonlSink::write(const Record& record) {
  write_line(to_json_line(record, unix_seconds()));
}

void JsonlSink::write(const Event& event) {
  write_line(to_json_line(event, unix_seconds()));
}

void JsonlSink::write_line(std::string line) {
  constexpr size_t kMostKept = size_t{64} << 20;
  if (pending_.size() < kMostKept) pending_ += line + '\n';
  const off_t end = ::lseek(fd_, 0, SEEK_END);
  size_t done = 0;
  while (done < pending_.size()) {
    const ssize_t written = ::write(fd_, pending_.data() + done, pending_.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      const int error = errno;
      // Note: where even that fails the half line stays; lines that follow would not parse either
      // way, and the next start cuts it off.
      if (done > 0 && ::ftruncate(fd_, end) != 0) pending_.erase(0, done);
      throw IoError(fmt::format("cannot write {}: {}", path_.string(), strerror(error)));
    }
    done += static_cast<size_t>(written);
  }
  pending_.clear();
}

}  // namespace dsv3
