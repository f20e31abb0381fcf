#pragma once

#include <cstdint>
#include <tuple>

#include "base/tensor_fwd.h"

namespace dsv3::ops {

// Layout, stated once: pairs are INTERLEAVED (2i, 2i+1), as in the released checkpoints, in q's and
// in the shared key's rope part alike; nothing in the program holds them in halves (NUMERICS trap
// 8). cos_sin [P, R] float32, row p = (cos θ_0, sin θ_0, cos θ_1, sin θ_1, …) of position p.
// positions [T] int32.

/// Rotates the last R dims of every head of q: q [T, H, N + R] → same shape (a new tensor when
/// recording gradients; the first N dims are copied). Backward is the inverse rotation.
at::Tensor rope_query(const at::Tensor& q, const at::Tensor& cos_sin, const at::Tensor& positions);

/// The same in place: q's storage holds the result, which is returned; only the rope part is read
/// and written. For a q that nobody else needs: a fresh product that its maker did not save.
/// Backward rotates the gradient in place too where nobody else holds it, else into a copy. Takes
/// tokens any stride apart; heads that are not contiguous are copied, as are tokens that share
/// memory (an expanded q) and float64.
at::Tensor rope_query_(at::Tensor q, const at::Tensor& cos_sin, const at::Tensor& positions);

/// Assembles K and V for attention from the up-projection and the shared rope key.
/// kv [T, H, N + Vd] (per head: nope, then value), k_rope [T, R] NOT yet rotated (rows may be
/// strided). Returns k [T, H, N + R] = [kv's nope | rotated k_rope, the same for all heads] and v
/// [T, H, Vd] (v is a strided view of kv). Backward sums dk's rope part over heads and rotates it
/// back.
std::tuple<at::Tensor, at::Tensor> rope_key_value(const at::Tensor& kv, const at::Tensor& k_rope,
                                                  const at::Tensor& cos_sin,
                                                  const at::Tensor& positions, int64_t v_head_dim);

namespace reference {
/// Rotates the last dim of x [T, …, R]; plain, differentiable, float64-capable.
at::Tensor rope(const at::Tensor& x, const at::Tensor& cos_sin, const at::Tensor& positions);
}  // namespace reference

}  // namespace dsv3::ops
