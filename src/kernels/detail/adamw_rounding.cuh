#pragma once

// How AdamW's numbers come from memory and go back, to nearest or rounded at random.

#include <type_traits>

#include "kernels/detail/adamw.h"
#include "kernels/detail/launch.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/detail/words.cuh"

namespace dsv3::kernels::cuda::detail {

using kernels::detail::PhiloxKey;
using kernels::detail::Rounded;

template <typename T, bool kStochastic>
inline constexpr bool kRandom = kStochastic&& std::is_same_v<T, __nv_bfloat16>;

/// Where a thread's two quads of elements stand in a range, and whether they exist. Lanes 2k and
/// 2k + 1 hold the halves of groups of eight, so that every access of a warp is contiguous; or,
/// kSplit = false, a thread holds one whole group, 16 bytes of BF16.
struct Quads {
  int64_t at[2];
  bool in[2];
};

template <bool kSplit, typename T>
__device__ __forceinline__ void load_quads(const T* x, const Quads& q, Words8<T>& y) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (q.in[k]) y.word[k] = *reinterpret_cast<const uint4*>(x + q.at[k]);
    }
  } else if constexpr (kSplit) {
    uint2 half[2] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (q.in[k]) half[k] = *reinterpret_cast<const uint2*>(x + q.at[k]);
    }
    y.word[0] = make_uint4(half[0].x, half[0].y, half[1].x, half[1].y);
  } else {
    y.word[0] = *reinterpret_cast<const uint4*>(x + q.at[0]);
  }
}

template <bool kSplit, typename T>
__device__ __forceinline__ void store_quads(T* x, const Quads& q, const Words8<T>& y) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (q.in[k]) *reinterpret_cast<uint4*>(x + q.at[k]) = y.word[k];
    }
  } else if constexpr (kSplit) {
    const uint4 v = y.word[0];
    if (q.in[0]) *reinterpret_cast<uint2*>(x + q.at[0]) = make_uint2(v.x, v.y);
    if (q.in[1]) *reinterpret_cast<uint2*>(x + q.at[1]) = make_uint2(v.z, v.w);
  } else {
    *reinterpret_cast<uint4*>(x + q.at[0]) = y.word[0];
  }
}

/// Random words of a thread's two quads, two each. With kSplit each of two neighbours draws for one
/// of their two groups and gives the other its half: every lane of the warp calls this.
template <bool kSplit>
__device__ __forceinline__ kernels::detail::Philox4 quad_words(const AdamW& p, const PhiloxKey& key,
                                                               const Quads& q, Rounded what) {
  const bool odd = kSplit && threadIdx.x % 2 != 0;
  const int64_t index = p.first_index + q.at[odd ? 1 : 0];
  const auto r = kernels::detail::rounding_words(p, key, index, what);
  if constexpr (!kSplit) return r;
  const uint32_t first = __shfl_xor_sync(kFullMask, odd ? r.word[0] : r.word[2], 1);
  const uint32_t second = __shfl_xor_sync(kFullMask, odd ? r.word[1] : r.word[3], 1);
  if (odd) return {{first, second, r.word[2], r.word[3]}};
  return {{r.word[0], r.word[1], first, second}};
}

/// round_at_random of two numbers that arithmetic left, in one word. Note: infinity's lower half is
/// zero, so that nothing carries out of it; arithmetic's NaN is 0x7fffffff, and its lower half is
/// cleared before.
__device__ __forceinline__ uint32_t round_pair(float low, float high, uint32_t random) {
  const int a = min(__float_as_int(low), 0x7fff0000), b = min(__float_as_int(high), 0x7fff0000);
  return __byte_perm(static_cast<uint32_t>(a) + (random & 0xffffu),
                     static_cast<uint32_t>(b) + (random >> 16), 0x7632);
}

/// What rounds a thread's eight numbers at random; nothing where they are rounded to nearest.
template <typename T, bool kStochastic>
struct Randomness {
  template <bool kSplit, typename Key>
  __device__ __forceinline__ void draw(const AdamW& p, const Key& key, const Quads& q,
                                       Rounded what) {
    if constexpr (kRandom<T, kStochastic>) words = quad_words<kSplit>(p, key, q, what);
  }
  kernels::detail::Philox4 words;
};

/// Stores eight new numbers, rounded to nearest or at random; `v` becomes what was stored.
template <bool kSplit, typename T, bool kStochastic>
__device__ __forceinline__ void store_rounded(T* x, float (&v)[kVector], const Quads& q,
                                              const Randomness<T, kStochastic>& randomness) {
  Words8<T> y;
  if constexpr (kRandom<T, kStochastic>) {
    const auto& random = randomness.words;
    y.word[0] =
        make_uint4(round_pair(v[0], v[1], random.word[0]), round_pair(v[2], v[3], random.word[1]),
                   round_pair(v[4], v[5], random.word[2]), round_pair(v[6], v[7], random.word[3]));
  } else {
    pack(v, y);
  }
  unpack(y, v);
  store_quads<kSplit>(x, q, y);
}

template <bool kStochastic, typename T, typename Key>
__device__ __forceinline__ void store1_rounded(const AdamW& p, const Key& key, T* x, float& v,
                                               int64_t i, Rounded what) {
  if constexpr (kRandom<T, kStochastic>) {
    const int64_t index = p.first_index + i;
    const auto random = kernels::detail::rounding_words(p, key, index, what);
    const uint32_t bits = kernels::detail::round_at_random(
        __float_as_uint(v), kernels::detail::rounding_bits(random, static_cast<int>(index % 8)));
    *x = __ushort_as_bfloat16(static_cast<unsigned short>(bits));
    v = __uint_as_float(bits << 16);
  } else {
    *x = from_float<T>(v);
    v = to_float(*x);
  }
}

}  // namespace dsv3::kernels::cuda::detail
