#include "checkpoint/saver.h"

#include <chrono>
#include <utility>

#include "base/error.h"
#include "base/file.h"
#include "checkpoint/catalogue.h"

namespace dsv3 {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Throws IoError where the disk has no room for `bytes` more; the files' headers, the rounding to
/// blocks and the run's other files get a margin.
void require_free_disk(const fs::path& run, uint64_t bytes) {
  const fs::path root = run / "checkpoints";
  fs::create_directories(root);
  const uint64_t needed = bytes + bytes / 50 + (uint64_t{1} << 20);
  const uint64_t free = free_disk_bytes(root);
  if (free < needed) {
    throw IoError(fmt::format("{} has {:.1f} MB free, but the checkpoint needs {:.1f} MB",
                              root.string(), static_cast<double>(free) / 1e6,
                              static_cast<double>(needed) / 1e6));
  }
}

}  // namespace

Saver::Saver(const ParameterSet& parameters, const ModelConfig& model, const Options& options)
    : parameters_(parameters), model_(model), options_(options) {}

Saver::~Saver() {
  if (preparing_.joinable()) preparing_.join();
  if (thread_.joinable()) thread_.join();
}

void Saver::prepare(const StateTensors& live) {
  if (preparing_.joinable() || !snapshot_.fits(live)) return;
  preparing_ = std::thread([this, live] {
    try {
      snapshot_.reserve(live);
    } catch (...) {  // begin() meets the same trouble where it can be told
    }
  });
}

void Saver::write(const SaveJob& job, const StateTensors& state, SaveResult& result) const {
  try {
    for (const fs::path& path : job.sync_first) {
      if (fs::exists(path)) sync_file(path);
    }
    require_free_disk(job.run, state.num_bytes());
    result.bytes =
        save_checkpoint(result.directory, parameters_, state, model_, job.step, job.options);
  } catch (const std::exception& error) {
    result.error = error.what();
    return;
  }
  try {
    prune_checkpoints(job.run, options_.keep_last, options_.keep_every);
  } catch (const std::exception& error) {
    result.warning = error.what();
  }
}

void Saver::start(SaveJob job) {
  const auto start = Clock::now();
  DSV3_CHECK(!result_.has_value(), "a save of step {} begins before that of step {} was fetched",
             job.step, result_->step);
  if (preparing_.joinable()) preparing_.join();
  if (!snapshot_.fits(job.state)) {
    result_ = save_now(job);
    return;
  }
  SaveResult result{.step = job.step, .directory = checkpoint_directory(job.run, job.step)};
  try {
    // Before the snapshot: a save that cannot succeed should not cost one.
    require_free_disk(job.run, job.state.num_bytes());
    snapshot_.begin(job.state);
  } catch (const std::exception& error) {
    result.error = error.what();
    result.seconds = result.stall_seconds = seconds_since(start);
    result_ = result;
    return;
  }
  done_ = false;
  stall_ = job.waited_seconds + seconds_since(start);
  result_ = std::move(result);
  thread_ = std::thread([this, start, job = std::move(job)] {
    try {
      snapshot_.finish();
      write(job, snapshot_.host(), *result_);
    } catch (const std::exception& error) {
      result_->error = error.what();
    }
    result_->seconds = seconds_since(start);
    done_ = true;
  });
}

SaveResult Saver::save_now(const SaveJob& job) {
  const auto start = Clock::now();
  SaveResult result{.step = job.step, .directory = checkpoint_directory(job.run, job.step)};
  write(job, job.state, result);
  result.seconds = result.stall_seconds = seconds_since(start);
  return result;
}

void Saver::before_change(const at::Device& device) {
  const double waited = snapshot_.before_change(device);
  double before = stall_;
  while (!stall_.compare_exchange_weak(before, before + waited)) {
  }
}

std::optional<SaveResult> Saver::poll() {
  return busy() ? std::nullopt : wait();
}

std::optional<SaveResult> Saver::wait() {
  if (thread_.joinable()) {
    thread_.join();
    result_->stall_seconds = stall_ + snapshot_.device_stall();
  }
  return std::exchange(result_, std::nullopt);
}

}  // namespace dsv3
