// Rows to expert order: serves any gather by row_of too.
//
// A block per token, or a few narrow ones; threads along D in 16-byte steps, so that a token's row
// is read once and its K rows are in flight together. FP8's scales go by rows of the output:
// written from the tokens' blocks, every 4 bytes of them would touch a sector of the L2 cache. Few
// scales are gathered by the first blocks, beside the rows; many in a kernel of their own, which
// the rows' kernel does not wait for. Bytes
// moved at T tokens, K choices, D hidden of BF16: 2·T·D·(1 + K); at 16,384 x 7168, K = 8: 2.1 GB.
// Memory bound.

#include <algorithm>
#include <type_traits>

#include "kernels/detail/expert_rows.cuh"
#include "kernels/detail/launch.cuh"
#include "kernels/detail/permutation.h"
#include "kernels/detail/ptx.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kMaxThreads;

constexpr int kMostTokens = kMaxThreads / detail::kWarp;  // of a block

// Of a thread that gathers scales beside the rows: all of its loads are in flight together.
constexpr int kGatherRows = 4, kGatherColumns = 2;

// Of a block of the kernel that stages scales; columns one after another.
constexpr int kStageThreads = 1024, kStageColumns = 4;
constexpr int kStageRows = 16;  // of a thread

/// Where a row of y comes from; token < 0: padding.
struct Source {
  int token;
  float weight;
};

__device__ __forceinline__ Source source_of(const PermuteForward& p, int64_t row,
                                            int64_t num_rows) {
  const int choice = row < num_rows ? p.choice_of[row] : -1;
  if (choice < 0) return {-1, 1.0f};
  return {choice / p.num_experts_per_token, p.weights == nullptr ? 1.0f : p.weights[choice]};
}

/// y_scales[g, r] = x_scales[g, token of r] · weight, 0 for padding, of the block's rows. The
/// tokens' scales come from the L2 cache, a sector each: rows of copies keep the memory busy
/// meanwhile.
__device__ __forceinline__ void gather_scales(const PermuteForward& p, int64_t num_rows) {
  const int threads = blockDim.x * blockDim.y;
  const int64_t first =
      int64_t{blockIdx.x} * threads * kGatherRows + threadIdx.y * blockDim.x + threadIdx.x;
  Source source[kGatherRows];
#pragma unroll
  for (int j = 0; j < kGatherRows; ++j) source[j] = source_of(p, first + j * threads, num_rows);
  for (int begin = 0; begin < p.num_scales; begin += kGatherColumns) {
    float scale[kGatherColumns][kGatherRows] = {};
#pragma unroll
    for (int c = 0; c < kGatherColumns; ++c) {
      const float* const x = p.x_scales + (begin + c) * p.x_scale_stride;
#pragma unroll
      for (int j = 0; j < kGatherRows; ++j) {
        if (begin + c < p.num_scales && source[j].token >= 0) scale[c][j] = x[source[j].token];
      }
    }
#pragma unroll
    for (int c = 0; c < kGatherColumns; ++c) {
      float* const y = p.y_scales + (begin + c) * p.y_scale_stride;
#pragma unroll
      for (int j = 0; j < kGatherRows; ++j) {
        const int64_t row = first + j * threads;
        if (begin + c < p.num_scales && row < num_rows) y[row] = scale[c][j] * source[j].weight;
      }
    }
  }
}

/// The same where there are many scales: column after column of them passes through shared memory,
/// because tokens come in any order while neighbouring rows are written together.
__global__ void __launch_bounds__(kStageThreads)
    stage_scales_kernel(PermuteForward p, int64_t num_rows) {
  extern __shared__ float4 staged[];
  detail::ptx::let_second_begin();
  const int64_t first = int64_t{blockIdx.x} * kStageThreads * kStageRows + threadIdx.x;
  Source source[kStageRows];
#pragma unroll
  for (int j = 0; j < kStageRows; ++j) {
    source[j] = source_of(p, first + j * kStageThreads, num_rows);
  }
  const int begin = blockIdx.y * kStageColumns, end = min(begin + kStageColumns, p.num_scales);
  for (int g = begin; g < end; ++g) {
    const auto* const x = reinterpret_cast<const float4*>(p.x_scales + g * p.x_scale_stride);
    __syncthreads();
#pragma unroll 4
    for (int t = threadIdx.x; t < static_cast<int>(p.num_tokens) / 4; t += kStageThreads) {
      staged[t] = x[t];
    }
    __syncthreads();
    const auto* const scales = reinterpret_cast<const float*>(staged);
    float* const y = p.y_scales + g * p.y_scale_stride;
#pragma unroll
    for (int j = 0; j < kStageRows; ++j) {
      const int64_t row = first + j * kStageThreads;
      if (row >= num_rows) continue;
      y[row] = source[j].token < 0 ? 0.0f : scales[source[j].token] * source[j].weight;
    }
  }
}

/// The words of a row that a thread has in flight.
template <typename Word, int kWords>
struct Batch {
  Word word[kWords];

  __device__ __forceinline__ void load(const Word* row, int first, int words) {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const int i = first + j * static_cast<int>(blockDim.x);
      if (i < words) word[j] = row[i];
    }
  }
  __device__ __forceinline__ void store(Word* row, int first, int words) const {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const int i = first + j * static_cast<int>(blockDim.x);
      if (i < words) row[i] = word[j];
    }
  }
};

/// Blocks that a multiprocessor holds at once: what the registers of the words in flight leave.
template <int kWords, bool kScales>
inline constexpr int kBlocksAtOnce = kWords > 2 || kScales ? 6 : 8;

/// Threads (along D, tokens). Copies x[t] to its K rows; the first blocks gather `scale_rows` rows'
/// scales. The last one ends after stage_scales_kernel, where that ran before.
template <typename Word, int kWords, bool kScales>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtOnce<kWords, kScales>)
    permute_kernel(PermuteForward p, int words, unsigned scale_blocks, int64_t scale_rows) {
  constexpr bool kEarly = kWords <= 2;  // more words wait for the rows' numbers outside registers
  if constexpr (kScales) {
    if (blockIdx.x < scale_blocks) return gather_scales(p, scale_rows);
  }
  if (blockIdx.x == gridDim.x - 1) detail::ptx::wait_for_first();
  __shared__ int rows[kMostTokens][kMaxChoices];
  const int num_choices = p.num_experts_per_token;
  const int64_t token = int64_t{blockIdx.x - scale_blocks} * blockDim.y + threadIdx.y;
  const bool exists = token < p.num_tokens;
  const auto* const x = static_cast<const Word*>(p.x) + token * words;
  int first = threadIdx.x;
  Batch<Word, kWords> batch;
  if (exists) {
    if (threadIdx.x < num_choices) {
      rows[threadIdx.y][threadIdx.x] = p.row_of[token * num_choices + threadIdx.x];
    }
    if (kEarly) batch.load(x, first, words);  // on its way while the rows' numbers are awaited
  }
  __syncthreads();
  if (!exists) return;
  auto* const y = static_cast<Word*>(p.y);
  while (first < words) {
    if (!kEarly) batch.load(x, first, words);
    for (int k = 0; k < num_choices; ++k) {
      batch.store(y + int64_t{rows[threadIdx.y][k]} * words, first, words);
    }
    first += kWords * static_cast<int>(blockDim.x);
    if (kEarly) batch.load(x, first, words);
  }
}

/// Shared memory that a block of the current device may ask for: 163 KB on sm_80, 227 KB on sm_90,
/// but 99 KB on sm_86 and sm_89.
int64_t shared_limit() {
  int device = 0, bytes = 48 * 1024;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return bytes;
}

/// Blocks of stage_scales_kernel, where it suits: a column fits into shared memory, and they are
/// enough to fill the device (DeepSeek-V3's 56 columns of 131,072 rows: 112).
dim3 stage_grid(const PermuteForward& p, int64_t num_rows) {
  constexpr int64_t kMostStaged = 160 * 1024, kFewestBlocks = 64;
  constexpr int64_t kBlockRows = kStageThreads * kStageRows;
  const int64_t blocks = (num_rows + kBlockRows - 1) / kBlockRows;
  const int64_t columns = (p.num_scales + kStageColumns - 1) / kStageColumns;
  const bool fits =
      p.num_tokens * static_cast<int64_t>(sizeof(float)) <= std::min(kMostStaged, shared_limit());
  const bool vectorised =
      p.num_tokens % 4 == 0 && p.x_scale_stride % 4 == 0 && detail::aligned16(p.x_scales);
  if (!fits || !vectorised || blocks * columns < kFewestBlocks) return dim3(0);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(columns));
}

void stage_scales(const PermuteForward& p, dim3 grid, int64_t num_rows, cudaStream_t stream) {
  const int shared = static_cast<int>(p.num_tokens * static_cast<int64_t>(sizeof(float)));
  cudaFuncSetAttribute(stage_scales_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  stage_scales_kernel<<<grid, kStageThreads, static_cast<size_t>(shared), stream>>>(p, num_rows);
}

/// With `scale_rows` > 0 the scales of so many rows are gathered too; `staged`: a kernel for them
/// was launched just before.
template <typename Word>
void launch_rows(const PermuteForward& p, int words, int64_t scale_rows, bool staged,
                 cudaStream_t stream) {
  const int threads = detail::threads_for((words + 1) / 2);  // two words at least, where there are
  const int tokens = kMaxThreads / threads;
  const int64_t per_block = int64_t{threads} * tokens * kGatherRows;
  const auto scale_blocks = static_cast<unsigned>((scale_rows + per_block - 1) / per_block);
  const auto blocks = static_cast<unsigned>((p.num_tokens + tokens - 1) / tokens) + scale_blocks;
  const dim3 block(static_cast<unsigned>(threads), static_cast<unsigned>(tokens));
  const auto pick = [&](auto in_flight) {
    constexpr int kWords = decltype(in_flight)::value;
    return scale_rows > 0 ? permute_kernel<Word, kWords, true>
                          : permute_kernel<Word, kWords, false>;
  };
  auto* const kernel = words <= 2 * threads ? pick(std::integral_constant<int, 2>())
                                            : pick(std::integral_constant<int, 4>());
  if (staged) {
    detail::launch_second(kernel, blocks, block, stream, p, words, scale_blocks, scale_rows);
  } else {
    kernel<<<blocks, block, 0, stream>>>(p, words, scale_blocks, scale_rows);
  }
}

}  // namespace

void permute_forward(const PermuteForward& p, Stream stream) {
  kernels::detail::check_permute(p);
  if (p.num_tokens == 0 || p.hidden == 0) return;
  const int64_t row_bytes = p.hidden * size_of(p.dtype);
  const int64_t num_choices = p.num_tokens * p.num_experts_per_token;
  const int64_t num_rows = std::max(p.num_rows, num_choices);
  const auto cuda = detail::cuda_stream(stream);
  const dim3 staged = p.num_scales > 0 ? stage_grid(p, num_rows) : dim3(0);
  const int64_t gathered = p.num_scales > 0 && staged.x == 0 ? num_rows : 0;
  if (staged.x > 0) stage_scales(p, staged, num_rows, cuda);
  const bool aligned = detail::aligned16(p.x) && detail::aligned16(p.y);
  detail::dispatch_word(row_bytes, aligned, [&](auto* type) {
    using Word = std::remove_pointer_t<decltype(type)>;
    const auto words = static_cast<int>(row_bytes / static_cast<int64_t>(sizeof(Word)));
    launch_rows<Word>(p, words, gathered, staged.x > 0, cuda);
  });
  if (p.num_rows > num_choices) {
    detail::clear_padding(p.y, p.choice_of, p.num_rows, row_bytes, cuda);
  }
  detail::check_launch("permute");
}

}  // namespace dsv3::kernels::cuda
