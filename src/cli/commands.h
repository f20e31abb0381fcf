#pragma once

namespace CLI {
class App;
}

namespace dsv3::cli {

/// Exit codes of the program, documented in the README.
enum ExitCode : int {
  kOk = 0,
  kFailure = 1,        // the world failed: a file, a device, memory
  kUsage = 2,          // the command line or the config is wrong
  kInterrupted = 130,  // stopped by Ctrl-C after saving
  kTerminated = 143    // stopped by SIGTERM after saving
};

/// Thrown by a command that has said all there is to say and ends with a code of its own.
struct ExitRequest {
  ExitCode code = kOk;
};

// Each adds one subcommand with its options, its help with examples and its callback; the callback
// throws, and main() turns exceptions into one sentence on stderr and an exit code.
void add_bench_command(CLI::App& app);
void add_checkpoint_command(CLI::App& app);
void add_config_command(CLI::App& app);
void add_data_command(CLI::App& app);
void add_eval_command(CLI::App& app);
void add_generate_command(CLI::App& app);
void add_plan_command(CLI::App& app);
void add_report_command(CLI::App& app);
void add_train_command(CLI::App& app);
void add_verify_command(CLI::App& app);

}  // namespace dsv3::cli
