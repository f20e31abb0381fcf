// SwiGLU on the device: threads along the columns, 8 elements each, loop over rows. Bytes in BF16:
// forward 6·T·I, backward 10·T·I. Memory bound: BF16 takes the approximate exponential and division
// (errors of a few 2^-22, far below its rounding), because the exact ones would bind it to
// arithmetic.

#include "kernels/detail/group.cuh"
#include "kernels/elementwise.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;

template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (std::is_same_v<T, float>) return 1.0f / (1.0f + expf(-x));
  return __fdividef(1.0f, 1.0f + __expf(-x));
}

template <typename T, int kVec>
__global__ void __launch_bounds__(256) forward_kernel(SwigluForward p) {
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kVec;
  if (column >= p.intermediate) return;
  for (int64_t t = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; t < p.num_tokens;
       t += int64_t{gridDim.y} * blockDim.y) {
    const T* gate = static_cast<const T*>(p.gate_up) + t * 2 * p.intermediate + column;
    float g[kVec], u[kVec];
    detail::load_n<kVec>(gate, g);
    detail::load_n<kVec>(gate + p.intermediate, u);
#pragma unroll
    for (int i = 0; i < kVec; ++i) u[i] *= g[i] * sigmoid<T>(g[i]);
    detail::store_n<kVec>(static_cast<T*>(p.y) + t * p.intermediate + column, u);
  }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(256) backward_kernel(SwigluBackward p) {
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kVec;
  if (column >= p.intermediate) return;
  for (int64_t t = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; t < p.num_tokens;
       t += int64_t{gridDim.y} * blockDim.y) {
    const int64_t offset = t * 2 * p.intermediate + column;
    const T* gate = static_cast<const T*>(p.gate_up) + offset;
    T* dgate = static_cast<T*>(p.dgate_up) + offset;
    float g[kVec], u[kVec], d[kVec];
    detail::load_n<kVec>(gate, g);
    detail::load_n<kVec>(gate + p.intermediate, u);
    detail::load_n<kVec>(static_cast<const T*>(p.dy) + t * p.intermediate + column, d);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float s = sigmoid<T>(g[i]);
      const float silu = g[i] * s;
      g[i] = d[i] * u[i] * (s + silu * (1.0f - s));
      u[i] = d[i] * silu;
    }
    detail::store_n<kVec>(dgate, g);
    detail::store_n<kVec>(dgate + p.intermediate, u);
  }
}

}  // namespace

void swiglu_forward(const SwigluForward& p, Stream stream) {
  if (p.num_tokens == 0 || p.intermediate == 0) return;
  const cudaStream_t on = detail::cuda_stream(stream);
  const bool vectorised =
      p.intermediate % kVector == 0 && detail::aligned16(p.gate_up) && detail::aligned16(p.y);
  const auto [grid, block] =
      detail::row_grid(p.num_tokens, vectorised ? p.intermediate / kVector : p.intermediate);
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
  if (p.num_tokens == 0 || p.intermediate == 0) return;
  const cudaStream_t on = detail::cuda_stream(stream);
  const bool vectorised = p.intermediate % kVector == 0 && detail::aligned16(p.gate_up) &&
                          detail::aligned16(p.dy) && detail::aligned16(p.dgate_up);
  const auto [grid, block] =
      detail::row_grid(p.num_tokens, vectorised ? p.intermediate / kVector : p.intermediate);
  detail::dispatch_float("swiglu_backward", p.dtype, [&, grid = grid, block = block](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (vectorised) {
      backward_kernel<T, kVector><<<grid, block, 0, on>>>(p);
    } else {
      backward_kernel<T, 1><<<grid, block, 0, on>>>(p);
    }
  });
  detail::check_launch("swiglu_backward");
}

}  // namespace dsv3::kernels::cuda
