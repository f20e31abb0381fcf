#include "ops/permute.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "kernels/routing.h"
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

/// What plain loops make of the choices: expert by expert, token by token.
struct Plain {
  std::vector<int32_t> counts, offsets, choice_of, row_of;
};
Plain plain_permutation(const at::Tensor& experts, int64_t num_experts, int64_t multiple) {
  const at::Tensor ids = experts.cpu().flatten();
  Plain plain;
  plain.row_of.resize(static_cast<size_t>(ids.numel()));
  for (int32_t e = 0; e < num_experts; ++e) {
    const size_t before = plain.choice_of.size();
    for (int64_t i = 0; i < ids.numel(); ++i) {
      if (ids.const_data_ptr<int32_t>()[i] != e) continue;
      plain.row_of[static_cast<size_t>(i)] = static_cast<int32_t>(plain.choice_of.size());
      plain.choice_of.push_back(static_cast<int32_t>(i));
    }
    plain.counts.push_back(static_cast<int32_t>(plain.choice_of.size() - before));
    while (plain.choice_of.size() % static_cast<size_t>(multiple) != 0) {
      plain.choice_of.push_back(-1);
    }
    plain.offsets.push_back(static_cast<int32_t>(plain.choice_of.size()));
  }
  return plain;
}

std::vector<int32_t> values_of(const at::Tensor& x) {
  const at::Tensor flat = x.cpu().contiguous();
  const auto* data = flat.const_data_ptr<int32_t>();
  return {data, data + flat.numel()};
}

void expect_permutation(const at::Tensor& experts, int64_t num_experts) {
  for (const int64_t multiple : {1, 16, 24}) {
    Plain plain = plain_permutation(experts, num_experts, multiple);
    for (const Permutation& actual :
         {make_permutation(experts, num_experts, multiple),
          reference::make_permutation(experts, num_experts, multiple)}) {
      ASSERT_GE(actual.choice_of.numel(), static_cast<int64_t>(plain.choice_of.size()));
      EXPECT_EQ(actual.choice_of.numel() % multiple, 0);
      if (multiple == 1) {
        EXPECT_EQ(actual.choice_of.numel(), experts.numel());
      }
      plain.choice_of.resize(static_cast<size_t>(actual.choice_of.numel()), -1);
      EXPECT_EQ(values_of(actual.counts), plain.counts);
      EXPECT_EQ(values_of(actual.offsets), plain.offsets);
      EXPECT_EQ(values_of(actual.row_of), plain.row_of);
      EXPECT_EQ(values_of(actual.choice_of), plain.choice_of);
    }
  }
}

TEST(PermutationRows, AreEnoughForEveryDistribution) {
  // The worst: every used expert one choice beyond a multiple.
  EXPECT_EQ(kernels::permutation_rows(0, 8, 16), 0);
  EXPECT_EQ(kernels::permutation_rows(3, 8, 16), 48);
  EXPECT_EQ(kernels::permutation_rows(131072, 256, 1), 131072);
  EXPECT_EQ(kernels::permutation_rows(131072, 256, 128), (131072 + 256 * 127) / 128 * 128);
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
  EXPECT_THROW(make_permutation(at::zeros({2, 2}, ints), 4, 0), std::invalid_argument);
  EXPECT_THROW(make_permutation(at::zeros({2, 2}, ints), 513), std::invalid_argument);
  EXPECT_THROW(make_permutation(at::zeros({2, 17}, ints), 32), std::invalid_argument);
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
        const Permutation permutation = make_permutation(
            random.integers({num_tokens, k}, 6, GetParam()), 6, random.integer(0, 1) * 15 + 1);
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
  const Permutation permutation = make_permutation(random.integers({num_tokens, k}, 6, device), 6,
                                                   random.integer(0, 1) * 15 + 1);
  const int64_t num_rows = permutation.choice_of.size(0);
  const auto leaf = [&](at::IntArrayRef sizes, at::ScalarType type) {
    return random.normal(sizes, type, device).set_requires_grad(true);
  };
  const at::Tensor rows = leaf({num_rows, hidden}, dtype);
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

/// FP8 rows carry their bytes and their scales; scales times the choice's weight; padding is 0.
TEST_P(PermuteTest, Fp8RowsCarryTheirScales) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  // The widest rows have so many scales that a kernel of their own takes them on CUDA.
  const std::pair<int64_t, int64_t> sizes[] = {{13, 1},    {13, 30},     {13, 128},  {13, 400},
                                               {13, 7168}, {1000, 1024}, {12, 32768}};
  for (const auto& [num_tokens, hidden] : sizes) {
    for (const int64_t multiple : {1, 16}) {
      const int64_t k = 3;
      const Permutation permutation =
          make_permutation(random.integers({num_tokens, k}, 5, GetParam()), 5, multiple);
      const Fp8RowTiles x =
          quantize_rows(random.normal({num_tokens, hidden}, at::kBFloat16, GetParam()), {});
      const at::Tensor weights = random.normal({num_tokens, k}, at::kFloat, GetParam());
      const Fp8RowTiles rows = permute_fp8(x, permutation);
      const Fp8RowTiles weighted = permute_fp8(x, permutation, weights);
      const auto bytes = [](const at::Tensor& data) { return data.view(at::kByte); };
      EXPECT_TRUE(same_bits(bytes(rows.data), bytes(weighted.data)));
      const at::Tensor expected =
          reference::permute(bytes(x.data).to(at::kFloat), permutation).to(at::kByte);
      EXPECT_TRUE(same_bits(bytes(rows.data), expected));
      EXPECT_TRUE(same_bits(rows.scales, reference::permute(x.scales, permutation)));
      const at::Tensor chosen = permutation.choice_of.clamp_min(0);
      const at::Tensor weight_of_row = weights.flatten().index_select(0, chosen).unsqueeze(-1);
      EXPECT_TRUE(close(weighted.scales, rows.scales * weight_of_row, 0.0));
    }
  }
}

TEST_P(PermuteTest, OneExpertMayTakeEveryToken) {
  test::Random random(test::fresh_seed());
  const auto ints = at::TensorOptions(at::kInt).device(GetParam());
  const Permutation permutation = make_permutation(at::full({300, 1}, 2, ints), 4);
  const at::Tensor x = random.normal({300, 64}, at::kBFloat16, GetParam());
  EXPECT_TRUE(same_bits(permute(x, permutation), x));
  const at::Tensor weights = at::full({300, 1}, 1.0, ints.dtype(at::kFloat));
  EXPECT_TRUE(same_bits(combine(x, weights, permutation, {}), x));
}

TEST_P(PermuteTest, TenRunsGiveTheSameBits) {
  test::Random random(test::fresh_seed());
  const at::Tensor experts = random.integers({3000, 6}, 64, GetParam());
  const int64_t num_rows = make_permutation(experts, 64, 16).choice_of.size(0);
  const at::Tensor values = random.normal({num_rows, 40}, at::kBFloat16, GetParam());
  const at::Tensor given = random.normal({3000, 6}, at::kFloat, GetParam());
  const auto run = [&]() -> std::vector<at::Tensor> {
    const Permutation p = make_permutation(experts, 64, 16);
    at::Tensor rows = values.detach().clone().set_requires_grad(true);
    at::Tensor weights = given.detach().clone().set_requires_grad(true);
    const at::Tensor y = combine(rows, weights, p, {});
    y.sum().backward();
    return {p.row_of, p.choice_of, y, rows.grad(), weights.grad()};
  };
  const auto first = run();
  for (int i = 1; i < 10; ++i) {
    const auto again = run();
    for (size_t j = 0; j < first.size(); ++j) EXPECT_TRUE(same_bits(first[j], again[j])) << j;
  }
}

}  // namespace
}  // namespace dsv3::ops
