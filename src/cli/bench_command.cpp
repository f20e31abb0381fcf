#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "bench/ops/report.h"
#include "bench/ops/run.h"
#include "cli/checks.h"
#include "cli/commands.h"
#include "cli/progress_bar.h"
#include "config/schema.h"
#include "training/device.h"

namespace dsv3::cli {
namespace {

constexpr const char* kBenchExamples = R"(Examples:
  dsv3 bench op                    every operator at every shape
  dsv3 bench op rms_norm swiglu    some of them, forward and backward)";

constexpr const char* kOpExamples = R"(Examples:
  dsv3 bench op --list                                  the operators' names
  dsv3 bench op --shape small --tokens 4096 --table     one shape, and the table in any case
  dsv3 bench op rms_norm_forward --device cpu --dtype fp32 >> results.jsonl

NAME is one benchmark or the beginning of several (rms_norm, rms_norm_latent). Results are JSON lines
on standard output, one for each way; the table goes to standard error at the end, when that is a
terminal or with --table. docs/performance.md says what is timed, and what each key and column means.
Exit codes: 0 all were timed; 1 one of ours failed (its line has "error"); 2 a wrong name or option.)";

struct OpArguments {
  std::vector<std::string> names;
  std::string shape = "all", device = "auto", dtype = "bf16";
  int64_t tokens = 0, rounds = 0, threads = 0;
  uint64_t seed = 0;
  bool list = false, dry_run = false, table = false, ours_only = false;
};

/// Whether `name` selects the benchmark: itself, or the words that it begins with.
bool selects(const std::string& name, const std::string& benchmark) {
  return benchmark == name || benchmark.starts_with(name + "_");
}

std::vector<bench::Benchmark> chosen(const std::vector<std::string>& names) {
  const auto all = bench::benchmarks();
  if (names.empty()) return all;
  std::vector<std::string_view> known;
  for (const auto& benchmark : all) known.emplace_back(benchmark.name);
  for (const auto& name : names) {
    if (std::ranges::any_of(all, [&](const auto& b) { return selects(name, b.name); })) continue;
    const std::string_view near = nearest(name, known);
    if (near.empty()) invalid("no operator called '{}' (dsv3 bench op --list names them)", name);
    invalid("no operator called '{}', did you mean '{}'?", name, near);
  }
  std::vector<bench::Benchmark> picked;
  for (const auto& benchmark : all) {
    if (std::ranges::any_of(names, [&](const auto& n) { return selects(n, benchmark.name); }))
      picked.push_back(benchmark);
  }
  return picked;
}

bench::RunOptions run_options(const OpArguments& arguments) {
  bench::RunOptions options;
  options.benchmarks = chosen(arguments.names);
  for (const auto& shape : bench::shapes()) {
    if (arguments.shape == "all" || arguments.shape == shape.name) options.shapes.push_back(shape);
  }
  options.device = choose_device(arguments.device);
  options.dtype = arguments.dtype == "bf16" ? DType::kBF16 : DType::kF32;
  options.tokens = arguments.tokens;
  options.rounds = arguments.rounds;
  options.seed = arguments.seed != 0 ? arguments.seed : std::random_device{}();
  options.composed = !arguments.ours_only;
  return options;
}

void run_op(const OpArguments& arguments) {
  if (arguments.list) {
    for (const auto& b : bench::benchmarks()) fmt::print("{:<28}{}\n", b.name, b.what);
    return;
  }
  const auto options = run_options(arguments);
  if (arguments.dry_run) {
    for (const auto& benchmark : options.benchmarks) {
      for (const auto& shape : options.shapes) {
        fmt::print("{}", bench::json_plan(benchmark, bench::problem_of(shape, options),
                                          options.device.str()));
      }
    }
    return;
  }
  configure_process(arguments.threads, /*deterministic=*/false);
  const std::string name = device_name(options.device);
  std::vector<bench::CaseResult> results;
  bool failed = false;
  ProgressBar bar("bench");
  const auto begin = [&](const bench::Begun& next) {
    bar.show(
        static_cast<double>(next.before) / static_cast<double>(next.all),
        fmt::format("{}/{}  {} {}", next.before, next.all, next.benchmark.name, next.shape.name));
  };
  bench::run_benchmarks(options, begin, [&](const bench::CaseResult& result) {
    bar.clear();
    fmt::print("{}", bench::json_lines(result, options, name));
    std::fflush(stdout);
    failed = failed || !result.ways.front().error.empty();
    results.push_back(result);
  });
  if (arguments.table || isatty(STDERR_FILENO)) {
    fmt::print(stderr, "{}, {} threads, {}, seed {}\n{}", name, at::get_num_threads(),
               name_of(options.dtype), options.seed, bench::table(results));
  }
  if (failed) throw ExitRequest{kFailure};
}

void add_op_options(CLI::App& command, OpArguments& arguments) {
  command.add_option("NAME", arguments.names, "Operators (default: all)");
  command.add_option("--shape", arguments.shape, "Sizes: v3, lite12, small or all")
      ->check(CLI::IsMember({"v3", "lite12", "small", "all"}))
      ->capture_default_str();
  command
      .add_option("--tokens", arguments.tokens,
                  "Tokens (default: the shape's micro-batch on a GPU, 2048 on the CPU); buckets of "
                  "the optimizer then hold tokens × hidden elements")
      ->check(positive());
  command.add_option("--device", arguments.device, "Where to run: auto, cpu, cuda")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  command.add_option("--dtype", arguments.dtype, "Of activations and weights")
      ->check(CLI::IsMember({"bf16", "fp32"}))
      ->capture_default_str();
  command
      .add_option("--rounds", arguments.rounds,
                  "Samples of each way, in turn (default: 21 on a GPU, 5 on the CPU)")
      ->check(positive());
  command.add_option("--threads", arguments.threads, "CPU threads (0 = all cores)")
      ->check(non_negative());
  command.add_option("--seed", arguments.seed, "Of the inputs (default: a fresh one, printed)")
      ->check(positive());
  command.add_flag("--ours-only", arguments.ours_only, "Without LibTorch's own way");
  command.add_flag("--list", arguments.list, "Print the operators' names and what they do");
  command.add_flag("--dry-run", arguments.dry_run,
                   "Print the cases with sizes and bytes as JSON lines, run nothing");
  command.add_flag("--table", arguments.table, "Print the table even where no terminal reads it");
}

}  // namespace

void add_bench_command(CLI::App& app) {
  auto* command = app.add_subcommand(
      "bench", "Time operators beside LibTorch's own, against the machine's copy bandwidth");
  command->require_subcommand(1);
  command->footer(kBenchExamples);
  auto* op = command->add_subcommand("op", "Operators outside the matrix products");
  op->footer(kOpExamples);
  const auto arguments = std::make_shared<OpArguments>();
  add_op_options(*op, *arguments);
  op->callback([arguments] { run_op(*arguments); });
}

}  // namespace dsv3::cli
