#pragma once

// Eight elements as they lie in memory: loaded early, unpacked where they are used.

#include "kernels/detail/vector.cuh"

namespace dsv3::kernels::cuda::detail {

/// Eight elements in 16-byte words: copied as they are, unpacked only where they are rotated.
template <typename T>
struct Words8 {
  static constexpr int kWords = kVector * static_cast<int>(sizeof(T)) / 16;
  uint4 word[kWords];

  __device__ __forceinline__ void load(const T* x) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = reinterpret_cast<const uint4*>(x)[i];
  }
  __device__ __forceinline__ void store(T* y) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(y)[i] = word[i];
  }
};

__device__ __forceinline__ void unpack(const Words8<float>& x, float (&v)[kVector]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    v[4 * i] = __uint_as_float(x.word[i].x);
    v[4 * i + 1] = __uint_as_float(x.word[i].y);
    v[4 * i + 2] = __uint_as_float(x.word[i].z);
    v[4 * i + 3] = __uint_as_float(x.word[i].w);
  }
}
__device__ __forceinline__ void unpack(const Words8<__nv_bfloat16>& x, float (&v)[kVector]) {
  const uint32_t words[4] = {x.word[0].x, x.word[0].y, x.word[0].z, x.word[0].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(words[i] << 16);
    v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void pack(const float (&v)[kVector], Words8<float>& y) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    y.word[i] = make_uint4(__float_as_uint(v[4 * i]), __float_as_uint(v[4 * i + 1]),
                           __float_as_uint(v[4 * i + 2]), __float_as_uint(v[4 * i + 3]));
  }
}
__device__ __forceinline__ void pack(const float (&v)[kVector], Words8<__nv_bfloat16>& y) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  y.word[0] = make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace dsv3::kernels::cuda::detail
