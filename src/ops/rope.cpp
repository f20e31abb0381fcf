#include "ops/rope.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>

#include "base/error.h"
#include "kernels/rope.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/range.h"

namespace dsv3::ops {
namespace {

void check_table(const char* op, const at::Tensor& cos_sin, const at::Tensor& positions,
                 const at::Tensor& x) {
  check_shape(cos_sin, op, "cos_sin", {-1, -1});
  require(cos_sin.size(1) > 0 && cos_sin.size(1) % 2 == 0,
          "[{}] cos_sin: expected an even width R above 0, got {}", op, cos_sin.size(1));
  require(cos_sin.scalar_type() == at::kFloat && cos_sin.device() == x.device(),
          "[{}] cos_sin: expected Float on {}, got {} on {}", op, x.device().str(),
          c10::toString(cos_sin.scalar_type()), cos_sin.device().str());
  check_shape(positions, op, "positions", {x.size(0)});
  check_int32(positions, op, "positions", x);
}

/// The table and positions as the kernels take them; both contiguous and alive as long as needed.
kernels::RopeTable table_of(const at::Tensor& cos_sin, const at::Tensor& positions) {
  return {.num_positions = cos_sin.size(0),
          .rope_dim = cos_sin.size(1),
          .cos_sin = cos_sin.const_data_ptr<float>(),
          .positions = positions.const_data_ptr<int32_t>()};
}

/// Whether a token's [H, W] part is contiguous (tokens may be apart).
bool heads_contiguous(const at::Tensor& x) {
  return (x.stride(2) == 1 || x.size(2) <= 1) && (x.stride(1) == x.size(2) || x.size(1) <= 1);
}

/// Whether no token of x [T, H, W], whose heads are contiguous, shares memory with another.
bool tokens_apart(const at::Tensor& x) {
  return x.size(0) <= 1 || x.stride(0) >= x.size(1) * x.size(2);
}

/// y may be q; both have contiguous heads.
void rotate_into(const at::Tensor& y, const at::Tensor& q, const at::Tensor& cos_sin,
                 const at::Tensor& positions, bool inverse) {
  kernels::rope_query({.num_tokens = q.size(0),
                       .num_heads = q.size(1),
                       .nope_dim = q.size(2) - cos_sin.size(1),
                       .table = table_of(cos_sin, positions),
                       .inverse = inverse,
                       .x_stride = q.stride(0),
                       .y_stride = y.stride(0),
                       .dtype = dtype_of(q, "rope_query", "q"),
                       .x = q.const_data_ptr(),
                       .y = y.mutable_data_ptr()},
                      stream_of(q));
}

at::Tensor rotate_query(const at::Tensor& x, const at::Tensor& cos_sin, const at::Tensor& positions,
                        bool inverse) {
  const NoRecord guard;
  const at::Tensor q = heads_contiguous(x) ? x : x.contiguous();
  at::Tensor y = at::empty(q.sizes(), q.options());
  rotate_into(y, q, cos_sin, positions, inverse);
  return y;
}

/// Rotates back; in place when this reference is the only one to the gradient and its memory.
at::Tensor rotate_gradient(const at::Tensor& grad, const at::Tensor& cos_sin,
                           const at::Tensor& positions) {
  const bool ours = grad.use_count() == 1 && grad.storage().use_count() == 1 &&
                    heads_contiguous(grad) && grad.is_non_overlapping_and_dense();
  if (!ours) return rotate_query(grad, cos_sin, positions, true);
  rotate_into(grad, grad, cos_sin, positions, true);
  return grad;
}

at::Tensor assemble_key(const at::Tensor& kv, const at::Tensor& k_rope, const at::Tensor& cos_sin,
                        const at::Tensor& positions, int64_t v_head_dim) {
  const int64_t T = kv.size(0), H = kv.size(1), N = kv.size(2) - v_head_dim, R = cos_sin.size(1);
  at::Tensor k = at::empty({T, H, N + R}, kv.options());
  kernels::rope_key_forward({.num_tokens = T,
                             .num_heads = H,
                             .nope_dim = N,
                             .value_dim = v_head_dim,
                             .table = table_of(cos_sin, positions),
                             .k_rope_stride = k_rope.stride(0),
                             .dtype = dtype_of(kv, "rope_key_value", "kv"),
                             .kv = kv.const_data_ptr(),
                             .k_rope = k_rope.const_data_ptr(),
                             .k = k.mutable_data_ptr()},
                            stream_of(kv));
  return k;
}

/// Gradients of kv and k_rope; dk or dv may be undefined (= 0).
Tensors split_key_gradient(const at::Tensor& dk_given, const at::Tensor& dv_given,
                           const at::Tensor& cos_sin, const at::Tensor& positions,
                           at::IntArrayRef kv_sizes, int64_t v_head_dim) {
  const at::Tensor dk = dk_given.defined() ? rows_contiguous(dk_given) : at::Tensor();
  const at::Tensor dv = dv_given.defined() ? rows_contiguous(dv_given) : at::Tensor();
  const at::Tensor& any = dk.defined() ? dk : dv;
  at::Tensor dkv = at::empty(kv_sizes, any.options());
  at::Tensor dk_rope = at::empty({kv_sizes[0], cos_sin.size(1)}, any.options());
  kernels::rope_key_backward({.num_tokens = kv_sizes[0],
                              .num_heads = kv_sizes[1],
                              .nope_dim = kv_sizes[2] - v_head_dim,
                              .value_dim = v_head_dim,
                              .table = table_of(cos_sin, positions),
                              .dk_token_stride = dk.defined() ? dk.stride(0) : 0,
                              .dk_head_stride = dk.defined() ? dk.stride(1) : 0,
                              .dv_token_stride = dv.defined() ? dv.stride(0) : 0,
                              .dv_head_stride = dv.defined() ? dv.stride(1) : 0,
                              .dtype = dtype_of(any, "rope_key_value", "gradient"),
                              .dk = dk.defined() ? dk.const_data_ptr() : nullptr,
                              .dv = dv.defined() ? dv.const_data_ptr() : nullptr,
                              .dkv = dkv.mutable_data_ptr(),
                              .dk_rope = dk_rope.mutable_data_ptr()},
                             stream_of(any));
  return {dkv, dk_rope};
}

}  // namespace

namespace {

void check_query(const at::Tensor& q, const at::Tensor& table, const at::Tensor& tokens) {
  check_shape(q, "rope_query", "q", {-1, -1, -1});
  check_number(q, "rope_query", "q");
  check_table("rope_query", table, tokens, q);
  require(q.size(2) >= table.size(1),
          "[rope_query] q: heads of {} are narrower than cos_sin's R = {}", q.size(2),
          table.size(1));
}

}  // namespace

at::Tensor rope_query(const at::Tensor& q, const at::Tensor& table, const at::Tensor& tokens) {
  const Range range("rope_query");
  check_query(q, table, tokens);
  const at::Tensor cos_sin = table.contiguous(), positions = tokens.contiguous();
  if (!has_kernel(q)) {
    const int64_t N = q.size(2) - cos_sin.size(1);
    const at::Tensor rotated = reference::rope(q.narrow(2, N, cos_sin.size(1)), cos_sin, positions);
    return at::cat({q.narrow(2, 0, N), rotated}, 2);
  }
  at::Tensor y = rotate_query(q, cos_sin, positions, false);
  if (recording({q})) {
    record("rope_query", {q}, {y}, [cos_sin, positions](const Tensors& grads) -> Tensors {
      if (!grads[0].defined()) return {at::Tensor()};
      return {rotate_query(grads[0], cos_sin, positions, true)};
    });
  }
  return y;
}

at::Tensor rope_query_(at::Tensor q, const at::Tensor& table, const at::Tensor& tokens) {
  const Range range("rope_query");
  check_query(q, table, tokens);
  if (!has_kernel(q) || !heads_contiguous(q) || !tokens_apart(q)) {
    return rope_query(q, table, tokens);
  }
  const at::Tensor cos_sin = table.contiguous(), positions = tokens.contiguous();
  at::Tensor y;
  {
    const NoRecord guard;
    y = q.detach();
    rotate_into(y, y, cos_sin, positions, false);
  }
  if (recording({q})) {
    record("rope_query", {q}, {y}, [cos_sin, positions](const Tensors& grads) -> Tensors {
      if (!grads[0].defined()) return {at::Tensor()};
      return {rotate_gradient(grads[0], cos_sin, positions)};
    });
  }
  return y;
}

std::tuple<at::Tensor, at::Tensor> rope_key_value(const at::Tensor& kv_given,
                                                  const at::Tensor& k_rope_given,
                                                  const at::Tensor& table, const at::Tensor& tokens,
                                                  int64_t v_head_dim) {
  constexpr const char* kOp = "rope_key_value";
  const Range range(kOp);
  check_shape(kv_given, kOp, "kv", {-1, -1, -1});
  check_number(kv_given, kOp, "kv");
  check_table(kOp, table, tokens, kv_given);
  check_shape(k_rope_given, kOp, "k_rope", {kv_given.size(0), table.size(1)});
  check_like(k_rope_given, kOp, "k_rope", kv_given, "kv");
  require(v_head_dim >= 0 && v_head_dim <= kv_given.size(2),
          "[{}] v_head_dim: expected 0 … {} (kv's heads), got {}", kOp, kv_given.size(2),
          v_head_dim);
  const at::Tensor cos_sin = table.contiguous(), positions = tokens.contiguous();
  const at::Tensor kv = kv_given.contiguous(), k_rope = rows_contiguous(k_rope_given);
  const int64_t N = kv.size(2) - v_head_dim;
  if (!has_kernel(kv)) {
    const at::Tensor rotated = reference::rope(k_rope, cos_sin, positions).unsqueeze(1);
    const at::Tensor shared = rotated.expand({kv.size(0), kv.size(1), rotated.size(2)});
    return {at::cat({kv.narrow(2, 0, N), shared}, 2), kv.narrow(2, N, v_head_dim)};
  }
  at::Tensor k, v;
  {
    const NoRecord guard;
    k = assemble_key(kv, k_rope, cos_sin, positions, v_head_dim);
    v = kv.detach().narrow(2, N, v_head_dim);
  }
  if (recording({kv, k_rope})) {
    record(kOp, {kv, k_rope}, {k, v},
           [cos_sin, positions, sizes = kv.sizes().vec(),
            v_head_dim](const Tensors& grads) -> Tensors {
             if (!grads[0].defined() && !grads[1].defined()) return {at::Tensor(), at::Tensor()};
             return split_key_gradient(grads[0], grads[1], cos_sin, positions, sizes, v_head_dim);
           });
  }
  return {k, v};
}

namespace reference {

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos_sin, const at::Tensor& positions) {
  const int64_t T = x.size(0), R = cos_sin.size(1);
  std::vector<int64_t> shape(x.dim(), 1);  // [T, 1, …, R/2], against x's pairs
  shape.front() = T;
  shape.back() = R / 2;
  const at::Tensor rows =
      cos_sin.index_select(0, positions.to(at::kLong)).to(x.scalar_type()).view({T, R / 2, 2});
  const at::Tensor c = rows.select(2, 0).reshape(shape), s = rows.select(2, 1).reshape(shape);
  const at::Tensor pairs = x.unflatten(-1, {R / 2, 2});
  const at::Tensor a = pairs.select(-1, 0), b = pairs.select(-1, 1);
  return at::stack({a.mul(c).sub(b.mul(s)), b.mul(c).add(a.mul(s))}, -1).flatten(-2);
}

}  // namespace reference
}  // namespace dsv3::ops
