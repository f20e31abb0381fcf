// Rows to expert order: serves any gather by row_of too.
//
// A block per token, its threads along D in 16-byte steps, so that a token's row is read once and
// its K rows are in flight together. FP8's scales follow in a kernel of their own by rows of the
// output: written from the tokens' blocks, every 4 bytes of them would touch a sector of the L2
// cache. Bytes moved at T tokens, K choices, D hidden of BF16: 2·T·D·(1 + K); at 16,384 x 7168,
// K = 8: 2.1 GB. Memory bound.

#include <algorithm>

#include "kernels/detail/expert_rows.cuh"
#include "kernels/detail/launch.cuh"
#include "kernels/detail/permutation.h"
#include "kernels/detail/vector.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kMaxThreads;

constexpr int kScaleThreads = 1024;
constexpr int kScaleRows = 16;    // of a thread
constexpr int kScaleColumns = 4;  // of a block

/// y_scales[g, r] = x_scales[g, token of r] · weight, 0 for padding. A thread keeps the tokens of
/// kScaleRows rows; column after column of scales passes through shared memory (kStaged), because
/// tokens come in any order while neighbouring rows are written together.
template <bool kStaged>
__global__ void __launch_bounds__(kScaleThreads)
    permute_scales_kernel(PermuteForward p, int64_t num_rows) {
  extern __shared__ float4 staged[];
  const int64_t first = int64_t{blockIdx.x} * kScaleThreads * kScaleRows + threadIdx.x;
  int token[kScaleRows];
  float weight[kScaleRows];
#pragma unroll
  for (int j = 0; j < kScaleRows; ++j) {
    const int64_t row = first + j * kScaleThreads;
    const int choice = row < num_rows ? p.choice_of[row] : -1;
    token[j] = choice < 0 ? -1 : choice / p.num_experts_per_token;
    weight[j] = choice < 0 || p.weights == nullptr ? 1.0f : p.weights[choice];
  }
  const int begin = blockIdx.y * kScaleColumns, end = min(begin + kScaleColumns, p.num_scales);
  for (int g = begin; g < end; ++g) {
    const float* scales = p.x_scales + g * p.x_scale_stride;
    if constexpr (kStaged) {
      __syncthreads();
#pragma unroll 4
      for (int t = threadIdx.x; t < static_cast<int>(p.num_tokens) / 4; t += kScaleThreads) {
        staged[t] = reinterpret_cast<const float4*>(scales)[t];
      }
      __syncthreads();
      scales = reinterpret_cast<const float*>(staged);
    }
    float* const y = p.y_scales + g * p.y_scale_stride;
#pragma unroll
    for (int j = 0; j < kScaleRows; ++j) {
      const int64_t row = first + j * kScaleThreads;
      if (row < num_rows) y[row] = token[j] < 0 ? 0.0f : scales[token[j]] * weight[j];
    }
  }
}

/// Copies x[t] to its K rows, in words of type Word, kBatch of them in flight in a thread.
template <typename Word>
__global__ void __launch_bounds__(kMaxThreads) permute_kernel(PermuteForward p, int64_t words) {
  constexpr int kBatch = 4;
  __shared__ int rows[kMaxChoices];
  const int num_choices = p.num_experts_per_token;
  const int64_t token = blockIdx.x;
  if (threadIdx.x < num_choices) rows[threadIdx.x] = p.row_of[token * num_choices + threadIdx.x];
  const auto* const x = static_cast<const Word*>(p.x) + token * words;
  auto* const y = static_cast<Word*>(p.y);
  __syncthreads();
  for (int64_t first = threadIdx.x; first < words; first += kBatch * blockDim.x) {
    Word batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t i = first + j * blockDim.x;
      if (i < words) batch[j] = x[i];
    }
    for (int k = 0; k < num_choices; ++k) {
      Word* const row = y + rows[k] * words;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int64_t i = first + j * blockDim.x;
        if (i < words) row[i] = batch[j];
      }
    }
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

void permute_scales(const PermuteForward& p, int64_t num_rows, cudaStream_t stream) {
  constexpr int64_t kMostStaged = 160 * 1024;
  constexpr int64_t kBlockRows = kScaleThreads * kScaleRows;
  const int64_t bytes = p.num_tokens * static_cast<int64_t>(sizeof(float));
  const bool staged = bytes <= std::min(kMostStaged, shared_limit()) && p.num_tokens % 4 == 0 &&
                      p.x_scale_stride % 4 == 0 && detail::aligned16(p.x_scales);
  auto* const kernel = staged ? permute_scales_kernel<true> : permute_scales_kernel<false>;
  const int shared = staged ? static_cast<int>(bytes) : 0;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  const dim3 grid(static_cast<unsigned>((num_rows + kBlockRows - 1) / kBlockRows),
                  static_cast<unsigned>((p.num_scales + kScaleColumns - 1) / kScaleColumns));
  kernel<<<grid, kScaleThreads, static_cast<size_t>(shared), stream>>>(p, num_rows);
}

}  // namespace

void permute_forward(const PermuteForward& p, Stream stream) {
  kernels::detail::check_permute(p);
  if (p.num_tokens == 0 || p.hidden == 0) return;
  const int64_t row_bytes = p.hidden * size_of(p.dtype);
  const auto cuda = detail::cuda_stream(stream);
  detail::dispatch_word(
      row_bytes, detail::aligned16(p.x) && detail::aligned16(p.y), [&](auto* type) {
        using Word = std::remove_pointer_t<decltype(type)>;
        const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
        permute_kernel<Word>
            <<<static_cast<unsigned>(p.num_tokens), detail::threads_for(words), 0, cuda>>>(p,
                                                                                           words);
      });
  const int64_t num_choices = p.num_tokens * p.num_experts_per_token;
  if (p.num_rows > num_choices) {
    detail::clear_padding(p.y, p.choice_of, p.num_rows, row_bytes, cuda);
  }
  if (p.num_scales > 0) permute_scales(p, std::max(p.num_rows, num_choices), cuda);
  detail::check_launch("permute");
}

}  // namespace dsv3::kernels::cuda
