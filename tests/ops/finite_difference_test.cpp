// Gradients of the kernels, FP32 and BF16, against central differences of the same operator in
// float64. Norm, SwiGLU, router and loss by themselves: in their own tests.
#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/gate.h"
#include "ops/permute.h"
#include "ops/rms_norm.h"
#include "ops/rms_norm_fp8.h"
#include "ops/rope.h"
#include "ops/swiglu.h"
#include "ops/swiglu_fp8.h"
#include "support/finite_difference.h"
#include "support/gradients.h"

namespace dsv3::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

constexpr int64_t kTokens = 21;
constexpr double kEps = 1e-6;

/// One evaluation: leaves and weights with the values drawn, in one dtype. `weights` are inputs
/// whose gradients go into buckets.
struct Evaluation {
  Tensors leaves;
  std::vector<Weight> weights;

  at::ScalarType type() const {
    return leaves.empty() ? weights[0].value.scalar_type() : leaves[0].scalar_type();
  }
  at::Device device() const {
    return leaves.empty() ? weights[0].value.device() : leaves[0].device();
  }
  /// Σ y · g: g's dtype and device follow y's.
  static at::Tensor dot(const at::Tensor& y, const at::Tensor& g) {
    return y.mul(g.to(y.device(), y.scalar_type())).sum();
  }
  at::Tensor here(const at::Tensor& x) const { return x.to(device()); }
};

class Differences : public ::testing::TestWithParam<test::Place> {
 protected:
  at::Tensor draw(at::IntArrayRef sizes) { return random_.normal(sizes, GetParam().dtype); }
  at::Tensor draw32(at::IntArrayRef sizes) { return random_.normal(sizes, at::kFloat); }
  at::Tensor ids(at::IntArrayRef sizes, int64_t end) { return random_.integers(sizes, end); }

  /// Holds the gradients of `objective` at `leaves` (in the dtypes that they have) and `weights`
  /// against differences in float64.
  void check(const Tensors& leaves, const Tensors& weights,
             const std::function<at::Tensor(const Evaluation&)>& objective) {
    SCOPED_TRACE(test::seed_text(seed_));
    const auto [device, dtype] = GetParam();
    Evaluation kernel;
    for (const auto& x : leaves) kernel.leaves.push_back(test::leaf(x, x.scalar_type(), device));
    for (const auto& w : weights) {
      kernel.weights.push_back(test::weight_of(w, w.scalar_type(), device, at::kFloat));
    }
    objective(kernel).backward();
    Tensors inputs = leaves, gradients;
    for (const auto& x : kernel.leaves) gradients.push_back(x.grad());
    for (size_t i = 0; i < weights.size(); ++i) {
      inputs.push_back(weights[i]);
      gradients.push_back(kernel.weights[i].grad);
    }
    const auto exact = [&](const Tensors& in) {
      Evaluation wide;
      for (size_t i = 0; i < leaves.size(); ++i) wide.leaves.push_back(in[i]);
      for (size_t i = leaves.size(); i < in.size(); ++i) wide.weights.push_back({in[i], {}});
      return objective(wide).item<double>();
    };
    EXPECT_TRUE(test::agrees_with_differences(exact, inputs, gradients, random_,
                                              dtype == at::kFloat ? 1e-5 : 2e-2));
  }

 private:
  uint64_t seed_ = test::fresh_seed();
  test::Random random_{seed_};
};

TEST_P(Differences, NormWithResidualAndTwoNorms) {
  const at::Tensor x = draw({kTokens, 136}), r = draw({kTokens, 136}), w = draw({136}),
                   v = draw({136}), g = draw({kTokens, 136}), h = draw({kTokens, 136});
  check({x, r}, {w}, [&](const Evaluation& at) {
    const auto [sum, y] = add_rms_norm(at.leaves[0], at.leaves[1], at.weights[0], kEps);
    return at.dot(sum, g) + at.dot(y.value, h);
  });
  check({x}, {w, v}, [&](const Evaluation& at) {
    const auto [y, z] = rms_norm_pair(at.leaves[0], at.weights[0], at.weights[1], kEps);
    return at.dot(y.value, g) + at.dot(z.value, h);
  });
}

/// The rounding to FP8 is passed by: the gradient is that of the operator without it.
TEST_P(Differences, ThroughFp8) {
  const at::Tensor x = draw({kTokens, 136}), w = draw({136}), g = draw({kTokens, 136});
  check({x}, {w}, [&](const Evaluation& at) {
    const at::Tensor y = at.type() == at::kDouble
                             ? rms_norm(at.leaves[0], at.weights[0], kEps).value
                             : rms_norm_fp8(at.leaves[0], at.weights[0], kEps, {}, true).y;
    return at.dot(y, g);
  });
  const at::Tensor gate_up = draw({kTokens, 272}), share = draw32({kTokens});
  check({gate_up, share}, {}, [&](const Evaluation& at) {
    const SwigluFp8Options keeping{.quantize = {}, .keep = true};
    const at::Tensor y = at.type() == at::kDouble
                             ? reference::swiglu(at.leaves[0], at.leaves[1])
                             : swiglu_fp8(at.leaves[0], at.leaves[1], keeping).y;
    return at.dot(y, g);
  });
}

TEST_P(Differences, Rotation) {
  const at::Tensor table = draw32({30, 16}), where = ids({kTokens}, 30);
  const at::Tensor q = draw({kTokens, 3, 24}), kv = draw({kTokens, 3, 20}),
                   shared = draw({kTokens, 16}), g = draw({kTokens, 3, 24}),
                   h = draw({kTokens, 3, 12});
  check({q}, {}, [&](const Evaluation& at) {
    return at.dot(rope_query(at.leaves[0], at.here(table), at.here(where)), g);
  });
  check({q}, {}, [&](const Evaluation& at) {
    return at.dot(rope_query_(at.leaves[0].mul(1.0), at.here(table), at.here(where)), g);
  });
  check({kv, shared}, {}, [&](const Evaluation& at) {
    const auto [k, v] =
        rope_key_value(at.leaves[0], at.leaves[1], at.here(table), at.here(where), 12);
    return at.dot(k, g) + at.dot(v, h);
  });
}

TEST_P(Differences, PermuteAndCombine) {
  const at::Tensor experts = ids({kTokens, 3}, 5);
  for (const int64_t multiple : {1, 8}) {
    const int64_t rows = make_permutation(experts, 5, multiple).choice_of.size(0);
    const at::Tensor x = draw({kTokens, 40}), given = draw({rows, 40}), w = draw32({kTokens, 3}),
                     base = draw({kTokens, 40}), g = draw({rows, 40}), h = draw({kTokens, 40});
    check({x}, {}, [&](const Evaluation& at) {
      const Permutation p = make_permutation(at.here(experts), 5, multiple);
      return at.dot(permute(at.leaves[0], p), g);
    });
    check({given, w, base}, {}, [&](const Evaluation& at) {
      const Permutation p = make_permutation(at.here(experts), 5, multiple);
      return at.dot(combine(at.leaves[0], at.leaves[1], p, at.leaves[2]), h);
    });
  }
}

TEST_P(Differences, Embedding) {
  const at::Tensor words = ids({kTokens}, 7), table = draw({9, 40}), g = draw({kTokens, 40});
  check({}, {table},
        [&](const Evaluation& at) { return at.dot(embedding(at.here(words), at.weights[0]), g); });
}

TEST_P(Differences, GateAndHead) {
  const at::Tensor x = draw({kTokens, 40}), w = draw32({6, 40}), g = draw32({kTokens, 6});
  check({x}, {w}, [&](const Evaluation& at) {
    return at.dot(gate({at.leaves[0], {}}, at.weights[0]), g);
  });
  at::Tensor labels = ids({kTokens}, 50);
  labels[3] = kIgnoreLabel;
  const at::Tensor head = draw({50, 40}).mul(0.3);
  check({x}, {head}, [&](const Evaluation& at) {
    const auto number = at.type() == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor scale = at::full({}, 0.125, at::TensorOptions(number).device(at.device()));
    return head_cross_entropy(at.leaves[0], at.weights[0], at.here(labels), scale).objective;
  });
}

INSTANTIATE_TEST_SUITE_P(Places, Differences, ::testing::ValuesIn(test::places()),
                         test::place_name);

}  // namespace
}  // namespace dsv3::ops
