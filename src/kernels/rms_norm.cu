// RMSNorm on the device. Forward: a group of 32 … 1024 threads holds a row in registers (up to 32
// elements a thread), so each row is read once and written once: 4·T·D bytes in BF16, 8·T·D with a
// residual.
//
// Backward: the grid is as many blocks as partial sums of dweight are kept; a group walks over
// rows, 16 elements a thread, and keeps its columns' share of dweight in registers. Blocks write
// their shares to scratch, a second kernel adds them in the order of the blocks: no atomics, the
// same bits on every run. 6·T·D bytes in BF16 (8 with dsum).
//
// Widths that are not multiples of 8, unaligned pointers and D > 16384 take a scalar path.

#include "kernels/detail/group.cuh"
#include "kernels/elementwise.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kGroupBlock;
using detail::kVector;
using detail::kWarp;

constexpr int kForwardVectors = 4;
constexpr int kBackwardVectors = 2;
constexpr int kScalarThreads = 256;
/// Threads per multiprocessor that backward's registers must leave room for.
constexpr int kResident = 1024;
/// Blocks of 256 threads that fill the largest device once, so that no second wave runs half empty.
constexpr int64_t kFullGrid = 528;

template <typename T, int kGroup>
__global__ void __launch_bounds__(kGroupBlock<kGroup>) forward_kernel(RmsNormForward p) {
  __shared__ float shared[kGroupBlock<kGroup> / kWarp];
  constexpr int kRows = kGroupBlock<kGroup> / kGroup;
  const int lane = threadIdx.x % kGroup;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kGroup;
  const bool active = row < p.num_tokens;
  const int64_t vectors = active ? p.hidden / kVector : 0;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* residual = static_cast<const T*>(p.residual) + row * p.hidden;
  T* sum = static_cast<T*>(p.sum) + row * p.hidden;
  T* y = static_cast<T*>(p.y) + row * p.hidden;
  float v[kForwardVectors][kVector];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kForwardVectors; ++i) {
    const int64_t c = lane + i * kGroup;
    if (c < vectors) detail::load8(x + c * kVector, v[i]);
  }
#pragma unroll
  for (int i = 0; i < kForwardVectors; ++i) {
    const int64_t c = lane + i * kGroup;
    if (c >= vectors) break;
    if (p.residual != nullptr) {
      float r[kVector];
      detail::load8(residual + c * kVector, r);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        v[i][e] = detail::to_float(detail::from_float<T>(v[i][e] + r[e]));
      }
      detail::store8(sum + c * kVector, v[i]);
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) squares = fmaf(v[i][e], v[i][e], squares);
  }
  squares = detail::group_sum<kGroup>(squares, shared);
  const float inv_rms = 1.0f / sqrtf(squares / static_cast<float>(p.hidden) + p.eps);
  if (active && lane == 0 && p.inv_rms != nullptr) p.inv_rms[row] = inv_rms;
#pragma unroll
  for (int i = 0; i < kForwardVectors; ++i) {
    const int64_t c = lane + i * kGroup;
    if (c >= vectors) break;
    float w[kVector];
    detail::load8(static_cast<const T*>(p.weight) + c * kVector, w);
#pragma unroll
    for (int e = 0; e < kVector; ++e) v[i][e] *= inv_rms * w[e];
    detail::store8(y + c * kVector, v[i]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kScalarThreads) forward_scalar_kernel(RmsNormForward p) {
  __shared__ float shared[kScalarThreads / kWarp];
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* y = static_cast<T*>(p.y) + row * p.hidden;
  const T* normalised = x;
  if (p.residual != nullptr) {
    const T* residual = static_cast<const T*>(p.residual) + row * p.hidden;
    T* sum = static_cast<T*>(p.sum) + row * p.hidden;
    // Each thread reads below only what it wrote here.
    for (int64_t d = threadIdx.x; d < p.hidden; d += kScalarThreads) {
      sum[d] = detail::from_float<T>(detail::to_float(x[d]) + detail::to_float(residual[d]));
    }
    normalised = sum;
  }
  float squares = 0.0f;
  for (int64_t d = threadIdx.x; d < p.hidden; d += kScalarThreads) {
    const float v = detail::to_float(normalised[d]);
    squares = fmaf(v, v, squares);
  }
  squares = detail::group_sum<kScalarThreads>(squares, shared);
  const float inv_rms = 1.0f / sqrtf(squares / static_cast<float>(p.hidden) + p.eps);
  if (threadIdx.x == 0 && p.inv_rms != nullptr) p.inv_rms[row] = inv_rms;
  for (int64_t d = threadIdx.x; d < p.hidden; d += kScalarThreads) {
    const float w = detail::to_float(static_cast<const T*>(p.weight)[d]);
    y[d] = detail::from_float<T>(detail::to_float(normalised[d]) * (inv_rms * w));
  }
}

/// The groups' shares of dweight, added in the order of the groups, into this block's row of
/// scratch.
template <int kGroup>
__device__ __forceinline__ void store_partial(const RmsNormBackward& p,
                                              const float (&dw)[kBackwardVectors][kVector],
                                              int64_t vectors) {
  constexpr int kRows = kGroupBlock<kGroup> / kGroup;
  constexpr int kWidth = kGroup * kBackwardVectors * kVector;
  const int lane = threadIdx.x % kGroup;
  float* partial = p.scratch + int64_t{blockIdx.x} * p.hidden;
  if constexpr (kRows == 1) {
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) {
      const int64_t c = lane + i * kGroup;
      if (c < vectors) detail::store8(partial + c * kVector, dw[i]);
    }
  } else {
    __shared__ float shares[kRows][kWidth];
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) {
      detail::store8(&shares[threadIdx.x / kGroup][(lane + i * kGroup) * kVector], dw[i]);
    }
    __syncthreads();
    for (int64_t d = threadIdx.x; d < p.hidden; d += kGroupBlock<kGroup>) {
      float sum = 0.0f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum += shares[r][d];
      partial[d] = sum;
    }
  }
}

template <typename T, int kGroup>
__global__ void __launch_bounds__(kGroupBlock<kGroup>, kResident / kGroupBlock<kGroup>)
    backward_kernel(RmsNormBackward p) {
  __shared__ float shared[2][kGroupBlock<kGroup> / kWarp];
  constexpr int kRows = kGroupBlock<kGroup> / kGroup;
  const int lane = threadIdx.x % kGroup;
  const int64_t vectors = p.hidden / kVector;
  float dw[kBackwardVectors][kVector] = {};
  int turn = 0;
  // Whole blocks go round together: group_sum is a barrier.
  for (int64_t first = int64_t{blockIdx.x} * kRows; first < p.num_tokens;
       first += int64_t{gridDim.x} * kRows, turn ^= 1) {
    const int64_t row = first + threadIdx.x / kGroup;
    const bool active = row < p.num_tokens;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* dy = static_cast<const T*>(p.dy) + row * p.hidden;
    float xs[kBackwardVectors][kVector] = {}, gs[kBackwardVectors][kVector] = {};
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) {
      const int64_t c = lane + i * kGroup;
      if (!active || c >= vectors) continue;
      detail::load8(x + c * kVector, xs[i]);
      detail::load8(dy + c * kVector, gs[i]);
    }
    const float inv_rms = active ? p.inv_rms[row] : 0.0f;
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) {
      const int64_t c = lane + i * kGroup;
      if (c >= vectors) continue;
      float w[kVector];
      detail::load8(static_cast<const T*>(p.weight) + c * kVector, w);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        dw[i][e] = fmaf(gs[i][e], xs[i][e] * inv_rms, dw[i][e]);
        gs[i][e] *= w[e];
        dot = fmaf(gs[i][e], xs[i][e], dot);
      }
    }
    dot = detail::group_sum<kGroup>(dot, shared[turn]);
    const float slope = dot * inv_rms * inv_rms * inv_rms / static_cast<float>(p.hidden);
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) {
      const int64_t c = lane + i * kGroup;
      if (!active || c >= vectors) continue;
      float out[kVector] = {};
      if (p.dsum != nullptr) {
        detail::load8(static_cast<const T*>(p.dsum) + row * p.hidden + c * kVector, out);
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) out[e] += gs[i][e] * inv_rms - xs[i][e] * slope;
      detail::store8(static_cast<T*>(p.dx) + row * p.hidden + c * kVector, out);
    }
  }
  if (p.dweight != nullptr) store_partial<kGroup>(p, dw, vectors);
}

template <typename T>
__global__ void __launch_bounds__(kScalarThreads) backward_scalar_kernel(RmsNormBackward p) {
  __shared__ float shared[kScalarThreads / kWarp];
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* dy = static_cast<const T*>(p.dy) + row * p.hidden;
  const T* dsum = static_cast<const T*>(p.dsum) + row * p.hidden;
  const T* weight = static_cast<const T*>(p.weight);
  const float inv_rms = p.inv_rms[row];
  float dot = 0.0f;
  for (int64_t d = threadIdx.x; d < p.hidden; d += kScalarThreads) {
    dot += detail::to_float(dy[d]) * detail::to_float(weight[d]) * detail::to_float(x[d]);
  }
  dot = detail::group_sum<kScalarThreads>(dot, shared);
  const float slope = dot * inv_rms * inv_rms * inv_rms / static_cast<float>(p.hidden);
  for (int64_t d = threadIdx.x; d < p.hidden; d += kScalarThreads) {
    const float added = p.dsum != nullptr ? detail::to_float(dsum[d]) : 0.0f;
    const float g = detail::to_float(dy[d]) * detail::to_float(weight[d]);
    static_cast<T*>(p.dx)[row * p.hidden + d] =
        detail::from_float<T>(added + g * inv_rms - detail::to_float(x[d]) * slope);
  }
}

/// Scalar path's dweight: block (32 columns, 8 rows at a time) sums a share of the rows.
template <typename T>
__global__ void weight_scalar_kernel(RmsNormBackward p, int64_t rows_per_block) {
  __shared__ float shares[8][kWarp];
  const int64_t d = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  const int64_t begin = blockIdx.y * rows_per_block;
  const int64_t end = min(begin + rows_per_block, p.num_tokens);
  float sum = 0.0f;
  for (int64_t t = begin + threadIdx.y; d < p.hidden && t < end; t += 8) {
    const float x = detail::to_float(static_cast<const T*>(p.x)[t * p.x_stride + d]);
    sum = fmaf(detail::to_float(static_cast<const T*>(p.dy)[t * p.hidden + d]), x * p.inv_rms[t],
               sum);
  }
  shares[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || d >= p.hidden) return;
  for (int i = 1; i < 8; ++i) sum += shares[i][threadIdx.x];
  p.scratch[blockIdx.y * p.hidden + d] = sum;
}

/// dweight[d] += Σ partials[b, d] in a fixed order.
template <typename G>
__global__ void add_partials_kernel(const float* partials, int64_t blocks, int64_t hidden,
                                    G* dweight) {
  __shared__ float shares[8][kWarp];
  const int64_t d = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (d < hidden) {
#pragma unroll 4
    for (int64_t b = threadIdx.y; b < blocks; b += 8) sum += partials[b * hidden + d];
  }
  shares[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || d >= hidden) return;
  for (int i = 1; i < 8; ++i) sum += shares[i][threadIdx.x];
  dweight[d] = detail::from_float<G>(detail::to_float(dweight[d]) + sum);
}

void add_partials(const RmsNormBackward& p, int64_t blocks, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>((p.hidden + kWarp - 1) / kWarp);
  detail::dispatch_float("rms_norm_backward", p.dweight_dtype, [&](auto* type) {
    using G = std::remove_pointer_t<decltype(type)>;
    add_partials_kernel<<<grid, dim3(kWarp, 8), 0, stream>>>(p.scratch, blocks, p.hidden,
                                                             static_cast<G*>(p.dweight));
  });
}

/// Whether rows of this width, stride and these pointers can be read 16 bytes at a time.
template <typename... Pointers>
bool vectorised(int64_t hidden, int64_t stride, Pointers... pointers) {
  return hidden % kVector == 0 && stride % kVector == 0 && (detail::aligned16(pointers) && ...);
}

}  // namespace

void rms_norm_forward(const RmsNormForward& p, Stream stream) {
  if (p.num_tokens == 0) return;
  const cudaStream_t on = detail::cuda_stream(stream);
  detail::dispatch_float("rms_norm", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    bool done = false;
    if (vectorised(p.hidden, p.x_stride, p.x, p.residual, p.weight, p.sum, p.y)) {
      done = detail::dispatch_group(p.hidden / kVector, kForwardVectors, [&](auto group) {
        constexpr int kGroup = decltype(group)::value, kBlock = kGroupBlock<kGroup>;
        constexpr int kRows = kBlock / kGroup;
        const auto grid = static_cast<unsigned>((p.num_tokens + kRows - 1) / kRows);
        forward_kernel<T, kGroup><<<grid, kBlock, 0, on>>>(p);
      });
    }
    if (!done) {
      forward_scalar_kernel<T><<<static_cast<unsigned>(p.num_tokens), kScalarThreads, 0, on>>>(p);
    }
  });
  detail::check_launch("rms_norm");
}

void rms_norm_backward(const RmsNormBackward& p, Stream stream) {
  if (p.num_tokens == 0) return;
  const cudaStream_t on = detail::cuda_stream(stream);
  int64_t partials = rms_norm_backward_scratch(p.num_tokens, p.hidden) / p.hidden;
  detail::dispatch_float("rms_norm_backward", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    bool done = false;
    if (vectorised(p.hidden, p.x_stride, p.dy, p.x, p.weight, p.dsum, p.dx, p.scratch)) {
      done = detail::dispatch_group(p.hidden / kVector, kBackwardVectors, [&](auto group) {
        constexpr int kGroup = decltype(group)::value;
        partials = std::min(partials, kFullGrid * 256 / kGroupBlock<kGroup>);
        const auto grid = static_cast<unsigned>(partials);
        backward_kernel<T, kGroup><<<grid, kGroupBlock<kGroup>, 0, on>>>(p);
      });
    }
    if (!done) {
      backward_scalar_kernel<T><<<static_cast<unsigned>(p.num_tokens), kScalarThreads, 0, on>>>(p);
      if (p.dweight != nullptr) {
        const dim3 grid(static_cast<unsigned>((p.hidden + kWarp - 1) / kWarp),
                        static_cast<unsigned>(partials));
        weight_scalar_kernel<T>
            <<<grid, dim3(kWarp, 8), 0, on>>>(p, (p.num_tokens + partials - 1) / partials);
      }
    }
  });
  detail::check_launch("rms_norm_backward");
  if (p.dweight == nullptr) return;
  add_partials(p, partials, on);
  detail::check_launch("rms_norm_backward (weight)");
}

}  // namespace dsv3::kernels::cuda
