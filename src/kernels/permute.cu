// Rows to expert order and back: permute (also serves any gather by row_of), combine and combine's
// gradient.
//
// permute and combine: a block per token, its threads along D in 16-byte steps, so that a token's
// row is read once and its K rows are in flight together. combine's gradient: a warp per choice,
// whose dot product needs no block; the K warps of a token find its dy in the L1 cache. Padding
// rows, where there are any, are cleared by a kernel of their own that looks at 64 rows a block.
// Bytes moved at T tokens, K choices, D hidden of BF16: permute 2·T·D·(1 + K), combine the same
// (+ base), its gradient 2·T·D·(1 + 2K); at 16,384 x 7168, K = 8: 2.1, 2.1 and 4.0 GB. Memory
// bound.

#include "kernels/detail/launch.cuh"
#include "kernels/detail/permutation.h"
#include "kernels/detail/vector.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;
using detail::kWarp;

constexpr int kMaxThreads = 256;

/// Eight elements as they stand in memory: many of them in flight cost few registers.
template <typename T>
struct Packed {
  uint4 words[sizeof(T) / 2];
};

template <typename T>
__device__ __forceinline__ Packed<T> load_packed(const T* x) {
  Packed<T> packed;
#pragma unroll
  for (int j = 0; j < static_cast<int>(sizeof(T) / 2); ++j) {
    packed.words[j] = reinterpret_cast<const uint4*>(x)[j];
  }
  return packed;
}

__device__ __forceinline__ void unpack(const Packed<float>& packed, float (&v)[kVector]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    v[4 * j] = __uint_as_float(packed.words[j].x);
    v[4 * j + 1] = __uint_as_float(packed.words[j].y);
    v[4 * j + 2] = __uint_as_float(packed.words[j].z);
    v[4 * j + 3] = __uint_as_float(packed.words[j].w);
  }
}
__device__ __forceinline__ void unpack(const Packed<__nv_bfloat16>& packed, float (&v)[kVector]) {
  const uint4 raw = packed.words[0];
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(words[i] << 16);
    v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

/// y_scales[g, rows[k]] = x_scales[g, token] · weight. The 4-byte writes of neighbouring rows come
/// from tokens that are on their way at about the same time: the L2 joins them.
__device__ __forceinline__ void permute_scales(const PermuteForward& p, int64_t token,
                                               const int* rows) {
  const int num_choices = p.num_experts_per_token;
  for (int i = threadIdx.x; i < p.num_scales * num_choices; i += blockDim.x) {
    const int g = i / num_choices, k = i % num_choices;
    const float weight = p.weights == nullptr ? 1.0f : p.weights[token * num_choices + k];
    p.y_scales[g * p.y_scale_stride + rows[k]] = p.x_scales[g * p.x_scale_stride + token] * weight;
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
  permute_scales(p, token, rows);
}

constexpr int kPaddingRows = 64;

/// Zeros over the rows without a choice, and over their scales (may be null).
template <typename Word>
__global__ void __launch_bounds__(kMaxThreads)
    clear_padding_kernel(Word* rows, const int32_t* choice_of, int64_t num_rows, int64_t words,
                         float* scales, int num_scales, int64_t scale_stride) {
  const int64_t first = int64_t{blockIdx.x} * kPaddingRows;
  const int64_t end = min(num_rows, first + kPaddingRows);
  for (int64_t row = first; row < end; ++row) {
    if (choice_of[row] >= 0) continue;
    for (int64_t i = threadIdx.x; i < words; i += blockDim.x) rows[row * words + i] = Word{};
    for (int g = threadIdx.x; g < num_scales; g += blockDim.x) scales[g * scale_stride + row] = 0;
  }
}

/// acc += weight · row for the choices [first, first + kBatch), loads issued before the sums.
template <int kBatch, typename T>
__device__ __forceinline__ void add_choices(const T* rows, const int* row, const float* weight,
                                            int first, int num_choices, int64_t hidden, int64_t i,
                                            float (&acc)[kVector]) {
  Packed<T> packed[kBatch];
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    if (first + j < num_choices) packed[j] = load_packed(rows + row[first + j] * hidden + i);
  }
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    if (first + j >= num_choices) break;
    const float w = weight[first + j];
    float v[kVector];
    unpack(packed[j], v);
#pragma unroll
    for (int e = 0; e < kVector; ++e) acc[e] = fmaf(w, v[e], acc[e]);
  }
}

template <typename T, bool kVectorised>
__global__ void __launch_bounds__(kMaxThreads)
    combine_kernel(const T* rows, const float* weights, const int32_t* row_of, const T* base, T* y,
                   int num_choices, int64_t hidden) {
  constexpr int kBatch = sizeof(T) == 2 ? 8 : 4;
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
      for (int k = 0; k < num_choices; k += kBatch) {
        add_choices<kBatch>(rows, row, weight, k, num_choices, hidden, i, acc);
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
    Packed<T> dy[kBatch], x[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t i = first + j * kStep;
      if (i >= hidden) continue;
      dy[j] = load_packed(choice.dy + i);
      if (choice.x != nullptr) x[j] = load_packed(choice.x + i);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t i = first + j * kStep;
      if (i >= hidden) continue;
      float d[kVector], v[kVector];
      unpack(dy[j], d);
      if (choice.x != nullptr) {
        unpack(x[j], v);
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

/// Threads along a row of `steps` steps: 4 to 8 warps, as many as leave the fewest idle in the last
/// round (D = 7168 of BF16: 896 steps, 4 rounds of 7 warps); fewer where the row is short.
int threads_for(int64_t steps) {
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

/// Zeros over the padding of `rows`; scales come from `p` where rows are permute's.
void clear_padding(void* rows, const int32_t* choice_of, int64_t num_rows, int64_t row_bytes,
                   const PermuteForward* p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((num_rows + kPaddingRows - 1) / kPaddingRows);
  dispatch_word(row_bytes, detail::aligned16(rows), [&](auto* type) {
    using Word = std::remove_pointer_t<decltype(type)>;
    const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
    clear_padding_kernel<Word><<<blocks, kMaxThreads, 0, stream>>>(
        static_cast<Word*>(rows), choice_of, num_rows, words, p != nullptr ? p->y_scales : nullptr,
        p != nullptr ? p->num_scales : 0, p != nullptr ? p->y_scale_stride : 0);
  });
}

}  // namespace

void permute_forward(const PermuteForward& p, Stream stream) {
  kernels::detail::check_permute(p);
  if (p.num_tokens == 0 || p.hidden == 0) return;
  const int64_t row_bytes = p.hidden * size_of(p.dtype);
  const auto cuda = detail::cuda_stream(stream);
  dispatch_word(row_bytes, detail::aligned16(p.x) && detail::aligned16(p.y), [&](auto* type) {
    using Word = std::remove_pointer_t<decltype(type)>;
    const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
    permute_kernel<Word>
        <<<static_cast<unsigned>(p.num_tokens), threads_for(words), 0, cuda>>>(p, words);
  });
  if (p.num_rows > p.num_tokens * p.num_experts_per_token) {
    clear_padding(p.y, p.choice_of, p.num_rows, row_bytes, &p, cuda);
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
    clear_padding(p.drows, p.choice_of, p.num_rows, p.hidden * size_of(p.dtype), nullptr, cuda);
  }
  detail::check_launch("combine_backward");
}

}  // namespace dsv3::kernels::cuda
