#pragma once

// E4M3 of tiles of finite numbers, a register at a time: magnitudes are compared as integers, codes
// are made of pairs (kernels/detail/wide.h), bytes are transposed. Note: for sources that are
// compiled with -ffp-contract=off (kernels/detail/e4m3.h).

#include <cstdint>

#include "kernels/detail/wide.h"
#include "kernels/quantize.h"

namespace dsv3::kernels::cpu::detail {

/// The largest magnitudes, lane by lane, of registers of numbers.
template <typename V, typename T>
struct Tops;
template <typename V>
struct Tops<V, BFloat16> {
  typename V::Words top = {};

  /// Of kPair numbers.
  DSV3_INLINE void raise(const BFloat16* x) {
    typename V::Words magnitude;
    read(x, magnitude);
    magnitude &= uint16_t{0x7fff};
    top = magnitude > top ? magnitude : top;
  }
  DSV3_INLINE void get(Pair<V>& out) const { split<V>(top, out); }
};
template <typename V>
struct Tops<V, float> {
  typename V::Ints a = {}, b = {};

  DSV3_INLINE void raise(const float* x) {
    raise(x, a);
    raise(x + V::kLanes, b);
  }
  DSV3_INLINE void get(Pair<V>& out) const {
    out.a = reinterpret_cast<typename V::Floats>(a);
    out.b = reinterpret_cast<typename V::Floats>(b);
  }

 private:
  DSV3_INLINE static void raise(const float* x, typename V::Ints& top) {
    typename V::Ints magnitude;
    read(x, magnitude);
    magnitude &= 0x7fffffffu;
    top = magnitude > top ? magnitude : top;
  }
};

/// e4m3_scaled_code (kernels/detail/e4m3.h) of positive numbers in bits 0 … 6; the others mean
/// nothing. What is added to a number's exponent field e is that of a power of two 2^20 times as
/// large; the sum's own exponent then completes the code: 24 + 8 · (e + 20) = 56 + 8 · e modulo
/// 128.
template <typename V>
DSV3_INLINE void magnitude_codes(const typename V::Floats& scaled, typename V::Ints& codes) {
  using Ints = typename V::Ints;
  const Ints exponent = reinterpret_cast<Ints>(scaled) & 0x7f800000u;
  const Ints least = Ints{} + (121u << 23);
  const Ints step = (exponent > least ? exponent : least) + ((20u << 23) + 24u);
  const auto bits = reinterpret_cast<Ints>(scaled + reinterpret_cast<typename V::Floats>(step));
  codes = bits + (bits >> 20);
}

/// The codes of kPair finite numbers times `inverse`.
template <typename V>
DSV3_INLINE void encode_pair(const BFloat16* x, const Pair<V>& inverse, uint8_t* codes) {
  using Ints = typename V::Ints;
  using Words = typename V::Words;
  Words words;
  read(x, words);
  Pair<V> v;
  split<V>(words & uint16_t{0x7fff}, v);
  Ints a, b;
  magnitude_codes<V>(v.a * inverse.a, a);
  magnitude_codes<V>(v.b * inverse.b, b);
  const Ints both = (a & 0xffffu) | (b << 16);
  const Words sign = words >> 8;  // in bit 7, the number's exponent below it
  const Words code = sign ^ ((sign ^ reinterpret_cast<Words>(both)) & uint16_t{0x7f});
  write(codes, __builtin_convertvector(code, typename V::Bytes));
}
template <typename V>
DSV3_INLINE void encode_pair(const float* x, const Pair<V>& inverse, uint8_t* codes) {
  using Ints = typename V::Ints;
  using Floats = typename V::Floats;
  using Quarter = typename V::QuarterBytes;
  const auto half = [&](const float* from, const Floats& factor, uint8_t* to)
      __attribute__((always_inline)) {
    Ints bits;
    read(from, bits);
    const Ints magnitude = bits & 0x7fffffffu, sign = bits >> 24;
    Ints code;
    magnitude_codes<V>(reinterpret_cast<Floats>(magnitude) * factor, code);
    code = sign ^ ((sign ^ code) & 0x7fu);
    write(to, __builtin_convertvector(code, Quarter));
  };
  half(x, inverse.a, codes);
  half(x + V::kLanes, inverse.b, codes + V::kLanes);
}

using Ints4 [[gnu::vector_size(16)]] = uint32_t;
/// Rows whose scales are divided side by side, which hides how long a division takes.
inline constexpr int64_t kAtOnce = 4;

/// The largest of each fourth lane.
template <typename V>
DSV3_INLINE void fold(const Pair<V>& tops, Ints4& out) {
  const auto a = reinterpret_cast<typename V::Ints>(tops.a);
  const auto b = reinterpret_cast<typename V::Ints>(tops.b);
  const typename V::Ints both = a > b ? a : b;
  Ints4 part[V::kLanes / 4];
  std::memcpy(part, &both, sizeof(both));
  for (int64_t half = V::kLanes / 8; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
    }
  }
  out = part[0];
}
DSV3_INLINE void larger(const Ints4& a, const Ints4& b, Ints4& out) {
  out = a > b ? a : b;
}
/// Lane i: the largest lane of tops[i].
DSV3_INLINE void fold(const Ints4 (&tops)[kAtOnce], Ints4& out) {
  Ints4 pair[2];
  for (int64_t i = 0; i < 2; ++i) {
    const Ints4 &a = tops[2 * i], &b = tops[2 * i + 1];
    larger(__builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(a, b, 2, 6, 3, 7),
           pair[i]);
  }
  larger(__builtin_shufflevector(pair[0], pair[1], 0, 1, 4, 5),
         __builtin_shufflevector(pair[0], pair[1], 2, 3, 6, 7), out);
}

inline constexpr int64_t kSide = 16;
/// Blocks that are transposed side by side.
inline constexpr int64_t kBlocks = 2;
using StripBytes [[gnu::vector_size(kBlocks * kSide)]] = uint8_t;

/// Two 16×16 blocks of bytes, side by side in `from`, transposed one below the other: four times,
/// every row is interleaved with the one 8 further on.
DSV3_INLINE void transpose_bytes(const uint8_t (*from)[kBlocks * kSide], uint8_t* to,
                                 int64_t stride) {
  StripBytes rows[kSide], next[kSide];
  for (int64_t i = 0; i < kSide; ++i) std::memcpy(&rows[i], from[i], sizeof(StripBytes));
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kSide / 2; ++i) {
      const StripBytes a = rows[i], b = rows[i + kSide / 2];
      next[2 * i] =
          __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 16,
                                  48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45,
                                                14, 46, 15, 47, 24, 56, 25, 57, 26, 58, 27, 59, 28,
                                                60, 29, 61, 30, 62, 31, 63);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kSide; ++i) rows[i] = next[i];
  }
  for (int64_t i = 0; i < kSide; ++i) {
    std::memcpy(to + i * stride, &rows[i], kSide);
    std::memcpy(to + (i + kSide) * stride, reinterpret_cast<const uint8_t*>(&rows[i]) + kSide,
                kSide);
  }
}

}  // namespace dsv3::kernels::cpu::detail
