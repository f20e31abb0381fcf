// Softmax cross-entropy on the host: tokens are shared between threads; a row's exponentials wait
// in FP32 for their sum.

#include <cmath>
#include <vector>

#include "kernels/detail/cpu.h"
#include "kernels/detail/lanes.h"
#include "kernels/loss.h"

namespace dsv3::kernels::cpu {
namespace {

using namespace detail;

/// True when no logit beats the label's and no lower id equals it.
template <typename T>
DSV3_INLINE bool is_argmax(const T* row, int64_t label, float largest) {
  if (!(load(row + label) >= largest)) return false;
  int equal_before = 0;
  for (int64_t v = 0; v < label; ++v) equal_before |= load(row + v) == largest ? 1 : 0;
  return equal_before == 0;
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
    const float largest = max_row(row, vocab);
    for (int64_t v = 0; v < vocab; ++v) exps[v] = exp_fast(load(row + v) - largest);
    const float sum = sum_row(exps, vocab);
    p.losses[t] = std::log(sum) + (largest - load(row + label));
    p.correct[t] = is_argmax(row, label, largest) ? 1 : 0;
    if (!p.write_gradient) continue;
    const float factor = scale / sum;
    for (int64_t v = 0; v < vocab; ++v) store(row + v, exps[v] * factor);
    store(row + label, scale * (exps[label] / sum - 1.0f));
  }
}

DSV3_CLONES void cross_entropy_f32(const CrossEntropy& p, float* exps, int64_t begin, int64_t end) {
  cross_entropy_rows<float>(p, exps, begin, end);
}
DSV3_CLONES void cross_entropy_bf16(const CrossEntropy& p, float* exps, int64_t begin,
                                    int64_t end) {
  cross_entropy_rows<BFloat16>(p, exps, begin, end);
}

}  // namespace

void cross_entropy(const CrossEntropy& p) {
  dispatch_float("cross_entropy", p.dtype, [](auto*) {});
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    require((p.labels[t] >= 0 && p.labels[t] < p.vocab) || p.labels[t] == kIgnoredLabel,
            "[cross_entropy] labels[{}]: expected 0 to {} or {} (ignored), got {}", t, p.vocab - 1,
            kIgnoredLabel, p.labels[t]);
  }
  const auto body = p.dtype == DType::kF32 ? cross_entropy_f32 : cross_entropy_bf16;
  const auto vocab = static_cast<size_t>(p.vocab);
  // Allocated before the parallel region, which must not throw.
  std::vector<float> exps(vocab * static_cast<size_t>(omp_get_max_threads()));
  const bool nested = omp_in_parallel();
  parallel_rows(p.num_tokens, 16 * p.vocab, [&](int64_t begin, int64_t end) {
    const auto thread = nested ? size_t{0} : static_cast<size_t>(omp_get_thread_num());
    body(p, exps.data() + thread * vocab, begin, end);
  });
}

}  // namespace dsv3::kernels::cpu
