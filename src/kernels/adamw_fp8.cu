// AdamW over a matrix that is also written as E4M3 in 128×128 blocks: a block of threads updates
// one such block as adamw.cu does, keeps its new weights in shared memory (64 KB), finds their
// amax and writes scale and codes. Memory is passed once: AdamW's bytes and one more an element.

#include <cuda_fp8.h>

#include <algorithm>

#include "kernels/detail/adamw.cuh"
#include "kernels/detail/e4m3.h"
#include "kernels/detail/launch.cuh"

namespace dsv3::kernels::cuda {
namespace {

using detail::AdamWFactors;
using detail::kVector;
using detail::kWarp;

constexpr int kThreads = 256;
constexpr int kTile = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kQuad = kTile / kWarp;  // elements of a lane in a row
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
/// magnitude. Every thread of the block calls it.
template <typename Types>
__device__ float update_quads_of_tile(const AdamWFp8& p, const AdamWFactors& f,
                                      const typename Types::Key& key, float gradient_scale,
                                      const Tile& tile, float* kept) {
  const int warp = threadIdx.x / kWarp, column = threadIdx.x % kWarp * kQuad;
  float top = 0.0f;
  for (int row = warp; row < tile.rows; row += 2 * kWarps) {
    const int64_t first = (tile.row + row) * p.columns + tile.column + column;
    const bool in = column < tile.columns;
    const detail::Quads q{{first, first + kWarps * p.columns},
                          {in, in && row + kWarps < tile.rows}};
    detail::Loaded<Types> x = {};
    float w[kVector];
    detail::load_quads<Types, true>(p.update, q, x);
    detail::update_quads<Types, true>(p.update, f, key, gradient_scale, q, x, w);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (!q.in[k]) continue;
      const float4 part = make_float4(w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3]);
      *reinterpret_cast<float4*>(kept + (row + k * kWarps) * kTile + column) = part;
      top = fmaxf(fmaxf(top, fmaxf(fabsf(part.x), fabsf(part.y))),
                  fmaxf(fabsf(part.z), fabsf(part.w)));
    }
  }
  return top;
}

/// The same an element at a time.
template <typename Types>
__device__ float update_elements_of_tile(const AdamWFp8& p, const AdamWFactors& f,
                                         const typename Types::Key& key, float gradient_scale,
                                         const Tile& tile, float* kept) {
  float top = 0.0f;
  for (int i = threadIdx.x; i < tile.rows * kTile; i += kThreads) {
    const int row = i / kTile, column = i % kTile;
    if (column >= tile.columns) continue;
    const int64_t at = (tile.row + row) * p.columns + tile.column + column;
    kept[i] = detail::update1<Types>(p.update, f, key, gradient_scale, at);
    top = fmaxf(top, fabsf(kept[i]));
  }
  return top;
}

__device__ __forceinline__ uint8_t code_of(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return static_cast<uint8_t>(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3));
#else
  return static_cast<uint8_t>(kernels::detail::e4m3_code(x));
#endif
}

/// Writes the codes of what was updated; the whole tile is there.
template <bool kVectors>
__device__ void write_codes(const AdamWFp8& p, const Tile& tile, const float* kept, float inverse) {
  constexpr int kEach = kVectors ? kQuad : 1;
  for (int i = threadIdx.x * kEach; i < tile.rows * kTile; i += kThreads * kEach) {
    const int row = i / kTile, column = i % kTile;
    if (column >= tile.columns) continue;
    uint8_t* const to = p.codes + (tile.row + row) * p.columns + tile.column + column;
    if constexpr (kVectors) {
      const float4 w = *reinterpret_cast<const float4*>(kept + i);
      const float v[kQuad] = {w.x, w.y, w.z, w.w};
      uint32_t word = 0;
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
        word |= uint32_t{code_of(__fmul_rn(v[e], inverse))} << (8 * e);
      }
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
      *to = code_of(__fmul_rn(kept[i], inverse));
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
template <typename Types, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    adamw_fp8_kernel(AdamWFp8 p, AdamWFactors f, typename Types::Key key) {
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
    const float mine = kVectors
                           ? update_quads_of_tile<Types>(p, f, key, gradient_scale, tile, kept)
                           : update_elements_of_tile<Types>(p, f, key, gradient_scale, tile, kept);
    const auto [scale, inverse] = kernels::detail::tile_scale(block_max(mine), p.rule);
    if (threadIdx.x == 0) p.scales[blockIdx.y * p.scale_stride + blockIdx.x] = scale;
    write_codes<kVectors>(p, tile, kept, inverse);
  }
  if (!p.update.zero_gradients) return;
  __syncthreads();  // another thread may still read what this one zeroes
  zero_gradients<typename Types::Gradient>(p, tile);
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
  detail::dispatch_adamw(p.update, [&](auto types) {
    using Types = decltype(types);
    auto* const kernel = vectors ? adamw_fp8_kernel<Types, true> : adamw_fp8_kernel<Types, false>;
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    kernel<<<grid, kThreads, kSharedBytes, detail::cuda_stream(stream)>>>(
        p, factors, detail::rounding_key<Types>(p.update));
  });
  detail::check_launch("adamw_fp8");
}

}  // namespace dsv3::kernels::cuda
