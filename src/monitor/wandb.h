#pragma once

#include <sys/types.h>

#include <filesystem>
#include <memory>
#include <string>

namespace dsv3 {

/// scripts/wandb_bridge.py as a child process beside the run: it follows metrics.jsonl and feeds
/// the official client. It ends by itself when this process does, however that happens.
class WandbBridge {
 public:
  /// Starts it for the run in `directory`; its output goes to wandb.log there. Null, with the
  /// reason in `why_not`, where Python, its module wandb or the script is missing.
  static std::unique_ptr<WandbBridge> start(const std::filesystem::path& directory,
                                            std::string& why_not);
  ~WandbBridge();
  WandbBridge(const WandbBridge&) = delete;
  WandbBridge& operator=(const WandbBridge&) = delete;

  /// The run is over: waits until what is left was sent, half a minute at the most; then it goes on
  /// alone. False when it ended with an error (wandb.log has it), now or earlier.
  bool finish();

 private:
  WandbBridge(pid_t child, int pipe) : child_(child), pipe_(pipe) {}

  pid_t child_;
  int pipe_;  // the child's standard input, whose end tells it that the run is over; -1: closed
};

}  // namespace dsv3
