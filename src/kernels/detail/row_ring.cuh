#pragma once

// Rows on their way: a ring in shared memory that every thread fills with its own 16-byte words,
// some rows ahead of their use, and reads back itself. So much more is in flight than registers
// could hold, and no barrier is needed: a thread waits for its own copies only.

#include "kernels/detail/packed.cuh"
#include "kernels/detail/ptx.cuh"

namespace dsv3::kernels::cuda::detail {

/// kVectors vectors of each of kThreads threads, of each of `matrices` matrices, in `stages` (1 …
/// kMostStages) stages of `memory` [stages · stage_bytes(matrices)].
template <typename T, int kVectors, int kThreads>
class RowRing {
 public:
  static constexpr int kMostStages = 4;
  static constexpr int64_t stage_bytes(int matrices) {
    return int64_t{matrices} * kVectors * kWords * kThreads * 16;
  }

  __device__ __forceinline__ RowRing(uint4* memory, int matrices, int stages)
      : begin_(memory + threadIdx.x),
        stage_(matrices * kVectors * kWords * kThreads),
        stages_(stages) {}

  /// Asks for vector i of matrix `m`, to the stage that is read next.
  __device__ __forceinline__ void ask(int m, int i, const T* from) {
    const uint32_t to = ptx::shared_address(slot(m, i));
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      ptx::async_copy16(to + w * kThreads * 16, reinterpret_cast<const uint4*>(from) + w);
    }
  }
  /// Closes a stage, asked for or left out, and goes on to the next.
  __device__ __forceinline__ void next() {
    ptx::async_commit();
    now_ = now_ + 1 == stages_ ? 0 : now_ + 1;
  }
  /// Waits for the stage that is read next.
  __device__ __forceinline__ void wait() const {
    static_assert(kMostStages == 4);
    if (stages_ == 1) ptx::async_wait<0>();
    if (stages_ == 2) ptx::async_wait<1>();
    if (stages_ == 3) ptx::async_wait<2>();
    if (stages_ == 4) ptx::async_wait<3>();
  }
  /// Vector i of matrix `m`, or zeros.
  __device__ __forceinline__ void read(int m, int i, bool exists, Packed<T>& to) const {
    to.clear();
    if (exists) to.load_words(slot(m, i), kThreads);
  }

 private:
  static constexpr int kWords = kVector * static_cast<int>(sizeof(T)) / 16;

  __device__ __forceinline__ uint4* slot(int m, int i) const {
    return begin_ + now_ * stage_ + (m * kVectors + i) * kWords * kThreads;
  }

  uint4* begin_;
  int stage_;  // words from one to the next
  int stages_, now_ = 0;
};

}  // namespace dsv3::kernels::cuda::detail
