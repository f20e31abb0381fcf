#pragma once

// Logits in words of 16 bytes (or one at a time where a row's length or address forbids it), held
// in registers and looked at twice: once for the largest, once for the sum of exponentials.

#include "kernels/detail/softmax.cuh"
#include "kernels/detail/vector.cuh"

namespace dsv3::kernels::cuda::detail {

/// Logits of type T in a word: uint4, or T itself.
template <typename T, typename Word>
inline constexpr int kPerWord = static_cast<int>(sizeof(Word) / sizeof(T));

template <typename T>
__device__ __forceinline__ void unpack(T word, float (&v)[1]) {
  v[0] = to_float(word);
}
template <typename T>
__device__ __forceinline__ void unpack(uint4 word, float (&v)[kPerWord<T, uint4>]) {
  const uint32_t parts[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      v[2 * i] = __uint_as_float(parts[i] << 16);
      v[2 * i + 1] = __uint_as_float(parts[i] & 0xffff0000u);
    } else {
      v[i] = __uint_as_float(parts[i]);
    }
  }
}

template <typename T>
__device__ __forceinline__ void pack(const float (&v)[1], T& word) {
  word = from_float<T>(v[0]);
}
template <typename T>
__device__ __forceinline__ void pack(const float (&v)[kPerWord<T, uint4>], uint4& word) {
  uint32_t parts[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
      parts[i] = *reinterpret_cast<const uint32_t*>(&pair);
    } else {
      parts[i] = __float_as_uint(v[i]);
    }
  }
  word = make_uint4(parts[0], parts[1], parts[2], parts[3]);
}

/// NaN where all are, and only there.
template <typename T>
__device__ __forceinline__ float largest_of(T word) {
  return to_float(word);
}
template <typename T>
__device__ __forceinline__ float largest_of(uint4 word) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t m =
        ptx::max_bf16x2(ptx::max_bf16x2(word.x, word.y), ptx::max_bf16x2(word.z, word.w));
    return fmaxf(__uint_as_float(m << 16), __uint_as_float(m & 0xffff0000u));
  } else {
    return fmaxf(fmaxf(__uint_as_float(word.x), __uint_as_float(word.y)),
                 fmaxf(__uint_as_float(word.z), __uint_as_float(word.w)));
  }
}

/// Floats in the order of integers, and back: the warp's largest in one instruction. -0 must have
/// been made +0.
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float warp_largest(float x) {
  const int most = __reduce_max_sync(kFullMask, ordered(x));
  return __int_as_float(most ^ ((most >> 31) & 0x7fffffff));
}

/// Joins the softmaxes of the warp's lanes; every lane gets the result.
__device__ __forceinline__ Softmax join_lanes(const Softmax& mine) {
  Softmax s;
  s.largest = warp_largest(mine.largest + 0.0f);
  s.argmax = __reduce_min_sync(kFullMask, mine.largest == s.largest ? mine.argmax : ~0u);
  s.sum = warp_sum(mine.sum_under(s.largest));
  return s;
}

/// Words of a block's chunk in registers, kWords a thread: the thread's word r is the chunk's word
/// kThreads · r + threadIdx.x. `count` words of the chunk exist.
template <typename T, typename Word, int kThreads, int kWords>
struct LogitChunk {
  static constexpr int kSize = kThreads * kWords;  // words
  static constexpr int kPer = kPerWord<T, Word>;
  Word word[kWords];
  int count;

  __device__ static int index(int r) { return r * kThreads + static_cast<int>(threadIdx.x); }

  /// All loads are on their way before the first is waited for.
  __device__ __forceinline__ void load(const Word* from, int64_t available) {
    count = static_cast<int>(min(available, int64_t{kSize}));
#pragma unroll
    for (int r = 0; r < kWords; ++r) {
      if (index(r) < count) word[r] = from[index(r)];
    }
  }

  /// The softmax of the warp's words, the same in every lane; `begin` is the chunk's first id.
  __device__ __forceinline__ Softmax scan(unsigned begin) const {
    float largest[kWords], top = -INFINITY;
#pragma unroll
    for (int r = 0; r < kWords; ++r) {
      largest[r] = index(r) < count ? largest_of<T>(word[r]) : -INFINITY;
      top = fmaxf(top, largest[r]);
    }
    top += 0.0f;  // -0 to +0
    Softmax s;
    s.largest = warp_largest(top);
    unsigned id = ~0u;
    if (top == s.largest) id = first_of(largest, top, begin);
    __syncwarp();
    s.argmax = __reduce_min_sync(kFullMask, id);
    const float power = reference_power(s.largest);
    float sum[4] = {};
#pragma unroll
    for (int r = 0; r < kWords; ++r) {
      if (index(r) >= count) continue;
      float v[kPer];
      unpack<T>(word[r], v);
#pragma unroll
      for (int e = 0; e < kPer; ++e) sum[e % 4] += scaled_exp(v[e], power);
    }
    s.sum = warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    return s;
  }

 private:
  /// The lowest id of this thread's words whose logit is `top`; `largest` of each word.
  __device__ __forceinline__ unsigned first_of(const float (&largest)[kWords], float top,
                                               unsigned begin) const {
    int found = -1;
    Word best = word[0];
#pragma unroll
    for (int r = kWords - 1; r >= 0; --r) {
      if (index(r) < count && largest[r] == top) {
        found = r;
        best = word[r];
      }
    }
    if (found < 0) return ~0u;
    float v[kPer];
    unpack<T>(best, v);
    int first = kPer - 1;
#pragma unroll
    for (int e = kPer - 2; e >= 0; --e) first = v[e] == top ? e : first;
    return begin + static_cast<unsigned>(index(found) * kPer + first);
  }
};

}  // namespace dsv3::kernels::cuda::detail
