#pragma once

// What kernels over rows in expert order share: threads along a row, words to copy it in, and its
// padding.

#include <type_traits>

#include "kernels/detail/launch.cuh"
#include "kernels/detail/vector.cuh"

namespace dsv3::kernels::cuda::detail {

inline constexpr int kMaxThreads = 256;

/// Threads along a row of `steps` steps: 4 to 8 warps, as many as leave the fewest idle in the last
/// round (D = 7168 of BF16: 896 steps, 4 rounds of 7 warps); fewer where the row is short.
inline int threads_for(int64_t steps) {
  const int64_t warps = (steps + kWarp - 1) / kWarp;
  int64_t best = kMaxThreads / kWarp;
  if (warps <= best) return static_cast<int>((warps > 0 ? warps : 1) * kWarp);
  const auto idle = [&](int64_t count) { return (warps + count - 1) / count * count - warps; };
  for (int64_t count = best - 1; count >= 4; --count) {
    if (idle(count) < idle(best)) best = count;
  }
  return static_cast<int>(best * kWarp);
}

/// Calls fn with a null pointer of the widest word that rows of row_bytes bytes allow.
template <typename Fn>
void dispatch_word(int64_t row_bytes, bool aligned, Fn&& fn) {
  if (aligned && row_bytes % 16 == 0) return fn(static_cast<uint4*>(nullptr));
  if (aligned && row_bytes % 4 == 0) return fn(static_cast<uint32_t*>(nullptr));
  if (aligned && row_bytes % 2 == 0) return fn(static_cast<uint16_t*>(nullptr));
  fn(static_cast<uint8_t*>(nullptr));
}

inline constexpr int kPaddingRows = kWarp;  // of a block

/// Zeros over the rows without a choice.
template <typename Word>
__global__ void __launch_bounds__(kMaxThreads)
    clear_padding_kernel(Word* rows, const int32_t* choice_of, int64_t num_rows, int64_t words) {
  const int64_t first = int64_t{blockIdx.x} * kPaddingRows, mine = first + threadIdx.x % kWarp;
  unsigned padding = __ballot_sync(kFullMask, mine < num_rows && choice_of[mine] < 0);
  for (; padding != 0; padding &= padding - 1) {
    Word* const row = rows + (first + __ffs(padding) - 1) * words;
    for (int64_t i = threadIdx.x; i < words; i += kMaxThreads) row[i] = Word{};
  }
}

/// Zeros over the padding of `rows`.
inline void clear_padding(void* rows, const int32_t* choice_of, int64_t num_rows, int64_t row_bytes,
                          cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((num_rows + kPaddingRows - 1) / kPaddingRows);
  dispatch_word(row_bytes, aligned16(rows), [&](auto* type) {
    using Word = std::remove_pointer_t<decltype(type)>;
    const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
    clear_padding_kernel<Word>
        <<<blocks, kMaxThreads, 0, stream>>>(static_cast<Word*>(rows), choice_of, num_rows, words);
  });
}

}  // namespace dsv3::kernels::cuda::detail
