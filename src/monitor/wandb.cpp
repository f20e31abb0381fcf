#include "monitor/wandb.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

extern char** environ;

namespace dsv3 {
namespace {
namespace fs = std::filesystem;

/// Starts `arguments` (found on the PATH) in a session of its own, so that Ctrl-C in the terminal
/// does not reach it. Standard input from `input` (-1: /dev/null), both outputs to `output`.
/// Returns 0 or the system's error.
int spawn(std::vector<std::string> arguments, int input, const std::string& output, pid_t& child) {
  std::vector<char*> argv;
  for (auto& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t files;
  posix_spawnattr_t attributes;
  posix_spawn_file_actions_init(&files);
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID);
  if (input >= 0)
    posix_spawn_file_actions_adddup2(&files, input, STDIN_FILENO);
  else
    posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, output.c_str(),
                                   O_WRONLY | O_CREAT | O_APPEND, 0666);
  posix_spawn_file_actions_adddup2(&files, STDOUT_FILENO, STDERR_FILENO);
  const int error = ::posix_spawnp(&child, argv[0], &files, &attributes, argv.data(), environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&files);
  return error;
}

/// Whether this Python has the module wandb; looks it up without loading it.
bool has_wandb(const std::string& python) {
  pid_t child = 0;
  const std::string look =
      "import importlib.util, sys; sys.exit(importlib.util.find_spec('wandb') is None)";
  if (spawn({python, "-c", look}, -1, "/dev/null", child) != 0) return false;
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/// The set-up's Python (scripts/setup.sh --tests) where it has wandb, else the one on the PATH.
std::string find_python() {
  for (const std::string python :
       {DSV3_SOURCE_DIR "/third_party/python/bin/python", "python3", "python"})
    if (has_wandb(python)) return python;
  return {};
}

}  // namespace

std::unique_ptr<WandbBridge> WandbBridge::start(const fs::path& directory, std::string& why_not) {
  const fs::path script = DSV3_SOURCE_DIR "/scripts/wandb_bridge.py";
  if (!fs::exists(script)) {
    why_not = fmt::format("{} is not there", script.string());
    return nullptr;
  }
  const std::string python = find_python();
  if (python.empty()) {
    why_not = "no python3 with the module wandb (pip install wandb)";
    return nullptr;
  }
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) {
    why_not = fmt::format("no pipe: {}", std::strerror(errno));
    return nullptr;
  }
  pid_t child = 0;
  const int error = spawn({python, script.string(), directory.string(), "--with-trainer"}, ends[0],
                          (directory / "wandb.log").string(), child);
  ::close(ends[0]);
  if (error != 0) {
    ::close(ends[1]);
    why_not = fmt::format("cannot start {}: {}", python, std::strerror(error));
    return nullptr;
  }
  return std::unique_ptr<WandbBridge>(new WandbBridge(child, ends[1]));
}

WandbBridge::~WandbBridge() {
  finish();
}

bool WandbBridge::finish() {
  if (pipe_ < 0) return true;
  ::close(std::exchange(pipe_, -1));
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (std::chrono::steady_clock::now() < limit) {
    int status = 0;
    const pid_t ended = ::waitpid(child_, &status, WNOHANG);
    if (ended != 0) return ended == child_ && WIFEXITED(status) && WEXITSTATUS(status) == 0;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return true;
}

}  // namespace dsv3
