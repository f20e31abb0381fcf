#include <fmt/format.h>
#include <poll.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <new>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "base/error.h"
#include "cli/build_info.h"
#include "cli/commands.h"
#include "config/load.h"

namespace dsv3::cli {
namespace {

constexpr const char* kExamples = R"(Examples:
  dsv3 verify                                      what this machine has, and whether it computes right
  dsv3 config configs/deepseek_v3_tiny.yaml        check a config and print it in full
  dsv3 plan configs/deepseek_v3_base.yaml          parameters, FLOPs per token and memory
  dsv3 train configs/deepseek_v3_tiny.yaml model.num_layers=6 --out runs/first
  dsv3 generate runs/first --prompt "In the beginning"
  dsv3 eval runs/first data/kjv.txt
  dsv3 train runs/first                            go on with a run that was stopped or killed
  dsv3 checkpoint verify runs/first                what it saved, and whether every byte is right
  dsv3 report runs/first                           one HTML page of its curves

`dsv3 COMMAND --help` says more about one of them.
Exit codes: 0 done; 1 a file, a device or memory failed; 2 the command line or the config is wrong;
130 stopped by Ctrl-C, 143 by SIGTERM.)";

/// Levenshtein distance, for the "did you mean" of a mistyped command.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row[b.size()];
}

/// CLI11 reports a mistyped command as a stray argument; a name and its nearest neighbour help
/// more.
void require_known_command(const CLI::App& app, int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') return;
  const std::string_view given = argv[1];
  std::string nearest, known;
  size_t best = 3;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    const std::string& name = command->get_name();
    if (name == given) return;
    known += (known.empty() ? "" : ", ") + name;
    if (const size_t distance = edit_distance(given, name); distance < best) {
      best = distance;
      nearest = name;
    }
  }
  if (nearest.empty()) invalid("unknown command '{}' (there are {})", given, known);
  invalid("unknown command '{}', did you mean '{}'?", given, nearest);
}

/// In the order in which a newcomer meets them.
void add_commands(CLI::App& app) {
  add_train_command(app);
  add_config_command(app);
  add_plan_command(app);
  add_checkpoint_command(app);
  add_report_command(app);
  add_eval_command(app);
  add_generate_command(app);
  add_data_command(app);
  add_bench_command(app);
  add_verify_command(app);
}

int run(int argc, char** argv) {
  CLI::App app("dsv3: train, evaluate and run models of the DeepSeek-V3 architecture", "dsv3");
  app.set_version_flag("--version", version_line(), "Print the version and what it was built with");
  app.footer(kExamples);
  app.require_subcommand(1);
  add_commands(app);
  if (argc < 2) {
    fmt::print(stderr, "{}", app.help());
    return kUsage;
  }
  require_known_command(app, argc, argv);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help and --version
    invalid("{} (try dsv3 {}--help)", error.what(),
            app.get_subcommands().empty() ? "" : app.get_subcommands()[0]->get_name() + " ");
  }
  return kOk;
}

int fail(ExitCode code, const std::string& message) {
  fmt::print(stderr, "dsv3: error: {}\n", message);
  return code;
}

/// LibTorch appends the place and a stack trace to its messages; the user needs the sentence alone.
std::string without_trace(std::string_view message) {
  message = message.substr(0, message.find("\nException raised from"));
  while (message.ends_with('\n') || message.ends_with(' ')) message.remove_suffix(1);
  return std::string(message);
}

/// Results may go to a pipe whose reader has had enough (quiet), or to a disk that is full (an
/// error).
int flush_output(int code) {
  if (code != kOk) return code;
  if (std::fflush(stdout) != 0) {
    if (errno == EPIPE) return code;
    return fail(kFailure, fmt::format("cannot write to standard output: {}",
                                      std::generic_category().message(errno)));
  }
  // An earlier write may have failed and left nothing to flush.
  pollfd output{.fd = STDOUT_FILENO, .events = POLLOUT, .revents = 0};
  const bool reader_left = ::poll(&output, 1, 0) == 1 && (output.revents & POLLERR) != 0;
  if (std::ferror(stdout) == 0 || reader_left) return code;
  return fail(kFailure, "writing to standard output failed; what was printed is not whole");
}

int guarded_main(int argc, char** argv) {
  try {
    return flush_output(run(argc, argv));
  } catch (const ExitRequest& request) {
    return flush_output(request.code);
  } catch (const ConfigErrors& errors) {
    for (const std::string& line : errors.errors) fmt::print(stderr, "{}\n", line);
    const size_t count = errors.errors.size();
    return fail(kUsage, fmt::format("{} {} in the config", count, count == 1 ? "error" : "errors"));
  } catch (const std::invalid_argument& error) {
    return fail(kUsage, without_trace(error.what()));
  } catch (const std::logic_error& error) {
    return fail(kFailure, fmt::format("internal error, please report: {}", error.what()));
  } catch (const std::bad_alloc&) {
    return fail(kFailure, "out of memory");
  } catch (const std::system_error& error) {
    if (error.code().value() == EPIPE) return kOk;
    return fail(kFailure, error.what());
  } catch (const std::exception& error) {
    return fail(kFailure, without_trace(error.what()));
  }
}

}  // namespace
}  // namespace dsv3::cli

int main(int argc, char** argv) {
  // A closed pipe must not end a training run between Ctrl-C and its save (`dsv3 train … | tee
  // log`).
  std::signal(SIGPIPE, SIG_IGN);
  return dsv3::cli::guarded_main(argc, argv);
}
