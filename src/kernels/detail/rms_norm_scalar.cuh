#pragma once

// RMSNorm's backward for any width and alignment, an element at a time; rms_norm.cu has the fast
// one.

#include "kernels/detail/row_groups.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/elementwise.h"

namespace dsv3::kernels::cuda::detail {

inline constexpr int kScalarThreads = 256;

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
    const float gw = to_float(dy[d]) * to_float(weight[d]);
    if (p.second_dy == nullptr) return gw;
    return fmaf(to_float(second_dy[d]), to_float(second_weight[d]), gw);
  };
  float dot = 0.0f;
  for (int64_t d = threadIdx.x; d < p.hidden; d += kScalarThreads) {
    dot += weighted(d) * to_float(x[d]);
  }
  dot = row_sum<RowGroups<kScalarThreads>>(dot, shared);
  const float slope = dot * inv_rms * inv_rms * inv_rms / static_cast<float>(p.hidden);
  for (int64_t d = threadIdx.x; d < p.hidden; d += kScalarThreads) {
    const float added = p.dsum != nullptr ? to_float(dsum[d]) : 0.0f;
    static_cast<T*>(p.dx)[row * p.hidden + d] =
        from_float<T>(added + weighted(d) * inv_rms - to_float(x[d]) * slope);
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
    const float x = to_float(static_cast<const T*>(p.x)[t * p.x_stride + d]);
    sum = fmaf(to_float(dy[t * p.hidden + d]), x * p.inv_rms[t], sum);
  }
  shares[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || d >= p.hidden) return;
  for (int i = 1; i < 8; ++i) sum += shares[i][threadIdx.x];
  partials[blockIdx.y * p.hidden + d] = sum;
}

template <typename T>
void launch_rms_norm_backward(const RmsNormBackward& p, int64_t partials, cudaStream_t stream) {
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

}  // namespace dsv3::kernels::cuda::detail
