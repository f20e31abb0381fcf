// Stable counting sort of T·K choices by expert, in three launches without atomics between blocks.
//
// 1. Block c counts its chunk of choices per expert → workspace [E, chunks].
// 2. A warp per expert turns its row into exclusive sums over chunks and writes the expert's count.
// 3. Block c sums counts to the experts' first rows, counts its chunk again warp by warp, and gives
// each choice its row:
//    first row + earlier chunks + earlier warps + earlier choices of the warp (matched lanes, in
//    lane order).
// Padding rows are shared out to the blocks by expert, the rows behind the last expert by turns.
// Reads the choices three times (12 bytes each in all), writes 8 bytes a choice: a few microseconds
// at T·K = 131072.

#include "kernels/detail/launch.cuh"
#include "kernels/detail/permutation.h"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kFullMask;
using detail::kWarp;
using kernels::detail::kPermutationChunk;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kPerWarp = kPermutationChunk / kWarps;
static_assert(kPerWarp % kWarp == 0);

/// histogram[warp][expert] of the block's chunk; the caller zeroes it before and synchronises
/// after.
__device__ void count_chunk(const int32_t* experts, int num_choices, int num_experts,
                            int* histogram) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int begin = blockIdx.x * kPermutationChunk + warp * kPerWarp;
  for (int i = begin + lane; i < begin + kPerWarp; i += kWarp) {
    const int expert = i < num_choices ? experts[i] : -1;
    const unsigned peers = __match_any_sync(kFullMask, expert);
    if (expert >= 0 && lane == __ffs(peers) - 1) {
      histogram[warp * num_experts + expert] += __popc(peers);
    }
    __syncwarp();
  }
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(const int32_t* experts, int num_choices, int num_experts, int32_t* chunk_counts) {
  extern __shared__ int histogram[];  // [kWarps][E]
  for (int i = threadIdx.x; i < kWarps * num_experts; i += kThreads) histogram[i] = 0;
  __syncthreads();
  count_chunk(experts, num_choices, num_experts, histogram);
  __syncthreads();
  for (int expert = threadIdx.x; expert < num_experts; expert += kThreads) {
    int count = 0;
    for (int w = 0; w < kWarps; ++w) count += histogram[w * num_experts + expert];
    chunk_counts[static_cast<int64_t>(expert) * gridDim.x + blockIdx.x] = count;
  }
}

__device__ int warp_inclusive_sum(int x, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kFullMask, x, distance);
    if (lane >= distance) x += other;
  }
  return x;
}

__global__ void scan_chunks_kernel(int32_t* chunk_counts, int num_chunks, int32_t* counts) {
  const int lane = threadIdx.x;
  int32_t* const row = chunk_counts + static_cast<int64_t>(blockIdx.x) * num_chunks;
  int total = 0;
  for (int first = 0; first < num_chunks; first += kWarp) {
    const int chunk = first + lane;
    const int count = chunk < num_chunks ? row[chunk] : 0;
    const int inclusive = warp_inclusive_sum(count, lane);
    if (chunk < num_chunks) row[chunk] = total + inclusive - count;
    total += __shfl_sync(kFullMask, inclusive, kWarp - 1);
  }
  if (lane == 0) counts[blockIdx.x] = total;
}

/// One warp: first_row[e] = Σ counts[< e], each rounded up to `multiple`; first_row[E] is their
/// sum; offsets (may be null) get the inclusive ends.
__device__ void scan_experts(const int32_t* counts, int num_experts, int multiple, int* first_row,
                             int32_t* offsets) {
  const int lane = threadIdx.x;
  int total = 0;
  for (int first = 0; first < num_experts; first += kWarp) {
    const int expert = first + lane;
    const int count = expert < num_experts ? counts[expert] : 0;
    const int size = (count + multiple - 1) / multiple * multiple;
    const int end = total + warp_inclusive_sum(size, lane);
    if (expert < num_experts) {
      first_row[expert] = end - size;
      if (offsets != nullptr) offsets[expert] = end;
    }
    total = __shfl_sync(kFullMask, end, kWarp - 1);
  }
  if (lane == 0) first_row[num_experts] = total;
}

/// choice_of = -1 for the block's share of the rows without a choice.
__device__ void mark_padding(const MakePermutation& p, const int* first_row, int num_rows) {
  for (int expert = blockIdx.x; expert < p.num_experts; expert += gridDim.x) {
    const int begin = first_row[expert] + p.counts[expert];
    for (int row = begin + threadIdx.x; row < first_row[expert + 1]; row += kThreads) {
      p.choice_of[row] = -1;
    }
  }
  const int step = kThreads * static_cast<int>(gridDim.x);
  for (int64_t row = int64_t{first_row[p.num_experts]} + blockIdx.x * kThreads + threadIdx.x;
       row < num_rows; row += step) {
    p.choice_of[row] = -1;
  }
}

__global__ void __launch_bounds__(kThreads)
    place_kernel(MakePermutation p, int num_choices, int num_rows) {
  extern __shared__ int shared[];  // [kWarps][E] next rows, then [E + 1] first rows
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int* const next_row = shared;
  int* const first_row = shared + kWarps * p.num_experts;
  for (int i = threadIdx.x; i < kWarps * p.num_experts; i += kThreads) next_row[i] = 0;
  if (warp == 0) {
    scan_experts(p.counts, p.num_experts, p.row_multiple, first_row,
                 blockIdx.x == 0 ? p.offsets : nullptr);
  }
  __syncthreads();
  if (num_rows > num_choices) mark_padding(p, first_row, num_rows);
  count_chunk(p.experts, num_choices, p.num_experts, next_row);
  __syncthreads();
  for (int expert = threadIdx.x; expert < p.num_experts; expert += kThreads) {
    int row =
        first_row[expert] + p.workspace[static_cast<int64_t>(expert) * gridDim.x + blockIdx.x];
    for (int w = 0; w < kWarps; ++w) {
      const int count = next_row[w * p.num_experts + expert];
      next_row[w * p.num_experts + expert] = row;
      row += count;
    }
  }
  __syncthreads();
  const int begin = blockIdx.x * kPermutationChunk + warp * kPerWarp;
  for (int i = begin + lane; i < begin + kPerWarp; i += kWarp) {
    const int expert = i < num_choices ? p.experts[i] : -1;
    const unsigned peers = __match_any_sync(kFullMask, expert);
    int first = 0;
    if (expert >= 0) {
      first = next_row[warp * p.num_experts + expert];
      const int row = first + __popc(peers & ((1u << lane) - 1));
      p.row_of[i] = row;
      p.choice_of[row] = i;
    }
    __syncwarp();
    if (expert >= 0 && lane == __ffs(peers) - 1) {
      next_row[warp * p.num_experts + expert] = first + __popc(peers);
    }
    __syncwarp();
  }
}

}  // namespace

void make_permutation(const MakePermutation& p, Stream stream) {
  kernels::detail::check_permutation_shape(p);
  const auto cuda = detail::cuda_stream(stream);
  const int num_choices = static_cast<int>(p.num_tokens * p.num_experts_per_token);
  const int num_chunks = kernels::detail::permutation_chunks(num_choices);
  const size_t histogram = sizeof(int) * kWarps * p.num_experts;
  if (num_chunks > 0) {
    count_kernel<<<num_chunks, kThreads, histogram, cuda>>>(p.experts, num_choices, p.num_experts,
                                                            p.workspace);
  }
  scan_chunks_kernel<<<p.num_experts, kWarp, 0, cuda>>>(p.workspace, num_chunks, p.counts);
  // Without choices one block still writes the offsets.
  const int num_blocks = num_chunks > 0 ? num_chunks : 1;
  const size_t shared = histogram + sizeof(int) * (p.num_experts + 1);
  const auto num_rows =
      static_cast<int>(permutation_rows(num_choices, p.num_experts, p.row_multiple));
  place_kernel<<<num_blocks, kThreads, shared, cuda>>>(p, num_choices, num_rows);
  detail::check_launch("make_permutation");
}

}  // namespace dsv3::kernels::cuda
