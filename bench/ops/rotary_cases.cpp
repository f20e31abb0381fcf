// Rotary embedding of q, and K and V laid out for attention.
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/view_as_complex.h>
#include <ATen/ops/view_as_real.h>

#include "bench/ops/case.h"
#include "bench/ops/composed.h"
#include "kernels/rope.h"

namespace dsv3::bench {
namespace {

/// The table of S positions and each token's place in it, read once each.
int64_t table_bytes(const Problem& p) {
  return 4 * p.sequence() * p.shape.rope + 4 * p.tokens;
}

Plan plan_query(const Problem& p) {
  const int64_t head = p.shape.nope + p.shape.rope;
  return {{{"T", p.tokens},
           {"H", p.shape.heads},
           {"N", p.shape.nope},
           {"R", p.shape.rope},
           {"P", p.sequence()}},
          2 * p.tokens * p.shape.heads * head * p.element() + table_bytes(p)};
}

std::vector<std::pair<const char*, int64_t>> key_dims(const Problem& p) {
  return {{"T", p.tokens},     {"H", p.shape.heads},  {"N", p.shape.nope},
          {"R", p.shape.rope}, {"Vd", p.shape.value}, {"P", p.sequence()}};
}

Plan plan_key_forward(const Problem& p) {
  const auto& s = p.shape;
  const int64_t elements = p.tokens * (s.heads * (s.nope + s.nope + s.rope) + s.rope);
  return {key_dims(p), elements * p.element() + table_bytes(p)};
}

Plan plan_key_backward(const Problem& p) {
  const auto& s = p.shape;
  const int64_t read = s.nope + s.rope + s.value, written = s.nope + s.value;
  const int64_t elements = p.tokens * (s.heads * (read + written) + s.rope);
  return {key_dims(p), elements * p.element() + table_bytes(p)};
}

struct Tables {
  at::Tensor angles;     // [P, R/2] FP32
  at::Tensor cos_sin;    // [P, R] FP32 as our kernels read it
  at::Tensor rotations;  // [P, R/2] complex, as LibTorch multiplies by it
  at::Tensor positions;  // [T] int32
  kernels::RopeTable ours;
};

Tables make_tables(Setup& s) {
  const int64_t P = s.problem.sequence(), R = s.problem.shape.rope;
  Tables t;
  t.angles = s.normal32({P, R / 2});
  const at::Tensor pairs = at::stack({t.angles.cos(), t.angles.sin()}, -1).contiguous();
  t.cos_sin = s.keep(pairs.view({P, R}));
  t.rotations = s.keep(at::view_as_complex(pairs));
  t.positions = s.positions();
  t.ours = {.num_positions = P,
            .rope_dim = R,
            .cos_sin = t.cos_sin.const_data_ptr<float>(),
            .positions = t.positions.const_data_ptr<int32_t>()};
  return t;
}

/// x [T, H, R] rotated as the released inference code does it: complex products in FP32.
at::Tensor composed_rotation(const at::Tensor& x, const Tables& t) {
  const at::Tensor pairs = x.to(at::kFloat).unflatten(-1, {x.size(-1) / 2, 2}).contiguous();
  const at::Tensor rotations = t.rotations.index_select(0, t.positions).unsqueeze(1);
  return at::view_as_real(at::view_as_complex(pairs).mul(rotations))
      .flatten(-2)
      .to(x.scalar_type());
}

at::Tensor composed_query(const at::Tensor& q, const Tables& t, int64_t N) {
  return at::cat({q.narrow(2, 0, N), composed_rotation(q.narrow(2, N, q.size(2) - N), t)}, 2);
}

template <bool backward>
Work make_query(Setup& s) {
  const auto& shape = s.problem.shape;
  const int64_t T = s.problem.tokens, H = shape.heads, N = shape.nope, head = N + shape.rope;
  const Tables t = make_tables(s);
  const at::Tensor x = s.normal({T, H, head});
  const kernels::RopeQuery p{.num_tokens = T,
                             .num_heads = H,
                             .nope_dim = N,
                             .table = t.ours,
                             .inverse = backward,
                             .x_stride = H * head,
                             .y_stride = H * head,
                             .dtype = s.problem.dtype,
                             .x = x.const_data_ptr(),
                             .y = s.empty({T, H, head}).mutable_data_ptr()};
  const auto ours = [p, stream = s.stream()] { kernels::rope_query(p, stream); };
  if (!backward) return {ours, composed_forward([=] { composed_query(x, t, N); })};
  const at::Tensor input = leaf(x);
  return {ours, composed_backward(
                    [=]() -> std::vector<at::Tensor> { return {composed_query(input, t, N)}; },
                    {input}, {x})};
}

/// {k, v} of kv [T, H, N + Vd] and k_rope [T, R].
std::vector<at::Tensor> composed_key(const at::Tensor& kv, const at::Tensor& k_rope,
                                     const Tables& t, int64_t N) {
  const at::Tensor shared = composed_rotation(k_rope.unsqueeze(1), t);
  const at::Tensor k =
      at::cat({kv.narrow(2, 0, N), shared.expand({kv.size(0), kv.size(1), shared.size(2)})}, 2);
  return {k, kv.narrow(2, N, kv.size(2) - N)};
}

/// k_rope as the down-projection leaves it: R columns behind the C of the latent.
at::Tensor shared_key(Setup& s) {
  const auto& shape = s.problem.shape;
  return s.normal({s.problem.tokens, shape.kv_rank + shape.rope})
      .narrow(1, shape.kv_rank, shape.rope);
}

Work make_key_forward(Setup& s) {
  const auto& shape = s.problem.shape;
  const int64_t T = s.problem.tokens, H = shape.heads, N = shape.nope, Vd = shape.value;
  const Tables t = make_tables(s);
  const at::Tensor kv = s.normal({T, H, N + Vd}), k_rope = shared_key(s);
  const kernels::RopeKeyForward p{.num_tokens = T,
                                  .num_heads = H,
                                  .nope_dim = N,
                                  .value_dim = Vd,
                                  .table = t.ours,
                                  .k_rope_stride = k_rope.stride(0),
                                  .dtype = s.problem.dtype,
                                  .kv = kv.const_data_ptr(),
                                  .k_rope = k_rope.const_data_ptr(),
                                  .k = s.empty({T, H, N + shape.rope}).mutable_data_ptr()};
  return {[p, stream = s.stream()] { kernels::rope_key_forward(p, stream); },
          composed_forward([=] { composed_key(kv, k_rope, t, N); })};
}

Work make_key_backward(Setup& s) {
  const auto& shape = s.problem.shape;
  const int64_t T = s.problem.tokens, H = shape.heads, N = shape.nope, R = shape.rope,
                Vd = shape.value;
  const Tables t = make_tables(s);
  const at::Tensor dk = s.normal({T, H, N + R}), dv = s.normal({T, H, Vd});
  const kernels::RopeKeyBackward p{.num_tokens = T,
                                   .num_heads = H,
                                   .nope_dim = N,
                                   .value_dim = Vd,
                                   .table = t.ours,
                                   .dk_token_stride = H * (N + R),
                                   .dk_head_stride = N + R,
                                   .dv_token_stride = H * Vd,
                                   .dv_head_stride = Vd,
                                   .dtype = s.problem.dtype,
                                   .dk = dk.const_data_ptr(),
                                   .dv = dv.const_data_ptr(),
                                   .dkv = s.empty({T, H, N + Vd}).mutable_data_ptr(),
                                   .dk_rope = s.empty({T, R}).mutable_data_ptr()};
  const at::Tensor kv = leaf(s.normal({T, H, N + Vd})), k_rope = leaf(shared_key(s));
  return {
      [p, stream = s.stream()] { kernels::rope_key_backward(p, stream); },
      composed_backward([=] { return composed_key(kv, k_rope, t, N); }, {kv, k_rope}, {dk, dv})};
}

constexpr Benchmark kBenchmarks[] = {
    {"rope_query_forward", "the rope part of every head of q rotated, the rest copied", plan_query,
     make_query<false>},
    {"rope_query_backward", "rotated back", plan_query, make_query<true>},
    {"rope_key_forward", "k = [nope | rotated shared key] for every head", plan_key_forward,
     make_key_forward},
    {"rope_key_backward", "the up-projection's gradient and the shared key's, summed over heads",
     plan_key_backward, make_key_backward},
};

}  // namespace

std::span<const Benchmark> rotary_benchmarks() {
  return kBenchmarks;
}

}  // namespace dsv3::bench
