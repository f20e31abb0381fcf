// AdamW over a flat range: one pass, 8 elements per thread and step, 16-byte accesses.
//
// Bytes an element: FP32 weights, gradients and moments 28; BF16 weights, gradients and moments 14;
// BF16 weights and gradients with FP32 master and moments 30; zeroing the gradients in the same
// pass adds their write. How far the weights moved is summed on the way, FP32 within 8 elements,
// FP64 beyond, one part per block. Memory bound. Loshchilov & Hutter 2019, arXiv:1711.05101.

#include <cuda_bf16.h>

#include "kernels/detail/adamw.h"
#include "kernels/detail/launch.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/optimizer.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;
using detail::kWarp;

constexpr int kThreads = 256;

/// Σ (w after - w before)² and Σ (w before)² of a thread.
struct Moved {
  double update = 0.0, weight = 0.0;
};

/// The block's sums into its part. Every thread of the block calls it.
__device__ void store_moved(const Moved& moved, double* partial) {
  __shared__ double shared[2][kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const double update = detail::warp_sum(moved.update), weight = detail::warp_sum(moved.weight);
  if (lane == 0) {
    shared[0][warp] = update;
    shared[1][warp] = weight;
  }
  __syncthreads();
  if (threadIdx.x >= 2) return;
  double sum = 0.0;
  for (int i = 0; i < kThreads / kWarp; ++i) sum += shared[threadIdx.x][i];
  partial[threadIdx.x] = sum;
}

template <typename W, typename G, typename M>
__device__ __forceinline__ void update8(const AdamW& p, float gradient_scale, int64_t i,
                                        Moved& moved) {
  W* const weights = static_cast<W*>(p.weights) + i;
  G* const gradients = static_cast<G*>(p.gradients) + i;
  M* const exp_avg = static_cast<M*>(p.exp_avg) + i;
  M* const exp_avg_sq = static_cast<M*>(p.exp_avg_sq) + i;
  float w[kVector], g[kVector], m[kVector], v[kVector];
  detail::load8(gradients, g);
  detail::load8(exp_avg, m);
  detail::load8(exp_avg_sq, v);
  if (p.master != nullptr) {
    detail::load8(p.master + i, w);
  } else {
    detail::load8(weights, w);
  }
  float update = 0.0f, weight = 0.0f;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    const float before = w[e];
    kernels::detail::adamw_element(p, g[e] * gradient_scale, w[e], m[e], v[e]);
    update = fmaf(w[e] - before, w[e] - before, update);
    weight = fmaf(before, before, weight);
  }
  moved.update += update;
  moved.weight += weight;
  detail::store8(exp_avg, m);
  detail::store8(exp_avg_sq, v);
  if (p.master != nullptr) detail::store8(p.master + i, w);
  detail::store8(weights, w);
}

template <typename W, typename G, typename M>
__device__ void update1(const AdamW& p, float gradient_scale, int64_t i, Moved& moved) {
  W* const weight = static_cast<W*>(p.weights) + i;
  M* const exp_avg = static_cast<M*>(p.exp_avg) + i;
  M* const exp_avg_sq = static_cast<M*>(p.exp_avg_sq) + i;
  float w = p.master != nullptr ? p.master[i] : detail::to_float(*weight);
  float m = detail::to_float(*exp_avg), v = detail::to_float(*exp_avg_sq);
  const float g = detail::to_float(static_cast<const G*>(p.gradients)[i]) * gradient_scale;
  const float before = w;
  kernels::detail::adamw_element(p, g, w, m, v);
  moved.update += (w - before) * (w - before);
  moved.weight += before * before;
  *exp_avg = detail::from_float<M>(m);
  *exp_avg_sq = detail::from_float<M>(v);
  if (p.master != nullptr) p.master[i] = w;
  *weight = detail::from_float<W>(w);
}

template <typename W, typename G, typename M>
__global__ void __launch_bounds__(kThreads) adamw_kernel(AdamW p, int64_t vector_size) {
  const bool skip = p.skip != nullptr && *p.skip != 0;
  const float gradient_scale = p.gradient_scale != nullptr ? *p.gradient_scale : 1.0f;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t num_threads = int64_t{gridDim.x} * kThreads;
  const float zeros[kVector] = {};
  Moved moved;
  for (int64_t i = thread * kVector; i < vector_size; i += num_threads * kVector) {
    if (!skip) update8<W, G, M>(p, gradient_scale, i, moved);
    if (p.zero_gradients) detail::store8(static_cast<G*>(p.gradients) + i, zeros);
  }
  for (int64_t i = vector_size + thread; i < p.size; i += num_threads) {
    if (!skip) update1<W, G, M>(p, gradient_scale, i, moved);
    if (p.zero_gradients) static_cast<G*>(p.gradients)[i] = detail::from_float<G>(0.0f);
  }
  if (p.partials != nullptr) store_moved(moved, p.partials + 2 * int64_t{blockIdx.x});
}

}  // namespace

void adamw(const AdamW& p, Stream stream) {
  kernels::detail::check_adamw(p);
  if (p.size == 0) return;
  const bool vectorised = detail::aligned16(p.weights) && detail::aligned16(p.master) &&
                          detail::aligned16(p.gradients) && detail::aligned16(p.exp_avg) &&
                          detail::aligned16(p.exp_avg_sq);
  const int64_t vector_size = vectorised ? p.size / kVector * kVector : 0;
  // As many blocks as parts: 25 waves of them at the most, so that the last one weighs little.
  const auto grid = static_cast<unsigned>(adamw_partials(p.size));
  detail::dispatch_float("adamw", p.weight_dtype, [&](auto* weight) {
    detail::dispatch_float("adamw", p.gradient_dtype, [&](auto* gradient) {
      detail::dispatch_float("adamw", p.moment_dtype, [&](auto* moment) {
        using W = std::remove_pointer_t<decltype(weight)>;
        using G = std::remove_pointer_t<decltype(gradient)>;
        using M = std::remove_pointer_t<decltype(moment)>;
        adamw_kernel<W, G, M><<<grid, kThreads, 0, detail::cuda_stream(stream)>>>(p, vector_size);
      });
    });
  });
  detail::check_launch("adamw");
}

}  // namespace dsv3::kernels::cuda
