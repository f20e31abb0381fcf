// RMSNorm's backward on the device (forward: rms_norm_forward.cu): the grid is as many blocks as
// partial sums of dweight are kept; a group of threads walks over rows, 16 elements a thread, all
// of a row's loads in flight before the first use, and keeps its columns' share of dweight in
// registers. Blocks write their shares to scratch, a second kernel adds them in the order of the
// blocks: no atomics, the same bits on every run. 6·T·D bytes in BF16 (8 with dsum, 8 with a second
// norm of the same input).
//
// Widths that are not multiples of 8, unaligned pointers and D > 16384 take a scalar path.

#include "kernels/detail/group.cuh"
#include "kernels/detail/packed.cuh"
#include "kernels/elementwise.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kGroupBlock;
using detail::kVector;
using detail::kWarp;
using detail::Packed;

constexpr int kBackwardVectors = 2;
constexpr int kScalarThreads = 256;
constexpr int kSumThreads = 256, kSumColumns = 8;  // of the sum of the partial sums
/// Threads per multiprocessor that backward's registers must leave room for.
constexpr int kResident = 1024;
/// Of the largest device: the grid fills it once, so that no second wave runs half empty.
constexpr int64_t kMultiprocessors = 132;

/// The groups' shares of dweight, added in the order of the groups, into this block's row of
/// `partials`.
template <int kGroup>
__device__ __forceinline__ void store_partial(float* partials, int64_t hidden,
                                              const float (&dw)[kBackwardVectors][kVector]) {
  constexpr int kRows = kGroupBlock<kGroup> / kGroup;
  constexpr int kWidth = kGroup * kBackwardVectors * kVector;
  const int lane = threadIdx.x % kGroup;
  const int64_t vectors = hidden / kVector;
  float* partial = partials + int64_t{blockIdx.x} * hidden;
  if constexpr (kRows == 1) {
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) {
      const int64_t c = lane + i * kGroup;
      if (c < vectors) detail::store8(partial + c * kVector, dw[i]);
    }
  } else {
    __shared__ float shares[kRows][kWidth];
    __syncthreads();  // an earlier call may still read
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) {
      detail::store8(&shares[threadIdx.x / kGroup][(lane + i * kGroup) * kVector], dw[i]);
    }
    __syncthreads();
    for (int64_t d = threadIdx.x; d < hidden; d += kGroupBlock<kGroup>) {
      float sum = 0.0f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum += shares[r][d];
      partial[d] = sum;
    }
  }
}

/// A row's vectors of a thread; zeros where none exist.
template <typename T>
struct RowPart {
  Packed<T> part[kBackwardVectors];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) part[i].clear();
  }
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) part[i].forget();
  }
  template <int kGroup>
  __device__ __forceinline__ void load(const void* row, int64_t vectors, bool once) {
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) {
      const int64_t c = threadIdx.x % kGroup + i * kGroup;
      if (c >= vectors) continue;
      const T* from = static_cast<const T*>(row) + c * kVector;
      once ? part[i].load_once(from) : part[i].load(from);
    }
  }
  __device__ __forceinline__ float at(int i, int e) const {
    return part[i].at(e);
  }
};

template <typename T>
__device__ __forceinline__ const T* row_of(const void* matrix, int64_t row, int64_t stride) {
  return static_cast<const T*>(matrix) + row * stride;
}

/// Blocks of a multiprocessor: a second norm and FP32 hold twice the registers.
template <typename T, int kGroup, bool kSecond>
inline constexpr int kBackwardBlocks = std::max(1,
                                                kResident / kGroupBlock<kGroup> /
                                                    (kSecond || std::is_same_v<T, float> ? 2 : 1));

template <typename T, int kGroup, bool kSecond>
__global__ void __launch_bounds__(kGroupBlock<kGroup>, kBackwardBlocks<T, kGroup, kSecond>)
    backward_kernel(RmsNormBackward p, int64_t partials) {
  __shared__ float shared[2][kGroupBlock<kGroup> / kWarp];
  constexpr int kRows = kGroupBlock<kGroup> / kGroup;
  const int64_t vectors = p.hidden / kVector;
  float dw[kBackwardVectors][kVector] = {}, dw2[kSecond ? kBackwardVectors : 1][kVector] = {};
  int turn = 0;
  // Whole blocks go round together: group_sum is a barrier.
  for (int64_t first = int64_t{blockIdx.x} * kRows; first < p.num_tokens;
       first += int64_t{gridDim.x} * kRows, turn ^= 1) {
    const int64_t row = first + threadIdx.x / kGroup;
    const bool active = row < p.num_tokens;
    const int64_t mine = active ? vectors : 0;
    RowPart<T> x, g, g2, sum, w, w2;
    x.clear(), g.clear(), sum.clear(), w.clear();
    x.template load<kGroup>(row_of<T>(p.x, row, p.x_stride), mine, true);
    g.template load<kGroup>(row_of<T>(p.dy, row, p.hidden), mine, true);
    w.template load<kGroup>(p.weight, vectors, false);
    if constexpr (kSecond) {
      g2.clear(), w2.clear();
      g2.template load<kGroup>(row_of<T>(p.second_dy, row, p.hidden), mine, true);
      w2.template load<kGroup>(p.second_weight, vectors, false);
    }
    if (p.dsum != nullptr) {
      sum.template load<kGroup>(row_of<T>(p.dsum, row, p.hidden), mine, true);
    }
    const float inv_rms = active ? p.inv_rms[row] : 0.0f;
    const auto weighted = [&](int i, int e) {
      const float gw = g.at(i, e) * w.at(i, e);
      return kSecond ? fmaf(g2.at(i, e), w2.at(i, e), gw) : gw;
    };
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const float normalised = x.at(i, e) * inv_rms;
        dw[i][e] = fmaf(g.at(i, e), normalised, dw[i][e]);
        if constexpr (kSecond) dw2[i][e] = fmaf(g2.at(i, e), normalised, dw2[i][e]);
        dot = fmaf(weighted(i, e), x.at(i, e), dot);
      }
    }
    dot = detail::group_sum<kGroup>(dot, shared[turn]);
    const float slope = dot * inv_rms * inv_rms * inv_rms / static_cast<float>(p.hidden);
    x.forget(), g.forget(), w.forget();
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) {
      const int64_t c = threadIdx.x % kGroup + i * kGroup;
      if (c >= mine) continue;
      float out[kVector];
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        out[e] = sum.at(i, e) + (weighted(i, e) * inv_rms - x.at(i, e) * slope);
      }
      detail::store8(static_cast<T*>(p.dx) + row * p.hidden + c * kVector, out);
    }
  }
  if (p.dweight != nullptr) store_partial<kGroup>(p.scratch, p.hidden, dw);
  if constexpr (kSecond) {
    if (p.second_dweight != nullptr) {
      store_partial<kGroup>(p.scratch + partials * p.hidden, p.hidden, dw2);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kScalarThreads) backward_scalar_kernel(RmsNormBackward p) {
  __shared__ float shared[kScalarThreads / kWarp];
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* dy = static_cast<const T*>(p.dy) + row * p.hidden;
  const T* dsum = static_cast<const T*>(p.dsum) + row * p.hidden;
  const T* weight = static_cast<const T*>(p.weight);
  const T* second_dy = static_cast<const T*>(p.second_dy) + row * p.hidden;
  const T* second_weight = static_cast<const T*>(p.second_weight);
  const float inv_rms = p.inv_rms[row];
  const auto weighted = [&](int64_t d) {
    const float gw = detail::to_float(dy[d]) * detail::to_float(weight[d]);
    if (p.second_dy == nullptr) return gw;
    return fmaf(detail::to_float(second_dy[d]), detail::to_float(second_weight[d]), gw);
  };
  float dot = 0.0f;
  for (int64_t d = threadIdx.x; d < p.hidden; d += kScalarThreads) {
    dot += weighted(d) * detail::to_float(x[d]);
  }
  dot = detail::group_sum<kScalarThreads>(dot, shared);
  const float slope = dot * inv_rms * inv_rms * inv_rms / static_cast<float>(p.hidden);
  for (int64_t d = threadIdx.x; d < p.hidden; d += kScalarThreads) {
    const float added = p.dsum != nullptr ? detail::to_float(dsum[d]) : 0.0f;
    static_cast<T*>(p.dx)[row * p.hidden + d] =
        detail::from_float<T>(added + weighted(d) * inv_rms - detail::to_float(x[d]) * slope);
  }
}

/// Scalar path's dweight: block (32 columns, 8 rows at a time) sums a share of the rows.
template <typename T>
__global__ void weight_scalar_kernel(RmsNormBackward p, const T* dy, int64_t rows_per_block,
                                     float* partials) {
  __shared__ float shares[8][kWarp];
  const int64_t d = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  const int64_t begin = blockIdx.y * rows_per_block;
  const int64_t end = min(begin + rows_per_block, p.num_tokens);
  float sum = 0.0f;
  for (int64_t t = begin + threadIdx.y; d < p.hidden && t < end; t += 8) {
    const float x = detail::to_float(static_cast<const T*>(p.x)[t * p.x_stride + d]);
    sum = fmaf(detail::to_float(dy[t * p.hidden + d]), x * p.inv_rms[t], sum);
  }
  shares[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || d >= p.hidden) return;
  for (int i = 1; i < 8; ++i) sum += shares[i][threadIdx.x];
  partials[blockIdx.y * p.hidden + d] = sum;
}

/// dweight[d] += Σ partials[b, d] in a fixed order: a block has 8 columns, whole sectors of memory,
/// and all reads of a thread are in flight together.
template <typename G>
__global__ void __launch_bounds__(kSumThreads)
    add_partials_kernel(const float* partials, int64_t blocks, int64_t hidden, G* dweight) {
  __shared__ float shares[kSumThreads / kWarp][kSumColumns];
  constexpr int kRows = kSumThreads / kSumColumns;
  const int column = threadIdx.x % kSumColumns;
  const int64_t d = int64_t{blockIdx.x} * kSumColumns + column;
  float sum = 0.0f;
  if (d < hidden) {
#pragma unroll 9
    for (int64_t b = threadIdx.x / kSumColumns; b < blocks; b += kRows) {
      sum += partials[b * hidden + d];
    }
  }
#pragma unroll
  for (int mask = kWarp / 2; mask >= kSumColumns; mask /= 2) {
    sum += __shfl_xor_sync(detail::kFullMask, sum, mask);
  }
  if (threadIdx.x % kWarp < kSumColumns) shares[threadIdx.x / kWarp][column] = sum;
  __syncthreads();
  if (threadIdx.x >= kSumColumns || d >= hidden) return;
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSumThreads / kWarp; ++i) sum += shares[i][column];
  dweight[d] = detail::from_float<G>(detail::to_float(dweight[d]) + sum);
}

/// `partials` [blocks, D], to the gradient that they belong to (may be null).
void add_partials(const RmsNormBackward& p, const float* partials, int64_t blocks, void* dweight,
                  cudaStream_t stream) {
  if (dweight == nullptr) return;
  const auto grid = static_cast<unsigned>((p.hidden + kSumColumns - 1) / kSumColumns);
  detail::dispatch_float("rms_norm_backward", p.dweight_dtype, [&](auto* type) {
    using G = std::remove_pointer_t<decltype(type)>;
    add_partials_kernel<<<grid, kSumThreads, 0, stream>>>(partials, blocks, p.hidden,
                                                          static_cast<G*>(dweight));
  });
  detail::check_launch("rms_norm_backward (weight)");
}

/// Returns how many partial sums it leaves, 0 = the row does not fit.
template <typename T, bool kSecond>
int64_t launch_vectorised(const RmsNormBackward& p, int64_t partials, cudaStream_t stream) {
  int64_t blocks = 0;
  detail::dispatch_group(p.hidden / kVector, kBackwardVectors, [&](auto group) {
    constexpr int kGroup = decltype(group)::value;
    blocks = std::min(partials, kMultiprocessors * kBackwardBlocks<T, kGroup, kSecond>);
    backward_kernel<T, kGroup, kSecond>
        <<<static_cast<unsigned>(blocks), kGroupBlock<kGroup>, 0, stream>>>(p, partials);
  });
  return blocks;
}

template <typename T>
void launch_scalar(const RmsNormBackward& p, int64_t partials, cudaStream_t stream) {
  backward_scalar_kernel<T><<<static_cast<unsigned>(p.num_tokens), kScalarThreads, 0, stream>>>(p);
  const dim3 grid(static_cast<unsigned>((p.hidden + kWarp - 1) / kWarp),
                  static_cast<unsigned>(partials));
  const int64_t rows = (p.num_tokens + partials - 1) / partials;
  const auto sum = [&](const void* dy, float* to) {
    weight_scalar_kernel<T>
        <<<grid, dim3(kWarp, 8), 0, stream>>>(p, static_cast<const T*>(dy), rows, to);
  };
  if (p.dweight != nullptr) sum(p.dy, p.scratch);
  if (p.second_dweight != nullptr) sum(p.second_dy, p.scratch + partials * p.hidden);
}

}  // namespace

void rms_norm_backward(const RmsNormBackward& p, Stream stream) {
  if (p.num_tokens == 0) return;
  const cudaStream_t on = detail::cuda_stream(stream);
  const int64_t partials = rms_norm_backward_scratch(p.num_tokens, p.hidden) / p.hidden;
  bool vectorised = p.hidden % kVector == 0 && p.x_stride % kVector == 0;
  for (const void* pointer :
       {p.dy, p.x, p.weight, p.dsum, p.second_dy, p.second_weight, static_cast<const void*>(p.dx),
        static_cast<const void*>(p.scratch)}) {
    vectorised = vectorised && detail::aligned16(pointer);
  }
  int64_t blocks = 0;
  detail::dispatch_float("rms_norm_backward", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (vectorised && p.second_dy != nullptr) blocks = launch_vectorised<T, true>(p, partials, on);
    if (vectorised && p.second_dy == nullptr) blocks = launch_vectorised<T, false>(p, partials, on);
    if (blocks == 0) {
      launch_scalar<T>(p, partials, on);
      blocks = partials;
    }
  });
  detail::check_launch("rms_norm_backward");
  add_partials(p, p.scratch, blocks, p.dweight, on);
  add_partials(p, p.scratch + partials * p.hidden, blocks, p.second_dweight, on);
}

}  // namespace dsv3::kernels::cuda
