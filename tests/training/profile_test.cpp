#include <map>
#include <set>

#include "base/error.h"
#include "training/trace_ranges.h"
#include "training/trainer_fixture.h"

namespace dsv3 {
namespace {

using nlohmann::json;

/// One event of our tracks.
struct Span {
  std::string path, track;
  double begin = 0, end = 0;
};

std::vector<Span> spans_of(const std::filesystem::path& trace) {
  std::vector<Span> spans;
  const json whole = json::parse(read_file(trace));
  for (const auto& event : whole["traceEvents"]) {
    if (!event.contains("cat") || event["cat"] != "dsv3") continue;
    EXPECT_EQ(event["pid"], "dsv3");
    const std::string path = event["args"]["path"];
    EXPECT_EQ(path.substr(path.rfind('/') + 1), event["name"]);
    const double begin = event["ts"], duration = event["dur"];
    spans.push_back({path, event["tid"], begin, begin + duration});
  }
  return spans;
}

/// Every span but the outermost lies within one of its parent's path, and spans of one track nest.
void expect_nested(const std::vector<Span>& spans) {
  constexpr double kRounding = 5e-3;  // µs: times are written with three decimals
  for (const Span& inner : spans) {
    const size_t slash = inner.path.rfind('/');
    bool found = slash == std::string::npos;
    for (const Span& outer : spans) {
      if (outer.track != inner.track || &outer == &inner) continue;
      const bool inside =
          inner.begin >= outer.begin - kRounding && inner.end <= outer.end + kRounding;
      found = found || (inside && outer.path == inner.path.substr(0, slash));
      const bool apart =
          inner.begin >= outer.end - kRounding || inner.end <= outer.begin + kRounding;
      const bool around =
          outer.begin >= inner.begin - kRounding && outer.end <= inner.end + kRounding;
      EXPECT_TRUE(inside || apart || around) << inner.path << " crosses " << outer.path;
    }
    EXPECT_TRUE(found) << inner.path << " has no parent around it";
  }
}

class ProfileTest : public test::TrainerFixture {};

TEST_F(ProfileTest, TheTraceHoldsStepsLayersAndOperatorsForwardAndBackward) {
  for (const auto recompute : {Recompute::kNone, Recompute::kFull}) {
    const std::string name = recompute == Recompute::kNone ? "none" : "full";
    config_.training.recompute = recompute;
    config_.profile.steps = {.first = 2, .last = 3};
    make(name, config_)->run();
    const auto spans = spans_of(directory_.path() / name / "profile" / "steps_2_3.json");
    expect_nested(spans);
    std::set<std::string> paths;
    for (const Span& span : spans) paths.insert(span.path);
    for (const std::string step : {"step 2", "step 3"}) {
      const std::string micro = step + "/micro-batch 1/";
      std::vector<std::string> expected{step + "/data",
                                        step + "/optimizer",
                                        micro + "forward/layer 0/mlp/linear",
                                        micro + "forward/layer 1/mla/attention",
                                        micro + "forward/layer 1/moe/grouped_linear",
                                        micro + "forward/head_cross_entropy",
                                        micro + "backward/layer 1",
                                        micro + "backward/head_cross_entropy",
                                        micro + "backward/embedding"};
      for (const char* op : {"mla/attention", "moe/grouped_linear", "moe/route"})
        expected.push_back(micro + "backward/layer 1/" + op);
      if (recompute == Recompute::kFull)
        expected.push_back(micro + "backward/layer 1/recompute/moe/grouped_linear");
      for (const auto& path : expected) EXPECT_TRUE(paths.contains(path)) << name << ": " << path;
    }
    EXPECT_FALSE(paths.contains("step 1"));
    EXPECT_FALSE(paths.contains("step 4"));
  }
}

TEST_F(ProfileTest, RangesOfAStreamAreJoinedLevelByLevel) {
  const auto trace = directory_.path() / "trace.json";
  json events = json::array();
  const auto add = [&](const char* name, double begin, double duration, const char* category) {
    events.push_back({{"ph", "X"},
                      {"cat", category},
                      {"name", name},
                      {"pid", 0},
                      {"tid", 7},
                      {"ts", begin},
                      {"dur", duration}});
  };
  const char* kGpu = "gpu_user_annotation";
  add("step 1/backward/layer 1/moe/linear", 20, 5, kGpu);
  add("step 1/backward/layer 1/mla/linear", 26, 2, kGpu);
  add("step 1/backward/layer 1/mla/linear", 30, 2, kGpu);
  add("step 1/backward/layer 0/mla/linear", 40, 1, kGpu);
  add("step 1/backward/layer 1", 10, 8, kGpu);  // what belongs to no operator
  add("somebody's range", 0, 100, kGpu);
  add("step 1", 0, 50, "user_annotation");
  add("aten::mm", 0, 50, "cpu_op");
  write_file_atomically(trace, json{{"traceEvents", events}}.dump());
  add_range_tracks(trace);
  EXPECT_EQ(json::parse(read_file(trace))["traceEvents"][5]["name"], "somebody's range");
  const auto spans = spans_of(trace);
  expect_nested(spans);
  std::multimap<std::string, std::pair<double, double>> found;
  for (const Span& span : spans)
    if (span.track == "GPU 0 stream 7") found.emplace(span.path, std::pair(span.begin, span.end));
  const std::multimap<std::string, std::pair<double, double>> expected{
      {"step 1", {10, 41}},
      {"step 1/backward", {10, 41}},
      {"step 1/backward/layer 0", {40, 41}},
      {"step 1/backward/layer 0/mla", {40, 41}},
      {"step 1/backward/layer 0/mla/linear", {40, 41}},
      {"step 1/backward/layer 1", {10, 32}},
      {"step 1/backward/layer 1/mla", {26, 32}},
      {"step 1/backward/layer 1/mla/linear", {26, 28}},
      {"step 1/backward/layer 1/mla/linear", {30, 32}},
      {"step 1/backward/layer 1/moe", {20, 25}},
      {"step 1/backward/layer 1/moe/linear", {20, 25}}};
  EXPECT_EQ(found, expected);
  write_file_atomically(trace, "[1, 2");
  EXPECT_THROW(add_range_tracks(trace), IoError);
}

}  // namespace
}  // namespace dsv3
