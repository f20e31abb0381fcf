#include "monitor/report.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <string>

#include "base/error.h"
#include "monitor/curves.h"
#include "monitor/report_panels.h"

namespace dsv3 {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

class ReportTest : public testing::Test {
 protected:
  ReportTest() {
    char name[] = "/tmp/dsv3_report_XXXXXX";
    directory_ = mkdtemp(name);
  }
  ~ReportTest() override { std::filesystem::remove_all(directory_); }

  RunHistory read(const std::string& lines) {
    std::ofstream(directory_ / "metrics.jsonl", std::ios::binary) << lines;
    return read_run_history(directory_);
  }
  /// The page's data, parsed again.
  static nlohmann::json data_of(const std::string& page) {
    const std::string open = R"(<script type="application/json" id="data">)";
    const size_t begin = page.find(open) + open.size();
    return nlohmann::json::parse(page.substr(begin, page.find("</script>", begin) - begin));
  }

  std::filesystem::path directory_;
};

MetricSeries random_walk(size_t count, uint32_t seed, double share_of_gaps) {
  std::mt19937 random(seed);
  std::normal_distribution<double> move;
  std::uniform_real_distribution<double> uniform;
  MetricSeries series;
  double value = 0;
  for (size_t i = 0; i < count; ++i) {
    value += move(random);
    const bool gap = uniform(random) < share_of_gaps;
    series.push_back({static_cast<int64_t>(3 * i + 1), gap ? kNan : value});
  }
  return series;
}

TEST(Curves, ThinnedCurvesKeepExtremesEndsGapsAndOrder) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  for (const double gaps : {0.0, 0.01}) {
    for (const size_t count : {0, 1, 8, 100, 101, 2001, 54321}) {
      const MetricSeries series = random_walk(count, seed, gaps);
      const MetricSeries thin = thin_out(series, 100);
      ASSERT_LE(thin.size(), 100U);
      if (count <= 100) {
        ASSERT_EQ(thin.size(), count);
        continue;
      }
      EXPECT_GE(thin.size(), 60U);
      EXPECT_EQ(thin.front().step, series.front().step);
      EXPECT_EQ(thin.back().step, series.back().step);
      const auto less = [](const MetricPoint& a, const MetricPoint& b) { return a.step < b.step; };
      EXPECT_TRUE(std::is_sorted(thin.begin(), thin.end(), less));
      double low = 1e9, high = -1e9, thin_low = 1e9, thin_high = -1e9;
      for (const auto& p : series) low = std::fmin(low, p.value), high = std::fmax(high, p.value);
      for (const auto& p : thin)
        thin_low = std::fmin(thin_low, p.value), thin_high = std::fmax(thin_high, p.value);
      EXPECT_EQ(thin_low, low);
      EXPECT_EQ(thin_high, high);
      const auto is_gap = [](const MetricPoint& p) { return std::isnan(p.value); };
      EXPECT_EQ(std::any_of(thin.begin(), thin.end(), is_gap),
                std::any_of(series.begin(), series.end(), is_gap));
    }
  }
}

TEST(Curves, ThinnedCurveOfEqualValuesHasNoPointTwice) {
  const MetricSeries thin = thin_out(MetricSeries(1000, MetricPoint{.step = 7, .value = 1}), 100);
  EXPECT_EQ(thin.size(), 51U);  // the ends, and one of each of 49 buckets
}

TEST(Curves, MeansAreCentredAndLeaveGaps) {
  const MetricSeries series{{1, 10}, {2, 4}, {3, kNan}, {4, 1}, {5, 3}, {6, 8}};
  const MetricSeries means = smooth(series, 5);
  ASSERT_EQ(means.size(), 6U);
  EXPECT_EQ(means[0].value, 10);  // alone: nothing before it
  EXPECT_EQ(means[1].value, 7);   // one on each side, one of them a gap
  EXPECT_TRUE(std::isnan(means[2].value));
  EXPECT_EQ(means[3].value, 4);  // (4 + 1 + 3 + 8) / 4
  EXPECT_EQ(means[4].value, 4);  // (1 + 3 + 8) / 3, nothing after 6
  EXPECT_EQ(means[5].value, 4);
}

TEST(Curves, BucketMeansShareTheirSteps) {
  const MetricSeries a{{1, 1}, {2, 3}, {3, 5}, {4, 7}}, b{{2, 10}, {4, kNan}};
  const AlignedSeries means = bucket_means({&a, &b}, 2);
  EXPECT_EQ(means.steps, (std::vector<int64_t>{2, 4}));
  EXPECT_EQ(means.values[0], (std::vector<double>{2, 6}));
  EXPECT_EQ(means.values[1][0], 10);
  EXPECT_TRUE(std::isnan(means.values[1][1]));
}

TEST(Curves, SummariesSkipWhatIsNotFinite) {
  const MetricSeries series{{1, 4}, {2, kNan}, {3, 1}, {4, 2}};
  EXPECT_EQ(median(series), 2);
  EXPECT_EQ(median({{1, 4}, {2, 1}}), 2.5);
  EXPECT_EQ(mean_of_last(series, 2), 1.5);
  EXPECT_EQ(smallest(series).step, 3);
  EXPECT_TRUE(std::isnan(median({})) && std::isnan(mean_of_last({}, 5)));
}

TEST_F(ReportTest, ReadsLinesAndEvents) {
  const RunHistory history =
      read(R"({"time":100.5,"step":1,"train/loss":2.5,"train/grad_norm":null})"
           "\n"
           R"({"time":101.5,"step":2,"train/loss":2.25,"moe/expert_distribution":[[4,0],[1,3]]})"
           "\n"
           R"({"time":102.0,"step":2,"event":"checkpoint","path":"checkpoints/step_2","bytes":12})"
           "\n"
           R"({"time":103.0,"step":2,"eval/loss":2.0})"
           "\n");
  EXPECT_EQ(history.num_lines, 4);
  EXPECT_EQ(history.num_broken, 0);
  EXPECT_FALSE(history.last_line_cut);
  ASSERT_EQ(history.series("train/loss").size(), 2U);
  EXPECT_EQ(history.series("train/loss")[1].value, 2.25);
  EXPECT_TRUE(std::isnan(history.series("train/grad_norm")[0].value));
  EXPECT_TRUE(history.series("no/such").empty());
  ASSERT_EQ(history.events.size(), 1U);
  EXPECT_EQ(history.events[0].details, "path: checkpoints/step_2, bytes: 12");
  ASSERT_EQ(history.loads.size(), 1U);
  EXPECT_EQ(history.loads[0].cells, (std::vector<uint8_t>{100, 0, 25, 75}));  // 50 is the mean
}

TEST_F(ReportTest, CountsAndNamesBrokenLines) {
  const RunHistory history = read(
      "{\"step\":1,\"train/loss\":2}\nnot json\n[1]\n{\"train/loss\":3}\n{\"step\":\"x\"}\n"
      "{\"step\":-1}\n{\"step\":2,\"train/loss\":1e999}\n"
      "{\"step\":3,\"moe/expert_distribution\":[[1],[1,2]]}\n{\"step\":4,\"train/lo");
  EXPECT_EQ(history.num_lines, 1);
  EXPECT_EQ(history.num_broken, 7);
  ASSERT_EQ(history.broken.size(), RunHistory::kMostNamed);
  EXPECT_EQ(history.broken[0], "line 2 is not a JSON object");
  EXPECT_EQ(history.broken[2], "line 4 has no integer \"step\"");
  EXPECT_TRUE(history.last_line_cut);
}

TEST_F(ReportTest, AStepThatComesAgainReplacesTheOldOnes) {
  const RunHistory history = read(
      "{\"step\":1,\"train/loss\":5}\n{\"step\":2,\"train/loss\":4}\n{\"step\":3,\"train/"
      "loss\":3}\n"
      "{\"step\":2,\"train/loss\":8}\n");
  ASSERT_EQ(history.series("train/loss").size(), 2U);
  EXPECT_EQ(history.series("train/loss")[1].step, 2);
  EXPECT_EQ(history.series("train/loss")[1].value, 8);
}

TEST_F(ReportTest, AClockThatWasSetBackStandsStill) {
  const RunHistory history = read(
      "{\"time\":5000,\"step\":1,\"train/loss\":3}\n{\"time\":5010,\"step\":2,\"train/loss\":3}\n"
      "{\"time\":1420,\"step\":2,\"event\":\"checkpoint\"}\n"
      "{\"time\":1425,\"step\":3,\"train/loss\":2}\n{\"time\":1435,\"step\":4,\"train/loss\":2}\n");
  ASSERT_EQ(history.times.size(), 4U);
  EXPECT_EQ(history.events.at(0).time, 5010);
  EXPECT_EQ(history.times[2].value, 5015);
  EXPECT_EQ(history.times[3].value, 5025);
}

TEST_F(ReportTest, SaysWhatIsMissing) {
  const auto message = [](const std::filesystem::path& path) -> std::string {
    try {
      read_run_history(path);
    } catch (const IoError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(message(directory_ / "none").find("is not a directory"), std::string::npos);
  EXPECT_NE(message(directory_).find("holds no metrics.jsonl"), std::string::npos);
  EXPECT_THROW(read(""), IoError);
  EXPECT_THROW(read("half a li"), IoError);
}

TEST_F(ReportTest, TextOfTheRunCannotBecomeMarkup) {
  const std::string evil = "</script><script>alert('x')</script><!--&amp;\xff{{script}}";
  std::ofstream(directory_ / "config.yaml", std::ios::binary) << evil;
  nlohmann::json event{{"step", 1}, {"event", "<b>"}, {"error", "<script>alert(2)</script>"}};
  RunHistory history = read("{\"step\":1,\"train/loss\":2}\n" + event.dump() + "\n");
  history.name = "<img src=x onerror=alert(3)>";
  const std::string page = report_page({{std::move(history), "dsv3 train '</script>'"}});
  EXPECT_EQ(page.find("alert('x')</script>"), std::string::npos);
  EXPECT_EQ(page.find("<script>alert"), std::string::npos);
  EXPECT_EQ(page.find("<img"), std::string::npos);
  const nlohmann::json data = data_of(page);
  EXPECT_EQ(data["runs"][0]["config"],
            "</script><script>alert('x')</script><!--&amp;\xEF\xBF\xBD{{script}}");
  EXPECT_EQ(data["runs"][0]["resume"], "dsv3 train '</script>'");
  EXPECT_EQ(data["runs"][0]["events"][0]["name"], "<b>");
}

TEST(Report, EscapesText) {
  EXPECT_EQ(escape_html("<a href=\"x\">&'"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;");
  EXPECT_EQ(escape_json_for_html(R"(["<&>"])"), R"(["\u003c\u0026\u003e"])");
}

TEST_F(ReportTest, ThinsLongRunsAndSaysSo) {
  std::string lines;
  for (int step = 1; step <= 5000; ++step)
    lines += fmt::format("{{\"step\":{},\"train/loss\":{}}}\n", step, 1.0 / step);
  const nlohmann::json data = data_of(report_page({{read(lines), ""}}));
  ASSERT_EQ(data["panels"].size(), 1U);
  for (const auto& series : data["panels"][0]["series"]) {
    EXPECT_EQ(series["total"], 5000);
    EXPECT_LE(series["step"].size(), kMostPoints);
    EXPECT_GT(series["step"].size(), kMostPoints / 3);
    EXPECT_EQ(series["step"].size(), series["value"].size());
  }
}

TEST_F(ReportTest, PartsOfAStepAndTheRestAddUpToIt) {
  const RunHistory history = read(
      "{\"step\":1,\"train/step_time\":1,\"train/time_forward\":0.25,\"train/time_backward\":0.5,"
      "\"train/time_communication\":0}\n");
  const nlohmann::json panel = data_of(report_page({{history, ""}}))["panels"][0];
  EXPECT_EQ(panel["kind"], "stack");
  ASSERT_EQ(panel["series"].size(), 3U);  // communication took nothing
  EXPECT_EQ(panel["series"][2]["label"], "the rest");
  EXPECT_EQ(panel["series"][2]["value"][0], 0.25);
}

TEST_F(ReportTest, LoadsBecomeFramesOfOneShape) {
  std::string lines = "{\"step\":1,\"moe/expert_distribution\":[[1,2,3]]}\n";
  for (int step = 2; step <= 1001; ++step)
    lines += fmt::format(
        "{{\"step\":{},\"moe/max_vio/layer_3\":1,\"moe/max_vio/layer_12\":1,"
        "\"moe/expert_distribution\":[[4,0],[1,3]]}}\n",
        step);
  const nlohmann::json loads = report_loads(read(lines));
  EXPECT_EQ(loads["experts"], 2);
  EXPECT_EQ(loads["layers"], (nlohmann::json{3, 12}));
  EXPECT_EQ(loads["total"], 1000);
  ASSERT_EQ(loads["frames"].size(), 120U);
  EXPECT_EQ(loads["frames"][0]["step"], 2);
  EXPECT_EQ(loads["frames"][119]["step"], 1001);
  EXPECT_EQ(loads["frames"][5]["cells"], "ZAAZSw==");  // 100, 0, 25, 75 in base64
  EXPECT_TRUE(report_loads(read("{\"step\":1}\n")).is_null());
}

TEST_F(ReportTest, ComparesConfigsAndRefusesTooManyRuns) {
  std::vector<ReportRun> runs(3, {read("{\"step\":1,\"train/loss\":2}\n"), ""});
  runs[0].history.config = "training: {steps: 10, seed: 3}\n";
  runs[1].history.config = "training: {steps: 20, seed: 3}\n";
  runs[2].history.config = "no: config\n";
  const nlohmann::json data = data_of(report_page(runs));
  bool steps = false;
  for (const auto& row : data["differences"]["rows"]) {
    EXPECT_NE(row["key"], "training.seed");
    if (row["key"] != "training.steps") continue;
    steps = true;
    EXPECT_EQ(row["values"], (nlohmann::json{"10", "20", "–"}));
  }
  EXPECT_TRUE(steps) << data["differences"];
  ASSERT_EQ(data["differences"]["unreadable"].size(), 1U);
  EXPECT_EQ(data["runs"][0]["label"], directory_.string());  // three of the same name
  EXPECT_THROW(report_page({}), std::invalid_argument);
  EXPECT_THROW(report_page(std::vector<ReportRun>(9, runs[0])), std::invalid_argument);
}

}  // namespace
}  // namespace dsv3
