// Rotary embedding on the host: threads over tokens; heads are copied and rotated in one pass.
#include "kernels/detail/cpu.h"
#include "kernels/rope.h"

namespace dsv3::kernels::cpu {
namespace {

using detail::load;
using detail::store;

void check_positions(const RopeTable& table, int64_t num_tokens) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int32_t position = table.positions[t];
    require(position >= 0 && position < table.num_positions,
            "[rope] positions[{}] is {}, expected 0 … {} (the rows of cos_sin)", t, position,
            table.num_positions - 1);
  }
}

/// y = x rotated by the row's angles, `sign` = -1 rotates back. y may be x.
template <typename T, typename S>
DSV3_INLINE void rotate(const S* x, T* y, const float* cos_sin, float sign, int64_t rope_dim) {
#pragma omp simd
  for (int64_t i = 0; i < rope_dim / 2; ++i) {
    const float c = cos_sin[2 * i], s = sign * cos_sin[2 * i + 1];
    const float a = load(&x[2 * i]), b = load(&x[2 * i + 1]);
    store(&y[2 * i], a * c - b * s);
    store(&y[2 * i + 1], b * c + a * s);
  }
}

template <typename T>
DSV3_INLINE void copy(const T* __restrict x, T* __restrict y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = x[i];
}

template <typename T>
DSV3_INLINE void query_body(const RopeQuery& p, int64_t begin, int64_t end) {
  const int64_t N = p.nope_dim, R = p.table.rope_dim, width = N + R;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(p.x) + t * p.x_stride;
    T* y = static_cast<T*>(p.y) + t * p.y_stride;
    const float* cos_sin = p.table.cos_sin + p.table.positions[t] * R;
    for (int64_t h = 0; h < p.num_heads; ++h, x += width, y += width) {
      if (x != y) copy(x, y, N);
      rotate(x + N, y + N, cos_sin, p.inverse ? -1.0f : 1.0f, R);
    }
  }
}

template <typename T>
DSV3_INLINE void key_forward_body(const RopeKeyForward& p, int64_t begin, int64_t end) {
  const int64_t N = p.nope_dim, R = p.table.rope_dim;
  for (int64_t t = begin; t < end; ++t) {
    const T* kv = static_cast<const T*>(p.kv) + t * p.num_heads * (N + p.value_dim);
    T* k = static_cast<T*>(p.k) + t * p.num_heads * (N + R);
    T* rotated = k + N;  // of the first head; the others copy it
    rotate(static_cast<const T*>(p.k_rope) + t * p.k_rope_stride, rotated,
           p.table.cos_sin + p.table.positions[t] * R, 1.0f, R);
    for (int64_t h = 0; h < p.num_heads; ++h, kv += N + p.value_dim, k += N + R) {
      copy(kv, k, N);
      if (h > 0) copy(rotated, k + N, R);
    }
  }
}

/// Widest rope part whose sum over heads fits the stack.
constexpr int64_t kMaxRopeDim = 1024;

template <typename T>
DSV3_INLINE void key_backward_body(const RopeKeyBackward& p, int64_t begin, int64_t end) {
  const int64_t N = p.nope_dim, R = p.table.rope_dim, Vd = p.value_dim;
  float sum[kMaxRopeDim];
  for (int64_t t = begin; t < end; ++t) {
    const T* dk = static_cast<const T*>(p.dk) + (p.dk ? t * p.dk_token_stride : 0);
    const T* dv = static_cast<const T*>(p.dv) + (p.dv ? t * p.dv_token_stride : 0);
    T* dkv = static_cast<T*>(p.dkv) + t * p.num_heads * (N + Vd);
    for (int64_t i = 0; i < R; ++i) sum[i] = 0.0f;
    for (int64_t h = 0; h < p.num_heads; ++h, dkv += N + Vd) {
      if (p.dk != nullptr) {
        const T* __restrict head = dk + h * p.dk_head_stride;
        copy(head, dkv, N);
#pragma omp simd
        for (int64_t i = 0; i < R; ++i) sum[i] += load(&head[N + i]);
      } else {
        for (int64_t i = 0; i < N; ++i) store(&dkv[i], 0.0f);
      }
      if (p.dv != nullptr) {
        copy(dv + h * p.dv_head_stride, dkv + N, Vd);
      } else {
        for (int64_t i = 0; i < Vd; ++i) store(&dkv[N + i], 0.0f);
      }
    }
    rotate(static_cast<const float*>(sum), static_cast<T*>(p.dk_rope) + t * R,
           p.table.cos_sin + p.table.positions[t] * R, -1.0f, R);
  }
}

DSV3_CLONES void query_rows(const RopeQuery& p, const float*, int64_t begin, int64_t end) {
  query_body<float>(p, begin, end);
}
DSV3_CLONES void query_rows(const RopeQuery& p, const BFloat16*, int64_t begin, int64_t end) {
  query_body<BFloat16>(p, begin, end);
}
DSV3_CLONES void key_forward_rows(const RopeKeyForward& p, const float*, int64_t begin,
                                  int64_t end) {
  key_forward_body<float>(p, begin, end);
}
DSV3_CLONES void key_forward_rows(const RopeKeyForward& p, const BFloat16*, int64_t begin,
                                  int64_t end) {
  key_forward_body<BFloat16>(p, begin, end);
}
DSV3_CLONES void key_backward_rows(const RopeKeyBackward& p, const float*, int64_t begin,
                                   int64_t end) {
  key_backward_body<float>(p, begin, end);
}
DSV3_CLONES void key_backward_rows(const RopeKeyBackward& p, const BFloat16*, int64_t begin,
                                   int64_t end) {
  key_backward_body<BFloat16>(p, begin, end);
}

}  // namespace

void rope_query(const RopeQuery& p) {
  check_positions(p.table, p.num_tokens);
  const int64_t bytes = 2 * p.num_heads * (p.nope_dim + p.table.rope_dim) * size_of(p.dtype);
  detail::dispatch_float("rope_query", p.dtype, [&](auto* type) {
    detail::parallel_rows(p.num_tokens, bytes,
                          [&](int64_t begin, int64_t end) { query_rows(p, type, begin, end); });
  });
}

void rope_key_forward(const RopeKeyForward& p) {
  check_positions(p.table, p.num_tokens);
  const int64_t bytes = p.num_heads * (2 * p.nope_dim + p.table.rope_dim) * size_of(p.dtype);
  detail::dispatch_float("rope_key_value", p.dtype, [&](auto* type) {
    detail::parallel_rows(p.num_tokens, bytes, [&](int64_t begin, int64_t end) {
      key_forward_rows(p, type, begin, end);
    });
  });
}

void rope_key_backward(const RopeKeyBackward& p) {
  check_positions(p.table, p.num_tokens);
  require(p.table.rope_dim <= kMaxRopeDim, "[rope_key_value] rope dim {} is above {}",
          p.table.rope_dim, kMaxRopeDim);
  const int64_t bytes =
      p.num_heads * (2 * (p.nope_dim + p.value_dim) + p.table.rope_dim) * size_of(p.dtype);
  detail::dispatch_float("rope_key_value_backward", p.dtype, [&](auto* type) {
    detail::parallel_rows(p.num_tokens, bytes, [&](int64_t begin, int64_t end) {
      key_backward_rows(p, type, begin, end);
    });
  });
}

}  // namespace dsv3::kernels::cpu
