// FP32 on the host: results and gradients err no more than 1.2 times what LibTorch's own operators
// err by in FP32, both against float64. BF16: in each operator's own test.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/silu.h>
#include <gtest/gtest.h>

#include <functional>
#include <utility>
#include <vector>

#include "ops/adamw.h"
#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/gate.h"
#include "ops/permute.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/router.h"
#include "ops/swiglu.h"
#include "support/gradients.h"

namespace dsv3::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

constexpr double kEps = 1e-6;
constexpr at::ScalarType kExact = at::kDouble;

at::Tensor weighed(const at::Tensor& y, const at::Tensor& g) {
  return y.mul(g.to(y.scalar_type())).sum();
}

class ErrorRatio : public ::testing::Test {
 protected:
  at::Tensor draw(at::IntArrayRef sizes, double std = 1.0) {
    return random_.normal(sizes, at::kFloat, at::kCPU, std);
  }
  at::Tensor ids(at::IntArrayRef sizes, int64_t end) { return random_.integers(sizes, end); }

  /// `forward` returns results, the last of them the objective; with the gradients of its inputs.
  static Tensors evaluate(const Tensors& inputs, at::ScalarType type,
                          const std::function<Tensors(const Tensors&)>& forward) {
    Tensors leaves;
    for (const auto& x : inputs) leaves.push_back(test::leaf(x, type));
    Tensors results = forward(leaves);
    results.back().backward();
    results.pop_back();
    for (const auto& x : leaves) results.push_back(x.grad());
    return results;
  }

  void expect_ratio(const Tensors& ours, const Tensors& theirs, const Tensors& exact) {
    SCOPED_TRACE(test::seed_text(seed_));
    ASSERT_EQ(ours.size(), exact.size());
    for (size_t i = 0; i < ours.size(); ++i) {
      EXPECT_LE(test::relative_error(ours[i], exact[i]),
                1.2 * test::relative_error(theirs[i], exact[i]))
          << "result " << i;
    }
  }
  /// The same where our forward, LibTorch's and the exact one share their inputs.
  void compare(const Tensors& inputs, const std::function<Tensors(const Tensors&)>& ours,
               const std::function<Tensors(const Tensors&)>& theirs) {
    expect_ratio(evaluate(inputs, at::kFloat, ours), evaluate(inputs, at::kFloat, theirs),
                 evaluate(inputs, kExact, theirs));
  }

 private:
  uint64_t seed_ = test::fresh_seed();
  test::Random random_{seed_};
};

const std::pair<int64_t, int64_t> kSizes[] = {{400, 1000}, {2048, 512}, {64, 7168}};

TEST_F(ErrorRatio, NormAndSwiglu) {
  for (const auto& [T, D] : kSizes) {
    SCOPED_TRACE(::testing::Message() << "T " << T << ", D " << D);
    const at::Tensor x = draw({T, D}), w = draw({D}), g = draw({T, D});
    const Weight weight = test::weight_of(w, at::kFloat, at::kCPU, at::kFloat);
    const at::Tensor leaf = test::leaf(x, at::kFloat);
    const at::Tensor y = rms_norm(leaf, weight, kEps).value;
    y.backward(g);
    const auto theirs = [&, D = D](const Tensors& in) -> Tensors {
      const at::Tensor z = at::rms_norm(in[0], {D}, in[1], kEps);
      return {z.detach(), weighed(z, g)};
    };
    expect_ratio({y, leaf.grad(), weight.grad}, evaluate({x, w}, at::kFloat, theirs),
                 evaluate({x, w}, kExact, theirs));
    compare(
        {draw({T, 2 * D}, 3.0)},
        [&](const Tensors& in) -> Tensors {
          const at::Tensor z = swiglu(in[0]).value;
          return {z.detach(), weighed(z, g)};
        },
        [&, D = D](const Tensors& in) -> Tensors {
          const at::Tensor z = at::silu(in[0].narrow(1, 0, D)).mul(in[0].narrow(1, D, D));
          return {z.detach(), weighed(z, g)};
        });
  }
}

TEST_F(ErrorRatio, CombineAndEmbedding) {
  for (const auto& [T, D] : kSizes) {
    SCOPED_TRACE(::testing::Message() << "T " << T << ", D " << D);
    const at::Tensor g = draw({T, D}), words = ids({T}, 50);
    const Permutation p = make_permutation(ids({T, 3}, 7), 7);
    const auto theirs = [&, T = T, D = D](const Tensors& in) -> Tensors {
      const at::Tensor chosen = in[0].index_select(0, p.row_of.flatten()).view({T, 3, D});
      const at::Tensor y = (chosen * in[1].unsqueeze(-1)).sum(1) + in[2];
      return {y.detach(), weighed(y, g)};
    };
    compare(
        {draw({3 * T, D}), draw({T, 3}), draw({T, D})},
        [&](const Tensors& in) -> Tensors {
          const at::Tensor y = combine(in[0], in[1], p, in[2]);
          return {y.detach(), weighed(y, g)};
        },
        theirs);
    const at::Tensor table = draw({50, D});
    const Weight rows = test::weight_of(table, at::kFloat, at::kCPU, at::kFloat);
    embedding(words, rows).backward(g);
    const auto their_rows = [&](const Tensors& in) -> Tensors {
      return {weighed(at::embedding(in[0], words), g)};
    };
    expect_ratio({rows.grad}, evaluate({table}, at::kFloat, their_rows),
                 evaluate({table}, kExact, their_rows));
  }
}

TEST_F(ErrorRatio, RotationRouterAndLoss) {
  const int64_t T = 400;
  const at::Tensor table = draw({50, 64}), where = ids({T}, 50), g = draw({T, 4, 64});
  compare(
      {draw({T, 4, 64})},
      [&](const Tensors& in) -> Tensors {
        const at::Tensor y = rope_query(in[0], table, where);
        return {y.detach(), weighed(y, g)};
      },
      [&](const Tensors& in) -> Tensors {
        const at::Tensor y = reference::rope(in[0], table, where);
        return {y.detach(), weighed(y, g)};
      });
  const at::Tensor d = draw({T, 8});
  for (const bool sigmoid : {true, false}) {
    const RouterOptions options{
        .num_experts = 256, .num_experts_per_token = 8, .sigmoid = sigmoid, .scale = 2.5};
    const auto with = [&](const auto& router) {
      return [&](const Tensors& in) -> Tensors {
        const Routing r = router(in[0], at::Tensor(), options, SequenceBalance{});
        return {r.weights.detach(), r.scores.detach(), weighed(r.weights, d)};
      };
    };
    compare({draw({T, 256})}, with(route), with(reference::route));
  }
  const at::Tensor labels = ids({T}, 3000), scale = at::full({}, 1.0 / T, at::kFloat);
  compare(
      {draw({T, 3000}, 2.0)},
      [&](const Tensors& in) -> Tensors {
        return {cross_entropy_(in[0].mul(1.0), labels, scale).objective};
      },
      [&](const Tensors& in) -> Tensors {
        return {at::cross_entropy_loss(in[0], labels.to(at::kLong))};
      });
}

TEST_F(ErrorRatio, AdamW) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "under sanitizers the bodies have no FMA, which LibTorch's have";
#endif
  const int64_t n = 50000;
  const at::Tensor w = draw({n}), g = draw({n}), m = draw({n}, 0.1), v = draw({n}, 0.1).abs();
  const AdamWStep step{.learning_rate = 0.01,
                       .weight_decay = 0.1,
                       .ema_decay = 0.999,
                       .correction1 = 1 - 0.9 * 0.9 * 0.9,
                       .correction2 = 1 - 0.95 * 0.95 * 0.95};
  const at::Tensor mean = draw({n}), before = mean.clone();
  const AdamWRange range{w.clone(), {}, g, m.clone(), v.clone(), mean};
  const AdamWRange exact = reference::adamw(range, step);
  adamw_(range, step);
  const at::Tensor w2 = w.clone(), m2 = m.clone(), v2 = v.clone();
  at::_fused_adamw_({w2}, {g}, {m2}, {v2}, {}, {at::full({}, 3.0, at::kFloat)}, 0.01, 0.9, 0.95,
                    0.1, 1e-8, false, false);
  const at::Tensor mean2 = before.lerp(w2, 1 - 0.999);
  // How far the mean moves, which its rounding hides: a thousandth of it.
  const auto moved = [&](const at::Tensor& x) { return x.to(kExact).sub(before); };
  expect_ratio({range.weights, range.exp_avg, range.exp_avg_sq, range.ema}, {w2, m2, v2, mean2},
               {exact.weights, exact.exp_avg, exact.exp_avg_sq, exact.ema});
  EXPECT_NEAR((moved(range.ema) * moved(exact.ema)).sum().item<double>() /
                  moved(exact.ema).square().sum().item<double>(),
              1.0, 3e-6)
      << "1 - 0.999 in FP32 is 1.3e-5 away from 0.001";
}

}  // namespace
}  // namespace dsv3::ops
