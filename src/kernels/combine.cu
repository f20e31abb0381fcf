// Rows from expert order back to their tokens, and the gradient of that.
//
// combine: a block per token or a few, threads along D in 16-byte steps, so that a token's K rows
// are in flight together. Its gradient: a warp per choice, whose dot product needs no block; the K
// warps of a token find its dy in the L1 cache. Bytes moved at T tokens, K choices, D hidden of
// BF16: 2·T·D·(1 + K) (+ base), the gradient 2·T·D·(1 + 2K); at 16,384 x 7168, K = 8: 2.1 and
// 4.0 GB. Memory bound.

#include <algorithm>

#include "kernels/detail/expert_rows.cuh"
#include "kernels/detail/launch.cuh"
#include "kernels/detail/words.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kMaxThreads;
using detail::kVector;
using detail::kWarp;

/// What a thread of combine has in flight: kVectors vectors of kChoices rows at a time.
template <int kChoicesAtOnce, int kVectorsAtOnce>
struct CombineBatch {
  static constexpr int kChoices = kChoicesAtOnce, kVectors = kVectorsAtOnce;
};

/// Of a block of several tokens: small ones, in order, keep the places that memory works at close
/// together.
constexpr unsigned kCombineThreads = 128;
constexpr int kMostTokens = kCombineThreads / kWarp;

/// A token's choices: every thread has them where they are two at most, else the block's shared
/// memory.
template <bool kOwn>
class Choices {
 public:
  /// All threads of the block; `exists`: the token does.
  __device__ __forceinline__ Choices(const CombineForward& p, int64_t token, bool exists) {
    const int count = p.num_experts_per_token;
    if constexpr (kOwn) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
        load(p, token * count + k, exists && k < count, row_[k], weight_[k]);
    } else {
      __shared__ int rows[kMostTokens][kMaxChoices];
      __shared__ float weights[kMostTokens][kMaxChoices];
      rows_ = rows[threadIdx.y], weights_ = weights[threadIdx.y];
      const int k = threadIdx.x;
      if (k < count) load(p, token * count + k, exists, rows_[k], weights_[k]);
      __syncthreads();
    }
  }
  __device__ __forceinline__ int row(int k) const {
    return kOwn ? row_[k] : rows_[k];
  }
  __device__ __forceinline__ float weight(int k) const {
    return kOwn ? weight_[k] : weights_[k];
  }

 private:
  static __device__ __forceinline__ void load(const CombineForward& p, int64_t choice, bool exists,
                                              int& row, float& weight) {
    row = exists ? p.row_of[choice] : 0;
    weight = exists && p.weights != nullptr ? p.weights[choice] : 1.0f;
  }

  int row_[2];
  float weight_[2];
  int* rows_;
  float* weights_;
};

/// Threads (along D, tokens). With Batch::kChoices = 2 there are no more.
template <typename T, typename Batch>
__global__ void __launch_bounds__(kMaxThreads) combine_kernel(CombineForward p) {
  const int num_choices = p.num_experts_per_token;
  const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool exists = token < p.num_tokens;
  const Choices<Batch::kChoices == 2> choices(p, token, exists);
  if (!exists) return;
  const auto* const rows = static_cast<const T*>(p.rows);
  const int64_t step = int64_t{blockDim.x} * kVector;
  for (int64_t first = int64_t{threadIdx.x} * kVector; first < p.hidden;
       first += Batch::kVectors * step) {
    float acc[Batch::kVectors][kVector] = {};
    if (p.base != nullptr) {
#pragma unroll
      for (int v = 0; v < Batch::kVectors; ++v) {
        const int64_t i = first + v * step;
        if (i < p.hidden) {
          detail::load8(static_cast<const T*>(p.base) + token * p.hidden + i, acc[v]);
        }
      }
    }
    for (int k = 0; k < num_choices; k += Batch::kChoices) {
      detail::Words8<T> packed[Batch::kChoices][Batch::kVectors];
#pragma unroll
      for (int j = 0; j < Batch::kChoices; ++j) {
        if (k + j >= num_choices) break;
        const T* const from = rows + choices.row(k + j) * p.hidden;
#pragma unroll
        for (int v = 0; v < Batch::kVectors; ++v) {
          const int64_t i = first + v * step;
          if (i < p.hidden) packed[j][v].load(from + i);
        }
      }
#pragma unroll
      for (int j = 0; j < Batch::kChoices; ++j) {
        if (k + j >= num_choices) break;
        const float w = choices.weight(k + j);
#pragma unroll
        for (int v = 0; v < Batch::kVectors; ++v) {
          float x[kVector];
          detail::unpack(packed[j][v], x);
#pragma unroll
          for (int e = 0; e < kVector; ++e) acc[v][e] = fmaf(w, x[e], acc[v][e]);
        }
      }
    }
#pragma unroll
    for (int v = 0; v < Batch::kVectors; ++v) {
      const int64_t i = first + v * step;
      if (i < p.hidden) detail::store8(static_cast<T*>(p.y) + token * p.hidden + i, acc[v]);
    }
  }
}

/// The same for any width, a block per token.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) combine_any_kernel(CombineForward p) {
  const int num_choices = p.num_experts_per_token;
  const int64_t token = blockIdx.x;
  const auto* const base = static_cast<const T*>(p.base);
  for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    float acc = base == nullptr ? 0.0f : detail::to_float(base[token * p.hidden + i]);
    for (int k = 0; k < num_choices; ++k) {
      const int64_t choice = token * num_choices + k;
      const T x = static_cast<const T*>(p.rows)[p.row_of[choice] * p.hidden + i];
      acc = fmaf(p.weights == nullptr ? 1.0f : p.weights[choice], detail::to_float(x), acc);
    }
    static_cast<T*>(p.y)[token * p.hidden + i] = detail::from_float<T>(acc);
  }
}

/// One choice's pointers and weight in combine's gradient.
template <typename T>
struct Choice {
  const T* dy;
  const T* x;  // null: no dot product wanted
  T* dx;       // null: no rows' gradient wanted
  float weight;
};

/// Writes dx = weight · dy and returns the lane's part of x · dy, kBatch vectors in flight.
template <typename T>
__device__ __forceinline__ float scale_and_dot(const Choice<T>& choice, int64_t hidden, int lane) {
  constexpr int kBatch = sizeof(T) == 2 ? 4 : 2;
  constexpr int64_t kStep = kWarp * kVector;
  float dot = 0.0f;
  for (int64_t first = lane * kVector; first < hidden; first += kBatch * kStep) {
    detail::Words8<T> dy[kBatch], x[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t i = first + j * kStep;
      if (i >= hidden) continue;
      dy[j].load(choice.dy + i);
      if (choice.x != nullptr) x[j].load(choice.x + i);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t i = first + j * kStep;
      if (i >= hidden) continue;
      float d[kVector], v[kVector];
      detail::unpack(dy[j], d);
      if (choice.x != nullptr) {
        detail::unpack(x[j], v);
#pragma unroll
        for (int e = 0; e < kVector; ++e) dot = fmaf(d[e], v[e], dot);
      }
      if (choice.dx == nullptr) continue;
#pragma unroll
      for (int e = 0; e < kVector; ++e) d[e] *= choice.weight;
      detail::store8(choice.dx + i, d);
    }
  }
  return dot;
}

template <typename T, bool kVectorised>
__global__ void __launch_bounds__(kMaxThreads)
    combine_backward_kernel(CombineBackward p, int64_t num_choices) {
  const int lane = threadIdx.x % kWarp;
  const int64_t index = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
  if (index >= num_choices) return;
  const int64_t row = p.row_of[index];
  const bool wants_dot = p.dweights != nullptr;
  const Choice<T> choice{
      .dy = static_cast<const T*>(p.dy) + index / p.num_experts_per_token * p.hidden,
      .x = wants_dot ? static_cast<const T*>(p.rows) + row * p.hidden : nullptr,
      .dx = p.drows == nullptr ? nullptr : static_cast<T*>(p.drows) + row * p.hidden,
      .weight = p.weights[index]};
  float dot = 0.0f;
  if constexpr (kVectorised) {
    dot = scale_and_dot(choice, p.hidden, lane);
  } else {
    for (int64_t i = lane; i < p.hidden; i += kWarp) {
      const float d = detail::to_float(choice.dy[i]);
      if (wants_dot) dot = fmaf(d, detail::to_float(choice.x[i]), dot);
      if (choice.dx != nullptr) choice.dx[i] = detail::from_float<T>(d * choice.weight);
    }
  }
  if (!wants_dot) return;
  dot = detail::warp_sum(dot);
  if (lane == 0) p.dweights[index] = dot;
}

}  // namespace

void combine_forward(const CombineForward& p, Stream stream) {
  if (p.num_tokens == 0 || p.hidden == 0) return;
  const bool vectorised = p.hidden % kVector == 0 && detail::aligned16(p.rows) &&
                          detail::aligned16(p.y) && detail::aligned16(p.base);
  const auto cuda = detail::cuda_stream(stream);
  detail::dispatch_float("combine", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!vectorised) {
      combine_any_kernel<T>
          <<<static_cast<unsigned>(p.num_tokens), detail::threads_for(p.hidden), 0, cuda>>>(p);
      return;
    }
    const auto launch = [&](auto batch) {
      using Batch = decltype(batch);
      const int64_t vectors = p.hidden / kVector;
      const auto threads = static_cast<unsigned>(
          detail::threads_for((vectors + Batch::kVectors - 1) / Batch::kVectors));
      const unsigned tokens = std::max(1u, kCombineThreads / threads);
      const auto blocks = static_cast<unsigned>((p.num_tokens + tokens - 1) / tokens);
      combine_kernel<T, Batch><<<blocks, dim3(threads, tokens), 0, cuda>>>(p);
    };
    constexpr int kInFlight = sizeof(T) == 2 ? 8 : 4;  // rows' vectors
    if (p.num_experts_per_token <= 2) {
      launch(CombineBatch<2, kInFlight / 4>());
    } else {
      launch(CombineBatch<kInFlight, 1>());
    }
  });
  detail::check_launch("combine");
}

void combine_backward(const CombineBackward& p, Stream stream) {
  const int64_t num_choices = p.num_tokens * p.num_experts_per_token;
  if (num_choices == 0) return;
  const auto cuda = detail::cuda_stream(stream);
  const bool vectorised = p.hidden % kVector == 0 && detail::aligned16(p.rows) &&
                          detail::aligned16(p.dy) && detail::aligned16(p.drows);
  detail::dispatch_float("combine_backward", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* const kernel =
        vectorised ? combine_backward_kernel<T, true> : combine_backward_kernel<T, false>;
    const int64_t threads = num_choices * kWarp;
    const auto blocks = static_cast<unsigned>((threads + kMaxThreads - 1) / kMaxThreads);
    kernel<<<blocks, kMaxThreads, 0, cuda>>>(p, num_choices);
  });
  if (p.drows != nullptr && p.num_rows > num_choices) {
    detail::clear_padding(p.drows, p.choice_of, p.num_rows, p.hidden * size_of(p.dtype), cuda);
  }
  detail::check_launch("combine_backward");
}

}  // namespace dsv3::kernels::cuda
