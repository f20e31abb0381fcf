// RMSNorm's backward on the device (forward: rms_norm_forward.cu): the grid is as many blocks as
// partial sums of dweight are kept; whole warps walk over rows, 16 elements a thread, whose next
// rows are on their way to shared memory meanwhile, and keep their columns' share of dweight in
// registers. Blocks write their shares to scratch, a second kernel adds them in the order of the
// blocks: no atomics, the same bits on every run. 6·T·D bytes in BF16 (8 with dsum, 8 with a second
// norm of the same input).
//
// Widths that are not multiples of 8, unaligned pointers and rows that shared memory cannot hold
// take a scalar path.

#include <algorithm>
#include <type_traits>

#include "kernels/detail/packed.cuh"
#include "kernels/detail/rms_norm_scalar.cuh"
#include "kernels/detail/row_groups.cuh"
#include "kernels/elementwise.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;
using detail::kWarp;
using detail::Packed;

constexpr int kVectors = 2;                        // of a row, a thread
constexpr int kSumThreads = 256, kSumColumns = 8;  // of the sum of the partial sums
/// Of the largest device: the grid fills it once, so that no second wave runs half empty.
constexpr int64_t kMultiprocessors = 132;

/// Blocks of a multiprocessor, for which registers suffice.
template <typename T, typename Rows, bool kSecond>
inline constexpr int kBlocks = Rows::kThreads > 448 ||
                                       ((kSecond || std::is_same_v<T, float>)&&Rows::kThreads > 256)
                                   ? 1
                                   : 2;
/// Where a block has one row, its next one is asked for before the row's sum, in the place of what
/// stays in registers until then. With a second norm that is too much, and several narrow rows
/// hide each other's waiting: there it is read again, and its place given away at the end.
template <typename Rows, bool kSecond>
inline constexpr bool kAsksEarly = Rows::kRows == 1 && !kSecond;
/// Rows that a block takes at once. With a second norm there is one block to a multiprocessor,
/// whose rows wait for their sums together.
template <typename T, typename Rows, bool kSecond>
inline constexpr int kAtOnce = kSecond&& Rows::kRows == 1 && Rows::kThreads <= 448 && sizeof(T) == 2
                                   ? 2
                                   : 1;
/// What a multiprocessor should have asked for; more stages than it takes are no faster.
constexpr int64_t kInFlight = 56 * 1024;
constexpr int kMostStages = 4;

/// Waits until all but the latest `pending` rows that the thread asked for have arrived.
__device__ __forceinline__ void wait_until(int pending) {
  static_assert(kMostStages == 4);
  if (pending == 0) detail::ptx::async_wait<0>();
  if (pending == 1) detail::ptx::async_wait<1>();
  if (pending == 2) detail::ptx::async_wait<2>();
  if (pending == 3) detail::ptx::async_wait<3>();
}

/// The rows' shares of dweight, added in the order of the rows, to this block's row of `partials`.
/// `shares` [threads · kVectors · 8] is free to use.
template <typename Rows>
__device__ __forceinline__ void store_partial(float* partials, int64_t hidden, float* shares,
                                              const float (&dw)[kVectors][kVector]) {
  constexpr int kGroup = Rows::kGroup;
  const int lane = threadIdx.x % kGroup;
  float* partial = partials + int64_t{blockIdx.x} * hidden;
  if constexpr (Rows::kRows == 1) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t d = int64_t{lane + i * kGroup} * kVector;
      if (d < hidden) detail::store8(partial + d, dw[i]);
    }
    return;
  }
  constexpr int kWidth = kGroup * kVectors * kVector;
  __syncthreads();  // all threads are through with the ring, or with an earlier call
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    detail::store8(shares + threadIdx.x / kGroup * kWidth + (lane + i * kGroup) * kVector, dw[i]);
  }
  __syncthreads();
  for (int d = threadIdx.x; d < hidden; d += Rows::kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < Rows::kRows; ++r) sum += shares[r * kWidth + d];
    partial[d] = sum;
  }
}

template <typename T>
__device__ __forceinline__ const T* row_of(const void* matrix, int64_t row, int64_t stride) {
  return static_cast<const T*>(matrix) + row * stride;
}

template <typename T, typename Rows, bool kSecond>
__global__ void __launch_bounds__(Rows::kThreads, kBlocks<T, Rows, kSecond>)
    backward_kernel(RmsNormBackward p, int64_t partials, int stages, int64_t rows_of_block) {
  // A thread's own words of the rows that are on their way. Copies that skip the registers are slow
  // where the first of them does not stand at a multiple of 128 bytes.
  extern __shared__ __align__(128) uint4 ring[];
  constexpr int kCount = kAtOnce<T, Rows, kSecond>;
  __shared__ float shared[2][kCount * Rows::kThreads / kWarp];
  constexpr int kWords = kVector * static_cast<int>(sizeof(T)) / 16, kThreads = Rows::kThreads;
  constexpr int kX = 0, kDy = 1, kSecondDy = 2, kDsum = kSecond ? 3 : 2;  // matrices in the ring
  constexpr bool kEarly = kAsksEarly<Rows, kSecond>;
  const int lane = threadIdx.x % Rows::kGroup;
  const int vectors = static_cast<int>(p.hidden / kVector);
  const bool has_dsum = p.dsum != nullptr;
  const uint32_t stage_bytes = (kDsum + has_dsum) * kVectors * kWords * kThreads * 16;
  const uint32_t ring_begin = detail::ptx::shared_address(ring) + threadIdx.x * 16;
  // With a second norm a block has neighbouring rows, else every gridDim.x-th of them.
  const int64_t step = kSecond ? Rows::kRows : int64_t{gridDim.x} * Rows::kRows;
  const int64_t begin = blockIdx.x * (kSecond ? rows_of_block : Rows::kRows);
  const int64_t end = kSecond ? min(begin + rows_of_block, p.num_tokens) : p.num_tokens;
  // Asks for this thread's words of a row, which may not exist, to the stage at `to`.
  const auto ask = [&](int64_t first, uint32_t to) {
    const int64_t row = first + threadIdx.x / Rows::kGroup;
    if (row < end) {
      const auto copy = [&](const T* from, int matrix) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const int c = lane + i * Rows::kGroup;
          if (c >= vectors) continue;
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            detail::ptx::async_copy16(to + ((matrix * kVectors + i) * kWords + w) * kThreads * 16,
                                      reinterpret_cast<const uint4*>(from + c * kVector) + w);
          }
        }
      };
      copy(row_of<T>(p.x, row, p.x_stride), kX);
      copy(row_of<T>(p.dy, row, p.hidden), kDy);
      if constexpr (kSecond) copy(row_of<T>(p.second_dy, row, p.hidden), kSecondDy);
      if (has_dsum) copy(row_of<T>(p.dsum, row, p.hidden), kDsum);
    }
    detail::ptx::async_commit();
  };
  int64_t ahead = begin;
  for (int s = 0; s < stages; ++s, ahead += step) ask(ahead, ring_begin + s * stage_bytes);
  const auto load_weight = [&](Packed<T>& to, const void* from, int i) {
    const int c = lane + i * Rows::kGroup;
    to.clear();
    if (c < vectors) to.load(static_cast<const T*>(from) + c * kVector);
  };
  Packed<T> weight[kVectors], second_weight[kSecond ? kVectors : 1];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    load_weight(weight[i], p.weight, i);
    if constexpr (kSecond) load_weight(second_weight[i], p.second_weight, i);
  }
  float dw[kVectors][kVector] = {}, dw2[kSecond ? kVectors : 1][kVector] = {};
  int turn = 0, stage = 0;
  // Whole blocks go round together: row_sums is a barrier.
  for (int64_t first = begin; first < end; first += kCount * step, turn ^= 1) {
    const int64_t row0 = first + threadIdx.x / Rows::kGroup;
    const auto active = [&](int a) { return row0 + a * step < end; };
    float inv_rms[kCount], dot[kCount];
#pragma unroll
    for (int a = 0; a < kCount; ++a) inv_rms[a] = active(a) ? p.inv_rms[row0 + a * step] : 0.0f;
    wait_until(stages - kCount);
    const auto stage_of = [&](int a) {
      return stage + a < stages ? stage + a : stage + a - stages;
    };
    const auto read = [&](int a, int matrix, int i, Packed<T>& to) {
      to.clear();
      if (!active(a) || lane + i * Rows::kGroup >= vectors) return;
      const uint4* words = ring + stage_of(a) * (stage_bytes / 16) + threadIdx.x;
      to.load_words(words + (matrix * kVectors + i) * kWords * kThreads, kThreads);
    };
    Packed<T> x[kVectors], g[kVectors], g2[kSecond ? kVectors : 1], sum[kVectors];
#pragma unroll
    for (int a = 0; a < kCount; ++a) {
      dot[a] = 0.0f;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        read(a, kX, i, x[i]), read(a, kDy, i, g[i]);
        if constexpr (kSecond) read(a, kSecondDy, i, g2[i]);
        weight[i].forget();
        if constexpr (kSecond) second_weight[i].forget();
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const float gx = g[i].at(e) * x[i].at(e);
          dw[i][e] = fmaf(gx, inv_rms[a], dw[i][e]);
          dot[a] = fmaf(gx, weight[i].at(e), dot[a]);
          if constexpr (kSecond) {
            const float g2x = g2[i].at(e) * x[i].at(e);
            dw2[i][e] = fmaf(g2x, inv_rms[a], dw2[i][e]);
            dot[a] = fmaf(g2x, second_weight[i].at(e), dot[a]);
          }
        }
      }
    }
    if constexpr (kEarly) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        sum[i].clear();
        if (has_dsum) {
          read(0, kDsum, i, sum[i]);
          sum[i].forget();  // it is in registers before its place is asked for again
        }
      }
      ask(ahead, ring_begin + stage * stage_bytes), ahead += step;
    }
    detail::row_sums<Rows>(dot, shared[turn]);
#pragma unroll
    for (int a = 0; a < kCount; ++a) {
      const float slope =
          dot[a] * inv_rms[a] * inv_rms[a] * inv_rms[a] / static_cast<float>(p.hidden);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if constexpr (kEarly) {
          x[i].forget(), g[i].forget();
        } else {
          read(a, kX, i, x[i]), read(a, kDy, i, g[i]);
          if constexpr (kSecond) read(a, kSecondDy, i, g2[i]);
          sum[i].clear();
          if (has_dsum) read(a, kDsum, i, sum[i]);
        }
        weight[i].forget();
        if constexpr (kSecond) second_weight[i].forget();
        float out[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          float weighted = g[i].at(e) * weight[i].at(e);
          if constexpr (kSecond) weighted = fmaf(g2[i].at(e), second_weight[i].at(e), weighted);
          out[e] = sum[i].at(e) + (weighted * inv_rms[a] - x[i].at(e) * slope);
        }
        const int c = lane + i * Rows::kGroup;
        if (active(a) && c < vectors) {
          detail::store8(static_cast<T*>(p.dx) + (row0 + a * step) * p.hidden + c * kVector, out);
        }
      }
      if constexpr (!kEarly) {
        ask(ahead, ring_begin + stage_of(a) * stage_bytes), ahead += step;
      }
    }
    stage = stage_of(kCount);
  }
  detail::ptx::let_second_begin();
  detail::ptx::async_wait<0>();
  float* shares = reinterpret_cast<float*>(ring);
  if (p.dweight != nullptr) store_partial<Rows>(p.scratch, p.hidden, shares, dw);
  if constexpr (kSecond) {
    if (p.second_dweight != nullptr) {
      store_partial<Rows>(p.scratch + partials * p.hidden, p.hidden, shares, dw2);
    }
  }
}

/// The sum of one weight's partial sums.
template <typename G>
struct WeightSum {
  const float* partials;  // [blocks, D]
  G* dweight;             // [D]
};
/// Those of an operator, at most two.
template <typename G>
struct WeightSums {
  WeightSum<G> of[2];
};

/// dweight[d] += Σ partials[b, d] in a fixed order, for sum blockIdx.y: a block has 8 columns,
/// whole sectors of memory, and all reads of a thread are in flight together.
template <typename G>
__global__ void __launch_bounds__(kSumThreads)
    add_partials_kernel(WeightSums<G> sums, int64_t blocks, int64_t hidden) {
  __shared__ float shares[kSumThreads / kWarp][kSumColumns];
  constexpr int kRows = kSumThreads / kSumColumns;
  const int column = threadIdx.x % kSumColumns;
  const int64_t d = int64_t{blockIdx.x} * kSumColumns + column;
  const auto [partials, dweight] = sums.of[blockIdx.y];
  detail::ptx::wait_for_first();
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

/// The partial sums of `blocks` blocks, `partials` of them kept, to the gradients that are wanted.
void add_partials(const RmsNormBackward& p, int64_t partials, int64_t blocks, cudaStream_t stream) {
  detail::dispatch_float("rms_norm_backward", p.dweight_dtype, [&](auto* type) {
    using G = std::remove_pointer_t<decltype(type)>;
    WeightSums<G> sums{};
    unsigned count = 0;
    const auto add = [&](const float* from, void* dweight) {
      if (dweight != nullptr) sums.of[count++] = {from, static_cast<G*>(dweight)};
    };
    add(p.scratch, p.dweight);
    add(p.scratch + partials * p.hidden, p.second_dweight);
    if (count == 0) return;
    const dim3 grid(static_cast<unsigned>((p.hidden + kSumColumns - 1) / kSumColumns), count);
    detail::launch_second(add_partials_kernel<G>, grid, kSumThreads, stream, sums, blocks,
                          p.hidden);
  });
  detail::check_launch("rms_norm_backward (weight)");
}

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  kernels::detail::raise_cuda("rms_norm_backward", "launch failed", cudaGetErrorString(error));
}

/// Stages of a ring, as many as `blocks` blocks of a multiprocessor want and find room for; 0 = a
/// block alone has none for one.
int ring_stages(int64_t stage_bytes, int blocks, int at_once) {
  constexpr int64_t kBesides = 2048;  // of a block: the driver's share and the static arrays
  int device = 0, of_block = 0, of_multiprocessor = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check_cuda(cudaDeviceGetAttribute(&of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                    device));
  const int64_t alone = (of_block - kBesides) / stage_bytes;
  const int64_t shared = (of_multiprocessor / blocks - kBesides) / stage_bytes;
  const int64_t wanted = (kInFlight + blocks * stage_bytes - 1) / (blocks * stage_bytes);
  const int64_t stages = std::min({wanted + at_once - 1, alone, std::max<int64_t>(shared, 1)});
  return stages < at_once ? 0 : static_cast<int>(std::min<int64_t>(stages, kMostStages));
}

/// Returns how many partial sums it leaves, 0 = the row does not fit.
template <typename T, bool kSecond>
int64_t launch_vectorised(const RmsNormBackward& p, int64_t partials, cudaStream_t stream) {
  int64_t blocks = 0;
  detail::dispatch_rows(p.hidden / kVector, kVectors, [&](auto rows) {
    using Rows = decltype(rows);
    const int matrices = 2 + (kSecond ? 1 : 0) + (p.dsum != nullptr ? 1 : 0);
    const int64_t stage_bytes = int64_t{matrices} * kVectors * kVector * sizeof(T) * Rows::kThreads;
    const int stages =
        ring_stages(stage_bytes, kBlocks<T, Rows, kSecond>, kAtOnce<T, Rows, kSecond>);
    if (stages == 0) return;
    auto* const kernel = backward_kernel<T, Rows, kSecond>;
    const auto shared_bytes = static_cast<int>(stages * stage_bytes);
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    blocks = std::min(partials, kMultiprocessors * kBlocks<T, Rows, kSecond>);
    const int64_t all = blocks * Rows::kRows;
    const int64_t rows_of_block = (p.num_tokens + all - 1) / all * Rows::kRows;
    kernel<<<static_cast<unsigned>(blocks), Rows::kThreads, shared_bytes, stream>>>(
        p, partials, stages, rows_of_block);
  });
  return blocks;
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
      detail::launch_rms_norm_backward<T>(p, partials, on);
      blocks = partials;
    }
  });
  detail::check_launch("rms_norm_backward");
  add_partials(p, partials, blocks, on);
}

}  // namespace dsv3::kernels::cuda
