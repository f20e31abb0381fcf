#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "cli/commands.h"
#include "monitor/report.h"
#include "training/resume.h"

namespace dsv3::cli {
namespace {

namespace fs = std::filesystem;

constexpr const char* kExamples = R"(Examples:
  dsv3 report runs/first                            writes runs/first/report.html; while it trains, too
  dsv3 report runs/first --out first.html
  dsv3 report --compare runs/first runs/second      their curves over each other, and how their configs differ:
                                                    writes runs/first/comparison.html
The page needs no network and no other file. docs/report.md explains it.)";

struct Arguments {
  std::vector<std::string> runs;
  std::string out;
  bool compare = false;
};

void warn_of_lines(const RunHistory& history) {
  const std::string file = (history.directory / "metrics.jsonl").string();
  if (history.num_broken > 0)
    fmt::print(stderr, "dsv3: warning: {}: {} could not be read and {} left out: {}{}\n", file,
               history.num_broken == 1 ? std::string("1 line")
                                       : fmt::format("{} lines", history.num_broken),
               history.num_broken == 1 ? "is" : "are", fmt::join(history.broken, "; "),
               history.num_broken > static_cast<int64_t>(history.broken.size()) ? "; …" : "");
  if (history.last_line_cut)
    fmt::print(stderr, "dsv3: warning: {}: the last line is cut off and is left out\n", file);
}

void report(const Arguments& arguments) {
  const size_t count = arguments.runs.size();
  require(arguments.compare || count == 1,
          "dsv3 report shows one run, {} were given; dsv3 report --compare lays their curves over "
          "each other",
          count);
  require(!arguments.compare || count >= 2, "--compare needs two runs or more, only {} was given",
          arguments.runs.front());
  std::vector<ReportRun> runs;
  for (const std::string& directory : arguments.runs) {
    runs.push_back({read_run_history(directory), resume_command(directory)});
    warn_of_lines(runs.back().history);
  }
  const fs::path usual =
      fs::path(arguments.runs.front()) / (arguments.compare ? "comparison.html" : "report.html");
  const fs::path out = arguments.out.empty() ? usual : fs::path(arguments.out);
  const std::string page = report_page(runs);
  write_file_atomically(out, page);
  fmt::print("wrote {} ({:.0f} KB); open it in a browser\n", out.string(),
             static_cast<double>(page.size()) / 1e3);
}

}  // namespace

void add_report_command(CLI::App& app) {
  auto* command = app.add_subcommand("report", "One HTML page of a run's curves, or of several");
  const auto arguments = std::make_shared<Arguments>();
  command->add_option("runs", arguments->runs, "Directory of the run; several with --compare")
      ->required();
  command->add_flag("--compare", arguments->compare,
                    "Lay the curves of 2 to 8 runs over each other");
  command->add_option("--out", arguments->out,
                      "Where to write the page (default RUN/report.html, of the first run "
                      "RUN1/comparison.html with --compare)");
  command->footer(kExamples);
  command->callback([arguments] { report(*arguments); });
}

}  // namespace dsv3::cli
