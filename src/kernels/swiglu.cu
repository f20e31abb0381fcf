// SwiGLU on the device: threads along the columns, 8 elements each, two rows at a time so that all
// loads of both are in flight before the first use. Bytes in BF16: forward 6·T·I, backward 10·T·I.
// The routing weight's gradient sums a row: there a block walks along one row. FP8 forms:
// swiglu_fp8.cu.

#include <algorithm>

#include "kernels/detail/launch.cuh"
#include "kernels/detail/swiglu.cuh"
#include "kernels/detail/swiglu_fp8.h"
#include "kernels/detail/vector.cuh"
#include "kernels/elementwise.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;
using detail::kWarp;

constexpr int kRows = 2;  // of a thread
constexpr int kThreads = 256;

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) forward_kernel(SwigluForward p) {
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kVec;
  if (column >= p.intermediate) return;
  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t t = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; t < p.num_tokens;
       t += kRows * step) {
    float g[kRows][kVec], u[kRows][kVec], weight[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // Rows past the end read the last one: no branch stands between the loads.
      const int64_t row = min(t + r * step, p.num_tokens - 1);
      const T* gate = static_cast<const T*>(p.gate_up) + row * 2 * p.intermediate + column;
      detail::load_n<kVec>(gate, g[r]);
      detail::load_n<kVec>(gate + p.intermediate, u[r]);
      weight[r] = p.row_weight != nullptr ? p.row_weight[row] : 1.0f;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = t + r * step;
      if (row >= p.num_tokens) break;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        u[r][i] = detail::swiglu_value<T>(g[r][i], u[r][i], weight[r]);
      }
      detail::store_n<kVec>(static_cast<T*>(p.y) + row * p.intermediate + column, u[r]);
    }
  }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) backward_kernel(SwigluBackward p) {
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kVec;
  if (column >= p.intermediate) return;
  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t t = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; t < p.num_tokens;
       t += kRows * step) {
    float g[kRows][kVec], u[kRows][kVec], d[kRows][kVec], weight[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // Note: a row past the end reads the last one, which may be written already: it is not used.
      const int64_t row = min(t + r * step, p.num_tokens - 1);
      const T* gate = static_cast<const T*>(p.gate_up) + row * 2 * p.intermediate + column;
      detail::load_n<kVec>(gate, g[r]);
      detail::load_n<kVec>(gate + p.intermediate, u[r]);
      detail::load_n<kVec>(static_cast<const T*>(p.dy) + row * p.intermediate + column, d[r]);
      weight[r] = p.row_weight != nullptr ? p.row_weight[row] : 1.0f;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = t + r * step;
      if (row >= p.num_tokens) break;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        float share = 0.0f;  // not wanted here
        detail::swiglu_gradient<T>(g[r][i], u[r][i], d[r][i], weight[r], share);
      }
      T* dgate = static_cast<T*>(p.dgate_up) + row * 2 * p.intermediate + column;
      detail::store_n<kVec>(dgate, g[r]);
      detail::store_n<kVec>(dgate + p.intermediate, u[r]);
    }
  }
}

/// The sum of `value` over the block's kThreads threads, in a fixed order. `shared` holds one
/// number of each warp.
__device__ __forceinline__ float block_sum(float value, float (&shared)[kThreads / kWarp]) {
  value = detail::warp_sum(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / kWarp; ++i) sum += shared[i];
  return sum;
}

/// With the row weight's gradient: a block per row.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) weighted_backward_kernel(SwigluBackward p) {
  __shared__ float shared[kThreads / kWarp];
  const int64_t row = blockIdx.x;
  const T* gate = static_cast<const T*>(p.gate_up) + row * 2 * p.intermediate;
  const T* dy = static_cast<const T*>(p.dy) + row * p.intermediate;
  T* dgate = static_cast<T*>(p.dgate_up) + row * 2 * p.intermediate;
  const float weight = p.row_weight != nullptr ? p.row_weight[row] : 1.0f;
  float share = 0.0f;
#pragma unroll 2
  for (int64_t c = threadIdx.x * kVec; c < p.intermediate; c += kThreads * kVec) {
    float g[kVec], u[kVec], d[kVec];
    detail::load_n<kVec>(gate + c, g);
    detail::load_n<kVec>(gate + p.intermediate + c, u);
    detail::load_n<kVec>(dy + c, d);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      detail::swiglu_gradient<T>(g[i], u[i], d[i], weight, share);
    }
    detail::store_n<kVec>(dgate + c, g);
    detail::store_n<kVec>(dgate + p.intermediate + c, u);
  }
  share = block_sum(share, shared);
  if (threadIdx.x == 0) p.drow_weight[row] = share;
}

/// A grid over (columns, rows) for threads that take kRows rows each and go round over more:
/// threads along the columns first.
struct RowGrid {
  dim3 grid, block;
};
RowGrid row_grid(int64_t num_tokens, int64_t columns) {
  unsigned width = 32;
  while (width < 256 && width < columns) width *= 2;
  const unsigned height = 256 / width;
  const int64_t rows = (num_tokens + kRows - 1) / kRows;
  const int64_t down = std::min<int64_t>((rows + height - 1) / height, 65535);
  return {dim3(static_cast<unsigned>((columns + width - 1) / width), static_cast<unsigned>(down)),
          dim3(width, height)};
}

}  // namespace

void swiglu_forward(const SwigluForward& p, Stream stream) {
  if (p.num_tokens == 0 || p.intermediate == 0) return;
  if (p.rows.data != nullptr || p.columns.data != nullptr) {
    return detail::swiglu_forward_fp8(p, stream);
  }
  const cudaStream_t on = detail::cuda_stream(stream);
  const bool vectorised =
      p.intermediate % kVector == 0 && detail::aligned16(p.gate_up) && detail::aligned16(p.y);
  const auto [grid, block] =
      row_grid(p.num_tokens, vectorised ? p.intermediate / kVector : p.intermediate);
  detail::dispatch_float("swiglu", p.dtype, [&, grid = grid, block = block](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (vectorised) {
      forward_kernel<T, kVector><<<grid, block, 0, on>>>(p);
    } else {
      forward_kernel<T, 1><<<grid, block, 0, on>>>(p);
    }
  });
  detail::check_launch("swiglu");
}

void swiglu_backward(const SwigluBackward& p, Stream stream) {
  if (p.num_tokens == 0) return;
  const cudaStream_t on = detail::cuda_stream(stream);
  if (p.intermediate > 0 && (p.rows.data != nullptr || p.columns.data != nullptr)) {
    return detail::swiglu_backward_fp8(p, stream);
  }
  const bool vectorised = p.intermediate % kVector == 0 && detail::aligned16(p.gate_up) &&
                          detail::aligned16(p.dy) && detail::aligned16(p.dgate_up);
  const bool weighted = p.drow_weight != nullptr;
  if (p.intermediate == 0 && !weighted) return;
  const auto [grid, block] =
      row_grid(p.num_tokens, vectorised ? p.intermediate / kVector : p.intermediate);
  const auto rows = static_cast<unsigned>(p.num_tokens);
  detail::dispatch_float("swiglu_backward", p.dtype, [&, grid = grid, block = block](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (weighted && vectorised) {
      weighted_backward_kernel<T, kVector><<<rows, kThreads, 0, on>>>(p);
    } else if (weighted) {
      weighted_backward_kernel<T, 1><<<rows, kThreads, 0, on>>>(p);
    } else if (vectorised) {
      backward_kernel<T, kVector><<<grid, block, 0, on>>>(p);
    } else {
      backward_kernel<T, 1><<<grid, block, 0, on>>>(p);
    }
  });
  detail::check_launch("swiglu_backward");
}

}  // namespace dsv3::kernels::cuda
