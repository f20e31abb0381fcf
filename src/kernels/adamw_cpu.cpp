// AdamW over a flat range on the host: threads share the range, inner loops are vector code at
// memory speed.

#include "kernels/detail/adamw.h"

#include "kernels/detail/cpu.h"
#include "kernels/optimizer.h"

namespace dsv3::kernels {
namespace detail {

void check_adamw(const AdamW& p) {
  require(p.master == nullptr || p.weight_dtype == DType::kBF16,
          "[adamw] master: expected only beside bf16 weights, got {} weights",
          name_of(p.weight_dtype));
  require(p.corrections != nullptr || (p.correction1 > 0.0f && p.correction2 > 0.0f),
          "[adamw] corrections: expected 1 - beta^step > 0 with step from 1, got {} and {}",
          p.correction1, p.correction2);
}

}  // namespace detail

namespace cpu {
namespace {

using namespace detail;

template <typename W, typename G, typename M>
DSV3_INLINE void adamw_range(const AdamW& params, float scale, int64_t begin, int64_t end) {
  const AdamW p = params;  // a copy that no store can alias
  W* const __restrict weights = static_cast<W*>(p.weights);
  float* const __restrict master = p.master;
  const G* const __restrict gradients = static_cast<const G*>(p.gradients);
  M* const __restrict exp_avg = static_cast<M*>(p.exp_avg);
  M* const __restrict exp_avg_sq = static_cast<M*>(p.exp_avg_sq);
  if (master != nullptr) {
    for (int64_t i = begin; i < end; ++i) {
      float w = master[i], m = load(exp_avg + i), v = load(exp_avg_sq + i);
      kernels::detail::adamw_element(p, load(gradients + i) * scale, w, m, v);
      master[i] = w;
      store(weights + i, w);
      store(exp_avg + i, m);
      store(exp_avg_sq + i, v);
    }
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    float w = load(weights + i), m = load(exp_avg + i), v = load(exp_avg_sq + i);
    kernels::detail::adamw_element(p, load(gradients + i) * scale, w, m, v);
    store(weights + i, w);
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
  }
}

using Body = void (*)(const AdamW&, float, int64_t, int64_t);

#define DSV3_ADAMW_BODY(name, W, G, M)                                             \
  DSV3_CLONES void name(const AdamW& p, float scale, int64_t begin, int64_t end) { \
    adamw_range<W, G, M>(p, scale, begin, end);                                    \
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

void adamw(const AdamW& params) {
  kernels::detail::check_adamw(params);
  AdamW p = params;
  if (p.corrections != nullptr) {
    p.correction1 = p.corrections[0];
    p.correction2 = p.corrections[1];
  }
  const Body body = body_for(p);
  const bool skip = p.skip != nullptr && *p.skip != 0;
  const float scale = p.gradient_scale != nullptr ? *p.gradient_scale : 1.0f;
  const int64_t gradient_size = size_of(p.gradient_dtype);
  constexpr int64_t kBlock = 2048;  // what is zeroed while it is still in the cache
  parallel_rows((p.size + kBlock - 1) / kBlock, 24 * kBlock, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, end = std::min(p.size, begin + kBlock);
      if (!skip) body(p, scale, begin, end);
      if (p.zero_gradients) {
        std::memset(static_cast<char*>(p.gradients) + begin * gradient_size, 0,
                    static_cast<size_t>((end - begin) * gradient_size));
      }
    }
  });
}

}  // namespace cpu
}  // namespace dsv3::kernels
