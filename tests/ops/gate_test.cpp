#include "ops/gate.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "kernels/routing.h"
#include "ops/dispatch.h"
#include "ops/gate_split.h"
#include "support/gradients.h"

namespace dsv3::ops {
namespace {

using test::close;
using test::same_bits;

class GateTest : public testing::TestWithParam<at::Device> {};
INSTANTIATE_TEST_SUITE_P(Devices, GateTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) {
                           return std::string(info.param.is_cuda() ? "cuda" : "cpu");
                         });

struct Case {
  int64_t num_tokens, hidden, num_experts;
};
/// 7168: seven parts and V3's width; 1030: a part of 6; 8 and 96: all terms in one product; 100 and
/// 256: a product per term.
const std::vector<Case> kCases = {{0, 16, 8},     {1, 8, 1},      {5, 24, 8},    {33, 7168, 256},
                                  {70, 1030, 96}, {64, 2048, 64}, {21, 40, 100}, {3000, 64, 16}};

at::Tensor wide(const at::Tensor& x) {
  return x.detach().to(at::kDouble);
}

/// The error against the result's norm; of few elements, whose terms may cancel, against the terms'
/// sum. `stood`: FP32 of at most this magnitude, to which the result was added, and which rounds
/// it.
testing::AssertionResult agrees(const at::Tensor& actual, const at::Tensor& a, const at::Tensor& b,
                                double most, double stood = 0.0) {
  const at::Tensor exact = wide(a).mm(wide(b));
  if (exact.numel() >= 100) return close(actual, exact, most);
  const at::Tensor terms = wide(a).abs().mm(wide(b).abs());
  return test::close_to_terms(actual, exact, terms + stood * 0x1p-24 / most, most);
}

/// 2^-17 of each element is what two terms of dlogits leave out.
constexpr double kWeightGradient = 0x1p-17;

/// Terms of FP32 add up to it: hi + mid + lo exactly, hi + mid to 2^-17.
TEST_P(GateTest, TermsAddUp) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [rows, columns] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 4}, {1, 1}, {3, 7}, {5, 8}, {300, 1000}}) {
    const at::Tensor x = random.normal({rows, columns}, at::kFloat, GetParam(), 3.0);
    for (const bool beside : {false, true}) {
      at::Tensor y = at::zeros({beside ? rows : 3 * rows, beside ? 3 * columns : columns},
                               x.options().dtype(at::kBFloat16));
      kernels::split_bf16({.num_rows = rows,
                           .num_columns = columns,
                           .num_terms = 3,
                           .terms = {2, 0, 1},
                           .x = x.const_data_ptr<float>(),
                           .y = y.mutable_data_ptr(),
                           .row_stride = beside ? 3 * columns : columns,
                           .term_stride = beside ? columns : rows * columns},
                          stream_of(x));
      const auto term = [&](int64_t i) {
        return wide(beside ? y.narrow(1, i * columns, columns) : y.narrow(0, i * rows, rows));
      };
      const at::Tensor lo = term(0), hi = term(1), mid = term(2);
      EXPECT_TRUE(same_bits(hi.to(at::kBFloat16), x.to(at::kBFloat16)));
      EXPECT_TRUE(same_bits(hi + mid + lo, wide(x)));
      if (x.numel() > 0) {
        EXPECT_LE(((hi + mid - wide(x)).abs() - wide(x).abs() * 0x1p-17).max().item<double>(), 0);
      }
    }
  }
}

/// The split products by themselves, on every device: FP32's accuracy from BF16 factors.
TEST_P(GateTest, SplitProductsAgreeWithFloat64) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [num_tokens, hidden, num_experts] : kCases) {
    SCOPED_TRACE(testing::Message()
                 << "T " << num_tokens << ", D " << hidden << ", E " << num_experts);
    const at::Tensor x = random.normal({num_tokens, hidden}, at::kBFloat16, GetParam());
    const at::Tensor weight =
        random.normal({num_experts, hidden}, at::kFloat, GetParam(), 0.006, 0.001);
    const at::Tensor dy = random.normal({num_tokens, num_experts}, at::kFloat, GetParam());
    const at::Tensor logits = split_product(x, weight);
    // Sums of D terms: 3e-6 is what cut-off parts of 1024 may lose, and twice FP32's own.
    EXPECT_TRUE(agrees(logits, x, weight.t(), 3e-6));

    const at::Tensor terms = split_gradient(dy);
    EXPECT_TRUE(close(split_product_dx(terms, weight), wide(dy).mm(wide(weight)),
                      test::tolerance(at::kBFloat16, 1)));
    const at::Tensor grad = random.normal({num_experts, hidden}, at::kFloat, GetParam());
    const at::Tensor before = grad.clone();
    add_split_product_dweight(terms, x, grad);
    const double stood = before.abs().max().item<double>();
    EXPECT_TRUE(agrees(wide(grad) - wide(before), dy.t(), x, kWeightGradient, stood));
  }
}

/// A weight whose terms beyond the first matter: BF16 alone would err by 2^-9.
TEST_P(GateTest, KeepsWhatBf16WouldLose) {
  const auto bf16 = at::TensorOptions(at::kBFloat16).device(GetParam());
  const at::Tensor x = at::zeros({4, 64}, bf16).fill_(1.0);
  const at::Tensor weight =
      at::zeros({8, 64}, bf16.dtype(at::kFloat)).fill_(1.0 + 0x1p-10 + 0x1p-20);
  EXPECT_EQ(split_product(x, weight)[3][5].item<double>(), 64.0 * (1.0 + 0x1p-10 + 0x1p-20));
}

TEST_P(GateTest, ResultAndGradientsAgreeWithFloat64) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const auto& [num_tokens, hidden, num_experts] : kCases) {
      for (const bool remakes : {false, true}) {
        SCOPED_TRACE(testing::Message() << c10::toString(dtype) << ", T " << num_tokens << ", D "
                                        << hidden << ", E " << num_experts);
        const at::Tensor x =
            test::leaf(random.normal({num_tokens, hidden}, dtype, GetParam()), dtype, GetParam());
        const Weight weight =
            test::weight_of(random.normal({num_experts, hidden}, at::kFloat, GetParam(), 0.006),
                            at::kFloat, GetParam(), at::kFloat, 0.25);
        const at::Tensor dy = random.normal({num_tokens, num_experts}, at::kFloat, GetParam());
        Remakable given{x, {}};
        if (remakes) given.remake = [value = x.detach()] { return value; };
        const at::Tensor logits = gate(given, weight);
        logits.backward(dy);
        EXPECT_EQ(logits.scalar_type(), at::kFloat);
        EXPECT_TRUE(agrees(logits, x, weight.value.t(), 3e-6));
        EXPECT_EQ(x.grad().scalar_type(), dtype);
        EXPECT_TRUE(agrees(x.grad(), dy, weight.value,
                           dtype == at::kFloat ? 3e-6 : test::tolerance(dtype, 1)));
        EXPECT_TRUE(agrees(wide(weight.grad) - 0.25, dy.t(), x, kWeightGradient, 0.25));
      }
    }
  }
}

TEST_P(GateTest, TenRunsGiveTheSameBits) {
  test::Random random(test::fresh_seed());
  const at::Tensor x = random.normal({500, 1100}, at::kBFloat16, GetParam());
  const at::Tensor weight = random.normal({96, 1100}, at::kFloat, GetParam());
  const at::Tensor first = gate({x, {}}, {weight, {}});
  for (int i = 1; i < 10; ++i) EXPECT_TRUE(same_bits(gate({x, {}}, {weight, {}}), first));
}

TEST(GateErrors, NameWhatIsWrong) {
  const Weight weight{at::zeros({4, 8}), {}};
  EXPECT_THROW(gate({at::zeros({2, 7}), {}}, weight), std::invalid_argument);
  EXPECT_THROW(gate({at::zeros({2, 8}, at::kHalf), {}}, weight), std::invalid_argument);
  EXPECT_THROW(gate({at::zeros({2, 8}), {}}, {at::zeros({4, 8}, at::kBFloat16), {}}),
               std::invalid_argument);
}

}  // namespace
}  // namespace dsv3::ops
