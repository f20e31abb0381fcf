#pragma once

// Results that are larger than the caches go past them: an ordinary store first reads the line that
// it fills, which costs a third of the traffic of a kernel that reads one tensor and writes one.

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "kernels/detail/cpu.h"

namespace dsv3::kernels::cpu::detail {

/// Tensors from this size on are written past the caches.
inline constexpr int64_t kStreamedBytes = 16 * 1024 * 1024;

/// Elements of a row that are made in the first cache level before they leave; a multiple of 128.
inline constexpr int64_t kStaged = 512;

/// Copies past the caches. stream_fence() must follow before another thread reads.
DSV3_INLINE void stream_bytes(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const char*>(from);
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(out) & 15);
  std::memcpy(out, in, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + 16 <= bytes; i += 16) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), part);
  }
  std::memcpy(out + i, in + i, static_cast<size_t>(bytes - i));
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

DSV3_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

/// Asks for what is read soon: the processor alone does not look past the end of a page or a row.
DSV3_INLINE void prefetch_bytes(const void* from, int64_t bytes) {
  const auto* in = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(in + i);
}

/// Calls make(begin, end, out) for parts of a row of `size` elements, where out[i - begin] takes
/// element i: straight into `y`, or through the first cache level past the others when `streamed`.
template <typename T, typename Make>
DSV3_INLINE void write_row(T* y, int64_t size, bool streamed, const Make& make) {
  if (!streamed) return make(int64_t{0}, size, y);
  Room<T, kStaged> staged;
  for (int64_t begin = 0; begin < size; begin += kStaged) {
    const int64_t end = std::min(begin + kStaged, size);
    make(begin, end, staged.data());
    stream_bytes(y + begin, staged.data(), (end - begin) * static_cast<int64_t>(sizeof(T)));
  }
}

}  // namespace dsv3::kernels::cpu::detail
