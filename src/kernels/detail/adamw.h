#pragma once

// What the host's and the device's bodies of AdamW share: the element, the random rounding, the
// checks.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/detail/philox.h"
#include "kernels/optimizer.h"

#ifdef __CUDACC__
#define DSV3_ADAMW_INLINE __host__ __device__ __forceinline__
#else
#define DSV3_ADAMW_INLINE inline __attribute__((always_inline))
#endif

namespace dsv3::kernels::detail {

/// What the formula needs of a step, so that an element costs one root and one division.
struct AdamWFactors {
  float decay;         // lr · weight decay
  float gain1;         // 1 - β1
  float beta2, gain2;  // β2, 1 - β2
  float step_size;     // lr / correction1
  float root_scale;    // 1 / sqrt(correction2)
  float eps;
  float ema_gain;  // 1 - EMA's decay
};

inline AdamWFactors adamw_factors(const AdamW& p) {
  return {.decay = p.learning_rate * p.weight_decay,
          .gain1 = static_cast<float>(1.0 - p.beta1),
          .beta2 = static_cast<float>(p.beta2),
          .gain2 = static_cast<float>(1.0 - p.beta2),
          .step_size = p.learning_rate / p.correction1,
          .root_scale = 1.0f / std::sqrt(p.correction2),
          .eps = p.eps,
          .ema_gain = static_cast<float>(1.0 - p.ema_decay)};
}

/// Updates weight w and moments m, v from the clipped gradient g. Math has root(x), quotient(a, b)
/// and sum(a, b, c) = a·b + c; `decay` is f.decay or 0. Note: with an explicit FMA for sum() no
/// compiler is free to round one use of this otherwise than another.
template <typename Math>
DSV3_ADAMW_INLINE void adamw_element(const AdamWFactors& f, float decay, float g, float& w,
                                     float& m, float& v) {
  m = Math::sum(f.gain1, g - m, m);
  v = Math::sum(f.gain2 * g, g, f.beta2 * v);
  w = Math::sum(-decay, w, w);
  const float root = Math::sum(Math::root(v), f.root_scale, f.eps);
  w = Math::sum(-f.step_size, Math::quotient(m, root), w);
}

/// Which of an element's numbers is rounded.
enum class Rounded : uint32_t { kWeight = 0, kExpAvg = 1, kExpAvgSq = 2, kEma = 3 };

/// The upper half of Philox's counter; the lower is an element's index / 8, the key the seed.
DSV3_ADAMW_INLINE uint64_t rounding_counter(const AdamW& p, Rounded what) {
  return 4 * p.step + static_cast<uint64_t>(what);
}

/// Random words for the eight elements of which `index` (among all of the run) is one: element e of
/// them takes 16 bits, the lower (e even) or upper (e odd) half of word e / 2.
DSV3_ADAMW_INLINE Philox4 rounding_words(const AdamW& p, const PhiloxKey& key, int64_t index,
                                         Rounded what) {
  return philox4x32(key, static_cast<uint64_t>(index) / 8, rounding_counter(p, what));
}
DSV3_ADAMW_INLINE uint32_t rounding_bits(const Philox4& words, int element) {
  return (words.word[element / 2] >> (element % 2 * 16)) & 0xffffu;
}

/// FP32 bits → BF16 bits, up with the probability of the part that is cut off. Infinity and NaN
/// stay.
DSV3_ADAMW_INLINE uint32_t round_at_random(uint32_t bits, uint32_t random16) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const uint32_t nan = (bits & 0x7fffffu) != 0 ? 0x40u : 0u;
  return finite ? (bits + random16) >> 16 : (bits >> 16) | nan;
}

/// Throws std::invalid_argument when dtypes do not fit or a correction is not positive.
void check_adamw(const AdamW& p);

/// The same for a matrix, its size and the stride of its scales.
void check_adamw_fp8(const AdamWFp8& p);

}  // namespace dsv3::kernels::detail
