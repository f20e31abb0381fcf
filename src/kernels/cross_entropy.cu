// Softmax cross-entropy of logits, which are overwritten by their gradient: a block per token, of
// as many threads as the row gives work to.
//
// Pass 1 takes the row in chunks of up to 32 KB, which the block holds in registers: the largest
// logit first, then one exponential per logit below it. Pass 2 reads the row again and writes the
// gradient. Rows of up to 48 KB (a few hundred of them are in flight) come from the second cache on
// their second reading: T·V read, T·V written. Longer ones go to cross_entropy_sm90.cu where the
// device can; elsewhere they are read twice.
//
// Split over the vocabulary, pass 1 and pass 2 are launches of their own.

#include "kernels/detail/cross_entropy.cuh"
#include "kernels/detail/logits.cuh"
#include "kernels/loss.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;
using detail::kWarp;
using detail::Softmax;

constexpr int kMostThreads = 512, kWords = 4;
/// Threads of a multiprocessor: pass 1 alone lives on many, pass 2 on registers for its loads.
constexpr int kScanThreads = 2048, kGradientThreads = 1024;

template <typename T, typename Word, int kThreads>
using Chunk = detail::LogitChunk<T, Word, kThreads, kWords>;

/// Pass 1 over a row whose first id is `begin`: each warp's softmax, in shared memory.
template <typename T, typename Word, int kWarps>
__device__ void scan_row(const T* row, int64_t vocab, int64_t begin, Softmax (&parts)[kWarps]) {
  using C = Chunk<T, Word, kWarps * kWarp>;
  const auto* words = reinterpret_cast<const Word*>(row);
  const int64_t num_words = vocab / C::kPer;
  Softmax all = detail::empty_softmax();
  for (int64_t first = 0; first < num_words; first += C::kSize) {
    C chunk;
    chunk.load(words + first, num_words - first);
    all.merge(chunk.scan(static_cast<unsigned>(begin + first * C::kPer)));
  }
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = all;
}

/// The block's softmax from its warps', the same bits in every lane of a warp.
template <int kWarps>
__device__ Softmax join_warps(const Softmax (&parts)[kWarps]) {
  const int lane = threadIdx.x % kWarp;
  return detail::join_lanes(lane < kWarps ? parts[lane] : detail::empty_softmax());
}

/// What pass 2 needs of a row.
struct Row {
  Softmax softmax;
  float label_logit;
};

/// Pass 2; `label` within the row, or outside it; zeros when not `valid`. `known` returns the Row;
/// it is asked when the first loads are on their way.
template <typename T, typename Word, int kThreads, typename Known>
__device__ Row write_gradient(T* row, int64_t vocab, int64_t label, bool valid, float scale,
                              const Known& known) {
  using C = Chunk<T, Word, kThreads>;
  auto* const words = reinterpret_cast<Word*>(row);
  const int64_t num_words = vocab / C::kPer;
  Row of{};
  float factor = 0.0f, power = 0.0f;
  for (int64_t first = 0; first < num_words; first += C::kSize) {
    C chunk;
    chunk.load(words + first, num_words - first);
    if (first == 0) {
      of = known();
      factor = scale / of.softmax.sum;
      power = detail::reference_power(of.softmax.largest);
    }
#pragma unroll
    for (int r = 0; r < kWords; ++r) {
      if (C::index(r) >= chunk.count) continue;
      const int64_t word = first + C::index(r), at = label - word * C::kPer;
      float v[C::kPer] = {};
      if (valid) {
        detail::unpack<T>(chunk.word[r], v);
#pragma unroll
        for (int e = 0; e < C::kPer; ++e) v[e] = factor * detail::scaled_exp(v[e], power);
        if (at >= 0 && at < C::kPer) {
#pragma unroll
          for (int e = 0; e < C::kPer; ++e) v[e] -= e == at ? scale : 0.0f;
        }
      }
      detail::pack<T>(v, chunk.word[r]);
      __stcs(words + word, chunk.word[r]);
    }
  }
  return of;
}

/// The token's loss and whether it is correct; an ignored label gives nothing, one that is no id
/// NaN.
__device__ void write_loss(const Row& row, int label, bool valid, float* loss, int32_t* correct) {
  const float otherwise = label == kIgnoredLabel ? 0.0f : NAN;
  *loss = valid ? row.softmax.loss(row.label_logit) : otherwise;
  *correct = valid && row.softmax.argmax == static_cast<unsigned>(label) ? 1 : 0;
}

template <typename T, typename Word, int kThreads>
__global__ void __launch_bounds__(kThreads, kGradientThreads / kThreads)
    whole_kernel(CrossEntropy p) {
  __shared__ Softmax parts[kThreads / kWarp];
  const int64_t token = blockIdx.x;
  T* const row = static_cast<T*>(p.logits) + token * p.vocab;
  const int label = p.labels[token];
  const bool valid = label >= 0 && label < p.vocab;
  Row known{};
  if (valid) {
    known.label_logit = detail::to_float(row[label]);
    scan_row<T, Word>(row, p.vocab, 0, parts);
    __syncthreads();
    known.softmax = join_warps(parts);
  }
  if (threadIdx.x == 0) {
    write_loss(known, label, valid, p.losses + token, p.correct + token);
  }
  // Note: every thread read the label's logit before the barrier, so it may be overwritten.
  if (p.write_gradient) {
    write_gradient<T, Word, kThreads>(row, p.vocab, label, valid, *p.scale, [&] { return known; });
  }
}

template <typename T, typename Word, int kThreads>
__global__ void __launch_bounds__(kThreads, kScanThreads / kThreads)
    statistics_kernel(CrossEntropyStatistics p) {
  __shared__ Softmax parts[kThreads / kWarp];
  const int64_t token = blockIdx.x;
  const T* const row = static_cast<const T*>(p.logits) + token * p.vocab;
  const int label = p.labels[token];
  scan_row<T, Word>(row, p.vocab, p.vocab_begin, parts);
  float label_logit = -INFINITY;
  const int64_t local = label - p.vocab_begin;
  if (threadIdx.x == 0 && label >= 0 && local >= 0 && local < p.vocab) {
    label_logit = detail::to_float(row[local]);
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const Softmax s = join_warps(parts);
  if (threadIdx.x != 0) return;
  const float k = detail::reference_power(s.largest);
  p.statistics[token] = {
      .largest = s.largest,
      .sum = s.largest == -INFINITY ? s.sum : s.sum * exp2f(-fmaf(s.largest, detail::kLog2E, -k)),
      .label_logit = label_logit,
      .argmax = static_cast<int32_t>(s.argmax)};
}

/// All parts of a token together, by each warp for itself: the same bits in all of them.
__device__ Row join_parts(const CrossEntropyFinish& p, int64_t token) {
  Softmax mine = detail::empty_softmax();
  float label_logit = -INFINITY;
  for (int part = threadIdx.x % kWarp; part < p.num_parts; part += kWarp) {
    const VocabStatistics s = p.statistics[part * p.num_tokens + token];
    const float k = detail::reference_power(s.largest);
    mine.merge({.largest = s.largest,
                .sum = s.largest == -INFINITY ? s.sum : s.sum * detail::scaled_exp(s.largest, k),
                .argmax = static_cast<unsigned>(s.argmax)});
    label_logit = fmaxf(label_logit, s.label_logit);
  }
  __syncwarp();
  return {detail::join_lanes(mine), detail::warp_largest(label_logit + 0.0f)};
}

template <typename T, typename Word, int kThreads>
__global__ void __launch_bounds__(kThreads, kGradientThreads / kThreads)
    finish_kernel(CrossEntropyFinish p) {
  const int64_t token = blockIdx.x;
  T* const row = static_cast<T*>(p.logits) + token * p.vocab;
  const int label = p.labels[token];
  const bool valid = label >= 0 && label < p.total_vocab;
  const auto join = [&] { return join_parts(p, token); };
  Row known{};
  if (p.write_gradient && p.vocab > 0) {
    const int64_t local = label - p.vocab_begin;
    known = write_gradient<T, Word, kThreads>(row, p.vocab, local, valid, *p.scale, join);
  } else {
    known = join();
  }
  if (threadIdx.x == 0) write_loss(known, label, valid, p.losses + token, p.correct + token);
}

/// Calls launch(null pointer of the element type, a word, the number of threads as a constant).
template <typename P, typename Launch>
void dispatch(const char* name, const P& p, const Launch& launch) {
  const bool vectorised = p.vocab % kVector == 0 && detail::aligned16(p.logits);
  detail::dispatch_float(name, p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t words = p.vocab / detail::kPerWord<T, uint4>;
    if (!vectorised) {
      launch(type, T{}, std::integral_constant<int, kMostThreads>());
    } else if (words <= 128 * kWords) {
      launch(type, uint4{}, std::integral_constant<int, 128>());
    } else if (words <= 256 * kWords) {
      launch(type, uint4{}, std::integral_constant<int, 256>());
    } else {
      launch(type, uint4{}, std::integral_constant<int, kMostThreads>());
    }
  });
  detail::check_launch(name);
}

}  // namespace

void cross_entropy(const CrossEntropy& p, Stream stream) {
  if (p.num_tokens == 0) return;
  if (p.write_gradient && detail::cross_entropy_sm90(p, detail::cuda_stream(stream))) return;
  const auto grid = static_cast<unsigned>(p.num_tokens);
  dispatch("cross_entropy", p, [&](auto* type, auto word, auto threads) {
    using T = std::remove_pointer_t<decltype(type)>;
    whole_kernel<T, decltype(word), decltype(threads)::value>
        <<<grid, decltype(threads)::value, 0, detail::cuda_stream(stream)>>>(p);
  });
}

void cross_entropy_statistics(const CrossEntropyStatistics& p, Stream stream) {
  if (p.num_tokens == 0) return;
  const auto grid = static_cast<unsigned>(p.num_tokens);
  dispatch("cross_entropy_statistics", p, [&](auto* type, auto word, auto threads) {
    using T = std::remove_pointer_t<decltype(type)>;
    statistics_kernel<T, decltype(word), decltype(threads)::value>
        <<<grid, decltype(threads)::value, 0, detail::cuda_stream(stream)>>>(p);
  });
}

void cross_entropy_finish(const CrossEntropyFinish& p, Stream stream) {
  if (p.num_tokens == 0) return;
  const auto grid = static_cast<unsigned>(p.num_tokens);
  dispatch("cross_entropy_finish", p, [&](auto* type, auto word, auto threads) {
    using T = std::remove_pointer_t<decltype(type)>;
    finish_kernel<T, decltype(word), decltype(threads)::value>
        <<<grid, decltype(threads)::value, 0, detail::cuda_stream(stream)>>>(p);
  });
}

}  // namespace dsv3::kernels::cuda
