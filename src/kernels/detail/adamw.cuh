#pragma once

// AdamW of one or eight elements on the device, for flat ranges and for FP8 blocks.

#include <type_traits>

#include "kernels/detail/adamw.h"
#include "kernels/detail/ptx.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/detail/words.cuh"

namespace dsv3::kernels::cuda::detail {

using kernels::detail::AdamWFactors;
using kernels::detail::Rounded;

/// Root and division to about 2 ulp, one special-function instruction each: IEEE's would make the
/// pass wait for arithmetic instead of memory.
struct FastMath {
  __device__ static float root(float x) { return ptx::sqrt_approx(x); }
  __device__ static float quotient(float a, float b) { return a * ptx::reciprocal_approx(b); }
  __device__ static float sum(float a, float b, float c) { return fmaf(a, b, c); }
};

/// The factors of a step whose number only the device knows.
__device__ __forceinline__ void take_corrections(const AdamW& p, AdamWFactors& f) {
  if (p.corrections == nullptr) return;
  f.step_size = p.learning_rate / p.corrections[0];
  f.root_scale = 1.0f / sqrtf(p.corrections[1]);
}

template <typename T, bool kStochastic>
inline constexpr bool kRandom = kStochastic&& std::is_same_v<T, __nv_bfloat16>;

/// Stores eight new numbers of elements i …, rounded to nearest or at random; `v` becomes what was
/// stored.
template <bool kStochastic, typename T>
__device__ __forceinline__ void store8_rounded(const AdamW& p, T* x, float (&v)[kVector], int64_t i,
                                               Rounded what) {
  if constexpr (kRandom<T, kStochastic>) {
    const auto random = kernels::detail::rounding_words(p, p.first_index + i, what);
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t low =
          kernels::detail::round_at_random(__float_as_uint(v[2 * j]), random.word[j] & 0xffffu);
      const uint32_t high =
          kernels::detail::round_at_random(__float_as_uint(v[2 * j + 1]), random.word[j] >> 16);
      words[j] = low | high << 16;
      v[2 * j] = __uint_as_float(low << 16);
      v[2 * j + 1] = __uint_as_float(high << 16);
    }
    *reinterpret_cast<uint4*>(x) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    store8(x, v);
#pragma unroll
    for (int e = 0; e < kVector; ++e) v[e] = to_float(from_float<T>(v[e]));
  }
}

template <bool kStochastic, typename T>
__device__ __forceinline__ void store1_rounded(const AdamW& p, T* x, float& v, int64_t i,
                                               Rounded what) {
  if constexpr (kRandom<T, kStochastic>) {
    const int64_t index = p.first_index + i;
    const auto random = kernels::detail::rounding_words(p, index, what);
    const uint32_t bits = kernels::detail::round_at_random(
        __float_as_uint(v), kernels::detail::rounding_bits(random, static_cast<int>(index % 8)));
    *x = __ushort_as_bfloat16(static_cast<unsigned short>(bits));
    v = __uint_as_float(bits << 16);
  } else {
    *x = from_float<T>(v);
    v = to_float(*x);
  }
}

template <bool kStochastic, typename E>
__device__ __forceinline__ void ema8(const AdamW& p, const float (&w)[kVector], int64_t i) {
  E* const ema = static_cast<E*>(p.ema) + i;
  float mean[kVector];
  load8(ema, mean);
#pragma unroll
  for (int e = 0; e < kVector; ++e) mean[e] = fmaf(1.0f - p.ema_decay, w[e] - mean[e], mean[e]);
  store8_rounded<kStochastic>(p, ema, mean, i, Rounded::kEma);
}
template <bool kStochastic, typename E>
__device__ __forceinline__ void ema1(const AdamW& p, float w, int64_t i) {
  E* const ema = static_cast<E*>(p.ema) + i;
  float mean = to_float(*ema);
  mean = fmaf(1.0f - p.ema_decay, w - mean, mean);
  store1_rounded<kStochastic>(p, ema, mean, i, Rounded::kEma);
}

/// How far a thread's weights moved: Σ (w after - w before)², before rounding, and Σ (w before)².
/// FP32 within eight elements, FP64 beyond.
struct Moved {
  double update = 0.0, weight = 0.0;
};

/// The types of a range: weights, gradients, moments, whether there is a master, whether what is
/// BF16 is rounded at random.
template <typename W, typename G, typename M, bool kHasMaster, bool kRoundsAtRandom>
struct AdamWTypes {
  using Weight = W;
  using Gradient = G;
  using Moment = M;
  using Kept = std::conditional_t<kHasMaster, float, W>;  // what the update starts from
  static constexpr bool kMaster = kHasMaster, kStochastic = kRoundsAtRandom;
};

/// Where the weight that the update starts from stands.
template <typename Types>
__device__ __forceinline__ typename Types::Kept* kept_weights(const AdamW& p) {
  if constexpr (Types::kMaster) return p.master;
  return static_cast<typename Types::Kept*>(p.weights);
}

/// Elements i … i + 7, 16-byte aligned; `w` becomes the new weights as they are kept. All four
/// loads are asked for before the first is used. `moved` may be null.
template <typename Types>
__device__ __forceinline__ void update8(const AdamW& p, const AdamWFactors& f, float gradient_scale,
                                        int64_t i, float (&w)[kVector], Moved* moved = nullptr) {
  using M = typename Types::Moment;
  auto* const kept = kept_weights<Types>(p) + i;
  M* const exp_avg = static_cast<M*>(p.exp_avg) + i;
  M* const exp_avg_sq = static_cast<M*>(p.exp_avg_sq) + i;
  Words8<typename Types::Gradient> g_words;
  Words8<typename Types::Kept> w_words;
  Words8<M> m_words, v_words;
  g_words.load(static_cast<const typename Types::Gradient*>(p.gradients) + i);
  m_words.load(exp_avg);
  v_words.load(exp_avg_sq);
  w_words.load(kept);
  float g[kVector], m[kVector], v[kVector];
  unpack(g_words, g);
  unpack(m_words, m);
  unpack(v_words, v);
  unpack(w_words, w);
  const int64_t decayed = p.decay_end - i;
  float update = 0.0f, weight = 0.0f;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    const float before = w[e];
    kernels::detail::adamw_element<FastMath>(f, e < decayed ? f.decay : 0.0f,
                                             __fmul_rn(g[e], gradient_scale), w[e], m[e], v[e]);
    update = fmaf(w[e] - before, w[e] - before, update);
    weight = fmaf(before, before, weight);
  }
  if (moved != nullptr) {
    moved->update += update;
    moved->weight += weight;
  }
  store8_rounded<Types::kStochastic>(p, exp_avg, m, i, Rounded::kExpAvg);
  store8_rounded<Types::kStochastic>(p, exp_avg_sq, v, i, Rounded::kExpAvgSq);
  store8_rounded<Types::kStochastic>(p, kept, w, i, Rounded::kWeight);
  if constexpr (Types::kMaster) {
    if (p.weights != nullptr) store8(static_cast<typename Types::Weight*>(p.weights) + i, w);
  }
  if (p.ema == nullptr) return;
  if (p.ema_dtype == DType::kBF16) {
    ema8<Types::kStochastic, __nv_bfloat16>(p, w, i);
  } else {
    ema8<Types::kStochastic, float>(p, w, i);
  }
}

/// Element i alone; returns the new weight as it is kept. `moved` may be null.
template <typename Types>
__device__ float update1(const AdamW& p, const AdamWFactors& f, float gradient_scale, int64_t i,
                         Moved* moved = nullptr) {
  using M = typename Types::Moment;
  auto* const kept = kept_weights<Types>(p) + i;
  M* const exp_avg = static_cast<M*>(p.exp_avg) + i;
  M* const exp_avg_sq = static_cast<M*>(p.exp_avg_sq) + i;
  float w = to_float(*kept), m = to_float(*exp_avg), v = to_float(*exp_avg_sq);
  const float g = __fmul_rn(to_float(static_cast<const typename Types::Gradient*>(p.gradients)[i]),
                            gradient_scale);
  const float before = w;
  kernels::detail::adamw_element<FastMath>(f, i < p.decay_end ? f.decay : 0.0f, g, w, m, v);
  if (moved != nullptr) {
    moved->update += (w - before) * (w - before);
    moved->weight += before * before;
  }
  store1_rounded<Types::kStochastic>(p, exp_avg, m, i, Rounded::kExpAvg);
  store1_rounded<Types::kStochastic>(p, exp_avg_sq, v, i, Rounded::kExpAvgSq);
  store1_rounded<Types::kStochastic>(p, kept, w, i, Rounded::kWeight);
  if constexpr (Types::kMaster) {
    using W = typename Types::Weight;
    if (p.weights != nullptr) static_cast<W*>(p.weights)[i] = from_float<W>(w);
  }
  if (p.ema == nullptr) return w;
  if (p.ema_dtype == DType::kBF16) {
    ema1<Types::kStochastic, __nv_bfloat16>(p, w, i);
  } else {
    ema1<Types::kStochastic, float>(p, w, i);
  }
  return w;
}

/// Calls launch(AdamWTypes of the range); check_adamw has run.
template <typename Launch>
void dispatch_adamw(const AdamW& p, const Launch& launch) {
  dispatch_float("adamw", p.gradient_dtype, [&](auto* gradient) {
    using G = std::remove_pointer_t<decltype(gradient)>;
    dispatch_float("adamw", p.moment_dtype, [&](auto* moment) {
      using M = std::remove_pointer_t<decltype(moment)>;
      const auto rounded = [&](auto stochastic) {
        constexpr bool kStochastic = decltype(stochastic)::value;
        if (p.weight_dtype == DType::kF32) {
          launch(AdamWTypes<float, G, M, false, kStochastic>());
        } else if (p.weight_dtype != DType::kBF16) {
          kernels::detail::raise_dtype("adamw", p.weight_dtype);
        } else if (p.master != nullptr) {
          launch(AdamWTypes<__nv_bfloat16, G, M, true, kStochastic>());
        } else {
          launch(AdamWTypes<__nv_bfloat16, G, M, false, kStochastic>());
        }
      };
      if (p.stochastic_rounding) {
        rounded(std::true_type());
      } else {
        rounded(std::false_type());
      }
    });
  });
}

/// Whether eight elements at a time can be loaded and rounded: every pointer and the range's place.
inline bool adamw_aligned(const AdamW& p) {
  return aligned16(p.weights) && aligned16(p.master) && aligned16(p.gradients) &&
         aligned16(p.exp_avg) && aligned16(p.exp_avg_sq) && aligned16(p.ema) &&
         (!p.stochastic_rounding || p.first_index % kVector == 0);
}

}  // namespace dsv3::kernels::cuda::detail
