// Rows to expert order and back: permute (also serves any gather by row_of), combine and combine's
// gradient.
//
// permute and combine: a block per token, its threads along D in 16-byte steps, so that a token's
// row is read once and its K rows are in flight together. FP8's scales follow in a kernel of their
// own by rows of the output: written from the tokens' blocks, every 4 bytes of them would touch a
// sector of the L2 cache. combine's gradient: a warp per choice, whose dot product needs no block;
// the K warps of a token find its dy in the L1 cache. Padding rows, where there are any, are
// cleared by a kernel that looks at 32 rows a block.
// Bytes moved at T tokens, K choices, D hidden of BF16: permute 2·T·D·(1 + K), combine the same
// (+ base), its gradient 2·T·D·(1 + 2K); at 16,384 x 7168, K = 8: 2.1, 2.1 and 4.0 GB. Memory
// bound.

#include <algorithm>

#include "kernels/detail/launch.cuh"
#include "kernels/detail/permutation.h"
#include "kernels/detail/vector.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;
using detail::kWarp;

constexpr int kMaxThreads = 256;
constexpr int kScaleThreads = 1024;
constexpr int kScaleRows = 16;    // of a thread
constexpr int kScaleColumns = 4;  // of a block

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

constexpr int kPaddingRows = kWarp;  // of a block

/// Zeros over the rows without a choice.
template <typename Word>
__global__ void __launch_bounds__(kMaxThreads)
    clear_padding_kernel(Word* rows, const int32_t* choice_of, int64_t num_rows, int64_t words) {
  const int64_t first = int64_t{blockIdx.x} * kPaddingRows, mine = first + threadIdx.x % kWarp;
  unsigned padding = __ballot_sync(detail::kFullMask, mine < num_rows && choice_of[mine] < 0);
  for (; padding != 0; padding &= padding - 1) {
    Word* const row = rows + (first + __ffs(padding) - 1) * words;
    for (int64_t i = threadIdx.x; i < words; i += kMaxThreads) row[i] = Word{};
  }
}

/// What a thread of combine has in flight: kVectors vectors of kChoices rows at a time.
template <int kChoicesAtOnce, int kVectorsAtOnce>
struct CombineBatch {
  static constexpr int kChoices = kChoicesAtOnce, kVectors = kVectorsAtOnce;
};

constexpr int kMostTokens = kMaxThreads / kWarp;  // of a block

/// Threads (along D, tokens).
template <typename T, typename Batch>
__global__ void __launch_bounds__(kMaxThreads) combine_kernel(CombineForward p) {
  __shared__ int row[kMostTokens][kMaxChoices];
  __shared__ float weight[kMostTokens][kMaxChoices];
  const int num_choices = p.num_experts_per_token;
  const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool exists = token < p.num_tokens;
  if (exists && threadIdx.x < num_choices) {
    const int64_t choice = token * num_choices + threadIdx.x;
    row[threadIdx.y][threadIdx.x] = p.row_of[choice];
    weight[threadIdx.y][threadIdx.x] = p.weights == nullptr ? 1.0f : p.weights[choice];
  }
  __syncthreads();
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
      Packed<T> packed[Batch::kChoices][Batch::kVectors];
#pragma unroll
      for (int j = 0; j < Batch::kChoices; ++j) {
        if (k + j >= num_choices) break;
        const T* const from = rows + row[threadIdx.y][k + j] * p.hidden;
#pragma unroll
        for (int v = 0; v < Batch::kVectors; ++v) {
          const int64_t i = first + v * step;
          if (i < p.hidden) packed[j][v] = load_packed(from + i);
        }
      }
#pragma unroll
      for (int j = 0; j < Batch::kChoices; ++j) {
        if (k + j >= num_choices) break;
        const float w = weight[threadIdx.y][k + j];
#pragma unroll
        for (int v = 0; v < Batch::kVectors; ++v) {
          float x[kVector];
          unpack(packed[j][v], x);
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

/// Zeros over the padding of `rows`.
void clear_padding(void* rows, const int32_t* choice_of, int64_t num_rows, int64_t row_bytes,
                   cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((num_rows + kPaddingRows - 1) / kPaddingRows);
  dispatch_word(row_bytes, detail::aligned16(rows), [&](auto* type) {
    using Word = std::remove_pointer_t<decltype(type)>;
    const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
    clear_padding_kernel<Word>
        <<<blocks, kMaxThreads, 0, stream>>>(static_cast<Word*>(rows), choice_of, num_rows, words);
  });
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
  dispatch_word(row_bytes, detail::aligned16(p.x) && detail::aligned16(p.y), [&](auto* type) {
    using Word = std::remove_pointer_t<decltype(type)>;
    const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
    permute_kernel<Word>
        <<<static_cast<unsigned>(p.num_tokens), threads_for(words), 0, cuda>>>(p, words);
  });
  const int64_t num_choices = p.num_tokens * p.num_experts_per_token;
  if (p.num_rows > num_choices) {
    clear_padding(p.y, p.choice_of, p.num_rows, row_bytes, cuda);
  }
  if (p.num_scales > 0) permute_scales(p, std::max(p.num_rows, num_choices), cuda);
  detail::check_launch("permute");
}

void combine_forward(const CombineForward& p, Stream stream) {
  if (p.num_tokens == 0 || p.hidden == 0) return;
  const bool vectorised = p.hidden % kVector == 0 && detail::aligned16(p.rows) &&
                          detail::aligned16(p.y) && detail::aligned16(p.base);
  const auto cuda = detail::cuda_stream(stream);
  detail::dispatch_float("combine", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!vectorised) {
      combine_any_kernel<T>
          <<<static_cast<unsigned>(p.num_tokens), threads_for(p.hidden), 0, cuda>>>(p);
      return;
    }
    const auto launch = [&](auto batch) {
      using Batch = decltype(batch);
      const int64_t vectors = p.hidden / kVector;
      const auto threads =
          static_cast<unsigned>(threads_for((vectors + Batch::kVectors - 1) / Batch::kVectors));
      const unsigned tokens = kMaxThreads / threads;
      const auto blocks = static_cast<unsigned>((p.num_tokens + tokens - 1) / tokens);
      combine_kernel<T, Batch><<<blocks, dim3(threads, tokens), 0, cuda>>>(p);
    };
    constexpr int kInFlight = sizeof(T) == 2 ? 8 : 4;  // rows' vectors
    if (p.num_experts_per_token <= 2) {
      launch(CombineBatch<2, kInFlight / 2>());
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
    clear_padding(p.drows, p.choice_of, p.num_rows, p.hidden * size_of(p.dtype), cuda);
  }
  detail::check_launch("combine_backward");
}

}  // namespace dsv3::kernels::cuda
