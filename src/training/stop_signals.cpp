#include "training/stop_signals.h"

#include <unistd.h>

#include <csignal>

namespace dsv3 {
namespace {

volatile std::sig_atomic_t stop_signal = 0, save_requested = 0;
struct sigaction previous_interrupt, previous_terminate, previous_user;

constexpr char kFirst[] = "\nstopping after this step, then saving; once more to stop at once\n";

void on_stop(int signal) {
  if (stop_signal != 0) ::_exit(128 + signal);
  stop_signal = signal;
  // write() is all that a handler may use; a lost message harms nobody.
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, kFirst, sizeof kFirst - 1);
}

void on_save(int) {
  save_requested = 1;
}

void install(int signal, void (*handler)(int), struct sigaction& previous) {
  struct sigaction action {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  ::sigaction(signal, &action, &previous);
}

}  // namespace

StopSignals::StopSignals() {
  stop_signal = 0;
  save_requested = 0;
  install(SIGINT, on_stop, previous_interrupt);
  install(SIGTERM, on_stop, previous_terminate);
  install(SIGUSR1, on_save, previous_user);
}

StopSignals::~StopSignals() {
  ::sigaction(SIGINT, &previous_interrupt, nullptr);
  ::sigaction(SIGTERM, &previous_terminate, nullptr);
  ::sigaction(SIGUSR1, &previous_user, nullptr);
}

bool StopSignals::requested() {
  return stop_signal != 0;
}

int StopSignals::signal() {
  return stop_signal;
}

bool StopSignals::take_save_request() {
  const bool taken = save_requested != 0;
  if (taken) save_requested = 0;
  return taken;
}

}  // namespace dsv3
