#include "training/stop_signals.h"

#include <unistd.h>

#include <csignal>

namespace dsv3 {
namespace {

volatile std::sig_atomic_t stop_requested = 0;
struct sigaction previous_interrupt, previous_terminate;

constexpr char kFirst[] = "\nstopping after this step, then saving; once more to stop at once\n";

void on_signal(int) {
  if (stop_requested != 0) ::_exit(130);
  stop_requested = 1;
  // write() is all that a handler may use; a lost message harms nobody.
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, kFirst, sizeof kFirst - 1);
}

}  // namespace

StopSignals::StopSignals() {
  stop_requested = 0;
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  ::sigaction(SIGINT, &action, &previous_interrupt);
  ::sigaction(SIGTERM, &action, &previous_terminate);
}

StopSignals::~StopSignals() {
  ::sigaction(SIGINT, &previous_interrupt, nullptr);
  ::sigaction(SIGTERM, &previous_terminate, nullptr);
}

bool StopSignals::requested() {
  return stop_requested != 0;
}

}  // namespace dsv3
