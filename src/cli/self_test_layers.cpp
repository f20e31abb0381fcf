// Self-tests of the operators that work on each token alone, of the matrix products and of
// attention.
#include <ATen/ops/cat.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "cli/self_test.h"
#include "ops/attention.h"
#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/swiglu.h"

namespace dsv3::cli {
namespace {

constexpr int64_t kTokens = 37;

at::Tensor leaf64(const at::Tensor& host) {
  return host.clone().requires_grad_(true);
}

ops::Weight weight_of(const SelfTestSetup& setup, const at::Tensor& host) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(setup.device);
  return {setup.place(host), at::zeros(host.sizes(), options)};
}

/// Gradients of both through the same random `upstream`.
void backward_both(const SelfTestSetup& setup, const at::Tensor& got, const at::Tensor& expected,
                   const at::Tensor& upstream) {
  got.backward(upstream.to(setup.device, got.scalar_type()));
  expected.backward(upstream);
}

SelfTestPairs test_rms_norm(SelfTestSetup& setup) {
  const at::Tensor x = setup.normal({kTokens, 96}), w = setup.normal({96});
  const at::Tensor x_got = setup.place(x), x_expected = leaf64(x), w_expected = leaf64(w);
  const ops::Weight weight = weight_of(setup, w);
  const at::Tensor got = ops::rms_norm(x_got, weight, 1e-6).value;
  const at::Tensor expected = ops::reference::rms_norm(x_expected, w_expected, 1e-6);
  backward_both(setup, got, expected, setup.normal({kTokens, 96}));
  return {{got, expected}, {x_got.grad(), x_expected.grad()}, {weight.grad, w_expected.grad()}};
}

SelfTestPairs test_swiglu(SelfTestSetup& setup) {
  const at::Tensor x = setup.normal({kTokens, 2 * 72});
  const at::Tensor x_got = setup.place(x), x_expected = leaf64(x);
  const at::Tensor got = ops::swiglu(x_got).value;
  const at::Tensor expected = ops::reference::swiglu(x_expected);
  backward_both(setup, got, expected, setup.normal({kTokens, 72}));
  return {{got, expected}, {x_got.grad(), x_expected.grad()}};
}

SelfTestPairs test_weighted_swiglu(SelfTestSetup& setup) {
  const at::Tensor x = setup.normal({kTokens, 2 * 72});
  const at::Tensor w = setup.normal({kTokens}).to(at::kFloat).to(at::kDouble);
  const at::Tensor x_got = setup.place(x), x_expected = leaf64(x), w_expected = leaf64(w);
  const at::Tensor w_got = w.to(setup.device, at::kFloat).clone().requires_grad_(true);
  const at::Tensor got = ops::weighted_swiglu(x_got, w_got).value;
  const at::Tensor expected = ops::reference::swiglu(x_expected, w_expected);
  backward_both(setup, got, expected, setup.normal({kTokens, 72}));
  return {{got, expected}, {x_got.grad(), x_expected.grad()}, {w_got.grad(), w_expected.grad()}};
}

SelfTestPairs test_rms_norm_pair(SelfTestSetup& setup) {
  const at::Tensor x = setup.normal({kTokens, 96}), w = setup.normal({2, 96});
  const at::Tensor x_got = setup.place(x), x_expected = leaf64(x), w_expected = leaf64(w);
  const ops::Weight first = weight_of(setup, w[0]), second = weight_of(setup, w[1]);
  const auto both = ops::rms_norm_pair(x_got, first, second, 1e-6);
  const at::Tensor got = at::cat({both.first.value, both.second.value}, 1);
  const at::Tensor expected = at::cat({ops::reference::rms_norm(x_expected, w_expected[0], 1e-6),
                                       ops::reference::rms_norm(x_expected, w_expected[1], 1e-6)},
                                      1);
  backward_both(setup, got, expected, setup.normal({kTokens, 2 * 96}));
  return {{got, expected},
          {x_got.grad(), x_expected.grad()},
          {at::cat({first.grad, second.grad}), w_expected.grad().flatten()}};
}

/// cos and sin of `positions` positions, interleaved, for a rope part of `dim`; FP32 on the host.
at::Tensor rotary_table(int64_t positions, int64_t dim) {
  at::Tensor table = at::zeros({positions, dim}, at::kFloat);
  float* data = table.data_ptr<float>();
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t i = 0; i < dim / 2; ++i) {
      const double angle = static_cast<double>(p) * std::pow(1e4, -2.0 * i / dim);
      data[p * dim + 2 * i] = static_cast<float>(std::cos(angle));
      data[p * dim + 2 * i + 1] = static_cast<float>(std::sin(angle));
    }
  }
  return table;
}

SelfTestPairs test_rope_query(SelfTestSetup& setup) {
  constexpr int64_t kNope = 24, kRope = 16, kHeads = 3;
  const at::Tensor q = setup.normal({kTokens, kHeads, kNope + kRope});
  const at::Tensor table = rotary_table(64, kRope), positions = setup.integers({kTokens}, 64);
  const at::Tensor q_got = setup.place(q), q_expected = leaf64(q);
  // In place on a copy, as the model does with a fresh product.
  const at::Tensor got = ops::rope_query_(q_got.clone(), setup.move(table), setup.move(positions));
  const at::Tensor expected =
      at::cat({q_expected.narrow(-1, 0, kNope),
               ops::reference::rope(q_expected.narrow(-1, kNope, kRope), table, positions)},
              -1);
  backward_both(setup, got, expected, setup.normal(q.sizes()));
  return {{got, expected}, {q_got.grad(), q_expected.grad()}};
}

SelfTestPairs test_rope_key_value(SelfTestSetup& setup) {
  constexpr int64_t kNope = 24, kRope = 16, kHeads = 3, kValue = 20;
  const at::Tensor kv = setup.normal({kTokens, kHeads, kNope + kValue});
  const at::Tensor shared = setup.normal({kTokens, kRope});
  const at::Tensor table = rotary_table(64, kRope), positions = setup.integers({kTokens}, 64);
  const at::Tensor kv_got = setup.place(kv), kv_expected = leaf64(kv);
  const at::Tensor shared_got = setup.place(shared), shared_expected = leaf64(shared);
  const auto [k, v] =
      ops::rope_key_value(kv_got, shared_got, setup.move(table), setup.move(positions), kValue);
  const at::Tensor got = at::cat({k, v}, -1);
  const at::Tensor rotated = ops::reference::rope(shared_expected, table, positions);
  const at::Tensor expected = at::cat(
      {kv_expected.narrow(-1, 0, kNope), rotated.unsqueeze(1).expand({kTokens, kHeads, kRope}),
       kv_expected.narrow(-1, kNope, kValue)},
      -1);
  backward_both(setup, got, expected, setup.normal(expected.sizes()));
  return {{got, expected},
          {kv_got.grad(), kv_expected.grad()},
          {shared_got.grad(), shared_expected.grad()}};
}

SelfTestPairs test_embedding(SelfTestSetup& setup) {
  const at::Tensor table = setup.normal({29, 48}), ids = setup.integers({kTokens}, 29);
  const ops::Weight weight = weight_of(setup, table);
  const at::Tensor table_expected = leaf64(table);
  const at::Tensor got = ops::embedding(setup.move(ids), weight);
  const at::Tensor expected = at::index_select(table_expected, 0, ids);
  backward_both(setup, got, expected, setup.normal({kTokens, 48}));
  return {{got, expected}, {weight.grad, table_expected.grad()}};
}

SelfTestPairs test_linear(SelfTestSetup& setup) {
  const at::Tensor x = setup.normal({kTokens, 64}), w = setup.normal({80, 64});
  const at::Tensor x_got = setup.place(x), x_expected = leaf64(x), w_expected = leaf64(w);
  const ops::Weight weight = weight_of(setup, w);
  const at::Tensor got = ops::linear(x_got, weight);
  const at::Tensor expected = at::matmul(x_expected, w_expected.t());
  backward_both(setup, got, expected, setup.normal({kTokens, 80}));
  return {{got, expected}, {x_got.grad(), x_expected.grad()}, {weight.grad, w_expected.grad()}};
}

SelfTestPairs test_grouped_linear(SelfTestSetup& setup) {
  const std::vector<int32_t> ends = {9, 9, 30, 37};  // the second expert has no rows
  const at::Tensor x = setup.normal({kTokens, 64}), w = setup.normal({4, 80, 64});
  const at::Tensor x_got = setup.place(x), x_expected = leaf64(x), w_expected = leaf64(w);
  const ops::Weight weight = weight_of(setup, w);
  const at::Tensor offsets = setup.move(at::tensor(ends, at::kInt));
  const at::Tensor got = ops::grouped_linear({x_got, {}}, weight, offsets);
  std::vector<at::Tensor> parts;
  for (size_t e = 0; e < ends.size(); ++e) {
    const int64_t begin = e == 0 ? 0 : ends[e - 1];
    parts.push_back(at::matmul(x_expected.narrow(0, begin, ends[e] - begin),
                               w_expected.select(0, static_cast<int64_t>(e)).t()));
  }
  const at::Tensor expected = at::cat(parts, 0);
  backward_both(setup, got, expected, setup.normal({kTokens, 80}));
  return {{got, expected}, {x_got.grad(), x_expected.grad()}, {weight.grad, w_expected.grad()}};
}

SelfTestPairs test_attention(SelfTestSetup& setup) {
  constexpr int64_t kSequences = 2, kLength = 67, kHeads = 2;
  ops::AttentionInputs got_inputs, expected_inputs;
  const auto draw = [&](int64_t dim, at::Tensor& got, at::Tensor& expected) {
    const at::Tensor x = setup.normal({kSequences * kLength, kHeads, dim});
    got = setup.place(x);
    expected = leaf64(x);
  };
  draw(192, got_inputs.q, expected_inputs.q);
  draw(192, got_inputs.k, expected_inputs.k);
  draw(128, got_inputs.v, expected_inputs.v);
  const ops::AttentionOptions options{
      .num_sequences = kSequences, .scale = 1.0 / std::sqrt(192.0), .documents = {}, .remake = {}};
  const at::Tensor got = ops::attention(got_inputs, options);
  const at::Tensor expected = ops::reference::attention(expected_inputs, options);
  backward_both(setup, got, expected, setup.normal(expected.sizes()));
  return {{got, expected},
          {got_inputs.q.grad(), expected_inputs.q.grad()},
          {got_inputs.k.grad(), expected_inputs.k.grad()},
          {got_inputs.v.grad(), expected_inputs.v.grad()}};
}

SelfTestPairs test_head_cross_entropy(SelfTestSetup& setup) {
  constexpr int64_t kVocabulary = 101;
  const at::Tensor hidden = setup.normal({kTokens, 64});
  const at::Tensor w = setup.normal({kVocabulary, 64}).mul(0.125).to(setup.dtype).to(at::kDouble);
  at::Tensor labels = setup.integers({kTokens}, kVocabulary);
  labels.data_ptr<int32_t>()[3] = ops::kIgnoreLabel;
  const at::Tensor h_got = setup.place(hidden), h_expected = leaf64(hidden);
  const at::Tensor w_expected = leaf64(w);
  const ops::Weight weight = weight_of(setup, w);
  const double scale = 1.0 / (kTokens - 1);
  const ops::HeadLoss got = ops::head_cross_entropy(h_got, weight, setup.move(labels),
                                                    setup.move(at::tensor(scale, at::kFloat)));
  const at::Tensor losses =
      ops::reference::cross_entropy(at::matmul(h_expected, w_expected.t()), labels);
  const at::Tensor expected = losses.sum().mul(scale);
  got.objective.backward();
  expected.backward();
  return {{got.objective, expected},
          {got.loss_sum, losses.sum()},
          {h_got.grad(), h_expected.grad()},
          {weight.grad, w_expected.grad()}};
}

}  // namespace

std::vector<SelfTest> layer_self_tests() {
  return {{"rms_norm", test_rms_norm},
          {"rms_norm_pair", test_rms_norm_pair},
          {"swiglu", test_swiglu},
          {"weighted_swiglu", test_weighted_swiglu},
          {"rope_query", test_rope_query},
          {"rope_key_value", test_rope_key_value},
          {"embedding", test_embedding},
          {"linear", test_linear},
          {"grouped_linear", test_grouped_linear},
          {"attention", test_attention},
          {"head_cross_entropy", test_head_cross_entropy}};
}

}  // namespace dsv3::cli
