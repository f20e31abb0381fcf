// Gradients of the assembled keys and values on the device: a block per token. Threads stand along
// [nope | value | rope] of a head, 8 elements each, and walk the heads; each has the loads of 4
// heads in flight. The first two parts are copied into dkv, the third is summed over heads: every
// row of threads sums its own heads in order, the shares meet in shared memory and are added in the
// order of rows, then rotated back. Bytes in BF16: 2·T·H·(2N + 2Vd + R). Memory bound.

#include <algorithm>
#include <string>

#include "kernels/detail/launch.cuh"
#include "kernels/detail/rotate.cuh"
#include "kernels/detail/words.cuh"
#include "kernels/rope.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;

constexpr int kThreads = 256;
constexpr int kHeads = 4;  // of a thread, whose loads are in flight together

/// blockDim (lanes, rows), R / 2 ≤ lanes · rows; shared [rows, R].
template <typename T>
__global__ void __launch_bounds__(kThreads) vector_kernel(RopeKeyBackward p) {
  extern __shared__ __align__(16) float shares[];
  const int64_t t = blockIdx.x;
  const int N = static_cast<int>(p.nope_dim), R = static_cast<int>(p.table.rope_dim);
  const int H = static_cast<int>(p.num_heads), width = N + static_cast<int>(p.value_dim);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, pair = 2 * thread;
  float cs[2] = {};  // of the pair that this thread rotates at the end, asked for early
  if (pair < R) {
    const float* cos_sin = p.table.cos_sin + int64_t{p.table.positions[t]} * R + pair;
    cs[0] = cos_sin[0];
    cs[1] = cos_sin[1];
  }
  const int column = threadIdx.x * kVector;
  const bool sums = column >= width, value = !sums && column >= N;
  const T* from = static_cast<const T*>(value ? p.dv : p.dk);
  const int64_t head_stride = value ? p.dv_head_stride : p.dk_head_stride;
  if (from != nullptr) {
    from += value ? t * p.dv_token_stride + column - N
                  : t * p.dk_token_stride + (sums ? column - width + N : column);
  }
  T* to = static_cast<T*>(p.dkv) + t * H * width + column;
  const int rows = blockDim.y;
  float sum[kVector] = {};
  for (int first = threadIdx.y; first < H; first += rows * kHeads) {
    detail::Words8<T> unit[kHeads] = {};
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const int head = first + j * rows;
      if (head < H && from != nullptr) unit[j].load(from + head * head_stride);
    }
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const int head = first + j * rows;
      if (head >= H) break;
      if (sums) {
        float v[kVector];
        detail::unpack(unit[j], v);
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[e] += v[e];
      } else {
        unit[j].store(to + head * width);
      }
    }
  }
  if (sums) detail::store8(shares + threadIdx.y * R + column - width, sum);
  __syncthreads();
  if (pair >= R) return;
  float v[2] = {};
  for (int row = 0; row < rows; ++row) {
    v[0] += shares[row * R + pair];
    v[1] += shares[row * R + pair + 1];
  }
  detail::rotate<2>(v, cs, -1.0f);
  T* out = static_cast<T*>(p.dk_rope) + t * R + pair;
  out[0] = detail::from_float<T>(v[0]);
  out[1] = detail::from_float<T>(v[1]);
}

/// Any dims, one element at a time; shared [groups, R].
template <typename T>
__global__ void __launch_bounds__(kThreads) any_kernel(RopeKeyBackward p, int groups) {
  extern __shared__ __align__(16) float shares[];
  const int64_t t = blockIdx.x;
  const int N = static_cast<int>(p.nope_dim), R = static_cast<int>(p.table.rope_dim);
  const int H = static_cast<int>(p.num_heads), width = N + static_cast<int>(p.value_dim);
  const T* dk = static_cast<const T*>(p.dk) + t * p.dk_token_stride;
  const T* dv = static_cast<const T*>(p.dv) + t * p.dv_token_stride;
  T* dkv = static_cast<T*>(p.dkv) + t * H * width;
  for (int unit = threadIdx.x; unit < H * width; unit += kThreads) {
    const int head = unit / width, i = unit % width;
    T v = detail::from_float<T>(0.0f);
    if (i < N) {
      if (p.dk != nullptr) v = dk[head * p.dk_head_stride + i];
    } else if (p.dv != nullptr) {
      v = dv[head * p.dv_head_stride + i - N];
    }
    dkv[unit] = v;
  }
  for (int unit = threadIdx.x; unit < R * groups; unit += kThreads) {
    const int i = unit % R, group = unit / R;
    float sum = 0.0f;
    for (int head = group; head < H && p.dk != nullptr; head += groups) {
      sum += detail::to_float(dk[head * p.dk_head_stride + N + i]);
    }
    shares[unit] = sum;
  }
  __syncthreads();
  const float* cos_sin = p.table.cos_sin + int64_t{p.table.positions[t]} * R;
  for (int i = 2 * threadIdx.x; i < R; i += 2 * kThreads) {
    float v[2] = {};
    for (int group = 0; group < groups; ++group) {
      v[0] += shares[group * R + i];
      v[1] += shares[group * R + i + 1];
    }
    detail::rotate_pair(v, cos_sin + i, -1.0f);
    T* out = static_cast<T*>(p.dk_rope) + t * R + i;
    out[0] = detail::from_float<T>(v[0]);
    out[1] = detail::from_float<T>(v[1]);
  }
}

template <typename... Counts>
bool whole(Counts... counts) {
  return ((counts % kVector == 0) && ...);
}

bool takes_vectors(const RopeKeyBackward& p) {
  return whole(p.nope_dim, p.table.rope_dim, p.value_dim, p.dk_token_stride, p.dk_head_stride,
               p.dv_token_stride, p.dv_head_stride) &&
         detail::aligned16(p.dk) && detail::aligned16(p.dv) && detail::aligned16(p.dkv);
}

}  // namespace

void rope_key_backward(const RopeKeyBackward& p, Stream stream) {
  constexpr int64_t kMostShared = 48 * 1024 / sizeof(float);
  const int64_t R = p.table.rope_dim;
  if (R > kMostShared) {
    kernels::detail::raise_invalid(
        "rope_key_value_backward",
        "rope dim " + std::to_string(R) + " is above " + std::to_string(kMostShared));
  }
  if (p.num_tokens == 0) return;
  const auto grid = static_cast<unsigned>(p.num_tokens);
  const cudaStream_t on = detail::cuda_stream(stream);
  const int64_t lanes = (p.nope_dim + p.value_dim + R) / kVector;
  // Rows of threads: no more than heads, but (4) enough threads to rotate every pair at the end.
  const int64_t heads = std::max<int64_t>(4, p.num_heads);
  const int64_t vector_rows = lanes > 0 ? std::min(kThreads / lanes, heads) : 0;
  const bool vectorised = takes_vectors(p) && 2 * lanes * vector_rows >= R;
  const int64_t rows =
      vectorised ? vector_rows
                 : std::clamp<int64_t>(kThreads / R, 1, std::max<int64_t>(1, p.num_heads));
  const size_t shared = static_cast<size_t>(rows * R) * sizeof(float);
  detail::dispatch_float("rope_key_value_backward", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (vectorised) {
      const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(rows));
      vector_kernel<T><<<grid, block, shared, on>>>(p);
    } else {
      any_kernel<T><<<grid, kThreads, shared, on>>>(p, static_cast<int>(rows));
    }
  });
  detail::check_launch("rope_key_value_backward");
}

}  // namespace dsv3::kernels::cuda
