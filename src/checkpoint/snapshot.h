#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <condition_variable>
#include <mutex>
#include <optional>

#include "checkpoint/state_tensors.h"

namespace dsv3 {

/// A copy of a run's tensors on the host, taken while the run goes on. The copy of GPU tensors is
/// queued on a stream of its own; host tensors are copied by whoever calls finish(). Until they
/// are, nobody may change them: before_change() is how the run keeps to that. The host memory is
/// kept for the next copy.
class Snapshot {
 public:
  Snapshot() = default;
  ~Snapshot();
  Snapshot(const Snapshot&) = delete;
  Snapshot& operator=(const Snapshot&) = delete;

  /// Takes the host memory for a copy of `live`, page-locked for GPU tensors. May take seconds the
  /// first time; begin() does it where it was not done before.
  void reserve(const StateTensors& live);
  /// Whether the machine has the memory that reserve() would take.
  bool fits(const StateTensors& live) const;

  /// Starts the copy of `live` as it stands after all work queued on the current stream so far. To
  /// be followed by finish(), from any one thread.
  void begin(const StateTensors& live);
  /// Copies the host tensors and waits for those of the GPU.
  void finish();
  /// The copy, after finish().
  const StateTensors& host() const { return host_; }

  /// To be called before tensors on `device` that a copy under way reads are changed. CUDA: work
  /// queued from now on waits for the copy, the caller does not. CPU: waits until they are copied.
  /// Returns the seconds that the caller waited.
  double before_change(const at::Device& device);
  /// Seconds that the GPU's work stood still in before_change(cuda); to be called once the work
  /// queued right after it is done.
  double device_stall();

 private:
  /// Copies queued from now on see what the current stream has done so far.
  void follow_current_stream(const at::Device& device);

  StateTensors live_, host_;
  std::optional<c10::Stream> stream_;  // for copies from the GPU
  std::optional<c10::Event> copied_;   // the last of them is done
  std::optional<c10::Event> before_wait_, after_wait_;
  bool must_block_ = false;  // a copy from the GPU was begun and nobody has waited for it yet
  std::mutex mutex_;
  std::condition_variable changed_;
  bool host_pending_ = false;  // host tensors are still to be copied
};

}  // namespace dsv3
