// Softmax cross-entropy of logits, which are overwritten by their gradient: a block per token.
//
// Pass 1 walks the row upwards with an online softmax (Milakov & Gimelshein, arXiv:1805.02867);
// pass 2 walks it downwards, so that what pass 1 read last is still in the cache. Rows of up to
// 48 KB (528 of them are in flight on 132 multiprocessors) come from the second cache on their
// second reading: T·V read, T·V written. Longer ones go to cross_entropy_sm90.cu where the device
// can; elsewhere they are read twice.
//
// Split over the vocabulary, pass 1 and pass 2 are launches of their own.

#include "kernels/detail/cross_entropy.cuh"
#include "kernels/detail/softmax.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/loss.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;
using detail::kWarp;
using detail::Softmax;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

/// The block's softmax, the same bits in every thread.
__device__ Softmax block_merge(Softmax s) {
  __shared__ Softmax parts[kWarps];
  s = detail::warp_merge(s);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = s;
  __syncthreads();
  s = parts[0];
  for (int w = 1; w < kWarps; ++w) s.merge(parts[w]);
  return s;
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

/// Pass 1: what this thread sees of the row, whose first id is `begin`.
template <typename T, int kStep>
__device__ Softmax scan_row(const T* row, int64_t vocab, int64_t begin) {
  Softmax s = detail::empty_softmax();
  float power = 0.0f;
#pragma unroll 2
  for (int64_t i = int64_t{threadIdx.x} * kStep; i < vocab; i += kThreads * kStep) {
    float v[kStep];
    load(row + i, v);
    float top = v[0];
#pragma unroll
    for (int e = 1; e < kStep; ++e) top = fmaxf(top, v[e]);
    if (top > s.largest) {
      int first = kStep - 1;
#pragma unroll
      for (int e = kStep - 2; e >= 0; --e) first = v[e] == top ? e : first;
      s.sum = s.sum_under(top);
      s.largest = top;
      s.argmax = static_cast<unsigned>(begin + i + first);
      power = detail::reference_power(top);
    }
#pragma unroll
    for (int e = 0; e < kStep; ++e) s.sum += detail::scaled_exp(v[e], power);
  }
  return s;
}

/// Pass 2, from the end of the row to its start; `label` within the row, or outside it.
template <typename T, int kStep>
__device__ void write_gradient(T* row, int64_t vocab, int64_t label, const Softmax& s,
                               float scale) {
  const float factor = scale / s.sum, power = detail::reference_power(s.largest);
  const int64_t num_steps = vocab / kStep;
#pragma unroll 2
  for (int64_t step = num_steps - 1 - threadIdx.x; step >= 0; step -= kThreads) {
    const int64_t i = step * kStep;
    float v[kStep];
    load(row + i, v);
#pragma unroll
    for (int e = 0; e < kStep; ++e) v[e] = factor * detail::scaled_exp(v[e], power);
    if (label >= i && label < i + kStep) {
#pragma unroll
      for (int e = 0; e < kStep; ++e) v[e] -= i + e == label ? scale : 0.0f;
    }
    store(row + i, v);
  }
}

/// What a label that is no id gives: ignored ones nothing, others NaN.
__device__ void write_invalid(int label, float* loss, int32_t* correct) {
  *loss = label == kIgnoredLabel ? 0.0f : NAN;
  *correct = 0;
}

template <typename T, int kStep>
__global__ void __launch_bounds__(kThreads) whole_kernel(CrossEntropy p) {
  const int64_t token = blockIdx.x;
  T* const row = static_cast<T*>(p.logits) + token * p.vocab;
  const int label = p.labels[token];
  if (label < 0 || label >= p.vocab) {
    if (threadIdx.x == 0) write_invalid(label, p.losses + token, p.correct + token);
    if (p.write_gradient) zero_row<T, kStep>(row, p.vocab);
    return;
  }
  const float label_logit = detail::to_float(row[label]);
  const Softmax s = block_merge(scan_row<T, kStep>(row, p.vocab, 0));
  if (threadIdx.x == 0) {
    p.losses[token] = s.loss(label_logit);
    p.correct[token] = s.argmax == static_cast<unsigned>(label) ? 1 : 0;
  }
  // Note: every thread read label_logit before block_merge's barrier, so it may be overwritten.
  if (p.write_gradient) write_gradient<T, kStep>(row, p.vocab, label, s, *p.scale);
}

template <typename T, int kStep>
__global__ void __launch_bounds__(kThreads) statistics_kernel(CrossEntropyStatistics p) {
  const int64_t token = blockIdx.x;
  const T* const row = static_cast<const T*>(p.logits) + token * p.vocab;
  const Softmax s = block_merge(scan_row<T, kStep>(row, p.vocab, p.vocab_begin));
  if (threadIdx.x != 0) return;
  const int64_t local = p.labels[token] - p.vocab_begin;
  const bool ours = p.labels[token] >= 0 && local >= 0 && local < p.vocab;
  const float k = detail::reference_power(s.largest);
  p.statistics[token] = {
      .largest = s.largest,
      .sum = s.largest == -INFINITY ? s.sum : s.sum * exp2f(-fmaf(s.largest, detail::kLog2E, -k)),
      .label_logit = ours ? detail::to_float(row[local]) : -INFINITY,
      .argmax = static_cast<int32_t>(s.argmax)};
}

/// All parts of a token together, in the order of parts.
struct Joined {
  Softmax softmax;
  float label_logit;
};
__device__ Joined join_parts(const CrossEntropyFinish& p, int64_t token) {
  Joined all{detail::empty_softmax(), -INFINITY};
  float top = -INFINITY;
  for (int part = 0; part < p.num_parts; ++part) {
    const VocabStatistics s = p.statistics[part * p.num_tokens + token];
    if (s.largest > top) all.softmax.argmax = static_cast<unsigned>(s.argmax);
    top = fmaxf(top, s.largest);
    all.label_logit = fmaxf(all.label_logit, s.label_logit);
  }
  const float k = detail::reference_power(top);
  for (int part = 0; part < p.num_parts; ++part) {
    const VocabStatistics s = p.statistics[part * p.num_tokens + token];
    all.softmax.sum += s.largest == -INFINITY ? s.sum : s.sum * detail::scaled_exp(s.largest, k);
  }
  all.softmax.largest = top;
  return all;
}

template <typename T, int kStep>
__global__ void __launch_bounds__(kThreads) finish_kernel(CrossEntropyFinish p) {
  const int64_t token = blockIdx.x;
  T* const row = static_cast<T*>(p.logits) + token * p.vocab;
  const int label = p.labels[token];
  if (label < 0 || label >= p.total_vocab) {
    if (threadIdx.x == 0) write_invalid(label, p.losses + token, p.correct + token);
    if (p.write_gradient) zero_row<T, kStep>(row, p.vocab);
    return;
  }
  const Joined all = join_parts(p, token);
  if (threadIdx.x == 0) {
    p.losses[token] = all.softmax.loss(all.label_logit);
    p.correct[token] = all.softmax.argmax == static_cast<unsigned>(label) ? 1 : 0;
  }
  if (!p.write_gradient) return;
  write_gradient<T, kStep>(row, p.vocab, label - p.vocab_begin, all.softmax, *p.scale);
}

/// Calls launch(element type, step as a constant).
template <typename P, typename Launch>
void dispatch(const char* name, const P& p, const Launch& launch) {
  const bool vectorised = p.vocab % kVector == 0 && detail::aligned16(p.logits);
  detail::dispatch_float(name, p.dtype, [&](auto* type) {
    if (vectorised) {
      launch(type, std::integral_constant<int, kVector>());
    } else {
      launch(type, std::integral_constant<int, 1>());
    }
  });
  detail::check_launch(name);
}

}  // namespace

void cross_entropy(const CrossEntropy& p, Stream stream) {
  if (p.num_tokens == 0) return;
  if (p.write_gradient && detail::cross_entropy_sm90(p, detail::cuda_stream(stream))) return;
  const auto grid = static_cast<unsigned>(p.num_tokens);
  dispatch("cross_entropy", p, [&](auto* type, auto step) {
    using T = std::remove_pointer_t<decltype(type)>;
    whole_kernel<T, step.value><<<grid, kThreads, 0, detail::cuda_stream(stream)>>>(p);
  });
}

void cross_entropy_statistics(const CrossEntropyStatistics& p, Stream stream) {
  if (p.num_tokens == 0) return;
  const auto grid = static_cast<unsigned>(p.num_tokens);
  dispatch("cross_entropy_statistics", p, [&](auto* type, auto step) {
    using T = std::remove_pointer_t<decltype(type)>;
    statistics_kernel<T, step.value><<<grid, kThreads, 0, detail::cuda_stream(stream)>>>(p);
  });
}

void cross_entropy_finish(const CrossEntropyFinish& p, Stream stream) {
  if (p.num_tokens == 0) return;
  const auto grid = static_cast<unsigned>(p.num_tokens);
  dispatch("cross_entropy_finish", p, [&](auto* type, auto step) {
    using T = std::remove_pointer_t<decltype(type)>;
    finish_kernel<T, step.value><<<grid, kThreads, 0, detail::cuda_stream(stream)>>>(p);
  });
}

}  // namespace dsv3::kernels::cuda
