// Sum of squares of a flat buffer in two passes, and the norm and clip factor made of such sums on
// the device.
//
// A thread adds squares of 8 elements in FP32 and those sums in FP64, with the loads of 4 such
// groups in flight; blocks leave one partial each, which one block adds in order. The cut depends
// on the size only; its 768 blocks of 256 threads run all at once on 132 multiprocessors (6 fit on
// each). Reads the buffer once: memory bound.

#include "kernels/detail/launch.cuh"
#include "kernels/detail/words.cuh"
#include "kernels/optimizer.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;
using detail::kWarp;

constexpr int kThreads = 256;
constexpr int kBatch = 4;  // groups of 8 whose loads are in flight together
constexpr int kBlocks = 768;
static_assert(kBlocks <= kSumOfSquaresPartials);

/// The block's sum, in thread 0.
__device__ double block_sum(double x) {
  __shared__ double partial[kThreads / kWarp];
  x = detail::warp_sum(x);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x >= kWarp) return 0.0;
  return detail::warp_sum(threadIdx.x < kThreads / kWarp ? partial[threadIdx.x] : 0.0);
}

__device__ __forceinline__ float squares(const float (&v)[kVector]) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kVector; ++e) sum = fmaf(v[e], v[e], sum);
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 6)
    partials_kernel(const T* x, int64_t size, int64_t vector_size, double* partials) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t num_threads = int64_t{gridDim.x} * kThreads;
  const int64_t stride = num_threads * kVector;
  double sum = 0.0;
  int64_t i = thread * kVector;
  for (; i + (kBatch - 1) * stride < vector_size; i += kBatch * stride) {
    detail::Words8<T> words[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) words[j].load(x + i + j * stride);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      float v[kVector];
      detail::unpack(words[j], v);
      sum += squares(v);
    }
  }
  for (; i < vector_size; i += stride) {
    float v[kVector];
    detail::load8(x + i, v);
    sum += squares(v);
  }
  for (i = vector_size + thread; i < size; i += num_threads) {
    const float v = detail::to_float(x[i]);
    sum += v * v;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    finish_sum_kernel(const double* partials, int count, double* result) {
  double sum = 0.0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *result = sum;
}

__global__ void finish_norm_kernel(FinishNorm p) {
  double sum = 0.0;
  for (int i = 0; i < p.count; ++i) sum += p.sums[i];
  const float norm = static_cast<float>(sqrt(sum));
  *p.norm = norm;
  if (p.clip_factor != nullptr) {
    *p.clip_factor = p.max_norm > 0.0f ? fminf(1.0f, p.max_norm / (norm + 1e-6f)) : 1.0f;
  }
  if (p.not_finite != nullptr) *p.not_finite = isfinite(norm) ? 0 : 1;
}

}  // namespace

void sum_of_squares(const SumOfSquares& p, Stream stream) {
  const auto cuda = detail::cuda_stream(stream);
  int blocks = 0;
  if (p.size > 0) {
    const int64_t vector_size = detail::aligned16(p.x) ? p.size / kVector * kVector : 0;
    const int64_t wanted = (p.size + kThreads * kVector - 1) / (kThreads * kVector);
    blocks = static_cast<int>(wanted < kBlocks ? wanted : kBlocks);
    detail::dispatch_float("sum_of_squares", p.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      partials_kernel<<<blocks, kThreads, 0, cuda>>>(static_cast<const T*>(p.x), p.size,
                                                     vector_size, p.partials);
    });
  }
  finish_sum_kernel<<<1, kThreads, 0, cuda>>>(p.partials, blocks, p.result);
  detail::check_launch("sum_of_squares");
}

void finish_norm(const FinishNorm& p, Stream stream) {
  finish_norm_kernel<<<1, 1, 0, detail::cuda_stream(stream)>>>(p);
  detail::check_launch("finish_norm");
}

}  // namespace dsv3::kernels::cuda
