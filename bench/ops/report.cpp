#include "bench/ops/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace dsv3::bench {
namespace {

using Json = nlohmann::ordered_json;

/// Four significant digits, more than a timing holds: the double nearest to them prints short.
double rounded(double value) {
  return std::stod(fmt::format("{:.4g}", value));
}

Json case_json(const std::string& name, const Problem& problem, const Plan& plan,
               const std::string& device) {
  Json json;
  json["op"] = name;
  json["shape"] = problem.shape.name;
  json["device"] = device;
  json["dtype"] = name_of(problem.dtype);
  json["tokens"] = problem.tokens;
  for (const auto& [letter, size] : plan.dims) json["dims"][letter] = size;
  json["bytes"] = plan.bytes;
  return json;
}

std::string microseconds(double seconds) {
  return seconds >= 1e-2 ? fmt::format("{:.0f}", seconds * 1e6)
                         : fmt::format("{:.1f}", seconds * 1e6);
}

/// "T=16384 D=7168".
std::string dims_text(const Plan& plan) {
  std::string text;
  for (const auto& [letter, size] : plan.dims)
    text += fmt::format("{}{}={}", text.empty() ? "" : " ", letter, size);
  return text;
}

std::string row(const CaseResult& result) {
  const WayResult& ours = result.ways.front();
  const std::string head =
      fmt::format("{:<28}{:<8}{:>9.1f} MB", result.name, result.problem.shape.name,
                  static_cast<double>(result.plan.bytes) * 1e-6);
  if (!ours.error.empty()) return fmt::format("{}  {}\n", head, ours.error);
  std::string text =
      fmt::format("{}{:>12}{:>9.1f}{:>9.1f}", head, microseconds(ours.median),
                  result.bytes_per_second(ours) * 1e-9, result.percent_of_copy(ours));
  if (result.ways.size() > 1) {
    const WayResult& composed = result.ways[1];
    text += composed.error.empty() ? fmt::format("{:>13}{:>8.2f}", microseconds(composed.median),
                                                 composed.median / ours.median)
                                   : fmt::format("{:>13}{:>8}", "failed", "-");
  } else {
    text += fmt::format("{:>13}{:>8}", "-", "-");
  }
  return fmt::format("{}  {}\n", text, dims_text(result.plan));
}

}  // namespace

std::string json_lines(const CaseResult& result, const RunOptions& options,
                       const std::string& device_name) {
  std::string lines;
  for (const auto& way : result.ways) {
    Json json = case_json(result.name, result.problem, result.plan, options.device.str());
    json["device_name"] = device_name;
    json["way"] = way.way;
    if (!way.error.empty()) {
      json["error"] = way.error;
    } else {
      json["median_us"] = rounded(way.median * 1e6);
      json["min_us"] = rounded(way.minimum * 1e6);
      json["gbps"] = rounded(result.bytes_per_second(way) * 1e-9);
      json["copy_gbps"] = rounded(result.copy_bytes_per_second * 1e-9);
      json["percent_of_copy"] = rounded(result.percent_of_copy(way));
      json["timed"] = way.timed;
      json["rounds"] = result.rounds;
      json["runs"] = way.runs;
      json["sets"] = result.sets;
    }
    json["seed"] = options.seed;
    lines += json.dump() + "\n";
  }
  return lines;
}

std::string json_plan(const Benchmark& benchmark, const Problem& problem,
                      const std::string& device) {
  const Plan plan = benchmark.plan(problem);
  Json json = case_json(benchmark.name, problem, plan, device);
  json["allocated"] = std::max(plan.bytes, plan.allocated);
  return json.dump() + "\n";
}

std::string table(const std::vector<CaseResult>& results) {
  if (results.empty()) return "";
  std::string text =
      fmt::format("{:<28}{:<8}{:>12}{:>12}{:>9}{:>9}{:>13}{:>8}  {}\n", "operator", "shape",
                  "to move", "ours us", "GB/s", "% copy", "LibTorch us", "ratio", "dims");
  double slowest = 0, fastest = 0;
  for (const auto& result : results) {
    text += row(result);
    const double copy = result.copy_bytes_per_second * 1e-9;
    if (copy <= 0) continue;
    slowest = slowest == 0 ? copy : std::min(slowest, copy);
    fastest = std::max(fastest, copy);
  }
  return text + fmt::format("copy bandwidth, measured between the cases: {:.1f} to {:.1f} GB/s\n",
                            slowest, fastest);
}

}  // namespace dsv3::bench
