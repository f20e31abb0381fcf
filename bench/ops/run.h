#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bench/ops/case.h"

namespace dsv3::bench {

struct RunOptions {
  std::vector<Benchmark> benchmarks;
  std::vector<Shape> shapes;
  c10::Device device = c10::kCPU;
  DType dtype = DType::kBF16;
  int64_t tokens = 0;  // 0: the shape's micro-batch on a GPU, kHostTokens on the CPU
  int64_t rounds = 0;  // samples of each way; 0: 21 on a GPU, 5 on the CPU
  uint64_t seed = 1;
  bool composed = true;  // LibTorch's own way beside ours
};
inline constexpr int64_t kHostTokens = 2048;

/// How long one way took.
struct WayResult {
  const char* way;         // "ours", "composed"
  double median = 0;       // seconds of one run
  double minimum = 0;      // seconds of one run
  int64_t runs = 0;        // of one sample
  const char* timed = "";  // "graph", "launches", "clock"
  std::string error;       // why there is no time
};

/// One case: ours, and LibTorch's way when asked for.
struct CaseResult {
  std::string name;
  Problem problem;
  Plan plan;
  double copy_bytes_per_second = 0;  // of a large copy, sampled between the ways
  int64_t rounds = 0;
  int64_t sets = 0;  // of inputs, in turn
  std::vector<WayResult> ways;

  /// Bytes per second of a way: the plan's bytes over its median time.
  double bytes_per_second(const WayResult& way) const;
  double percent_of_copy(const WayResult& way) const;
};

/// The problem of one shape under these options.
Problem problem_of(const Shape& shape, const RunOptions& options);

/// How many sets of inputs a case takes in turn, so that none is still in a cache of `cache_bytes`.
int64_t sets_of(const Plan& plan, int64_t cache_bytes);

/// The case that comes next, and how many of all are done.
struct Begun {
  const Benchmark& benchmark;
  const Shape& shape;
  int64_t before, all;
};

/// Times every benchmark at every shape; says which comes next, and hands each result over as soon
/// as it is there. A case that fails (out of memory, say) is a result with an error; the others
/// run.
void run_benchmarks(const RunOptions& options, const std::function<void(const Begun&)>& begin,
                    const std::function<void(const CaseResult&)>& done);

}  // namespace dsv3::bench
