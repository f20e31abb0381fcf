#pragma once

#include <atomic>
#include <filesystem>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "checkpoint/save.h"
#include "checkpoint/snapshot.h"

namespace dsv3 {

/// What became of one save.
struct SaveResult {
  int64_t step = 0;
  std::filesystem::path directory;
  std::string error = {};    // empty = the checkpoint is there; else nothing of it is
  std::string warning = {};  // old checkpoints that could not be removed
  uint64_t bytes = 0;        // of its files
  double seconds = 0;        // from the start of the save to the end of its last fsync
  double stall_seconds = 0;  // of them, how long training stood still for it
};

/// A save to be done.
struct SaveJob {
  std::filesystem::path run;
  int64_t step = 0;
  StateTensors state;  // live tensors; they must live, at their place, as long as the Saver
  SaveOptions options;
  std::vector<std::filesystem::path> sync_first;  // files of the run that must not lag behind the
                                                  // checkpoint (metrics.jsonl)
  double waited_seconds = 0;                      // for the save before; counts as stall
};

/// Writes the checkpoints of one run, one at a time, in the background: a thread writes a snapshot
/// on the host while training goes on. A save that fails leaves nothing behind and the checkpoints
/// before it as they are. To be used by one thread, except before_change().
class Saver {
 public:
  struct Options {
    int64_t keep_last = 2;   // newest checkpoints that are kept; 0 = all
    int64_t keep_every = 0;  // steps; multiples of it are kept for good; 0 = none
  };
  /// `parameters` must outlive the Saver.
  Saver(const ParameterSet& parameters, const ModelConfig& model, const Options& options);
  /// Waits for the save under way.
  ~Saver();
  Saver(const Saver&) = delete;
  Saver& operator=(const Saver&) = delete;

  /// Takes the snapshot's memory beforehand, in the background: page-locked memory takes seconds.
  void prepare(const StateTensors& live);

  /// Starts a save of job.state as it stands after the work queued so far, and returns. The result
  /// of the save before must have been fetched. Where the host lacks memory for a snapshot, the
  /// save is done before this returns.
  void start(SaveJob job);
  /// Saves from the live tensors, without a snapshot, and returns when it is done.
  SaveResult save_now(const SaveJob& job);

  /// To be called before anything that a save reads is changed, from any thread: on CUDA the work
  /// queued from now on waits for the snapshot, on the CPU the caller does.
  void before_change(const at::Device& device);

  bool busy() const { return thread_.joinable() && !done_; }
  /// The result of a save that has ended since the last call.
  std::optional<SaveResult> poll();
  /// The same, after waiting for the save under way.
  std::optional<SaveResult> wait();

 private:
  void write(const SaveJob& job, const StateTensors& state, SaveResult& result) const;

  const ParameterSet& parameters_;
  ModelConfig model_;
  Options options_;
  Snapshot snapshot_;
  std::thread preparing_, thread_;
  std::atomic<bool> done_ = false;  // the thread has nothing left to do
  std::atomic<double> stall_ = 0;   // of the save under way
  std::optional<SaveResult> result_;
};

}  // namespace dsv3
