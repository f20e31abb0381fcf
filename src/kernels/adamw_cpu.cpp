// AdamW over a flat range on the host: threads share the range, inner loops are vector code at
// memory speed.

#include "kernels/detail/adamw.h"

#include "kernels/detail/cpu.h"
#include "kernels/detail/lanes.h"
#include "kernels/optimizer.h"

namespace dsv3::kernels {
namespace detail {

void check_adamw(const AdamW& p) {
  require(p.master == nullptr || p.weight_dtype == DType::kBF16,
          "[adamw] master: expected only beside bf16 weights, got {} weights",
          name_of(p.weight_dtype));
  require(p.correction1 > 0.0f && p.correction2 > 0.0f,
          "[adamw] corrections: expected 1 - beta^step > 0 with step from 1, got {} and {}",
          p.correction1, p.correction2);
}

}  // namespace detail

namespace cpu {
namespace {

using namespace detail;

constexpr int64_t kBlock = 2048;  // elements that stay in the cache between the passes over them

/// Σ (w - before)² of rows of FP32, by lanes.
DSV3_INLINE float squared_distance(const float* w, const float* before, int64_t size) {
  LaneFloats sum = {}, v, u;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    load_lanes(w + i, v);
    load_lanes(before + i, u);
    sum += (v - u) * (v - u);
  }
  float total = sum_of_lanes(sum);
  for (; i < size; ++i) total += (w[i] - before[i]) * (w[i] - before[i]);
  return total;
}

/// One block, at most kBlock elements. moved[0] += Σ (w after - w before)², moved[1] += Σ (w
/// before)²; moved may be null.
template <typename W, typename G, typename M>
DSV3_INLINE void adamw_range(const AdamW& params, float scale, int64_t begin, int64_t end,
                             double* moved) {
  const AdamW p = params;  // a copy that no store can alias
  W* const __restrict weights = static_cast<W*>(p.weights);
  const G* const __restrict gradients = static_cast<const G*>(p.gradients);
  M* const __restrict exp_avg = static_cast<M*>(p.exp_avg);
  M* const __restrict exp_avg_sq = static_cast<M*>(p.exp_avg_sq);
  float before[kBlock], after[kBlock];
  const int64_t size = end - begin;
  if (p.master != nullptr) {
    std::memcpy(before, p.master + begin, static_cast<size_t>(size) * sizeof(float));
  } else {
    for (int64_t i = 0; i < size; ++i) before[i] = load(weights + begin + i);
  }
  for (int64_t i = 0; i < size; ++i) {
    const int64_t at = begin + i;
    float w = before[i], m = load(exp_avg + at), v = load(exp_avg_sq + at);
    kernels::detail::adamw_element(p, load(gradients + at) * scale, w, m, v);
    after[i] = w;
    store(weights + at, w);
    store(exp_avg + at, m);
    store(exp_avg_sq + at, v);
  }
  if (p.master != nullptr)
    std::memcpy(p.master + begin, after, static_cast<size_t>(size) * sizeof(float));
  if (moved == nullptr) return;
  moved[0] += squared_distance(after, before, size);
  moved[1] += dot_rows(before, before, size);
}

using Body = void (*)(const AdamW&, float, int64_t, int64_t, double*);

#define DSV3_ADAMW_BODY(name, W, G, M)                                                            \
  DSV3_CLONES void name(const AdamW& p, float scale, int64_t begin, int64_t end, double* moved) { \
    adamw_range<W, G, M>(p, scale, begin, end, moved);                                            \
  }
DSV3_ADAMW_BODY(adamw_fff, float, float, float)
DSV3_ADAMW_BODY(adamw_ffb, float, float, BFloat16)
DSV3_ADAMW_BODY(adamw_fbf, float, BFloat16, float)
DSV3_ADAMW_BODY(adamw_fbb, float, BFloat16, BFloat16)
DSV3_ADAMW_BODY(adamw_bff, BFloat16, float, float)
DSV3_ADAMW_BODY(adamw_bfb, BFloat16, float, BFloat16)
DSV3_ADAMW_BODY(adamw_bbf, BFloat16, BFloat16, float)
DSV3_ADAMW_BODY(adamw_bbb, BFloat16, BFloat16, BFloat16)
#undef DSV3_ADAMW_BODY

/// By the dtypes of weights, gradients and moments, in this order.
Body body_for(const AdamW& p) {
  constexpr Body kBodies[8] = {adamw_fff, adamw_ffb, adamw_fbf, adamw_fbb,
                               adamw_bff, adamw_bfb, adamw_bbf, adamw_bbb};
  int index = 0;
  for (const DType dtype : {p.weight_dtype, p.gradient_dtype, p.moment_dtype}) {
    dispatch_float("adamw", dtype, [](auto*) {});
    index = 2 * index + (dtype == DType::kBF16 ? 1 : 0);
  }
  return kBodies[index];
}

}  // namespace

void adamw(const AdamW& p) {
  kernels::detail::check_adamw(p);
  const Body body = body_for(p);
  const bool skip = p.skip != nullptr && *p.skip != 0;
  const float scale = p.gradient_scale != nullptr ? *p.gradient_scale : 1.0f;
  const int64_t gradient_size = size_of(p.gradient_dtype);
  const int64_t blocks = (p.size + kBlock - 1) / kBlock, parts = adamw_partials(p.size);
  const int64_t part = parts > 0 ? (blocks + parts - 1) / parts : 0;  // blocks of a part
  parallel_rows(parts, 24 * kBlock * part, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      double moved[2] = {};
      for (int64_t block = i * part; block < std::min(blocks, (i + 1) * part); ++block) {
        const int64_t begin = block * kBlock, end = std::min(p.size, begin + kBlock);
        if (!skip) body(p, scale, begin, end, p.partials != nullptr ? moved : nullptr);
        if (p.zero_gradients) {
          std::memset(static_cast<char*>(p.gradients) + begin * gradient_size, 0,
                      static_cast<size_t>((end - begin) * gradient_size));
        }
      }
      if (p.partials != nullptr) std::copy_n(moved, 2, p.partials + 2 * i);
    }
  });
}

}  // namespace cpu
}  // namespace dsv3::kernels
