// AdamW over a matrix that is also written as E4M3 in 128×128 blocks: a block of threads updates
// one such block as adamw.cu does, keeps its new weights in shared memory (64 KB), finds their
// amax and writes scale and codes. Memory is passed once: AdamW's bytes and one more an element.

#include <cuda_fp8.h>

#include <algorithm>

#include "kernels/detail/adamw.cuh"
#include "kernels/detail/launch.cuh"

namespace dsv3::kernels::cuda {
namespace {

using detail::AdamWFactors;
using detail::kVector;
using detail::kWarp;

constexpr int kThreads = 256;
constexpr int kTile = 128;
constexpr int kColumnThreads = kTile / kVector;         // 16 threads along a row
constexpr int kRowsAtOnce = kThreads / kColumnThreads;  // 16
constexpr int kSharedBytes = kTile * kTile * static_cast<int>(sizeof(float));

/// The part of the matrix that a block of threads holds.
struct Tile {
  int64_t row, column;  // of its first element
  int rows, columns;    // that exist
};

/// The block's largest, to all threads.
__device__ float block_max(float x) {
  __shared__ float parts[kThreads / kWarp];
  x = detail::warp_max(x);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  float top = parts[0];
#pragma unroll
  for (int w = 1; w < kThreads / kWarp; ++w) top = fmaxf(top, parts[w]);
  return top;
}

/// Updates the tile and leaves its weights in `kept` [128, 128]; returns this thread's largest
/// magnitude.
template <typename W, typename G, typename M, bool kStochastic, bool kVectors>
__device__ float update_tile(const AdamWFp8& p, const AdamWFactors& f, float gradient_scale,
                             const Tile& tile, float* kept) {
  const int column = threadIdx.x % kColumnThreads * kVector;
  float top = 0.0f;
#pragma unroll 2
  for (int row = threadIdx.x / kColumnThreads; row < tile.rows; row += kRowsAtOnce) {
    const int64_t i = (tile.row + row) * p.columns + tile.column + column;
    float* const to = kept + row * kTile + column;
    if constexpr (kVectors) {
      if (column >= tile.columns) continue;
      float w[kVector];
      detail::update8<W, G, M, kStochastic>(p.update, f, gradient_scale, i, w);
      detail::store8(to, w);
#pragma unroll
      for (int e = 0; e < kVector; ++e) top = fmaxf(top, fabsf(w[e]));
    } else {
      for (int e = 0; e < kVector && column + e < tile.columns; ++e) {
        to[e] = detail::update1<W, G, M, kStochastic>(p.update, f, gradient_scale, i + e);
        top = fmaxf(top, fabsf(to[e]));
      }
    }
  }
  return top;
}

__device__ __forceinline__ uint8_t code_of(float x) {
  return static_cast<uint8_t>(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3));
}

/// Writes the codes of what update_tile left; each thread reads only what it wrote itself.
template <bool kVectors>
__device__ void write_codes(const AdamWFp8& p, const Tile& tile, const float* kept, float inverse) {
  const int column = threadIdx.x % kColumnThreads * kVector;
  for (int row = threadIdx.x / kColumnThreads; row < tile.rows; row += kRowsAtOnce) {
    uint8_t* const to = p.codes + (tile.row + row) * p.columns + tile.column + column;
    const float* const from = kept + row * kTile + column;
    if constexpr (kVectors) {
      if (column >= tile.columns) continue;
      uint32_t words[2] = {};
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        words[e / 4] |= uint32_t{code_of(__fmul_rn(from[e], inverse))} << (8 * (e % 4));
      }
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
      for (int e = 0; e < kVector && column + e < tile.columns; ++e) {
        to[e] = code_of(__fmul_rn(from[e], inverse));
      }
    }
  }
}

template <typename G>
__device__ void zero_gradients(const AdamWFp8& p, const Tile& tile) {
  for (int i = threadIdx.x; i < tile.rows * kTile; i += kThreads) {
    const int row = i / kTile, column = i % kTile;
    if (column >= tile.columns) continue;
    G* const row_start = static_cast<G*>(p.update.gradients) + (tile.row + row) * p.columns;
    row_start[tile.column + column] = detail::from_float<G>(0.0f);
  }
}

/// grid (blocks of columns, blocks of rows).
template <typename W, typename G, typename M, bool kStochastic, bool kVectors>
__global__ void __launch_bounds__(kThreads) adamw_fp8_kernel(AdamWFp8 p, AdamWFactors f) {
  extern __shared__ __align__(16) float kept[];
  detail::take_corrections(p.update, f);
  const Tile tile{
      .row = int64_t{blockIdx.y} * kTile,
      .column = int64_t{blockIdx.x} * kTile,
      .rows = static_cast<int>(min(int64_t{kTile}, p.rows - blockIdx.y * int64_t{kTile})),
      .columns = static_cast<int>(min(int64_t{kTile}, p.columns - blockIdx.x * int64_t{kTile}))};
  if (p.update.skip == nullptr || *p.update.skip == 0) {
    const float gradient_scale =
        p.update.gradient_scale != nullptr ? *p.update.gradient_scale : 1.0f;
    const float mine =
        update_tile<W, G, M, kStochastic, kVectors>(p, f, gradient_scale, tile, kept);
    const float top = fmaxf(block_max(mine), p.min_amax);
    float scale = __fdiv_rn(top, 448.0f), inverse = __fdiv_rn(448.0f, top);
    if (p.power_of_two) {
      scale = __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u);
      inverse = __fdiv_rn(1.0f, scale);
    }
    if (threadIdx.x == 0) p.scales[blockIdx.y * p.scale_stride + blockIdx.x] = scale;
    write_codes<kVectors>(p, tile, kept, inverse);
  }
  if (!p.update.zero_gradients) return;
  __syncthreads();  // another thread may still read what this one zeroes
  zero_gradients<G>(p, tile);
}

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  kernels::detail::raise_cuda("adamw_fp8", "launch failed", cudaGetErrorString(error));
}

}  // namespace

void adamw_fp8(const AdamWFp8& p, Stream stream) {
  kernels::detail::check_adamw_fp8(p);
  if (p.update.size == 0) return;
  const dim3 grid(static_cast<unsigned>((p.columns + kTile - 1) / kTile),
                  static_cast<unsigned>((p.rows + kTile - 1) / kTile));
  const bool vectors = detail::adamw_aligned(p.update) && p.columns % kVector == 0 &&
                       reinterpret_cast<uintptr_t>(p.codes) % kVector == 0;
  const AdamWFactors factors = kernels::detail::adamw_factors(p.update);
  detail::dispatch_adamw(
      p.update, [&](auto* weight, auto* gradient, auto* moment, auto stochastic) {
        using W = std::remove_pointer_t<decltype(weight)>;
        using G = std::remove_pointer_t<decltype(gradient)>;
        using M = std::remove_pointer_t<decltype(moment)>;
        auto* const kernel = vectors ? adamw_fp8_kernel<W, G, M, stochastic.value, true>
                                     : adamw_fp8_kernel<W, G, M, stochastic.value, false>;
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        kSharedBytes));
        kernel<<<grid, kThreads, kSharedBytes, detail::cuda_stream(stream)>>>(p, factors);
      });
  detail::check_launch("adamw_fp8");
}

}  // namespace dsv3::kernels::cuda
