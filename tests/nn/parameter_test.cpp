#include "nn/parameter.h"

#include <ATen/ops/arange.h>
#include <gtest/gtest.h>

#include <stdexcept>

namespace dsv3 {
namespace {

ParameterSpec matrix(const std::string& name, int64_t rows, int64_t cols) {
  return {.name = name, .shape = {rows, cols}, .pieces = {{.name = name, .row_end = rows}}};
}

ParameterSpec norm(const std::string& name, int64_t size) {
  return {.name = name,
          .shape = {size},
          .pieces = {{.name = name, .row_end = size}},
          .decay = false,
          .init = Init::kOnes};
}

ParameterSpec experts(const std::string& name, int64_t count, int64_t rows, int64_t cols) {
  ParameterSpec spec{.name = name,
                     .shape = {count, rows, cols},
                     .pieces = {},
                     .expert = true,
                     .active_fraction = 0.25};
  for (int64_t e = 0; e < count; ++e) {
    spec.pieces.push_back({name + "." + std::to_string(e) + ".a", e, 0, rows / 2});
    spec.pieces.push_back({name + "." + std::to_string(e) + ".b", e, rows / 2, rows});
  }
  return spec;
}

TEST(ParameterSet, BucketsGroupByPrecisionExpertAndDecay) {
  ParameterSet set;
  auto& n = set.declare(norm("norm", 5));
  auto& w = set.declare(matrix("w", 3, 5));
  auto& e = set.declare(experts("e", 4, 2, 3));
  auto gate_spec = matrix("gate", 4, 5);
  gate_spec.float32 = true;
  auto& gate = set.declare(gate_spec);
  auto bias_spec = norm("bias", 4);
  bias_spec.trainable = false;
  auto& bias = set.declare(bias_spec);
  set.allocate({.dtype = DType::kBF16, .gradient_dtype = DType::kF32});

  ASSERT_EQ(set.buckets().size(), 3u);
  EXPECT_EQ(w.bucket, n.bucket);
  EXPECT_LT(w.offset, set.buckets()[0].decay_end);  // decayed first, though declared later
  EXPECT_GE(n.offset, set.buckets()[0].decay_end);
  EXPECT_TRUE(set.buckets()[static_cast<size_t>(e.bucket)].expert);
  EXPECT_EQ(w.value().scalar_type(), at::kBFloat16);
  EXPECT_EQ(w.weight.grad.scalar_type(), at::kFloat);
  EXPECT_EQ(gate.value().scalar_type(), at::kFloat);
  EXPECT_EQ(bias.bucket, -1);
  EXPECT_FALSE(bias.value().requires_grad());
  EXPECT_TRUE(w.value().requires_grad());
  EXPECT_EQ(set.total_parameters(), 5 + 15 + 24 + 20);
  EXPECT_DOUBLE_EQ(set.active_parameters(), 5 + 15 + 6 + 20);
}

TEST(ParameterSet, ParametersAreViewsOfTheirBucket) {
  ParameterSet set;
  auto& w = set.declare(matrix("w", 3, 5));
  set.allocate({.dtype = DType::kF32});
  set.buckets()[0].values.fill_(7);
  EXPECT_EQ(w.value().detach().sum().item<float>(), 7 * 15);
  w.weight.grad.fill_(2);
  set.zero_gradients();
  EXPECT_EQ(w.weight.grad.sum().item<float>(), 0);
}

TEST(ParameterSet, NumbersDependOnSeedNameAndIndexOnly) {
  ParameterSet first, second, other_seed;
  auto& a = first.declare(matrix("w", 40, 50));
  first.allocate({.dtype = DType::kF32});
  first.initialize(3);
  second.declare(matrix("before", 7, 3));
  auto& b = second.declare(matrix("w", 40, 50));
  second.allocate({.dtype = DType::kF32});
  second.initialize(3);
  auto& c = other_seed.declare(matrix("w", 40, 50));
  other_seed.allocate({.dtype = DType::kF32});
  other_seed.initialize(4);
  EXPECT_TRUE(a.value().equal(b.value()));
  EXPECT_FALSE(a.value().equal(c.value()));
  EXPECT_NEAR(a.value().detach().std().item<float>(), 0.006, 0.0005);
}

TEST(ParameterSet, PieceViewsCoverFusedParameters) {
  ParameterSet set;
  auto& e = set.declare(experts("e", 2, 4, 3));
  set.allocate({.dtype = DType::kF32});
  const at::Tensor whole = at::arange(24).view({2, 4, 3});
  const at::Tensor view = e.piece_view(e.spec.pieces[3], whole);  // expert 1, rows 2..4
  EXPECT_EQ(view.size(0), 2);
  EXPECT_EQ(view[0][0].item<int64_t>(), 18);
}

TEST(ParameterSet, WrongDeclarationsAreRefused) {
  ParameterSet set;
  set.declare(matrix("w", 3, 5));
  EXPECT_THROW(set.declare(matrix("w", 3, 5)), std::logic_error);
  auto hole = matrix("hole", 3, 5);
  hole.pieces[0].row_end = 2;
  EXPECT_THROW(set.declare(hole), std::logic_error);
}

}  // namespace
}  // namespace dsv3
