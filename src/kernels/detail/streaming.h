#pragma once

// Results that are larger than the caches go past them: an ordinary store first reads the line that
// it fills, which costs a third of the traffic of a kernel that reads one tensor and writes one.

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "kernels/detail/cpu.h"
#include "kernels/detail/wide.h"

namespace dsv3::kernels::cpu::detail {

/// Tensors from this size on are written past the caches.
inline constexpr int64_t kStreamedBytes = 16 * 1024 * 1024;

/// Elements of a row that are made in the first cache level before they leave; a multiple of 128.
inline constexpr int64_t kStaged = 512;

/// A register to an address that is a multiple of its size, past the caches. Note: the widest
/// registers are whole lines; smaller pieces cost a quarter of the memory's speed where lines are
/// far apart.
template <typename V>
DSV3_INLINE void stream_register(void* to, const void* from) {
  using Vector = typename V::Ints;
  Vector value;
  read(from, value);
#if defined(__clang__)
  __builtin_nontemporal_store(value, static_cast<Vector*>(to));
#elif defined(__SSE2__)
  // Note: by hand, because GCC has no such store for vectors of its own.
  auto& bytes = *static_cast<char(*)[sizeof(Vector)]>(to);
  if constexpr (sizeof(Vector) == 16) {
    asm volatile("movntdq %1, %0" : "=m"(bytes) : "x"(value));
  } else {
    asm volatile("vmovntdq %1, %0" : "=m"(bytes) : "v"(value));
  }
#else
  write(to, value);
#endif
}

/// Copies past the caches. stream_fence() must follow before another thread reads.
template <typename V>
DSV3_INLINE void stream_bytes(void* to, const void* from, int64_t bytes) {
  constexpr int64_t kSize = sizeof(typename V::Ints);
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const char*>(from);
  int64_t i = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(out) & (kSize - 1));
  std::memcpy(out, in, static_cast<size_t>(i));
  for (; i + kSize <= bytes; i += kSize) stream_register<V>(out + i, in + i);
  std::memcpy(out + i, in + i, static_cast<size_t>(bytes - i));
}

/// Copies, past the caches when `streamed`.
template <typename V>
DSV3_INLINE void put_bytes(void* to, const void* from, int64_t bytes, bool streamed) {
  if (streamed) return stream_bytes<V>(to, from, bytes);
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

DSV3_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

/// Of __builtin_prefetch: into the second cache level, for the first holds what is worked on.
inline constexpr int kSecondLevel = 2;

/// Asks for what is read soon: the processor alone does not look past the end of a page or a row.
DSV3_INLINE void prefetch_bytes(const void* from, int64_t bytes) {
  const auto* in = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(in + i, 0, kSecondLevel);
}

/// Asks for the memory of a pair.
template <typename V, typename T>
DSV3_INLINE void prefetch_pair(const T* x) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < V::kPair; i += kLine) __builtin_prefetch(x + i, 0, kSecondLevel);
}

/// Calls make(begin, end, out) for parts of a row of `size` elements, where out[i - begin] takes
/// element i: straight into `y`, or through the first cache level past the others when `streamed`.
template <typename V, typename T, typename Make>
DSV3_INLINE void write_row(T* y, int64_t size, bool streamed, const Make& make) {
  if (!streamed) return make(int64_t{0}, size, y);
  Room<T, kStaged> staged;
  for (int64_t begin = 0; begin < size; begin += kStaged) {
    const int64_t end = std::min(begin + kStaged, size);
    make(begin, end, staged.data());
    stream_bytes<V>(y + begin, staged.data(), (end - begin) * static_cast<int64_t>(sizeof(T)));
  }
}

}  // namespace dsv3::kernels::cpu::detail
