#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/kernel.h"

// Rotary embedding and the layouts of MLA's heads. Letters: T tokens, H heads, N nope dims, R rope
// dims, Vd value dims. Every dtype is kF32 or kBF16, arithmetic is FP32. A stride counts elements;
// the last dim is contiguous. All functions throw std::invalid_argument on another dtype, CudaError
// on a failed launch; T = 0 is allowed.

namespace dsv3::kernels {

/// The rotary table and where in it each token stands. Pairs are interleaved: (x0, x1) of pair i
/// becomes (x0·cos - x1·sin, x1·cos + x0·sin) (Su et al. 2021, arXiv:2104.09864).
struct RopeTable {
  int64_t num_positions;  // P
  int64_t rope_dim;       // R, even
  const float* cos_sin;  // [P, R]: cos θ_0, sin θ_0, cos θ_1, …; YaRN changes only its numbers
  const int32_t* positions;  // [T] in [0, P): std::invalid_argument on the host, undefined on CUDA;
                             // documents restart at 0
};

/// Copies the first N dims of every head and rotates the last R; `inverse` rotates back (the
/// gradient). In place only the rope part is touched: it reads and writes T·H·R, otherwise
/// T·H·(N + R). The shared key is H = 1, N = 0.
struct RopeQuery {
  int64_t num_tokens;  // T
  int64_t num_heads;   // H
  int64_t nope_dim;    // N
  RopeTable table;
  bool inverse;
  int64_t x_stride;  // of x's tokens
  int64_t y_stride;  // of y's tokens
  DType dtype;       // of x, y
  const void* x;     // [T, H, N + R], tokens x_stride apart
  void* y;           // [T, H, N + R], tokens y_stride apart; x itself (with x_stride), or apart
};

/// k[t, h] = [kv[t, h, :N] | rotated k_rope[t]], the same rotated part for all heads. Values stay
/// where they are: v[t, h] = kv[t, h, N:], a strided view that attention reads. Reads T·H·N + T·R,
/// writes T·H·(N + R).
struct RopeKeyForward {
  int64_t num_tokens;  // T
  int64_t num_heads;   // H
  int64_t nope_dim;    // N
  int64_t value_dim;   // Vd
  RopeTable table;
  int64_t k_rope_stride;  // of k_rope's rows
  DType dtype;            // of kv, k_rope, k
  const void* kv;         // [T, H, N + Vd] contiguous
  const void* k_rope;     // [T, R], rows k_rope_stride apart, not rotated
  void* k;                // [T, H, N + R] contiguous
};

/// dkv[t, h] = [dk[t, h, :N] | dv[t, h]]; dk_rope[t] = rotated back Σ_h dk[t, h, N:], summed in
/// FP32 in an order that depends on the shape only. Reads T·H·(N + R + Vd), writes T·H·(N + Vd) +
/// T·R.
struct RopeKeyBackward {
  int64_t num_tokens;
  int64_t num_heads;
  int64_t nope_dim;
  int64_t value_dim;
  RopeTable table;
  int64_t dk_token_stride, dk_head_stride;
  int64_t dv_token_stride, dv_head_stride;
  DType dtype;     // of all
  const void* dk;  // [T, H, N + R], may be null (= 0)
  const void* dv;  // [T, H, Vd], may be null (= 0)
  void* dkv;       // [T, H, N + Vd] contiguous
  void* dk_rope;   // [T, R] contiguous
};

DSV3_DECLARE_KERNEL(rope_query, RopeQuery)
DSV3_DECLARE_KERNEL(rope_key_forward, RopeKeyForward)
DSV3_DECLARE_KERNEL(rope_key_backward, RopeKeyBackward)

}  // namespace dsv3::kernels
