// Softmax cross-entropy of a chunk of logits, which are overwritten by their gradient. A block per
// token.
//
// Pass 1 walks the row upwards with an online softmax (Milakov & Gimelshein, arXiv:1805.02867) and
// looks for a logit that beats the label's; pass 2 walks it downwards, so that what pass 1 read
// last is still in L2. Bytes moved: read T·V, read T·V again (partly from L2), write T·V; next to
// the head's three products of 2·T·V·D FLOP it is small.

#include "kernels/detail/launch.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/loss.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;
using detail::kWarp;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

/// Largest logit and Σ e^(logit - largest) of what a thread, warp or block has seen.
struct OnlineSoftmax {
  float largest = -INFINITY;
  float sum = 0.0f;

  __device__ void merge(float other_largest, float other_sum) {
    const float top = fmaxf(largest, other_largest);
    if (top == -INFINITY) return;
    sum = sum * expf(largest - top) + other_sum * expf(other_largest - top);
    largest = top;
  }
};

__device__ OnlineSoftmax warp_merge(OnlineSoftmax s) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float largest = __shfl_xor_sync(detail::kFullMask, s.largest, mask);
    const float sum = __shfl_xor_sync(detail::kFullMask, s.sum, mask);
    s.merge(largest, sum);
  }
  return s;
}

/// The block's softmax, the same bits in every thread.
__device__ OnlineSoftmax block_merge(OnlineSoftmax s) {
  __shared__ float largest[kWarps], sum[kWarps];
  s = warp_merge(s);
  if (threadIdx.x % kWarp == 0) {
    largest[threadIdx.x / kWarp] = s.largest;
    sum[threadIdx.x / kWarp] = s.sum;
  }
  __syncthreads();
  OnlineSoftmax total;
  for (int w = 0; w < kWarps; ++w) total.merge(largest[w], sum[w]);
  return total;
}

/// Loads or stores kStep elements (8 with 16-byte accesses, or 1).
template <typename T>
__device__ __forceinline__ void load(const T* x, float (&v)[kVector]) {
  detail::load8(x, v);
}
template <typename T>
__device__ __forceinline__ void load(const T* x, float (&v)[1]) {
  v[0] = detail::to_float(*x);
}
template <typename T>
__device__ __forceinline__ void store(T* x, const float (&v)[kVector]) {
  detail::store8(x, v);
}
template <typename T>
__device__ __forceinline__ void store(T* x, const float (&v)[1]) {
  *x = detail::from_float<T>(v[0]);
}

template <typename T, int kStep>
__device__ void zero_row(T* row, int64_t vocab) {
  const float zeros[kStep] = {};
  for (int64_t i = int64_t{threadIdx.x} * kStep; i < vocab; i += kThreads * kStep) {
    store(row + i, zeros);
  }
}

/// Pass 1. `beaten` is raised when a logit comes before the label's in the order (value down, id
/// up).
template <typename T, int kStep>
__device__ OnlineSoftmax scan_row(const T* row, int64_t vocab, int label, float label_logit,
                                  bool* beaten) {
  OnlineSoftmax s;
  for (int64_t i = int64_t{threadIdx.x} * kStep; i < vocab; i += kThreads * kStep) {
    float v[kStep];
    load(row + i, v);
    float top = v[0];
#pragma unroll
    for (int e = 1; e < kStep; ++e) top = fmaxf(top, v[e]);
    if (top >= label_logit) {
#pragma unroll
      for (int e = 0; e < kStep; ++e) {
        *beaten |= v[e] > label_logit || (v[e] == label_logit && i + e < label);
      }
    }
    if (top == -INFINITY) continue;
    if (top > s.largest) {
      s.sum *= expf(s.largest - top);
      s.largest = top;
    }
#pragma unroll
    for (int e = 0; e < kStep; ++e) s.sum += expf(v[e] - s.largest);
  }
  return s;
}

/// Pass 2, from the end of the row to its start.
template <typename T, int kStep>
__device__ void write_gradient(T* row, int64_t vocab, int label, OnlineSoftmax s, float scale) {
  const float inverse = 1.0f / s.sum;
  const int64_t num_steps = vocab / kStep;
  for (int64_t step = num_steps - 1 - threadIdx.x; step >= 0; step -= kThreads) {
    const int64_t i = step * kStep;
    float v[kStep];
    load(row + i, v);
#pragma unroll
    for (int e = 0; e < kStep; ++e) {
      v[e] = scale * (expf(v[e] - s.largest) * inverse - (i + e == label ? 1.0f : 0.0f));
    }
    store(row + i, v);
  }
}

template <typename T, int kStep>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(CrossEntropy p) {
  const int64_t token = blockIdx.x;
  T* const row = static_cast<T*>(p.logits) + token * p.vocab;
  const int label = p.labels[token];
  if (label < 0 || label >= p.vocab) {
    if (threadIdx.x == 0) {
      p.losses[token] = label == kIgnoredLabel ? 0.0f : NAN;
      p.correct[token] = 0;
    }
    if (p.write_gradient) zero_row<T, kStep>(row, p.vocab);
    return;
  }
  const float label_logit = detail::to_float(row[label]);
  bool beaten = false;
  OnlineSoftmax s = scan_row<T, kStep>(row, p.vocab, label, label_logit, &beaten);
  s = block_merge(s);
  beaten = __syncthreads_or(beaten);
  if (threadIdx.x == 0) {
    p.losses[token] = logf(s.sum) + (s.largest - label_logit);
    p.correct[token] = beaten ? 0 : 1;
  }
  if (p.write_gradient) write_gradient<T, kStep>(row, p.vocab, label, s, *p.scale);
}

}  // namespace

void cross_entropy(const CrossEntropy& p, Stream stream) {
  if (p.num_tokens == 0) return;
  const bool vectorised = p.vocab % kVector == 0 && detail::aligned16(p.logits);
  detail::dispatch_float("cross_entropy", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* const kernel = vectorised ? cross_entropy_kernel<T, kVector> : cross_entropy_kernel<T, 1>;
    kernel<<<static_cast<unsigned>(p.num_tokens), kThreads, 0, detail::cuda_stream(stream)>>>(p);
  });
  detail::check_launch("cross_entropy");
}

}  // namespace dsv3::kernels::cuda
