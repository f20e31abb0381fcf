#include "ops/checkpoint.h"

#include <ATen/TensorOperators.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <stdexcept>

#include "ops/autograd.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/swiglu.h"
#include "support/compare.h"
#include "support/gradients.h"
#include "support/random.h"

namespace dsv3::ops {
namespace {

using test::same_bits;

constexpr double kStart = 0.25;  // what a bucket already holds

class CheckpointTest : public testing::TestWithParam<test::Place> {
 protected:
  at::Device device() const { return GetParam().device; }
  at::ScalarType dtype() const { return GetParam().dtype; }

  void SetUp() override {
    norm_ = random_.normal({8}, dtype(), device(), 0.2, 1.0);
    up_ = random_.normal({16, 8}, dtype(), device());
    down_ = random_.normal({8, 8}, dtype(), device());
    x_ = random_.normal({5, 8}, dtype(), device());
    dy_ = random_.normal({5, 8}, dtype(), device());
    dz_ = random_.normal({5, 16}, dtype(), device());
  }

  /// Two layers with buckets that already hold something, and what their runs were like.
  struct Layers {
    Weight norm, up, down;
    std::vector<bool> runs;  // recomputing() of each
    // The memory of a result within.
    c10::weak_intrusive_ptr<c10::StorageImpl> inner{c10::intrusive_ptr<c10::StorageImpl>()};

    /// {y, nothing, z}
    Tensors operator()(const at::Tensor& x) {
      runs.push_back(recomputing());
      const at::Tensor z = linear(rms_norm(x, norm, 1e-6).value, up);
      const at::Tensor activated = swiglu(z).value;
      inner = activated.storage().getWeakStorageImpl();
      return {linear(activated, down), at::Tensor(), z};
    }
  };

  Layers layers() const {
    const auto bucket = dtype() == at::kDouble ? at::kDouble : at::kFloat;
    return {test::weight_of(norm_, dtype(), device(), bucket, kStart),
            test::weight_of(up_, dtype(), device(), bucket, kStart),
            test::weight_of(down_, dtype(), device(), bucket, kStart),
            {}};
  }

  at::Tensor leaf() const { return test::leaf(x_, dtype(), device()); }

  uint64_t seed_ = test::fresh_seed();
  test::Random random_{seed_};
  testing::ScopedTrace trace_{__FILE__, __LINE__, test::seed_text(seed_)};
  at::Tensor norm_, up_, down_, x_, dy_, dz_;
};

std::vector<test::Place> all_places() {
  auto result = test::places();
  for (const auto& device : test::devices()) result.push_back({device, at::kDouble});
  return result;
}

INSTANTIATE_TEST_SUITE_P(Places, CheckpointTest, testing::ValuesIn(all_places()), test::place_name);

TEST_P(CheckpointTest, OutputsAndGradientsAreThoseOfThePlainRunAddedOnce) {
  for (const bool both : {true, false}) {
    SCOPED_TRACE(both ? "both outputs used" : "one output used");
    Layers plain = layers(), again = layers();
    const at::Tensor x = leaf(), x_again = leaf();
    const Tensors expected = plain(x);
    const Tensors actual =
        checkpoint([&](const at::Tensor& input) { return again(input); }, x_again);
    ASSERT_EQ(actual.size(), 3u);
    EXPECT_TRUE(same_bits(actual[0], expected[0]));
    EXPECT_FALSE(actual[1].defined());
    EXPECT_TRUE(same_bits(actual[2], expected[2]));
    if (both) {
      test::backward({expected[0], expected[2]}, {dy_, dz_});
      test::backward({actual[0], actual[2]}, {dy_, dz_});
    } else {
      expected[2].backward(dz_);
      actual[2].backward(dz_);
    }
    EXPECT_TRUE(same_bits(x_again.grad(), x.grad()));
    EXPECT_TRUE(same_bits(again.norm.grad, plain.norm.grad));
    EXPECT_TRUE(same_bits(again.up.grad, plain.up.grad));
    EXPECT_TRUE(same_bits(again.down.grad, plain.down.grad));
    EXPECT_EQ(again.runs, (std::vector<bool>{false, true}));
    EXPECT_FALSE(recomputing());
  }
}

TEST_P(CheckpointTest, NothingInsideIsKept) {
  Layers plain = layers(), again = layers();
  const Tensors kept = plain(leaf());
  EXPECT_FALSE(plain.inner.expired()) << "the plain run keeps the second product's input";
  const Tensors outputs = checkpoint([&](const at::Tensor& input) { return again(input); }, leaf());
  EXPECT_TRUE(again.inner.expired());
  outputs[0].backward(dy_);
  EXPECT_TRUE(again.inner.expired()) << "freed again after backward";
}

TEST_P(CheckpointTest, WithoutRecordingItRunsOnce) {
  Layers once = layers();
  {
    const c10::AutoGradMode off(false);
    checkpoint([&](const at::Tensor& input) { return once(input); }, leaf());
  }
  EXPECT_EQ(once.runs, (std::vector<bool>{false}));
}

TEST_P(CheckpointTest, AFailureInTheSecondRunLeavesNoFlagBehind) {
  int runs = 0;
  Layers inner = layers();
  const Tensors outputs = checkpoint(
      [&](const at::Tensor& input) {
        if (++runs == 2) throw std::runtime_error("no memory");
        return inner(input);
      },
      leaf());
  EXPECT_THROW(outputs[0].backward(dy_), std::runtime_error);
  EXPECT_FALSE(recomputing());
  EXPECT_EQ(inner.up.grad.min().item<double>(), kStart);
  EXPECT_EQ(inner.up.grad.max().item<double>(), kStart);
}

}  // namespace
}  // namespace dsv3::ops
