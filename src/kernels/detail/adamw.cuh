#pragma once

// AdamW of one or eight elements on the device, for flat ranges and for FP8 blocks.

#include <type_traits>

#include "kernels/detail/adamw.h"
#include "kernels/detail/ptx.cuh"
#include "kernels/detail/vector.cuh"

namespace dsv3::kernels::cuda::detail {

using kernels::detail::AdamWFactors;
using kernels::detail::Rounded;

/// Root and division to about 2 ulp, one special-function instruction each: IEEE's would make the
/// pass wait for arithmetic instead of memory.
struct FastMath {
  __device__ static float root(float x) { return ptx::sqrt_approx(x); }
  __device__ static float quotient(float a, float b) { return a * ptx::reciprocal_approx(b); }
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
  for (int e = 0; e < kVector; ++e) mean[e] += (1.0f - p.ema_decay) * (w[e] - mean[e]);
  store8_rounded<kStochastic>(p, ema, mean, i, Rounded::kEma);
}
template <bool kStochastic, typename E>
__device__ __forceinline__ void ema1(const AdamW& p, float w, int64_t i) {
  E* const ema = static_cast<E*>(p.ema) + i;
  float mean = to_float(*ema);
  mean += (1.0f - p.ema_decay) * (w - mean);
  store1_rounded<kStochastic>(p, ema, mean, i, Rounded::kEma);
}

/// How far a thread's weights moved: Σ (w after - w before)², before rounding, and Σ (w before)².
/// FP32 within eight elements, FP64 beyond.
struct Moved {
  double update = 0.0, weight = 0.0;
};

/// Elements i … i + 7, 16-byte aligned; `w` becomes the new weights as they are kept. `moved` may
/// be null.
template <typename W, typename G, typename M, bool kStochastic>
__device__ __forceinline__ void update8(const AdamW& p, const AdamWFactors& f, float gradient_scale,
                                        int64_t i, float (&w)[kVector], Moved* moved = nullptr) {
  W* const weights = static_cast<W*>(p.weights) + i;
  M* const exp_avg = static_cast<M*>(p.exp_avg) + i;
  M* const exp_avg_sq = static_cast<M*>(p.exp_avg_sq) + i;
  float g[kVector], m[kVector], v[kVector];
  load8(static_cast<const G*>(p.gradients) + i, g);
  load8(exp_avg, m);
  load8(exp_avg_sq, v);
  if (p.master != nullptr) {
    load8(p.master + i, w);
  } else {
    load8(weights, w);
  }
  const int64_t decayed = p.decay_end - i;
  float update = 0.0f, weight = 0.0f;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    const float before = w[e];
    kernels::detail::adamw_element<FastMath>(f, e < decayed ? f.decay : 0.0f, g[e] * gradient_scale,
                                             w[e], m[e], v[e]);
    update = fmaf(w[e] - before, w[e] - before, update);
    weight = fmaf(before, before, weight);
  }
  if (moved != nullptr) {
    moved->update += update;
    moved->weight += weight;
  }
  store8_rounded<kStochastic>(p, exp_avg, m, i, Rounded::kExpAvg);
  store8_rounded<kStochastic>(p, exp_avg_sq, v, i, Rounded::kExpAvgSq);
  if (p.master == nullptr) {
    store8_rounded<kStochastic>(p, weights, w, i, Rounded::kWeight);
  } else {
    store8(p.master + i, w);
    if (p.weights != nullptr) store8(weights, w);
  }
  if (p.ema == nullptr) return;
  if (p.ema_dtype == DType::kBF16) {
    ema8<kStochastic, __nv_bfloat16>(p, w, i);
  } else {
    ema8<kStochastic, float>(p, w, i);
  }
}

/// Element i alone; returns the new weight as it is kept. `moved` may be null.
template <typename W, typename G, typename M, bool kStochastic>
__device__ float update1(const AdamW& p, const AdamWFactors& f, float gradient_scale, int64_t i,
                         Moved* moved = nullptr) {
  W* const weight = static_cast<W*>(p.weights) + i;
  M* const exp_avg = static_cast<M*>(p.exp_avg) + i;
  M* const exp_avg_sq = static_cast<M*>(p.exp_avg_sq) + i;
  float w = p.master != nullptr ? p.master[i] : to_float(*weight);
  float m = to_float(*exp_avg), v = to_float(*exp_avg_sq);
  const float g = to_float(static_cast<const G*>(p.gradients)[i]) * gradient_scale;
  const float before = w;
  kernels::detail::adamw_element<FastMath>(f, i < p.decay_end ? f.decay : 0.0f, g, w, m, v);
  if (moved != nullptr) {
    moved->update += (w - before) * (w - before);
    moved->weight += before * before;
  }
  store1_rounded<kStochastic>(p, exp_avg, m, i, Rounded::kExpAvg);
  store1_rounded<kStochastic>(p, exp_avg_sq, v, i, Rounded::kExpAvgSq);
  if (p.master == nullptr) {
    store1_rounded<kStochastic>(p, weight, w, i, Rounded::kWeight);
  } else {
    p.master[i] = w;
    if (p.weights != nullptr) *weight = from_float<W>(w);
  }
  if (p.ema == nullptr) return w;
  if (p.ema_dtype == DType::kBF16) {
    ema1<kStochastic, __nv_bfloat16>(p, w, i);
  } else {
    ema1<kStochastic, float>(p, w, i);
  }
  return w;
}

/// Calls launch(weight type, gradient type, moment type, stochastic as a constant).
template <typename Launch>
void dispatch_adamw(const AdamW& p, const Launch& launch) {
  dispatch_float("adamw", p.weight_dtype, [&](auto* weight) {
    dispatch_float("adamw", p.gradient_dtype, [&](auto* gradient) {
      dispatch_float("adamw", p.moment_dtype, [&](auto* moment) {
        if (p.stochastic_rounding) {
          launch(weight, gradient, moment, std::true_type());
        } else {
          launch(weight, gradient, moment, std::false_type());
        }
      });
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
