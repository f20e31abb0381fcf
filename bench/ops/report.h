#pragma once

#include <string>
#include <vector>

#include "bench/ops/run.h"

namespace dsv3::bench {

/// One JSON object a line for each way of the case; the keys stand in docs/performance.md.
std::string json_lines(const CaseResult& result, const RunOptions& options,
                       const std::string& device_name);

/// The case without times, as --dry-run prints it.
std::string json_plan(const Benchmark& benchmark, const Problem& problem,
                      const std::string& device);

/// A row for each case: ours beside LibTorch's way.
std::string table(const std::vector<CaseResult>& results);

}  // namespace dsv3::bench
