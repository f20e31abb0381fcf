// Softmax cross-entropy on the host: tokens are shared between threads; a row's exponentials wait
// in FP32 for their sum.

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/detail/cpu.h"
#include "kernels/detail/lanes.h"
#include "kernels/loss.h"

namespace dsv3::kernels::cpu {
namespace {

using namespace detail;

constexpr float kNone = -std::numeric_limits<float>::infinity();

/// The lowest id whose logit is `largest`, -1 where none is (NaN).
template <typename T>
DSV3_INLINE int64_t first_of(const T* row, int64_t vocab, float largest) {
  constexpr int64_t kStep = 64;
  for (int64_t begin = 0; begin < vocab; begin += kStep) {
    const int64_t end = std::min(vocab, begin + kStep);
    int equal = 0;
    for (int64_t v = begin; v < end; ++v) equal |= load(row + v) == largest ? 1 : 0;
    if (equal == 0) continue;
    for (int64_t v = begin; v < end; ++v) {
      if (load(row + v) == largest) return v;
    }
  }
  return -1;
}

/// The row's statistics with ids counted from 0; its exponentials under its largest logit in
/// `exps`.
template <typename T>
DSV3_INLINE VocabStatistics scan_row(const T* row, int64_t vocab, float* __restrict exps) {
  VocabStatistics s{};
  s.largest = max_row(row, vocab);
  const float shift = s.largest == kNone ? 0.0f : s.largest;
  for (int64_t v = 0; v < vocab; ++v) exps[v] = exp_fast(load(row + v) - shift);
  s.sum = sum_row(exps, vocab);
  s.argmax = static_cast<int32_t>(first_of(row, vocab, s.largest));
  s.label_logit = kNone;
  return s;
}

template <typename T>
DSV3_INLINE void cross_entropy_rows(const CrossEntropy& p, float* __restrict exps, int64_t begin,
                                    int64_t end) {
  const int64_t vocab = p.vocab;
  const float scale = p.write_gradient ? *p.scale : 0.0f;
  for (int64_t t = begin; t < end; ++t) {
    T* const __restrict row = static_cast<T*>(p.logits) + t * vocab;
    const int64_t label = p.labels[t];
    if (label == kIgnoredLabel) {
      p.losses[t] = 0.0f;
      p.correct[t] = 0;
      if (p.write_gradient) std::fill_n(row, vocab, T{});
      continue;
    }
    const VocabStatistics s = scan_row(row, vocab, exps);
    p.losses[t] = std::log(s.sum) + (s.largest - load(row + label));
    p.correct[t] = s.argmax == label ? 1 : 0;
    if (!p.write_gradient) continue;
    const float factor = scale / s.sum;
    for (int64_t v = 0; v < vocab; ++v) store(row + v, exps[v] * factor);
    store(row + label, scale * (exps[label] / s.sum - 1.0f));
  }
}

template <typename T>
DSV3_INLINE void statistics_rows(const CrossEntropyStatistics& p, float* __restrict exps,
                                 int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const T* const row = static_cast<const T*>(p.logits) + t * p.vocab;
    VocabStatistics s = scan_row(row, p.vocab, exps);
    if (s.argmax >= 0) s.argmax += static_cast<int32_t>(p.vocab_begin);
    const int64_t local = p.labels[t] - p.vocab_begin;
    if (p.labels[t] >= 0 && local >= 0 && local < p.vocab) s.label_logit = load(row + local);
    p.statistics[t] = s;
  }
}

/// All parts of token t together, in the order of parts.
DSV3_INLINE VocabStatistics join_parts(const CrossEntropyFinish& p, int64_t t) {
  VocabStatistics all{.largest = kNone, .sum = 0.0f, .label_logit = kNone, .argmax = -1};
  for (int32_t part = 0; part < p.num_parts; ++part) {
    const VocabStatistics& s = p.statistics[part * p.num_tokens + t];
    if (s.largest > all.largest) {
      all.largest = s.largest;
      all.argmax = s.argmax;
    }
    all.label_logit = s.label_logit > all.label_logit ? s.label_logit : all.label_logit;
  }
  for (int32_t part = 0; part < p.num_parts; ++part) {
    const VocabStatistics& s = p.statistics[part * p.num_tokens + t];
    all.sum += s.largest == kNone ? s.sum : s.sum * exp_fast(s.largest - all.largest);
  }
  return all;
}

template <typename T>
DSV3_INLINE void finish_rows(const CrossEntropyFinish& p, int64_t begin, int64_t end) {
  const int64_t vocab = p.vocab;
  const float scale = p.write_gradient ? *p.scale : 0.0f;
  for (int64_t t = begin; t < end; ++t) {
    T* const __restrict row = static_cast<T*>(p.logits) + t * vocab;
    const int64_t label = p.labels[t];
    if (label == kIgnoredLabel) {
      p.losses[t] = 0.0f;
      p.correct[t] = 0;
      if (p.write_gradient) std::fill_n(row, vocab, T{});
      continue;
    }
    const VocabStatistics all = join_parts(p, t);
    p.losses[t] = std::log(all.sum) + (all.largest - all.label_logit);
    p.correct[t] = all.argmax == label ? 1 : 0;
    if (!p.write_gradient) continue;
    const float factor = scale / all.sum, largest = all.largest;
    for (int64_t v = 0; v < vocab; ++v) {
      store(row + v, exp_fast(load(row + v) - largest) * factor);
    }
    const int64_t local = label - p.vocab_begin;
    if (local < 0 || local >= vocab) continue;
    store(row + local, scale * (exp_fast(all.label_logit - largest) / all.sum - 1.0f));
  }
}

#define DSV3_CROSS_ENTROPY(T)                                                                  \
  DSV3_CLONES void whole(const CrossEntropy& p, const T*, float* exps, int64_t begin,          \
                         int64_t end) {                                                        \
    cross_entropy_rows<T>(p, exps, begin, end);                                                \
  }                                                                                            \
  DSV3_CLONES void statistics(const CrossEntropyStatistics& p, const T*, float* exps,          \
                              int64_t begin, int64_t end) {                                    \
    statistics_rows<T>(p, exps, begin, end);                                                   \
  }                                                                                            \
  DSV3_CLONES void finish(const CrossEntropyFinish& p, const T*, int64_t begin, int64_t end) { \
    finish_rows<T>(p, begin, end);                                                             \
  }
DSV3_CROSS_ENTROPY(float)
DSV3_CROSS_ENTROPY(BFloat16)
#undef DSV3_CROSS_ENTROPY

void check_labels(const char* name, const int32_t* labels, int64_t num_tokens, int64_t vocab) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    require((labels[t] >= 0 && labels[t] < vocab) || labels[t] == kIgnoredLabel,
            "[{}] labels[{}]: expected 0 to {} or {} (ignored), got {}", name, t, vocab - 1,
            kIgnoredLabel, labels[t]);
  }
}

/// Calls body(exps, begin, end) for parts of the tokens, `exps` a row of FP32 of the thread's own.
template <typename Body>
void for_rows(int64_t num_tokens, int64_t vocab, const Body& body) {
  const auto width = static_cast<size_t>(vocab);
  // Allocated before the parallel region, which must not throw.
  std::vector<float> exps(width * static_cast<size_t>(omp_get_max_threads()));
  const bool nested = omp_in_parallel();
  parallel_rows(num_tokens, 16 * vocab, [&](int64_t begin, int64_t end) {
    const auto thread = nested ? size_t{0} : static_cast<size_t>(omp_get_thread_num());
    body(exps.data() + thread * width, begin, end);
  });
}

}  // namespace

void cross_entropy(const CrossEntropy& p) {
  check_labels("cross_entropy", p.labels, p.num_tokens, p.vocab);
  dispatch_float("cross_entropy", p.dtype, [&](auto* type) {
    for_rows(p.num_tokens, p.vocab,
             [&](float* exps, int64_t begin, int64_t end) { whole(p, type, exps, begin, end); });
  });
}

void cross_entropy_statistics(const CrossEntropyStatistics& p) {
  check_labels("cross_entropy_statistics", p.labels, p.num_tokens, p.total_vocab);
  dispatch_float("cross_entropy_statistics", p.dtype, [&](auto* type) {
    for_rows(p.num_tokens, p.vocab, [&](float* exps, int64_t begin, int64_t end) {
      statistics(p, type, exps, begin, end);
    });
  });
}

void cross_entropy_finish(const CrossEntropyFinish& p) {
  check_labels("cross_entropy_finish", p.labels, p.num_tokens, p.total_vocab);
  dispatch_float("cross_entropy_finish", p.dtype, [&](auto* type) {
    parallel_rows(p.num_tokens, 16 * p.vocab,
                  [&](int64_t begin, int64_t end) { finish(p, type, begin, end); });
  });
}

}  // namespace dsv3::kernels::cpu
