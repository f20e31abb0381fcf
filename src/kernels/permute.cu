// Rows to expert order and back: permute (also serves any gather by row_of), combine and combine's
// gradient.
//
// permute and combine: a block per token, its threads along D, 8 elements each, so that a token's
// row is read once and its K rows are in flight together. combine's gradient: a warp per choice,
// whose dot product needs no block. Bytes moved at T tokens, K choices, D hidden of BF16: permute
// 2·T·D·(1 + K), combine the same (+ base), its gradient 2·T·D·(1 + 2K). Memory bound.

#include "kernels/detail/launch.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;
using detail::kWarp;

constexpr int kMaxThreads = 256;

/// Copies x[t] to its K rows, in words of type Word.
template <typename Word>
__global__ void __launch_bounds__(kMaxThreads)
    permute_kernel(const Word* x, const int32_t* row_of, Word* y, int num_choices, int64_t words) {
  __shared__ int rows[kMaxChoices];
  const int64_t token = blockIdx.x;
  if (threadIdx.x < num_choices) rows[threadIdx.x] = row_of[token * num_choices + threadIdx.x];
  __syncthreads();
  for (int64_t i = threadIdx.x; i < words; i += blockDim.x) {
    const Word word = x[token * words + i];
    for (int k = 0; k < num_choices; ++k) y[rows[k] * words + i] = word;
  }
}

/// acc += weight · row for the choices [first, first + 4), loads issued before the sums.
template <typename T>
__device__ __forceinline__ void add_choices(const T* rows, const int* row, const float* weight,
                                            int first, int num_choices, int64_t hidden, int64_t i,
                                            float (&acc)[kVector]) {
  constexpr int kBatch = 4;
  float v[kBatch][kVector];
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    if (first + j < num_choices) detail::load8(rows + row[first + j] * hidden + i, v[j]);
  }
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    if (first + j >= num_choices) break;
    const float w = weight[first + j];
#pragma unroll
    for (int e = 0; e < kVector; ++e) acc[e] = fmaf(w, v[j][e], acc[e]);
  }
}

template <typename T, bool kVectorised>
__global__ void __launch_bounds__(kMaxThreads)
    combine_kernel(const T* rows, const float* weights, const int32_t* row_of, const T* base, T* y,
                   int num_choices, int64_t hidden) {
  __shared__ int row[kMaxChoices];
  __shared__ float weight[kMaxChoices];
  const int64_t token = blockIdx.x;
  if (threadIdx.x < num_choices) {
    row[threadIdx.x] = row_of[token * num_choices + threadIdx.x];
    weight[threadIdx.x] = weights == nullptr ? 1.0f : weights[token * num_choices + threadIdx.x];
  }
  __syncthreads();
  if constexpr (kVectorised) {
    for (int64_t i = int64_t{threadIdx.x} * kVector; i < hidden; i += blockDim.x * kVector) {
      float acc[kVector] = {};
      if (base != nullptr) detail::load8(base + token * hidden + i, acc);
      for (int k = 0; k < num_choices; k += 4) {
        add_choices(rows, row, weight, k, num_choices, hidden, i, acc);
      }
      detail::store8(y + token * hidden + i, acc);
    }
  } else {
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) {
      float acc = base == nullptr ? 0.0f : detail::to_float(base[token * hidden + i]);
      for (int k = 0; k < num_choices; ++k) {
        acc = fmaf(weight[k], detail::to_float(rows[row[k] * hidden + i]), acc);
      }
      y[token * hidden + i] = detail::from_float<T>(acc);
    }
  }
}

template <typename T, bool kVectorised>
__global__ void __launch_bounds__(kMaxThreads)
    combine_backward_kernel(CombineBackward p, int64_t num_rows) {
  const int lane = threadIdx.x % kWarp;
  const int64_t choice = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
  if (choice >= num_rows) return;
  const T* const dy = static_cast<const T*>(p.dy) + choice / p.num_experts_per_token * p.hidden;
  const int64_t row = p.row_of[choice];
  const T* const x = static_cast<const T*>(p.rows) + row * p.hidden;
  T* const dx = p.drows == nullptr ? nullptr : static_cast<T*>(p.drows) + row * p.hidden;
  const bool wants_dot = p.dweights != nullptr;
  const float weight = p.weights[choice];
  float dot = 0.0f;
  if constexpr (kVectorised) {
#pragma unroll 4
    for (int64_t i = lane * kVector; i < p.hidden; i += kWarp * kVector) {
      float d[kVector], v[kVector];
      detail::load8(dy + i, d);
      if (wants_dot) detail::load8(x + i, v);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        if (wants_dot) dot = fmaf(d[e], v[e], dot);
        d[e] *= weight;
      }
      if (dx != nullptr) detail::store8(dx + i, d);
    }
  } else {
    for (int64_t i = lane; i < p.hidden; i += kWarp) {
      const float d = detail::to_float(dy[i]);
      if (wants_dot) dot = fmaf(d, detail::to_float(x[i]), dot);
      if (dx != nullptr) dx[i] = detail::from_float<T>(d * weight);
    }
  }
  if (!wants_dot) return;
  dot = detail::warp_sum(dot);
  if (lane == 0) p.dweights[choice] = dot;
}

/// Threads along a row: enough for one step each, at most kMaxThreads.
int threads_for(int64_t steps) {
  const int64_t warps = (steps + kWarp - 1) / kWarp;
  return static_cast<int>(warps * kWarp < kMaxThreads ? (warps > 0 ? warps : 1) * kWarp
                                                      : kMaxThreads);
}

template <typename Word>
void launch_permute(const PermuteForward& p, int64_t row_bytes, cudaStream_t stream) {
  const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
  permute_kernel<<<static_cast<unsigned>(p.num_tokens), threads_for(words), 0, stream>>>(
      static_cast<const Word*>(p.x), p.row_of, static_cast<Word*>(p.y), p.num_experts_per_token,
      words);
}

}  // namespace

void permute_forward(const PermuteForward& p, Stream stream) {
  if (p.num_tokens == 0 || p.hidden == 0) return;
  const int64_t row_bytes = p.hidden * size_of(p.dtype);
  const auto cuda = detail::cuda_stream(stream);
  if (row_bytes % 16 == 0 && detail::aligned16(p.x) && detail::aligned16(p.y)) {
    launch_permute<uint4>(p, row_bytes, cuda);
  } else if (size_of(p.dtype) == 4) {
    launch_permute<uint32_t>(p, row_bytes, cuda);
  } else if (size_of(p.dtype) == 2) {
    launch_permute<uint16_t>(p, row_bytes, cuda);
  } else {
    kernels::detail::raise_dtype("permute", p.dtype);
  }
  detail::check_launch("permute");
}

void combine_forward(const CombineForward& p, Stream stream) {
  if (p.num_tokens == 0 || p.hidden == 0) return;
  const bool vectorised = p.hidden % kVector == 0 && detail::aligned16(p.rows) &&
                          detail::aligned16(p.y) && detail::aligned16(p.base);
  detail::dispatch_float("combine", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* const kernel = vectorised ? combine_kernel<T, true> : combine_kernel<T, false>;
    const int threads = threads_for(vectorised ? p.hidden / kVector : p.hidden);
    kernel<<<static_cast<unsigned>(p.num_tokens), threads, 0, detail::cuda_stream(stream)>>>(
        static_cast<const T*>(p.rows), p.weights, p.row_of, static_cast<const T*>(p.base),
        static_cast<T*>(p.y), p.num_experts_per_token, p.hidden);
  });
  detail::check_launch("combine");
}

void combine_backward(const CombineBackward& p, Stream stream) {
  const int64_t num_rows = p.num_tokens * p.num_experts_per_token;
  if (num_rows == 0) return;
  const bool vectorised = p.hidden % kVector == 0 && detail::aligned16(p.rows) &&
                          detail::aligned16(p.dy) && detail::aligned16(p.drows);
  detail::dispatch_float("combine_backward", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* const kernel =
        vectorised ? combine_backward_kernel<T, true> : combine_backward_kernel<T, false>;
    const int64_t threads = num_rows * kWarp;
    const auto blocks = static_cast<unsigned>((threads + kMaxThreads - 1) / kMaxThreads);
    kernel<<<blocks, kMaxThreads, 0, detail::cuda_stream(stream)>>>(p, num_rows);
  });
  detail::check_launch("combine_backward");
}

}  // namespace dsv3::kernels::cuda
