#pragma once

// AdamW of one or eight elements on the device, for flat ranges and for FP8 blocks.

#include <type_traits>

#include "kernels/detail/adamw_rounding.cuh"
#include "kernels/detail/ptx.cuh"

namespace dsv3::kernels::cuda::detail {

using kernels::detail::AdamWFactors;

/// Where nothing is rounded at random.
struct NoKey {};

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

template <bool kStochastic, typename E, typename Key>
__device__ __forceinline__ void ema1(const AdamW& p, const Key& key, float gain, float w,
                                     int64_t i) {
  E* const ema = static_cast<E*>(p.ema) + i;
  float mean = to_float(*ema);
  mean = fmaf(gain, w - mean, mean);
  store1_rounded<kStochastic>(p, key, ema, mean, i, Rounded::kEma);
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
  using Key = std::conditional_t<kRoundsAtRandom, PhiloxKey, NoKey>;
  static constexpr bool kMaster = kHasMaster, kStochastic = kRoundsAtRandom;
  // How a warp shares out what it reads (Quads): where FP32 stands among it, 16 bytes are 4
  // numbers.
  static constexpr bool kSplit = sizeof(G) + sizeof(M) + sizeof(Kept) > 6;
};

/// Their random rounding's key, if they have one.
template <typename Types>
typename Types::Key rounding_key(const AdamW& p) {
  if constexpr (Types::kStochastic) return kernels::detail::philox_key(p.seed);
  return {};
}

/// Where the weight that the update starts from stands.
template <typename Types>
__device__ __forceinline__ typename Types::Kept* kept_weights(const AdamW& p) {
  if constexpr (Types::kMaster) return p.master;
  return static_cast<typename Types::Kept*>(p.weights);
}

/// What a thread reads of its two quads.
template <typename Types>
struct Loaded {
  Words8<typename Types::Gradient> g;
  Words8<typename Types::Kept> w;
  Words8<typename Types::Moment> m, v;
  Words8<float> ema;  // or BF16 in the first word
};

/// Asks for all of it before the first is used.
template <typename Types, bool kSplit>
__device__ __forceinline__ void load_quads(const AdamW& p, const Quads& q, Loaded<Types>& x) {
  using M = typename Types::Moment;
  load_quads<kSplit>(static_cast<const typename Types::Gradient*>(p.gradients), q, x.g);
  load_quads<kSplit>(static_cast<const M*>(p.exp_avg), q, x.m);
  load_quads<kSplit>(static_cast<const M*>(p.exp_avg_sq), q, x.v);
  load_quads<kSplit>(kept_weights<Types>(p), q, x.w);
  if (p.ema == nullptr) return;
  if (p.ema_dtype == DType::kBF16) {
    Words8<__nv_bfloat16> half;
    load_quads<kSplit>(static_cast<const __nv_bfloat16*>(p.ema), q, half);
    x.ema.word[0] = half.word[0];
  } else {
    load_quads<kSplit>(static_cast<const float*>(p.ema), q, x.ema);
  }
}

template <bool kSplit, typename E, bool kStochastic>
__device__ __forceinline__ void update_ema(const AdamW& p, float gain, const float (&w)[kVector],
                                           const Words8<E>& words, const Quads& q,
                                           const Randomness<E, kStochastic>& random) {
  float mean[kVector];
  unpack(words, mean);
#pragma unroll
  for (int e = 0; e < kVector; ++e) mean[e] = fmaf(gain, w[e] - mean[e], mean[e]);
  store_rounded<kSplit>(static_cast<E*>(p.ema), mean, q, random);
}

/// Updates what load_quads read; `w` becomes the new weights as they are kept. `moved` may be null.
template <typename Types, bool kSplit>
__device__ __forceinline__ void update_quads(const AdamW& p, const AdamWFactors& f,
                                             const typename Types::Key& key, float gradient_scale,
                                             const Quads& q, const Loaded<Types>& x,
                                             float (&w)[kVector], Moved* moved = nullptr) {
  using M = typename Types::Moment;
  using Kept = typename Types::Kept;
  constexpr bool kStochastic = Types::kStochastic;
  // Drawn while what was asked for is on its way.
  Randomness<M, kStochastic> random_m, random_v;
  Randomness<Kept, kStochastic> random_w;
  Randomness<__nv_bfloat16, kStochastic> random_ema;
  random_m.template draw<kSplit>(p, key, q, Rounded::kExpAvg);
  random_v.template draw<kSplit>(p, key, q, Rounded::kExpAvgSq);
  random_w.template draw<kSplit>(p, key, q, Rounded::kWeight);
  const bool has_bf16_ema = p.ema != nullptr && p.ema_dtype == DType::kBF16;
  if (has_bf16_ema) random_ema.template draw<kSplit>(p, key, q, Rounded::kEma);
  float g[kVector], m[kVector], v[kVector];
  unpack(x.g, g);
  unpack(x.m, m);
  unpack(x.v, v);
  unpack(x.w, w);
  float update = 0.0f, weight = 0.0f;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    const float before = w[e], decay = q.at[e / 4] + e % 4 < p.decay_end ? f.decay : 0.0f;
    kernels::detail::adamw_element<FastMath>(f, decay, __fmul_rn(g[e], gradient_scale), w[e], m[e],
                                             v[e]);
    update = fmaf(w[e] - before, w[e] - before, update);
    weight = fmaf(before, before, weight);
  }
  if (moved != nullptr) {
    moved->update += update;
    moved->weight += weight;
  }
  store_rounded<kSplit>(static_cast<M*>(p.exp_avg), m, q, random_m);
  store_rounded<kSplit>(static_cast<M*>(p.exp_avg_sq), v, q, random_v);
  store_rounded<kSplit>(kept_weights<Types>(p), w, q, random_w);
  if constexpr (Types::kMaster) {
    using W = typename Types::Weight;
    Words8<W> rounded;
    pack(w, rounded);
    if (p.weights != nullptr) store_quads<kSplit>(static_cast<W*>(p.weights), q, rounded);
  }
  if (has_bf16_ema) {
    const Words8<__nv_bfloat16> ema{{x.ema.word[0]}};
    update_ema<kSplit>(p, f.ema_gain, w, ema, q, random_ema);
  } else if (p.ema != nullptr) {
    update_ema<kSplit>(p, f.ema_gain, w, x.ema, q, Randomness<float, kStochastic>());
  }
}

/// Element i alone; returns the new weight as it is kept. `moved` may be null.
template <typename Types>
__device__ float update1(const AdamW& p, const AdamWFactors& f, const typename Types::Key& key,
                         float gradient_scale, int64_t i, Moved* moved = nullptr) {
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
  store1_rounded<Types::kStochastic>(p, key, exp_avg, m, i, Rounded::kExpAvg);
  store1_rounded<Types::kStochastic>(p, key, exp_avg_sq, v, i, Rounded::kExpAvgSq);
  store1_rounded<Types::kStochastic>(p, key, kept, w, i, Rounded::kWeight);
  if constexpr (Types::kMaster) {
    using W = typename Types::Weight;
    if (p.weights != nullptr) static_cast<W*>(p.weights)[i] = from_float<W>(w);
  }
  if (p.ema == nullptr) return w;
  if (p.ema_dtype == DType::kBF16) {
    ema1<Types::kStochastic, __nv_bfloat16>(p, key, f.ema_gain, w, i);
  } else {
    ema1<Types::kStochastic, float>(p, key, f.ema_gain, w, i);
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
