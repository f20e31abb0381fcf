#include "ops/permute.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "support/compare.h"
#include "support/random.h"

namespace dsv3::ops {
namespace {

using test::close;
using test::close_to_terms;
using test::same_bits;

class PermuteTest : public testing::TestWithParam<at::Device> {};
INSTANTIATE_TEST_SUITE_P(Devices, PermuteTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) {
                           return std::string(info.param.is_cuda() ? "cuda" : "cpu");
                         });

struct Case {
  int64_t num_tokens, k, num_experts;
};

const std::vector<Case> kCases = {{0, 2, 4},      {1, 1, 1},      {1, 8, 512},  {5, 3, 7},
                                  {129, 2, 8},    {511, 2, 3},    {513, 2, 40}, {700, 8, 64},
                                  {5000, 4, 256}, {3000, 16, 512}};

void expect_permutation(const at::Tensor& experts, int64_t num_experts) {
  const Permutation actual = make_permutation(experts, num_experts);
  // Plain loops: expert by expert, token by token.
  const at::Tensor ids = experts.cpu().flatten();
  std::vector<int32_t> counts, offsets, choice_of, row_of(static_cast<size_t>(ids.numel()));
  for (int32_t e = 0; e < num_experts; ++e) {
    const size_t before = choice_of.size();
    for (int64_t i = 0; i < ids.numel(); ++i) {
      if (ids.const_data_ptr<int32_t>()[i] != e) continue;
      row_of[static_cast<size_t>(i)] = static_cast<int32_t>(choice_of.size());
      choice_of.push_back(static_cast<int32_t>(i));
    }
    counts.push_back(static_cast<int32_t>(choice_of.size() - before));
    offsets.push_back(static_cast<int32_t>(choice_of.size()));
  }
  const auto values = [](const at::Tensor& x) {
    const at::Tensor flat = x.cpu().contiguous();
    const auto* data = flat.const_data_ptr<int32_t>();
    return std::vector<int32_t>(data, data + flat.numel());
  };
  EXPECT_EQ(values(actual.counts), counts);
  EXPECT_EQ(values(actual.offsets), offsets);
  EXPECT_EQ(values(actual.row_of), row_of);
  EXPECT_EQ(values(actual.choice_of), choice_of);
  const Permutation slow = reference::make_permutation(experts, num_experts);
  EXPECT_EQ(values(slow.counts), counts);
  EXPECT_EQ(values(slow.offsets), offsets);
  EXPECT_EQ(values(slow.row_of), row_of);
  EXPECT_EQ(values(slow.choice_of), choice_of);
}

TEST_P(PermuteTest, SortsChoicesStablyByExpert) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [num_tokens, k, num_experts] : kCases) {
    SCOPED_TRACE(testing::Message() << "T " << num_tokens << ", K " << k << ", E " << num_experts);
    expect_permutation(random.integers({num_tokens, k}, num_experts, GetParam()), num_experts);
    // Few experts used: most are empty.
    expect_permutation(random.integers({num_tokens, k}, (num_experts + 7) / 8, GetParam()),
                       num_experts);
    expect_permutation(
        at::full({num_tokens, k}, num_experts - 1, at::TensorOptions(at::kInt).device(GetParam())),
        num_experts);
  }
}

TEST(PermuteErrors, NameWhatIsWrong) {
  const auto ints = at::TensorOptions(at::kInt);
  EXPECT_THROW(make_permutation(at::full({2, 2}, 4, ints), 4), std::invalid_argument);
  EXPECT_THROW(make_permutation(at::full({2, 2}, -1, ints), 4), std::invalid_argument);
  EXPECT_THROW(make_permutation(at::zeros({2, 2}), 4), std::invalid_argument);
  const Permutation permutation = make_permutation(at::zeros({2, 2}, ints), 4);
  EXPECT_THROW(permute(at::zeros({3, 8}), permutation), std::invalid_argument);
  EXPECT_THROW(combine(at::zeros({3, 8}), at::zeros({2, 2}), permutation, {}),
               std::invalid_argument);
  EXPECT_THROW(combine(at::zeros({4, 8}), at::zeros({2, 2}, at::kBFloat16), permutation, {}),
               std::invalid_argument);
  EXPECT_THROW(combine(at::zeros({4, 8}), at::zeros({2, 2}), permutation, at::zeros({2, 9})),
               std::invalid_argument);
}

/// 1, 7, 8, 24: below, beside and on the 8-element vectors; 600 and 2056: more than one tile, block
/// or step.
const std::vector<int64_t> kHidden = {1, 7, 8, 24, 600, 2056};

TEST_P(PermuteTest, PermuteAgreesWithTheReference) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t hidden : kHidden) {
      for (const auto& [num_tokens, k] :
           std::vector<std::pair<int64_t, int64_t>>{{0, 2}, {1, 1}, {21, 3}, {6, 8}}) {
        SCOPED_TRACE(testing::Message() << c10::toString(dtype) << ", T " << num_tokens << ", D "
                                        << hidden << ", K " << k);
        const Permutation permutation =
            make_permutation(random.integers({num_tokens, k}, 6, GetParam()), 6);
        at::Tensor x =
            random.normal({num_tokens, hidden}, dtype, GetParam()).set_requires_grad(true);
        at::Tensor exact = x.detach().to(at::kDouble).set_requires_grad(true);
        const at::Tensor y = permute(x, permutation);
        const at::Tensor expected = reference::permute(exact, permutation);
        EXPECT_TRUE(same_bits(y, expected.to(dtype)));
        const at::Tensor dy = random.normal(y.sizes(), dtype, GetParam());
        y.backward(dy);
        expected.backward(dy.to(at::kDouble));
        EXPECT_TRUE(close(x.grad(), exact.grad(), test::tolerance(dtype)));
      }
    }
  }
}

/// A leaf in float64, of the values or of their absolute values.
at::Tensor exact(const at::Tensor& x, bool absolute = false) {
  if (!x.defined()) return x;
  const at::Tensor wide = x.detach().to(at::kDouble);
  return (absolute ? wide.abs() : wide).set_requires_grad(true);
}

void expect_combine(test::Random& random, at::ScalarType dtype, int64_t num_tokens, int64_t k,
                    int64_t hidden, bool with_base, at::Device device) {
  const Permutation permutation = make_permutation(random.integers({num_tokens, k}, 6, device), 6);
  const auto leaf = [&](at::IntArrayRef sizes, at::ScalarType type) {
    return random.normal(sizes, type, device).set_requires_grad(true);
  };
  const at::Tensor rows = leaf({num_tokens * k, hidden}, dtype);
  const at::Tensor weights = leaf({num_tokens, k}, at::kFloat);
  const at::Tensor base = with_base ? leaf({num_tokens, hidden}, dtype) : at::Tensor();
  const at::Tensor dy = random.normal({num_tokens, hidden}, dtype, device);

  const at::Tensor y = combine(rows, weights, permutation, base);
  y.backward(dy);
  const at::Tensor exact_rows = exact(rows), exact_weights = exact(weights);
  const at::Tensor expected = combine(exact_rows, exact_weights, permutation, exact(base));
  expected.backward(dy.to(at::kDouble));
  // The same sums over absolute values: what rounding errors are measured against.
  const at::Tensor term_weights = exact(weights, true);
  const at::Tensor terms = combine(exact(rows, true), term_weights, permutation, exact(base, true));
  terms.backward(dy.to(at::kDouble).abs());

  EXPECT_EQ(y.scalar_type(), dtype);
  EXPECT_TRUE(close_to_terms(y, expected, terms, test::tolerance(dtype)));
  EXPECT_TRUE(close(rows.grad(), exact_rows.grad(), test::tolerance(dtype)));
  // FP32 sums of the stored values, whatever their dtype.
  EXPECT_TRUE(close_to_terms(weights.grad(), exact_weights.grad(), term_weights.grad(), 2e-6));
  if (with_base) {
    EXPECT_TRUE(same_bits(base.grad(), dy));
  }
}

TEST_P(PermuteTest, CombineAgreesWithTheReference) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const std::vector<std::pair<int64_t, int64_t>> shapes = {{0, 2}, {1, 1}, {21, 3}, {6, 8}, {9, 6}};
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t hidden : kHidden) {
      for (const auto& [num_tokens, k] : shapes) {
        for (const bool with_base : {true, false}) {
          SCOPED_TRACE(testing::Message() << c10::toString(dtype) << ", T " << num_tokens << ", D "
                                          << hidden << ", K " << k << (with_base ? ", base" : ""));
          expect_combine(random, dtype, num_tokens, k, hidden, with_base, GetParam());
        }
      }
    }
  }
}

TEST_P(PermuteTest, CombineRoundsOnce) {
  // BF16 near 1 steps by 2^-7: rounding after each term would lose all four of 2^-9.
  const auto bf16 = at::TensorOptions(at::kBFloat16).device(GetParam());
  const Permutation permutation = make_permutation(at::zeros({1, 4}, bf16.dtype(at::kInt)), 1);
  const at::Tensor rows = at::full({4, 16}, 0x1p-9, bf16);
  const at::Tensor weights = at::full({1, 4}, 1.0, bf16.dtype(at::kFloat));
  const at::Tensor y = combine(rows, weights, permutation, at::full({1, 16}, 1.0, bf16));
  EXPECT_EQ(y[0][3].item<double>(), 1.0 + 0x1p-7);
}

TEST_P(PermuteTest, FrozenInputsGetNoGradient) {
  test::Random random(test::fresh_seed());
  const Permutation permutation = make_permutation(random.integers({6, 2}, 3, GetParam()), 3);
  const at::Tensor rows = random.normal({12, 16}, at::kFloat, GetParam());
  at::Tensor weights = random.normal({6, 2}, at::kFloat, GetParam()).set_requires_grad(true);
  combine(rows, weights, permutation, {}).sum().backward();
  EXPECT_FALSE(rows.grad().defined());
  EXPECT_TRUE(weights.grad().defined());
}

TEST_P(PermuteTest, TwoRunsGiveTheSameBits) {
  test::Random random(test::fresh_seed());
  const at::Tensor experts = random.integers({3000, 6}, 64, GetParam());
  const Permutation a = make_permutation(experts, 64), b = make_permutation(experts, 64);
  EXPECT_TRUE(same_bits(a.row_of, b.row_of));
  const at::Tensor rows = random.normal({18000, 40}, at::kBFloat16, GetParam());
  const at::Tensor weights = random.normal({3000, 6}, at::kFloat, GetParam());
  EXPECT_TRUE(same_bits(combine(rows, weights, a, {}), combine(rows, weights, b, {})));
}

}  // namespace
}  // namespace dsv3::ops
