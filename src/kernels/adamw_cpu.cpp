// AdamW over a flat range on the host: threads share the range in blocks that stay in the first
// cache, inner loops are vector code at memory speed. What is optional (random rounding, the EMA,
// zeroed gradients) follows per block, while it is there.

#include "kernels/detail/adamw.h"

#include "kernels/detail/cpu.h"
#include "kernels/detail/lanes.h"
#include "kernels/detail/streaming.h"
#include "kernels/detail/wide.h"
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
  require(p.ema == nullptr || p.ema_dtype == DType::kF32 || p.ema_dtype == DType::kBF16,
          "[adamw] ema_dtype: expected fp32 or bf16, got {}", name_of(p.ema_dtype));
  require(p.first_index >= 0, "[adamw] first_index: expected at least 0, got {}", p.first_index);
}

}  // namespace detail

namespace cpu {
namespace {

using namespace detail;
using kernels::detail::AdamWFactors;
using kernels::detail::Rounded;

constexpr int64_t kBlock = kAdamWPart;  // elements

struct HostMath {
  DSV3_INLINE static float root(float x) { return std::sqrt(x); }
  DSV3_INLINE static float quotient(float a, float b) { return a / b; }
  DSV3_INLINE static float sum(float a, float b, float c) { return a * b + c; }
};

/// Where a block's numbers stand; the types belong to the body.
struct Block {
  void* weights;
  float* master;  // may be null
  const void* gradients;
  void* exp_avg;
  void* exp_avg_sq;
};

template <typename W, typename G, typename M>
DSV3_INLINE void adamw_block(const AdamWFactors& factors, float decay, float scale, const Block& at,
                             int64_t size) {
  const AdamWFactors f = factors;  // a copy that no store can alias
  W* const __restrict weights = static_cast<W*>(at.weights);
  float* const __restrict master = at.master;
  const G* const __restrict gradients = static_cast<const G*>(at.gradients);
  M* const __restrict exp_avg = static_cast<M*>(at.exp_avg);
  M* const __restrict exp_avg_sq = static_cast<M*>(at.exp_avg_sq);
  if (master != nullptr) {
    for (int64_t i = 0; i < size; ++i) {
      float w = master[i], m = load(exp_avg + i), v = load(exp_avg_sq + i);
      kernels::detail::adamw_element<HostMath>(f, decay, load(gradients + i) * scale, w, m, v);
      master[i] = w;
      store(weights + i, w);
      store(exp_avg + i, m);
      store(exp_avg_sq + i, v);
    }
    return;
  }
  for (int64_t i = 0; i < size; ++i) {
    float w = load(weights + i), m = load(exp_avg + i), v = load(exp_avg_sq + i);
    kernels::detail::adamw_element<HostMath>(f, decay, load(gradients + i) * scale, w, m, v);
    store(weights + i, w);
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
  }
}

using Body = void (*)(const AdamWFactors&, float, float, const Block&, int64_t);

#define DSV3_ADAMW_BODY(name, W, G, M)                                                    \
  DSV3_CLONES void name(const AdamWFactors& f, float decay, float scale, const Block& at, \
                        int64_t size) {                                                   \
    adamw_block<W, G, M>(f, decay, scale, at, size);                                      \
  }
DSV3_ADAMW_BODY(adamw_fff, float, float, float)
DSV3_ADAMW_BODY(adamw_ffb, float, float, BFloat16)
DSV3_ADAMW_BODY(adamw_fbf, float, BFloat16, float)
DSV3_ADAMW_BODY(adamw_fbb, float, BFloat16, BFloat16)
DSV3_ADAMW_BODY(adamw_bff, BFloat16, float, float)
DSV3_ADAMW_BODY(adamw_bfb, BFloat16, float, BFloat16)
DSV3_ADAMW_BODY(adamw_bbf, BFloat16, BFloat16, float)
#undef DSV3_ADAMW_BODY

/// Lane by lane; a compiler makes vector instructions of it.
template <typename V>
DSV3_INLINE void adamw_lanes(const AdamWFactors& f, float decay, float scale,
                             const typename V::Floats& g, typename V::Floats& w,
                             typename V::Floats& m, typename V::Floats& v) {
  typename V::Floats new_w = {}, new_m = {}, new_v = {};
  for (int64_t i = 0; i < V::kLanes; ++i) {
    float weight = w[i], first = m[i], second = v[i];
    kernels::detail::adamw_element<HostMath>(f, decay, g[i] * scale, weight, first, second);
    new_w[i] = weight;
    new_m[i] = first;
    new_v[i] = second;
  }
  w = new_w;
  m = new_m;
  v = new_v;
}

/// All in BF16 without a master: taken apart and joined in pairs (kernels/detail/wide.h). Where
/// kMoved, adds Σ (after - before)² and Σ before² of the weights to moved[0] and moved[1], `after`
/// as it is before it is rounded.
template <typename V, bool kMoved>
DSV3_INLINE void adamw_in_pairs(const AdamWFactors& factors, float decay, float scale,
                                const Block& at, int64_t size, double* moved) {
  const AdamWFactors f = factors;  // a copy that no store can alias
  auto* const weights = static_cast<BFloat16*>(at.weights);
  auto* const exp_avg = static_cast<BFloat16*>(at.exp_avg);
  auto* const exp_avg_sq = static_cast<BFloat16*>(at.exp_avg_sq);
  const auto* const gradients = static_cast<const BFloat16*>(at.gradients);
  Pair<V> update = {}, weight = {};
  for_each_pair<V>(
      size, [&](int64_t i, auto count) __attribute__((always_inline)) {
        Pair<V> w, g, m, v;
        load_pair<V>(weights + i, count, w);
        load_pair<V>(gradients + i, count, g);
        load_pair<V>(exp_avg + i, count, m);
        load_pair<V>(exp_avg_sq + i, count, v);
        const Pair<V> before = w;
        adamw_lanes<V>(f, decay, scale, g.a, w.a, m.a, v.a);
        adamw_lanes<V>(f, decay, scale, g.b, w.b, m.b, v.b);
        store_pair<V>(weights + i, count, w);
        store_pair<V>(exp_avg + i, count, m);
        store_pair<V>(exp_avg_sq + i, count, v);
        if constexpr (kMoved) {
          weight.a += before.a * before.a;
          weight.b += before.b * before.b;
          Pair<V> step;
          step.a = w.a - before.a;
          step.b = w.b - before.b;
          if constexpr (!std::is_same_v<decltype(count), WholePair<V>>) {
            // Elements that do not exist are zeros, which eps = 0 makes NaN.
            for (int64_t lane = 0; lane < V::kLanes; ++lane) {
              if (place_in_pair<V, BFloat16>(lane) >= count) step.a[lane] = 0.0f;
              if (place_in_pair<V, BFloat16>(V::kLanes + lane) >= count) step.b[lane] = 0.0f;
            }
          }
          update.a += step.a * step.a;
          update.b += step.b * step.b;
        }
      });
  if constexpr (kMoved) {
    moved[0] += sum_of<V>(update.a) + sum_of<V>(update.b);
    moved[1] += sum_of<V>(weight.a) + sum_of<V>(weight.b);
  }
}
DSV3_WIDE(void adamw_bbb,
          (const AdamWFactors& f, float decay, float scale, const Block& at, int64_t size),
          at.master != nullptr
              ? adamw_block<BFloat16, BFloat16, BFloat16>(f, decay, scale, at, size)
              : adamw_in_pairs<V, false>(f, decay, usual_nan(scale), at, size, nullptr))
DSV3_WIDE(void adamw_bbb_moved,
          (const AdamWFactors& f, float decay, float scale, const Block& at, int64_t size,
           double* moved),
          adamw_in_pairs<V, true>(f, decay, usual_nan(scale), at, size, moved))

Body body_for(DType weight, DType gradient, DType moment) {
  constexpr Body kBodies[8] = {adamw_fff, adamw_ffb, adamw_fbf, adamw_fbb,
                               adamw_bff, adamw_bfb, adamw_bbf, adamw_bbb};
  int index = 0;
  for (const DType dtype : {weight, gradient, moment}) {
    dispatch_float("adamw", dtype, [](auto*) {});
    index = 2 * index + (dtype == DType::kBF16 ? 1 : 0);
  }
  return kBodies[index];
}

/// Copies between types; a BF16 result is rounded to nearest.
template <typename From, typename To>
DSV3_INLINE void convert(const From* __restrict from, To* __restrict to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) store(to + i, load(from + i));
}
DSV3_CLONES void widen(const BFloat16* from, float* to, int64_t size) {
  convert(from, to, size);
}

/// Adds Σ (after - before)² and Σ before² to moved[0] and moved[1].
DSV3_CLONES void add_moved(const float* before, const float* after, int64_t size, double* moved) {
  LaneFloats update = {}, weight = {}, u, v;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    load_lanes(before + i, u);
    load_lanes(after + i, v);
    update += (v - u) * (v - u);
    weight += u * u;
  }
  float rest_update = 0.0f, rest_weight = 0.0f;
  for (; i < size; ++i) {
    rest_update += (after[i] - before[i]) * (after[i] - before[i]);
    rest_weight += before[i] * before[i];
  }
  moved[0] += sum_of_lanes(update) + rest_update;
  moved[1] += sum_of_lanes(weight) + rest_weight;
}

/// mean += (1 - decay) · (w - mean).
template <typename E, typename W>
DSV3_INLINE void ema_block(float gain, const W* __restrict w, const E* mean, float* __restrict to,
                           int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = load(mean + i) + gain * (load(w + i) - load(mean + i));
}
#define DSV3_EMA_BODY(E, W)                                                                   \
  DSV3_CLONES void ema_into(float gain, const W* w, const E* mean, float* to, int64_t size) { \
    ema_block<E, W>(gain, w, mean, to, size);                                                 \
  }
DSV3_EMA_BODY(float, float)
DSV3_EMA_BODY(float, BFloat16)
DSV3_EMA_BODY(BFloat16, float)
DSV3_EMA_BODY(BFloat16, BFloat16)
#undef DSV3_EMA_BODY

DSV3_CLONES void round_nearest(const float* from, BFloat16* to, int64_t size) {
  convert(from, to, size);
}

constexpr int64_t kGroups = kBlock / 8 + 8;  // of eight elements, that a block touches, and a few

/// rounding_words of `groups` groups (and of a few more) from `first_group` on, one after the
/// other: the rounds of Philox (kernels/detail/philox.h) for groups side by side, 32 bits in lanes
/// of 64 whose upper halves mean nothing.
template <typename V>
DSV3_INLINE void philox_body(uint64_t key, uint64_t first_group, uint64_t counter_high,
                             int64_t groups, uint32_t* words) {
  using Longs = typename V::Longs;
  constexpr int64_t kAtOnce = V::kLanes / 2;
  const kernels::detail::PhiloxKey rounds = kernels::detail::philox_key(key);
  Longs index;
  for (int64_t i = 0; i < kAtOnce; ++i) index[i] = static_cast<uint64_t>(i);
  for (int64_t g = 0; g < groups; g += kAtOnce) {
    const Longs counter = index + (first_group + static_cast<uint64_t>(g));
    Longs c0 = counter, c1 = counter >> 32, a, b;
    Longs c2 = Longs{} + counter_high, c3 = Longs{} + (counter_high >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kernels::detail::kPhiloxRounds; ++round) {
      multiply_halves<V>(c0, Longs{} + uint64_t{0xD2511F53u}, a);
      multiply_halves<V>(c2, Longs{} + uint64_t{0xCD9E8D57u}, b);
      c0 = (b >> 32) ^ c1 ^ uint64_t { rounds.word[round][0] };
      c1 = b;
      c2 = (a >> 32) ^ c3 ^ uint64_t { rounds.word[round][1] };
      c3 = a;
    }
    const Longs low = (c0 & 0xffffffffu) | (c1 << 32), high = (c2 & 0xffffffffu) | (c3 << 32);
    for (int64_t i = 0; i < kAtOnce; ++i) {
      const uint64_t group[2] = {low[i], high[i]};
      std::memcpy(words + 4 * (g + i), group, sizeof(group));
    }
  }
}
DSV3_WIDE(void philox_block,
          (uint64_t key, uint64_t first_group, uint64_t counter_high, int64_t groups,
           uint32_t* words),
          philox_body<V>(key, first_group, counter_high, groups, words))

/// `words` begin `offset` elements before from[0].
DSV3_CLONES void round_with(const float* __restrict from, const uint32_t* words, int64_t offset,
                            BFloat16* __restrict to, int64_t size) {
  // Element e of a group takes half e of its words: in order, as a little-endian machine holds
  // them (what a big-endian one would need, no machine of ours is).
  static_assert(std::endian::native == std::endian::little);
  using Short [[gnu::may_alias]] = uint16_t;
  const Short* const random = reinterpret_cast<const Short*>(words) + offset;
  for (int64_t i = 0; i < size; ++i) {
    to[i].bits = static_cast<uint16_t>(
        kernels::detail::round_at_random(std::bit_cast<uint32_t>(from[i]), random[i]));
  }
}

/// Rounds elements begin … of the range, at most kBlock, up or down at random.
void round_random(const AdamW& p, Rounded what, int64_t begin, const float* from, BFloat16* to,
                  int64_t size) {
  alignas(64) uint32_t words[4 * kGroups];
  const int64_t index = p.first_index + begin, offset = index % 8;
  prefetch_bytes(to + size, 2 * size);  // the next block's, while the random words are made
  philox_block(p.seed, static_cast<uint64_t>(index / 8), kernels::detail::rounding_counter(p, what),
               (offset + size + 7) / 8, words);
  round_with(from, words, offset, to, size);
}

/// One range, cut into blocks.
class Range {
 public:
  explicit Range(const AdamW& p)
      : p_(p),
        factors_(kernels::detail::adamw_factors(p)),
        scale_(p.gradient_scale != nullptr ? *p.gradient_scale : 1.0f),
        body_(body_for(p.weights == nullptr ? DType::kF32 : p.weight_dtype, p.gradient_dtype,
                       p.moment_dtype)),
        wide_body_(body_for(DType::kF32, p.gradient_dtype, DType::kF32)),
        random_weights_(p.stochastic_rounding && p.weight_dtype == DType::kBF16 &&
                        p.master == nullptr),
        random_moments_(p.stochastic_rounding && p.moment_dtype == DType::kBF16) {}

  /// One block. `moved` (may be null) takes what it adds to Σ (w after - w before)² and Σ (w
  /// before)².
  void update(int64_t begin, int64_t end, double* moved) const {
    const int64_t middle = std::clamp(p_.decay_end, begin, end);
    update_part(begin, middle, factors_.decay, moved);
    update_part(middle, end, 0.0f, moved);
    if (p_.ema != nullptr) update_ema(begin, end - begin);
  }

 private:
  bool bf16_weights() const { return p_.weights != nullptr && p_.weight_dtype == DType::kBF16; }
  static void* at(void* base, DType dtype, int64_t i) {
    return base == nullptr ? nullptr : static_cast<char*>(base) + i * size_of(dtype);
  }
  Block block(int64_t i) const {
    // Without rounded weights (adamw_fp8's may be null) the master is all there is.
    if (p_.weights == nullptr) {
      return {.weights = p_.master + i,
              .master = nullptr,
              .gradients = at(p_.gradients, p_.gradient_dtype, i),
              .exp_avg = at(p_.exp_avg, p_.moment_dtype, i),
              .exp_avg_sq = at(p_.exp_avg_sq, p_.moment_dtype, i)};
    }
    return {.weights = at(p_.weights, p_.weight_dtype, i),
            .master = p_.master == nullptr ? nullptr : p_.master + i,
            .gradients = at(p_.gradients, p_.gradient_dtype, i),
            .exp_avg = at(p_.exp_avg, p_.moment_dtype, i),
            .exp_avg_sq = at(p_.exp_avg_sq, p_.moment_dtype, i)};
  }

  void update_part(int64_t begin, int64_t end, float decay, double* moved) const {
    if (begin == end) return;
    const int64_t size = end - begin;
    // Only the FP32 copies hold BF16 weights before their rounding.
    const bool rounded = moved != nullptr && bf16_weights() && p_.master == nullptr;
    const bool random = random_weights_ || random_moments_;
    if (rounded && !random && p_.gradient_dtype == DType::kBF16 &&
        p_.moment_dtype == DType::kBF16) {
      adamw_bbb_moved(factors_, decay, scale_, block(begin), size, moved);
      return;
    }
    if (rounded || random) {
      update_in_copies(begin, size, decay, moved);
      return;
    }
    const Block at = block(begin);
    const float* const kept = at.master != nullptr ? at.master : static_cast<float*>(at.weights);
    alignas(64) float before[kBlock];
    if (moved != nullptr) std::copy_n(kept, size, before);
    body_(factors_, decay, scale_, at, size);
    if (moved != nullptr) add_moved(before, kept, size, moved);
  }

  /// In FP32 copies of what is BF16, which are then rounded.
  void update_in_copies(int64_t begin, int64_t size, float decay, double* moved) const {
    alignas(64) float copies[3][kBlock], before[kBlock];
    const Block given = block(begin);
    Block wide = given;
    if (given.master != nullptr) {
      wide.weights = given.master;
    } else if (bf16_weights()) {
      wide.weights = copies[0];
      widen(static_cast<const BFloat16*>(given.weights), copies[0], size);
    }
    wide.master = nullptr;
    if (p_.moment_dtype == DType::kBF16) {
      wide.exp_avg = copies[1];
      wide.exp_avg_sq = copies[2];
      widen(static_cast<const BFloat16*>(given.exp_avg), copies[1], size);
      widen(static_cast<const BFloat16*>(given.exp_avg_sq), copies[2], size);
    }
    const auto* const kept = static_cast<const float*>(wide.weights);
    if (moved != nullptr) std::copy_n(kept, size, before);
    wide_body_(factors_, decay, scale_, wide, size);
    const int64_t gradient_bytes = size * size_of(p_.gradient_dtype);
    prefetch_bytes(static_cast<const char*>(given.gradients) + gradient_bytes, gradient_bytes);
    if (moved != nullptr) add_moved(before, kept, size, moved);
    if (!random_moments_ && p_.moment_dtype == DType::kBF16) {
      round_nearest(copies[1], static_cast<BFloat16*>(given.exp_avg), size);
      round_nearest(copies[2], static_cast<BFloat16*>(given.exp_avg_sq), size);
    }
    if (random_moments_) {
      round_random(p_, Rounded::kExpAvg, begin, copies[1], static_cast<BFloat16*>(given.exp_avg),
                   size);
      round_random(p_, Rounded::kExpAvgSq, begin, copies[2],
                   static_cast<BFloat16*>(given.exp_avg_sq), size);
    }
    if (random_weights_) {
      round_random(p_, Rounded::kWeight, begin, copies[0], static_cast<BFloat16*>(given.weights),
                   size);
    } else if (given.master != nullptr) {
      round_nearest(given.master, static_cast<BFloat16*>(given.weights), size);
    } else if (bf16_weights()) {
      round_nearest(copies[0], static_cast<BFloat16*>(given.weights), size);
    }
  }

  void update_ema(int64_t begin, int64_t size) const {
    alignas(64) float mean[kBlock];
    dispatch_float("adamw", p_.ema_dtype, [&](auto* type) {
      using E = std::remove_pointer_t<decltype(type)>;
      E* const ema = static_cast<E*>(p_.ema) + begin;
      const Block now = block(begin);
      const float gain = factors_.ema_gain;
      if (now.master != nullptr || !bf16_weights()) {
        const void* weights = now.master != nullptr ? now.master : now.weights;
        ema_into(gain, static_cast<const float*>(weights), ema, mean, size);
      } else {
        ema_into(gain, static_cast<const BFloat16*>(now.weights), ema, mean, size);
      }
      if constexpr (std::is_same_v<E, float>) {
        std::copy_n(mean, size, ema);
      } else if (p_.stochastic_rounding) {
        round_random(p_, Rounded::kEma, begin, mean, ema, size);
      } else {
        round_nearest(mean, ema, size);
      }
    });
  }

  const AdamW& p_;
  AdamWFactors factors_;
  float scale_;
  Body body_, wide_body_;
  bool random_weights_, random_moments_;
};

}  // namespace

void adamw(const AdamW& params) {
  kernels::detail::check_adamw(params);
  AdamW p = params;
  if (p.corrections != nullptr) {
    p.correction1 = p.corrections[0];
    p.correction2 = p.corrections[1];
  }
  const Range range(p);
  const bool skip = p.skip != nullptr && *p.skip != 0;
  const int64_t gradient_size = size_of(p.gradient_dtype);
  parallel_rows(adamw_partials(p.size), 24 * kBlock, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      double moved[2] = {};
      const int64_t begin = block * kBlock, end = std::min(p.size, begin + kBlock);
      if (!skip) range.update(begin, end, p.partials != nullptr ? moved : nullptr);
      if (p.zero_gradients) {
        std::memset(static_cast<char*>(p.gradients) + begin * gradient_size, 0,
                    static_cast<size_t>((end - begin) * gradient_size));
      }
      if (p.partials != nullptr) std::copy_n(moved, 2, p.partials + 2 * block);
    }
  });
}

}  // namespace cpu
}  // namespace dsv3::kernels
