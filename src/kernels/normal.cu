// Normal numbers on the device: a thread per counter (four numbers), rows by the grid's second dim.
// The FP32 logarithm, square root and sine are within a few units of the host's float64 ones; they
// must not become the fast approximations (no --use_fast_math here).

#include <algorithm>

#include "kernels/detail/launch.cuh"
#include "kernels/detail/philox.h"
#include "kernels/detail/vector.cuh"
#include "kernels/optimizer.h"

namespace dsv3::kernels::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) fill_kernel(NormalFill p) {
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const int64_t global = p.first + row * p.pitch;
    const int64_t begin = global / 4, end = (global + p.columns + 3) / 4;
    T* y = static_cast<T*>(p.y) + row * p.stride;
    for (int64_t counter = begin + int64_t{blockIdx.x} * kThreads + threadIdx.x; counter < end;
         counter += int64_t{gridDim.x} * kThreads) {
      const auto words =
          kernels::detail::philox4x32(p.seed, static_cast<uint64_t>(counter), p.stream);
      float n[4];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const float u = kernels::detail::unit_above_zero(words.word[2 * pair]);
        const float turn = kernels::detail::unit_below_one(words.word[2 * pair + 1]);
        const float radius = sqrtf(-2.0f * logf(u));
        float sine, cosine;
        sincospif(2.0f * turn, &sine, &cosine);
        n[2 * pair] = radius * cosine;
        n[2 * pair + 1] = radius * sine;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t column = counter * 4 + i - global;
        if (column >= 0 && column < p.columns) {
          y[column] = detail::from_float<T>(p.mean + p.std * n[i]);
        }
      }
    }
  }
}

}  // namespace

void normal_fill(const NormalFill& p, Stream stream) {
  if (p.first < 0 || p.pitch < 0) {
    kernels::detail::raise_invalid("normal_fill", "global indices must not be negative");
  }
  if (p.rows <= 0 || p.columns <= 0) return;
  const int64_t counters = p.columns / 4 + 2;
  const dim3 grid(
      static_cast<unsigned>(std::min<int64_t>((counters + kThreads - 1) / kThreads, 4096)),
      static_cast<unsigned>(std::min<int64_t>(p.rows, 65535)));
  detail::dispatch_float("normal_fill", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    fill_kernel<T><<<grid, kThreads, 0, detail::cuda_stream(stream)>>>(p);
  });
  detail::check_launch("normal_fill");
}

}  // namespace dsv3::kernels::cuda
