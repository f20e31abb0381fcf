#pragma once

// Vectors as wide as the machine's registers, and pairs of them: a pair holds as many elements of a
// row as a register holds of BF16, as two registers of FP32. Of BF16 `a` takes the even and `b` the
// odd ones (of a little-endian machine), so that shifts and masks take a register apart and join it
// again; widening and narrowing in order would cost shuffles, of which a processor does fewer at
// once. Whoever works on pairs must treat all of their elements alike.

#include <cstdint>
#include <type_traits>

#include "kernels/detail/cpu.h"

/// Defines the function `name` (with its type) of the parameters `(…)` for AVX-512, AVX2 and the
/// baseline, chosen when the program is loaded; in the body V is the Wide of its registers. As with
/// DSV3_CLONES all that it calls must be DSV3_INLINE.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__x86_64__)
#define DSV3_WIDE(name, parameters, ...) \
  name parameters {                      \
    using V = detail::Wide<16>;          \
    __VA_ARGS__;                         \
  }
#else
#if defined(__clang__)
// Note: clang takes versions for unused that are called through the choice between them.
#pragma clang diagnostic ignored "-Wunused-function"
#define DSV3_AVX512 "arch=skylake-avx512"
#define DSV3_AVX2 "arch=haswell"
#else
#define DSV3_AVX512 "arch=x86-64-v4"
#define DSV3_AVX2 "arch=x86-64-v3"
#endif
#define DSV3_WIDE(name, parameters, ...)                 \
  __attribute__((target(DSV3_AVX512))) name parameters { \
    using V = detail::Wide<64>;                          \
    __VA_ARGS__;                                         \
  }                                                      \
  __attribute__((target(DSV3_AVX2))) name parameters {   \
    using V = detail::Wide<32>;                          \
    __VA_ARGS__;                                         \
  }                                                      \
  __attribute__((target("default"))) name parameters {   \
    using V = detail::Wide<16>;                          \
    __VA_ARGS__;                                         \
  }
#endif

namespace dsv3::kernels::cpu::detail {

static_assert(std::endian::native == std::endian::little);

/// The vectors of a machine with registers of so many bytes.
template <int64_t kBytes>
struct Wide {
  using Floats [[gnu::vector_size(kBytes)]] = float;
  using Ints [[gnu::vector_size(kBytes)]] = uint32_t;
  using Signed [[gnu::vector_size(kBytes)]] = int32_t;
  using Longs [[gnu::vector_size(kBytes)]] = uint64_t;
  using Words [[gnu::vector_size(kBytes)]] = uint16_t;
  using Bytes [[gnu::vector_size(kBytes / 2)]] = uint8_t;
  using QuarterBytes [[gnu::vector_size(kBytes / 4)]] = uint8_t;
  static constexpr int64_t kLanes = kBytes / 4;
  static constexpr int64_t kPair = 2 * kLanes;
};

// Note: vectors go in and out by reference, because passing them by value would depend on the
// machine's ABI.

/// The products of the lower halves of 64-bit lanes.
template <typename V>
DSV3_INLINE void multiply_halves(const typename V::Longs& a, const typename V::Longs& b,
                                 typename V::Longs& out) {
#if defined(__SSE2__) && !defined(__clang__)
  // Note: by hand, because GCC multiplies all 64 bits, in three instructions.
  if constexpr (sizeof(a) == 16) {
    out = a;
    asm("pmuludq %1, %0" : "+x"(out) : "x"(b));
  } else {
    asm("vpmuludq %2, %1, %0" : "=v"(out) : "v"(a), "v"(b));
  }
#else
  out = (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

/// A vector of bytes from and to any address.
template <typename Vector>
DSV3_INLINE void read(const void* from, Vector& out) {
  std::memcpy(&out, from, sizeof(Vector));
}
template <typename Vector>
DSV3_INLINE void write(void* to, const Vector& x) {
  std::memcpy(to, &x, sizeof(Vector));
}

template <typename V>
struct Pair {
  typename V::Floats a, b;
};

/// Which of a pair's elements stands in lane i of a and b together.
template <typename V, typename T>
DSV3_INLINE constexpr int64_t place_in_pair(int64_t i) {
  if constexpr (std::is_same_v<T, float>) return i;
  return i < V::kLanes ? 2 * i : 2 * (i - V::kLanes) + 1;
}

/// How many elements of a pair exist: all, where the compiler should know it.
template <typename V>
using WholePair = std::integral_constant<int64_t, V::kPair>;

/// Calls fn(i, count) for pairs that begin at element i: count is a WholePair, or the int64_t that
/// is left at the end of a row.
template <typename V, typename Fn>
DSV3_INLINE void for_each_pair(int64_t size, const Fn& fn) {
  int64_t i = 0;
  for (; i + V::kPair <= size; i += V::kPair) fn(i, WholePair<V>{});
  if (i < size) fn(i, size - i);
}

/// BF16 numbers as FP32.
template <typename V>
DSV3_INLINE void split(const typename V::Words& words, Pair<V>& out) {
  const auto both = reinterpret_cast<typename V::Ints>(words);
  out.a = reinterpret_cast<typename V::Floats>(both << 16);
  out.b = reinterpret_cast<typename V::Floats>(both & 0xffff0000u);
}

/// Rounds to BF16, nearest even. A NaN must end in 16 zero bits, or it may become a number: so do
/// all that arithmetic makes of BF16 numbers (and see usual_nan).
template <typename V>
DSV3_INLINE void join(const Pair<V>& x, typename V::Words& words) {
  using Ints = typename V::Ints;
  const auto a = reinterpret_cast<Ints>(x.a), b = reinterpret_cast<Ints>(x.b);
  const Ints even = a + 0x7fffu + ((a >> 16) & 1u), odd = b + 0x7fffu + ((b >> 16) & 1u);
  const Ints both = (even >> 16) | (odd & 0xffff0000u);
  words = reinterpret_cast<typename V::Words>(both);
}

/// x, or the NaN that ends in zeros: for a number from outside that is multiplied in.
DSV3_INLINE float usual_nan(float x) {
  return x != x ? std::bit_cast<float>(0x7fc00000u) : x;
}

template <typename V>
DSV3_INLINE void load_pair(const float* x, WholePair<V>, Pair<V>& out) {
  read(x, out.a);
  read(x + V::kLanes, out.b);
}
template <typename V>
DSV3_INLINE void load_pair(const BFloat16* x, WholePair<V>, Pair<V>& out) {
  typename V::Words words;
  read(x, words);
  split<V>(words, out);
}
/// `count` elements, then zeros.
template <typename V, typename T>
DSV3_INLINE void load_pair(const T* x, int64_t count, Pair<V>& out) {
  Room<T, V::kPair> room;
  std::memset(static_cast<void*>(room.data()), 0, sizeof(room));
  std::memcpy(static_cast<void*>(room.data()), x, static_cast<size_t>(count) * sizeof(T));
  load_pair<V>(static_cast<const T*>(room.data()), WholePair<V>{}, out);
}

template <typename V>
DSV3_INLINE void store_pair(float* x, WholePair<V>, const Pair<V>& v) {
  write(x, v.a);
  write(x + V::kLanes, v.b);
}
template <typename V>
DSV3_INLINE void store_pair(BFloat16* x, WholePair<V>, const Pair<V>& v) {
  typename V::Words words;
  join<V>(v, words);
  write(x, words);
}
template <typename V, typename T>
DSV3_INLINE void store_pair(T* x, int64_t count, const Pair<V>& v) {
  Room<T, V::kPair> room;
  store_pair<V>(room.data(), WholePair<V>{}, v);
  std::memcpy(static_cast<void*>(x), room.data(), static_cast<size_t>(count) * sizeof(T));
}

template <typename V>
DSV3_INLINE float sum_of(const typename V::Floats& x) {
  if constexpr (sizeof(x) == 16) {
    return (x[0] + x[2]) + (x[1] + x[3]);
  } else {
    using Half = Wide<sizeof(x) / 2>;
    typename Half::Floats low, high;
    read(&x, low);
    read(reinterpret_cast<const char*>(&x) + sizeof(low), high);
    return sum_of<Half>(low + high);
  }
}

/// Sums pairs: four shares of every lane, joined after each 1024 elements, as exact as LibTorch's
/// own sums. The result depends on the length and the width of the registers only.
template <typename V>
class PairSum {
 public:
  /// Σ of the elements that term(i, count, out) leaves in `out`, zeros beyond `count`.
  template <typename Term>
  DSV3_INLINE static float of(int64_t size, const Term& term) {
    constexpr int64_t kPart = 1024;
    typename V::Floats total = {};
    for (int64_t first = 0; first < size; first += kPart) {
      const int64_t last = std::min(first + kPart, size);
      Pair<V> even = {}, odd = {};
      int64_t i = first;
      for (; i + 2 * V::kPair <= last; i += 2 * V::kPair) {
        add(term, i, WholePair<V>{}, even);
        add(term, i + V::kPair, WholePair<V>{}, odd);
      }
      if (i + V::kPair <= last) {
        add(term, i, WholePair<V>{}, even);
        i += V::kPair;
      }
      if (i < last) add(term, i, last - i, odd);
      total += (even.a + even.b) + (odd.a + odd.b);
    }
    return sum_of<V>(total);
  }

 private:
  template <typename Term, typename Count>
  DSV3_INLINE static void add(const Term& term, int64_t i, Count count, Pair<V>& sum) {
    Pair<V> v;
    term(i, count, v);
    sum.a += v.a;
    sum.b += v.b;
  }
};

}  // namespace dsv3::kernels::cpu::detail
