// Sum of squares and clip factor on the host. The cut into partial sums depends on the size only,
// so that the bits do not depend on the number of threads.

#include <cmath>

#include "kernels/detail/cpu.h"
#include "kernels/detail/streaming.h"
#include "kernels/optimizer.h"

namespace dsv3::kernels::cpu {
namespace {

using namespace detail;

/// FP32 within 2048 elements, FP64 beyond; asks for what comes 4 KB later.
template <typename V, typename T>
DSV3_INLINE double squares(const T* x, int64_t size) {
  constexpr int64_t kBlock = 2048, kAhead = 4096 / static_cast<int64_t>(sizeof(T));
  double sum = 0.0;
  for (int64_t first = 0; first < size; first += kBlock) {
    sum += PairSum<V>::of(
        std::min(kBlock, size - first), [&](int64_t i, auto count, Pair<V>& v)
                                            __attribute__((always_inline)) {
                                              load_pair<V>(x + first + i, count, v);
                                              prefetch_pair<V>(x + first + i + kAhead);
                                              v.a *= v.a;
                                              v.b *= v.b;
                                            });
  }
  return sum;
}

DSV3_WIDE(double squares_f32, (const void* x, int64_t begin, int64_t size),
          return squares<V>(static_cast<const float*>(x) + begin, size))
DSV3_WIDE(double squares_bf16, (const void* x, int64_t begin, int64_t size),
          return squares<V>(static_cast<const BFloat16*>(x) + begin, size))

}  // namespace

void sum_of_squares(const SumOfSquares& p) {
  dispatch_float("sum_of_squares", p.dtype, [](auto*) {});
  constexpr int64_t kSmallest = 16384;
  const int64_t part =
      std::max(kSmallest, (p.size + kSumOfSquaresPartials - 1) / kSumOfSquaresPartials);
  const int64_t count = (p.size + part - 1) / part;
  parallel_rows(count, part * size_of(p.dtype), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t size = std::min(part, p.size - i * part);
      p.partials[i] = p.dtype == DType::kF32 ? squares_f32(p.x, i * part, size)
                                             : squares_bf16(p.x, i * part, size);
    }
  });
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += p.partials[i];
  *p.result = sum;
}

void finish_norm(const FinishNorm& p) {
  double sum = 0.0;
  for (int32_t i = 0; i < p.count; ++i) sum += p.sums[i];
  const auto norm = static_cast<float>(std::sqrt(sum));
  *p.norm = norm;
  if (p.clip_factor != nullptr) {
    *p.clip_factor = p.max_norm > 0.0f ? std::fmin(1.0f, p.max_norm / (norm + 1e-6f)) : 1.0f;
  }
  if (p.not_finite != nullptr) *p.not_finite = std::isfinite(norm) ? 0 : 1;
}

}  // namespace dsv3::kernels::cpu
