// Rotary embedding on the device: heads are copied, assembled and rotated in one pass.
//
// A row is one head of one token. Threads stand along its dims, 8 elements (4 pairs) each, so a
// thread copies or rotates and never divides for its column; a block takes 4 · blockDim.y rows, 2
// in place, and each thread has the loads of its rows in flight before the first is used. Nothing
// is shared between threads: the angles, and the key that all heads share, are read again from the
// caches, and arrive before the rows do. Bytes in BF16: query 4·T·H·(N + R), in place 4·T·H·R, key
// 2·T·H·(2N + R). Memory bound.
//
// In place a piece is a line of memory or two, and twice as many are passed over: the bare accesses
// reach 86 % of the copy on an H200.
//
// Dims that are not multiples of 8 and unaligned pointers go an element or pair at a time.

#include "kernels/rope.h"

#include <algorithm>

#include "kernels/detail/launch.cuh"
#include "kernels/detail/rotate.cuh"
#include "kernels/detail/words.cuh"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;

constexpr int kThreads = 128;
constexpr int kRows = 4, kRowsInPlace = 2;  // of a thread, whose loads are in flight together

/// A part of the heads in memory: element (t, h, d) at t · token + h · head + d.
template <typename T>
struct Part {
  T* data;
  int64_t token, head;
};

/// y[t, h] = [nope[t, h] | rotated rope[t, h]].
template <typename T>
struct Assembly {
  int64_t num_rows;  // T · H
  int num_heads;     // H
  int nope_dim;      // N
  RopeTable table;
  float sign;  // -1 rotates back
  Part<const T> nope, rope;
  Part<T> y;
};

/// blockDim (lanes of 8 elements, rows); grid over rows.
template <typename T>
__global__ void __launch_bounds__(kThreads) assemble_kernel(Assembly<T> p) {
  const int lane = threadIdx.x, nope_lanes = p.nope_dim / kVector;
  const bool rotates = lane >= nope_lanes;
  const Part<const T> from = rotates ? p.rope : p.nope;
  const int column = (rotates ? lane - nope_lanes : lane) * kVector;
  const int64_t first = int64_t{blockIdx.x} * (kRows * blockDim.y);
  const int64_t first_token = first / p.num_heads;
  const auto first_head = static_cast<unsigned>(first - first_token * p.num_heads);
  detail::Words8<T> unit[kRows];
  int64_t token[kRows];
  int head[kRows], position[kRows] = {};
  bool valid[kRows];
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const unsigned local = threadIdx.y + j * blockDim.y;
    const unsigned at = first_head + local, heads = p.num_heads;
    valid[j] = first + local < p.num_rows;
    token[j] = first_token + at / heads;
    head[j] = static_cast<int>(at % heads);
    const T* const x = from.data + token[j] * from.token + head[j] * from.head + column;
    if (valid[j]) unit[j].load(x);
    if (rotates && valid[j]) position[j] = p.table.positions[token[j]];
  }
  if (rotates) {
    const float* const angles = p.table.cos_sin + column;
    float cs[kVector];
    detail::load8(angles + position[0] * p.table.rope_dim, cs);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (!valid[j]) continue;
      // Mostly the same token, and always when there are many heads.
      if (j > 0 && position[j] != position[j - 1]) {
        detail::load8(angles + position[j] * p.table.rope_dim, cs);
      }
      float v[kVector];
      detail::unpack(unit[j], v);
      detail::rotate<kVector>(v, cs, p.sign);
      detail::pack(v, unit[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    if (!valid[j]) continue;
    T* const to = p.y.data + token[j] * p.y.token + head[j] * p.y.head + lane * kVector;
    unit[j].store(to);
  }
}

/// The rotated part where it stands; rows and strides below 2^31.
template <typename T>
struct Rotation {
  unsigned num_rows, num_heads;
  RopeTable table;
  float sign;
  T* data;
  int token, head;  // strides
};

template <typename T>
__global__ void __launch_bounds__(kThreads) rotate_kernel(Rotation<T> p) {
  const int column = static_cast<int>(threadIdx.x) * kVector;
  unsigned row = blockIdx.x * (kRowsInPlace * blockDim.y) + threadIdx.y;
  unsigned token = row / p.num_heads, head = row - token * p.num_heads;
  detail::Words8<T> unit[kRowsInPlace];
  T* at[kRowsInPlace] = {};
  int position[kRowsInPlace] = {};
#pragma unroll
  for (int j = 0; j < kRowsInPlace; ++j) {
    if (row < p.num_rows) {
      at[j] = p.data + int64_t{p.token} * token + int64_t{p.head} * head + column;
      unit[j].load(at[j]);
      position[j] = p.table.positions[token];
    }
    row += blockDim.y;
    head += blockDim.y;
    if (head >= p.num_heads) token = row / p.num_heads, head = row - token * p.num_heads;
  }
  const float* const angles = p.table.cos_sin + column;
  const auto stride = static_cast<int>(p.table.rope_dim);
  float cs[kVector];
  detail::load8(angles + int64_t{position[0]} * stride, cs);
#pragma unroll
  for (int j = 0; j < kRowsInPlace; ++j) {
    if (at[j] == nullptr) return;
    // Mostly the same token, and always when there are many heads.
    if (j > 0 && position[j] != position[j - 1]) {
      detail::load8(angles + int64_t{position[j]} * stride, cs);
    }
    float v[kVector];
    detail::unpack(unit[j], v);
    detail::rotate<kVector>(v, cs, p.sign);
    detail::pack(v, unit[j]);
    unit[j].store(at[j]);
  }
}

/// The same for any dims: a block per token, elements and pairs one at a time.
template <typename T>
__global__ void __launch_bounds__(kThreads) assemble_any_kernel(Assembly<T> p) {
  const int64_t t = blockIdx.x;
  const int R = static_cast<int>(p.table.rope_dim), per_head = p.nope_dim + R / 2;
  const float* cos_sin = p.table.cos_sin + int64_t{p.table.positions[t]} * R;
  const T* nope = p.nope.data + t * p.nope.token;
  const T* rope = p.rope.data + t * p.rope.token;
  T* y = p.y.data + t * p.y.token;
  for (int unit = threadIdx.x; unit < p.num_heads * per_head; unit += kThreads) {
    const int head = unit / per_head, i = unit % per_head;
    if (i < p.nope_dim) {
      y[head * p.y.head + i] = nope[head * p.nope.head + i];
    } else {
      const int pair = 2 * (i - p.nope_dim);
      const T* from = rope + head * p.rope.head + pair;
      T* to = y + head * p.y.head + p.nope_dim + pair;
      float v[2] = {detail::to_float(from[0]), detail::to_float(from[1])};
      detail::rotate_pair(v, cos_sin + pair, p.sign);
      to[0] = detail::from_float<T>(v[0]);
      to[1] = detail::from_float<T>(v[1]);
    }
  }
}

/// All of these counts of elements are whole vectors.
template <typename... Counts>
bool whole(Counts... counts) {
  return ((counts % kVector == 0) && ...);
}

template <typename P>
bool vector_part(const P& part) {
  return whole(part.token, part.head) && detail::aligned16(part.data);
}

template <typename T>
void launch(const Assembly<T>& p, int64_t num_tokens, cudaStream_t stream) {
  const int64_t lanes = (p.nope_dim + p.table.rope_dim) / kVector;
  const bool vectorised = whole(p.nope_dim, p.table.rope_dim) && lanes <= kThreads &&
                          (p.nope_dim == 0 || vector_part(p.nope)) && vector_part(p.rope) &&
                          vector_part(p.y) && detail::aligned16(p.table.cos_sin);
  if (!vectorised) {
    assemble_any_kernel<T><<<static_cast<unsigned>(num_tokens), kThreads, 0, stream>>>(p);
    return;
  }
  const int64_t rows = std::max<int64_t>(1, kThreads / lanes);
  const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(rows));
  const int64_t of_block = rows * kRows;
  assemble_kernel<T>
      <<<static_cast<unsigned>((p.num_rows + of_block - 1) / of_block), block, 0, stream>>>(p);
}

/// Where p.rope is p.y and nothing else is moved. Returns false where rotate_kernel does not do.
template <typename T>
bool launch_in_place(const Assembly<T>& p, cudaStream_t stream) {
  const int64_t lanes = p.table.rope_dim / kVector;
  const int64_t most = std::max({p.num_rows, p.y.token, p.y.head});
  if (!whole(p.table.rope_dim) || lanes > kThreads || !vector_part(p.y) ||
      !detail::aligned16(p.table.cos_sin) || most > INT32_MAX) {
    return false;
  }
  const int64_t rows = std::max<int64_t>(1, kThreads / lanes), of_block = rows * kRowsInPlace;
  const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(rows));
  rotate_kernel<T>
      <<<static_cast<unsigned>((p.num_rows + of_block - 1) / of_block), block, 0, stream>>>(
          {.num_rows = static_cast<unsigned>(p.num_rows),
           .num_heads = static_cast<unsigned>(p.num_heads),
           .table = p.table,
           .sign = p.sign,
           .data = p.y.data,
           .token = static_cast<int>(p.y.token),
           .head = static_cast<int>(p.y.head)});
  return true;
}

}  // namespace

void rope_query(const RopeQuery& p, Stream stream) {
  if (p.num_tokens == 0 || p.num_heads == 0) return;
  detail::dispatch_float("rope_query", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t width = p.nope_dim + p.table.rope_dim;
    const auto* x = static_cast<const T*>(p.x);
    const bool in_place = p.x == p.y;
    const Assembly<T> assembly{
        .num_rows = p.num_tokens * p.num_heads,
        .num_heads = static_cast<int>(p.num_heads),
        .nope_dim = in_place ? 0 : static_cast<int>(p.nope_dim),
        .table = p.table,
        .sign = p.inverse ? -1.0f : 1.0f,
        .nope = {x, p.x_stride, width},
        .rope = {x + p.nope_dim, p.x_stride, width},
        .y = {static_cast<T*>(p.y) + (in_place ? p.nope_dim : 0), p.y_stride, width}};
    const cudaStream_t on = detail::cuda_stream(stream);
    if (in_place && launch_in_place<T>(assembly, on)) return;
    launch<T>(assembly, p.num_tokens, on);
  });
  detail::check_launch("rope_query");
}

void rope_key_forward(const RopeKeyForward& p, Stream stream) {
  if (p.num_tokens == 0 || p.num_heads == 0) return;
  detail::dispatch_float("rope_key_value", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t kv_width = p.nope_dim + p.value_dim, k_width = p.nope_dim + p.table.rope_dim;
    launch<T>({.num_rows = p.num_tokens * p.num_heads,
               .num_heads = static_cast<int>(p.num_heads),
               .nope_dim = static_cast<int>(p.nope_dim),
               .table = p.table,
               .sign = 1.0f,
               .nope = {static_cast<const T*>(p.kv), p.num_heads * kv_width, kv_width},
               .rope = {static_cast<const T*>(p.k_rope), p.k_rope_stride, 0},
               .y = {static_cast<T*>(p.k), p.num_heads * k_width, k_width}},
              p.num_tokens, detail::cuda_stream(stream));
  });
  detail::check_launch("rope_key_value");
}

}  // namespace dsv3::kernels::cuda
