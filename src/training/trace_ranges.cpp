#include "training/trace_ranges.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "base/error.h"
#include "base/file.h"

namespace dsv3 {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kProcess = "dsv3";

/// One of our ranges as Kineto recorded it; times in µs.
struct Recorded {
  std::string path;
  double begin = 0, end = 0;
};

std::vector<std::string> components(const std::string& path) {
  std::vector<std::string> parts;
  for (size_t begin = 0, end = 0; end != std::string::npos; begin = end + 1) {
    end = path.find('/', begin);
    parts.push_back(path.substr(begin, end == std::string::npos ? end : end - begin));
  }
  return parts;
}

/// Turns the ranges of one track into nested events.
class Track {
 public:
  Track(std::string name, Json& events) : name_(std::move(name)), events_(events) {}

  void write(std::vector<Recorded> ranges) {
    // Outer ranges first where several begin at once.
    std::ranges::stable_sort(ranges, [](const Recorded& a, const Recorded& b) {
      return std::tuple(a.begin, -a.end) < std::tuple(b.begin, -b.end);
    });
    for (const Recorded& range : ranges) add(range);
    close_to(0);
  }

 private:
  struct Open {
    std::string name;
    double begin = 0, end = 0;
  };

  void add(const Recorded& range) {
    const auto parts = components(range.path);
    size_t common = 0;
    while (common < std::min(parts.size(), open_.size()) && open_[common].name == parts[common])
      ++common;
    // The innermost range again is another one, not more of the same.
    if (common == parts.size() && common == open_.size()) --common;
    close_to(common);
    for (Open& level : open_) level.end = std::max(level.end, range.end);
    for (size_t i = common; i < parts.size(); ++i)
      open_.push_back({parts[i], range.begin, range.end});
  }

  void close_to(size_t depth) {
    for (; open_.size() > depth; open_.pop_back()) {
      std::string path;
      for (const Open& level : open_) path += (path.empty() ? "" : "/") + level.name;
      const Open& level = open_.back();
      events_.push_back({{"ph", "X"},
                         {"cat", "dsv3"},
                         {"name", level.name},
                         {"pid", kProcess},
                         {"tid", name_},
                         {"ts", level.begin},
                         {"dur", level.end - level.begin},
                         {"args", {{"path", path}}}});
    }
  }

  std::string name_;
  Json& events_;
  std::vector<Open> open_;
};

std::string text_of(const Json& value) {
  return value.is_string() ? value.get<std::string>() : value.dump();
}

}  // namespace

void add_range_tracks(const std::filesystem::path& trace) {
  try {
    Json json = Json::parse(read_file(trace));
    std::map<std::string, std::vector<Recorded>> tracks;
    for (const Json& event : json.at("traceEvents")) {
      const std::string category = event.value("cat", "");
      const bool gpu = category == "gpu_user_annotation";
      if ((!gpu && category != "user_annotation") || event.value("ph", "") != "X") continue;
      const auto path = event.at("name").get<std::string>();
      if (!path.starts_with("step ")) continue;
      const double begin = event.at("ts").get<double>(), duration = event.at("dur").get<double>();
      const std::string track =
          gpu ? fmt::format("GPU {} stream {}", text_of(event.at("pid")), text_of(event.at("tid")))
              : fmt::format("CPU thread {}", text_of(event.at("tid")));
      tracks[track].push_back({path, begin, begin + duration});
    }
    for (auto& [name, ranges] : tracks)
      Track(name, json.at("traceEvents")).write(std::move(ranges));
    write_file_atomically(trace, json.dump());
  } catch (const nlohmann::json::exception& error) {
    throw IoError(fmt::format("{} is no Chrome trace: {}", trace.string(), error.what()));
  }
}

}  // namespace dsv3
