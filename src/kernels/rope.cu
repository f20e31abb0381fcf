// Rotary embedding on the device: a block per token, its threads along the heads' dims, 8 elements
// (4 pairs) each. Everything is read and written once: query 4·T·H·(N + R) bytes in BF16, key
// 2·T·H·(2N + R), its gradient 2·T·H·(2N + 2Vd + R). Memory bound.
//
// The key's gradient sums the rope part over heads: thread groups take every n-th head, shares meet
// in shared memory and are added in a fixed order.
//
// Dims that are not multiples of 8 and unaligned pointers take the same kernels one element (or
// pair) at a time.

#include <string>

#include "kernels/detail/group.cuh"
#include "kernels/rope.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;

constexpr int kThreads = 256;

/// Rotates the pairs of v (kVec elements, even) by the angles at cos_sin; `sign` = -1 rotates back.
template <int kVec>
__device__ __forceinline__ void rotate(float (&v)[kVec], const float* cos_sin, float sign) {
  float cs[kVec];
  detail::load_n<kVec>(cos_sin, cs);
#pragma unroll
  for (int i = 0; i < kVec; i += 2) {
    const float a = v[i], b = v[i + 1], c = cs[i], s = sign * cs[i + 1];
    v[i] = a * c - b * s;
    v[i + 1] = b * c + a * s;
  }
}

template <int kVec, typename T>
__device__ __forceinline__ void copy_n(const T* x, T* y) {
  float v[kVec];
  detail::load_n<kVec>(x, v);
  detail::store_n<kVec>(y, v);
}

/// kVec = 8, or 2: then the first N dims go one at a time and the rest in pairs.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) query_kernel(RopeQuery p) {
  constexpr int kCopy = kVec == kVector ? kVector : 1;
  const int64_t t = blockIdx.x;
  const int N = static_cast<int>(p.nope_dim), R = static_cast<int>(p.table.rope_dim);
  const int copies = N / kCopy, per_head = copies + R / kVec;
  const int units = static_cast<int>(p.num_heads) * per_head;
  const T* x = static_cast<const T*>(p.x) + t * p.x_stride;
  T* y = static_cast<T*>(p.y) + t * p.y_stride;
  const float* cos_sin = p.table.cos_sin + int64_t{p.table.positions[t]} * R;
  const float sign = p.inverse ? -1.0f : 1.0f;
  for (int unit = threadIdx.x; unit < units; unit += kThreads) {
    const int head = unit / per_head, i = unit % per_head;
    if (i < copies) {
      const int offset = head * (N + R) + i * kCopy;
      copy_n<kCopy>(x + offset, y + offset);
    } else {
      const int pair = (i - copies) * kVec, offset = head * (N + R) + N + pair;
      float v[kVec];
      detail::load_n<kVec>(x + offset, v);
      rotate<kVec>(v, cos_sin + pair, sign);
      detail::store_n<kVec>(y + offset, v);
    }
  }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) key_forward_kernel(RopeKeyForward p) {
  extern __shared__ __align__(16) float rotated[];  // [R]
  const int64_t t = blockIdx.x;
  const int N = static_cast<int>(p.nope_dim), R = static_cast<int>(p.table.rope_dim);
  const T* k_rope = static_cast<const T*>(p.k_rope) + t * p.k_rope_stride;
  const float* cos_sin = p.table.cos_sin + int64_t{p.table.positions[t]} * R;
  for (int i = 2 * threadIdx.x; i < R; i += 2 * kThreads) {
    float v[2] = {detail::to_float(k_rope[i]), detail::to_float(k_rope[i + 1])};
    rotate<2>(v, cos_sin + i, 1.0f);
    rotated[i] = v[0];
    rotated[i + 1] = v[1];
  }
  __syncthreads();
  const int kv_width = N + static_cast<int>(p.value_dim);
  const int copies = N / kVec, per_head = (N + R) / kVec;
  const T* kv = static_cast<const T*>(p.kv) + t * p.num_heads * kv_width;
  T* k = static_cast<T*>(p.k) + t * p.num_heads * (N + R);
  for (int unit = threadIdx.x; unit < static_cast<int>(p.num_heads) * per_head; unit += kThreads) {
    const int head = unit / per_head, i = unit % per_head;
    T* out = k + head * (N + R) + i * kVec;
    if (i < copies) {
      copy_n<kVec>(kv + head * kv_width + i * kVec, out);
    } else {
      float v[kVec];
      detail::load_n<kVec>(rotated + (i - copies) * kVec, v);
      detail::store_n<kVec>(out, v);
    }
  }
}

/// Groups of threads that share out the heads when R / kVec threads cover the rope part.
inline int head_groups(int64_t rope_dim, int vector) {
  return static_cast<int>(std::max<int64_t>(1, kThreads * vector / rope_dim));
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) key_backward_kernel(RopeKeyBackward p, int groups) {
  extern __shared__ __align__(16) float shares[];  // [groups, R]
  const int64_t t = blockIdx.x;
  const int N = static_cast<int>(p.nope_dim), R = static_cast<int>(p.table.rope_dim);
  const int H = static_cast<int>(p.num_heads), width = N + static_cast<int>(p.value_dim);
  const T* dk = static_cast<const T*>(p.dk) + t * p.dk_token_stride;
  const T* dv = static_cast<const T*>(p.dv) + t * p.dv_token_stride;
  T* dkv = static_cast<T*>(p.dkv) + t * H * width;
  const int per_head = width / kVec, nope = N / kVec;
  for (int unit = threadIdx.x; unit < H * per_head; unit += kThreads) {
    const int head = unit / per_head, i = unit % per_head;
    float v[kVec] = {};
    if (i < nope) {
      if (p.dk != nullptr) detail::load_n<kVec>(dk + head * p.dk_head_stride + i * kVec, v);
    } else if (p.dv != nullptr) {
      detail::load_n<kVec>(dv + head * p.dv_head_stride + (i - nope) * kVec, v);
    }
    detail::store_n<kVec>(dkv + head * width + i * kVec, v);
  }
  const int lanes = R / kVec;
  for (int unit = threadIdx.x; unit < lanes * groups; unit += kThreads) {
    const int lane = unit % lanes, group = unit / lanes;
    float sum[kVec] = {};
    if (p.dk != nullptr) {
#pragma unroll 4
      for (int head = group; head < H; head += groups) {
        float v[kVec];
        detail::load_n<kVec>(dk + head * p.dk_head_stride + N + lane * kVec, v);
#pragma unroll
        for (int e = 0; e < kVec; ++e) sum[e] += v[e];
      }
    }
    detail::store_n<kVec>(shares + group * R + lane * kVec, sum);
  }
  __syncthreads();
  const float* cos_sin = p.table.cos_sin + int64_t{p.table.positions[t]} * R;
  for (int i = 2 * threadIdx.x; i < R; i += 2 * kThreads) {
    float v[2] = {};
    for (int group = 0; group < groups; ++group) {
      v[0] += shares[group * R + i];
      v[1] += shares[group * R + i + 1];
    }
    rotate<2>(v, cos_sin + i, -1.0f);
    T* out = static_cast<T*>(p.dk_rope) + t * R + i;
    out[0] = detail::from_float<T>(v[0]);
    out[1] = detail::from_float<T>(v[1]);
  }
}

/// All of these counts of elements are whole vectors.
template <typename... Counts>
bool whole(Counts... counts) {
  return ((counts % kVector == 0) && ...);
}

void check_rope_dim(const char* name, const RopeTable& table) {
  constexpr int64_t kMostShared = 48 * 1024 / sizeof(float);
  if (table.rope_dim > kMostShared) {
    kernels::detail::raise_invalid(name, "rope dim " + std::to_string(table.rope_dim) +
                                             " is above " + std::to_string(kMostShared));
  }
}

}  // namespace

void rope_query(const RopeQuery& p, Stream stream) {
  if (p.num_tokens == 0 || p.num_heads == 0) return;
  const auto grid = static_cast<unsigned>(p.num_tokens);
  const cudaStream_t on = detail::cuda_stream(stream);
  const bool vectorised = whole(p.nope_dim, p.table.rope_dim, p.x_stride, p.y_stride) &&
                          detail::aligned16(p.x) && detail::aligned16(p.y) &&
                          detail::aligned16(p.table.cos_sin);
  detail::dispatch_float("rope_query", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (vectorised) {
      query_kernel<T, kVector><<<grid, kThreads, 0, on>>>(p);
    } else {
      query_kernel<T, 2><<<grid, kThreads, 0, on>>>(p);
    }
  });
  detail::check_launch("rope_query");
}

void rope_key_forward(const RopeKeyForward& p, Stream stream) {
  check_rope_dim("rope_key_value", p.table);
  if (p.num_tokens == 0 || p.num_heads == 0) return;
  const auto grid = static_cast<unsigned>(p.num_tokens);
  const size_t shared = static_cast<size_t>(p.table.rope_dim) * sizeof(float);
  const cudaStream_t on = detail::cuda_stream(stream);
  const bool vectorised = whole(p.nope_dim, p.table.rope_dim, p.value_dim) &&
                          detail::aligned16(p.kv) && detail::aligned16(p.k);
  detail::dispatch_float("rope_key_value", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (vectorised) {
      key_forward_kernel<T, kVector><<<grid, kThreads, shared, on>>>(p);
    } else {
      key_forward_kernel<T, 1><<<grid, kThreads, shared, on>>>(p);
    }
  });
  detail::check_launch("rope_key_value");
}

void rope_key_backward(const RopeKeyBackward& p, Stream stream) {
  check_rope_dim("rope_key_value_backward", p.table);
  if (p.num_tokens == 0) return;
  const auto grid = static_cast<unsigned>(p.num_tokens);
  const cudaStream_t on = detail::cuda_stream(stream);
  const bool vectorised = whole(p.nope_dim, p.table.rope_dim, p.value_dim, p.dk_token_stride,
                                p.dk_head_stride, p.dv_token_stride, p.dv_head_stride) &&
                          detail::aligned16(p.dk) && detail::aligned16(p.dv) &&
                          detail::aligned16(p.dkv);
  const int groups = head_groups(p.table.rope_dim, vectorised ? kVector : 1);
  const size_t shared = static_cast<size_t>(groups * p.table.rope_dim) * sizeof(float);
  detail::dispatch_float("rope_key_value_backward", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (vectorised) {
      key_backward_kernel<T, kVector><<<grid, kThreads, shared, on>>>(p, groups);
    } else {
      key_backward_kernel<T, 1><<<grid, kThreads, shared, on>>>(p, groups);
    }
  });
  detail::check_launch("rope_key_value_backward");
}

}  // namespace dsv3::kernels::cuda
