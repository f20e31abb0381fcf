#include "ops/linear.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "support/compare.h"
#include "support/gradients.h"
#include "support/random.h"

namespace dsv3::ops {
namespace {

using test::close;
using test::close_to_terms;
using test::same_bits;

constexpr double kStart = 0.5;  // what a bucket already holds; exact in every type

std::vector<test::Place> all_places() {
  auto result = test::places();
  for (const auto& device : test::devices()) result.push_back({device, at::kDouble});
  return result;
}

class LinearTest : public testing::TestWithParam<test::Place> {
 protected:
  at::Device device() const { return GetParam().device; }
  at::ScalarType dtype() const { return GetParam().dtype; }

  /// FP32 and, with BF16 weights, BF16 too.
  std::vector<at::ScalarType> bucket_types() const {
    if (dtype() == at::kDouble) return {at::kDouble};
    if (dtype() == at::kFloat) return {at::kFloat};
    return {at::kFloat, at::kBFloat16};
  }

  /// A sum of `terms` exact products in FP32 (FP64), then one rounding to the result's type.
  double product_tolerance(int64_t terms) const {
    const auto sum = dtype() == at::kDouble ? at::kDouble : at::kFloat;
    return test::tolerance(sum, 2.0 + static_cast<double>(terms)) +
           (dtype() == at::kBFloat16 ? test::tolerance(dtype()) : 0.0);
  }

  /// Two calls' gradients in one bucket. Where the contract (ops/weight_grad.h) promises sums in
  /// the bucket itself, nothing is rounded to BF16 on the way.
  double bucket_tolerance(int64_t terms, at::ScalarType bucket, bool exact_product) const {
    const auto sum = dtype() == at::kDouble ? at::kDouble : at::kFloat;
    double most = test::tolerance(sum, 6.0 + static_cast<double>(terms));
    if (dtype() == at::kBFloat16 && !exact_product) most += test::tolerance(at::kBFloat16, 2);
    if (bucket == at::kBFloat16) most += test::tolerance(at::kBFloat16, 4);
    return most;
  }

  at::Tensor draw(at::IntArrayRef sizes) { return random_.normal(sizes, dtype(), device()); }

  at::Tensor offsets_of(const std::vector<int32_t>& rows) const {
    std::vector<int32_t> ends(rows.size());
    std::partial_sum(rows.begin(), rows.end(), ends.begin());
    return at::tensor(ends, at::TensorOptions(at::kInt)).to(device());
  }

  void expect_linear(int64_t tokens, int64_t in, int64_t out, at::ScalarType bucket);
  void expect_grouped(const std::vector<int32_t>& rows, int64_t in, int64_t out,
                      at::ScalarType bucket);

  uint64_t seed_ = test::fresh_seed();
  test::Random random_{seed_};
  testing::ScopedTrace trace_{__FILE__, __LINE__, test::seed_text(seed_)};
};

INSTANTIATE_TEST_SUITE_P(Places, LinearTest, testing::ValuesIn(all_places()), test::place_name);

at::Tensor exact(const at::Tensor& x) {
  return x.detach().to(at::kCPU, at::kDouble);
}

/// Rows of one expert.
at::Tensor part(const at::Tensor& x, const std::vector<int32_t>& rows, size_t expert) {
  const int64_t begin = std::accumulate(rows.begin(), rows.begin() + static_cast<long>(expert), 0);
  return x.narrow(0, begin, rows[expert]);
}

void LinearTest::expect_linear(int64_t tokens, int64_t in, int64_t out, at::ScalarType bucket) {
  SCOPED_TRACE(testing::Message() << "T " << tokens << ", K " << in << ", N " << out << ", bucket "
                                  << c10::toString(bucket));
  const Weight weight = test::weight_of(draw({out, in}), dtype(), device(), bucket, kStart);
  const at::Tensor w = exact(weight.value);
  at::Tensor grad = at::full({out, in}, kStart, at::TensorOptions(at::kDouble));
  at::Tensor terms = grad.clone();  // the same sum over absolute values
  for (int call = 0; call < 2; ++call) {
    const at::Tensor x = test::leaf(draw({tokens, in}), dtype(), device());
    const at::Tensor dy = draw({tokens, out});
    const at::Tensor y = linear(x, weight);
    y.backward(dy);
    EXPECT_EQ(y.scalar_type(), dtype());
    EXPECT_TRUE(close(y, exact(x).matmul(w.t()), product_tolerance(in)));
    EXPECT_TRUE(close(x.grad(), exact(dy).matmul(w), product_tolerance(out)));
    grad += exact(dy).t().matmul(exact(x));
    terms += exact(dy).t().abs().matmul(exact(x).abs());
  }
  const bool exact_product = device().is_cuda();
  EXPECT_TRUE(
      close_to_terms(weight.grad, grad, terms, bucket_tolerance(tokens, bucket, exact_product)));
  EXPECT_FALSE(weight.value.grad().defined()) << "gradients go to the bucket alone";
}

TEST_P(LinearTest, AgreesWithFloat64AndAddsUpInTheBucket) {
  for (const auto bucket : bucket_types()) {
    expect_linear(1, 1, 1, bucket);
    expect_linear(1, 8, 5, bucket);
    expect_linear(7, 3, 9, bucket);
    expect_linear(64, 32, 48, bucket);
    expect_linear(129, 65, 33, bucket);
    expect_linear(300, 40, 24, bucket);
    expect_linear(0, 8, 5, bucket);
  }
}

void LinearTest::expect_grouped(const std::vector<int32_t>& rows, int64_t in, int64_t out,
                                at::ScalarType bucket) {
  const auto num_experts = static_cast<int64_t>(rows.size());
  const int64_t total = std::accumulate(rows.begin(), rows.end(), int64_t{0});
  SCOPED_TRACE(testing::Message() << "T' " << total << ", E " << num_experts << ", K " << in
                                  << ", N " << out << ", bucket " << c10::toString(bucket));
  const Weight weight =
      test::weight_of(draw({num_experts, out, in}), dtype(), device(), bucket, kStart);
  const at::Tensor w = exact(weight.value);
  const at::Tensor offsets = offsets_of(rows);
  at::Tensor grad = at::full({num_experts, out, in}, kStart, at::TensorOptions(at::kDouble));
  at::Tensor terms = grad.clone();
  for (int call = 0; call < 2; ++call) {
    const at::Tensor x = test::leaf(draw({total, in}), dtype(), device());
    const at::Tensor dy = draw({total, out});
    const at::Tensor y = grouped_linear({x, {}}, weight, offsets);
    y.backward(dy);
    EXPECT_EQ(y.scalar_type(), dtype());
    at::Tensor expected_y = at::zeros({total, out}, at::TensorOptions(at::kDouble));
    at::Tensor expected_dx = at::zeros({total, in}, at::TensorOptions(at::kDouble));
    for (size_t e = 0; e < rows.size(); ++e) {
      const auto i = static_cast<int64_t>(e);
      const at::Tensor x_e = part(exact(x), rows, e), dy_e = part(exact(dy), rows, e);
      part(expected_y, rows, e).copy_(x_e.matmul(w[i].t()));
      part(expected_dx, rows, e).copy_(dy_e.matmul(w[i]));
      grad[i] += dy_e.t().matmul(x_e);
      terms[i] += dy_e.t().abs().matmul(x_e.abs());
    }
    EXPECT_TRUE(close(y, expected_y, product_tolerance(in)));
    EXPECT_TRUE(close(x.grad(), expected_dx, product_tolerance(out)));
  }
  // LibTorch's grouped kernel rounds; ours, for other sizes, does not.
  const bool exact_product = device().is_cuda() && (in % 8 != 0 || out % 8 != 0);
  for (size_t e = 0; e < rows.size(); ++e) {
    SCOPED_TRACE(testing::Message() << "expert " << e << " with " << rows[e] << " rows");
    const auto i = static_cast<int64_t>(e);
    if (rows[e] == 0) {
      EXPECT_TRUE(same_bits(weight.grad[i], at::full({out, in}, kStart, weight.grad.options())));
    } else {
      EXPECT_TRUE(close_to_terms(weight.grad[i], grad[i], terms[i],
                                 bucket_tolerance(rows[e], bucket, exact_product)));
    }
  }
}

TEST_P(LinearTest, GroupedAgreesWithALoopOverExpertsInFloat64) {
  for (const auto bucket : bucket_types()) {
    expect_grouped({5, 0, 9, 1}, 16, 24, bucket);
    expect_grouped({0, 0, 31, 0}, 16, 8, bucket);  // all to one
    expect_grouped({1}, 8, 8, bucket);
    expect_grouped({0, 1, 0}, 24, 8, bucket);
    expect_grouped({0, 0}, 8, 16, bucket);
    expect_grouped({70, 3, 0, 65, 128}, 72, 136, bucket);  // more than a tile each way
    expect_grouped({4, 0, 7}, 5, 3, bucket);               // odd sizes
    expect_grouped({66, 0, 1, 130}, 67, 70, bucket);
    expect_grouped({3, 5}, 1, 1, bucket);
    std::vector<int32_t> drawn(33);
    for (auto& rows : drawn) rows = static_cast<int32_t>(random_.integer(0, 12));
    expect_grouped(drawn, random_.integer(1, 50), random_.integer(1, 50), bucket);
    expect_grouped(drawn, 8 * random_.integer(1, 9), 8 * random_.integer(1, 9), bucket);
  }
}

TEST_P(LinearTest, RowsBehindTheLastOffsetChangeNothing) {
  const std::vector<int32_t> rows = {6, 0, 3};
  const auto nan = std::numeric_limits<double>::quiet_NaN();
  for (const int64_t size : {16, 5}) {
    const at::Tensor data = draw({12, size}), dy = draw({12, size});
    data.narrow(0, 9, 3).fill_(nan);
    dy.narrow(0, 9, 3).fill_(nan);
    const at::Tensor w = draw({3, size, size});
    const auto run = [&](int64_t total) {
      const Weight weight = test::weight_of(w, dtype(), device(), bucket_types()[0]);
      const at::Tensor x = test::leaf(data.narrow(0, 0, total), dtype(), device());
      const at::Tensor y = grouped_linear({x, {}}, weight, offsets_of(rows));
      y.backward(dy.narrow(0, 0, total));
      return std::vector<at::Tensor>{y.detach().narrow(0, 0, 9), x.grad().narrow(0, 0, 9),
                                     weight.grad};
    };
    const auto without = run(9), with = run(12);
    for (size_t i = 0; i < without.size(); ++i)
      EXPECT_TRUE(close(with[i], without[i], product_tolerance(16))) << i;
  }
}

TEST_P(LinearTest, StridedInputsGiveWhatPackedOnesGive) {
  const at::Tensor wide = draw({20, 48}), wide_dy = draw({20, 40});
  const at::Tensor w = draw({24, 16});
  const std::vector<int32_t> rows = {8, 0, 12};
  const at::Tensor experts = draw({3, 24, 16});
  const auto run = [&](const at::Tensor& x, const at::Tensor& dy, bool grouped) {
    const Weight weight =
        test::weight_of(grouped ? experts : w, dtype(), device(), bucket_types()[0]);
    const at::Tensor leaf = x.detach().requires_grad_();
    const at::Tensor y =
        grouped ? grouped_linear({leaf, {}}, weight, offsets_of(rows)) : linear(leaf, weight);
    y.backward(dy);
    return std::vector<at::Tensor>{y.detach(), leaf.grad(), weight.grad};
  };
  const at::Tensor strided = wide.narrow(1, 16, 16), strided_dy = wide_dy.narrow(1, 8, 24);
  const at::Tensor turned = strided.t().contiguous().t();
  ASSERT_FALSE(strided.is_contiguous() || turned.is_contiguous() || strided_dy.is_contiguous());
  for (const bool grouped : {false, true}) {
    const auto packed = run(strided.contiguous(), strided_dy.contiguous(), grouped);
    for (const auto& x : {strided, turned}) {
      const auto other = run(x, strided_dy, grouped);
      for (size_t i = 0; i < packed.size(); ++i)
        EXPECT_TRUE(close(other[i], packed[i], product_tolerance(24)))
            << (grouped ? "grouped, " : "") << i;
    }
  }
}

TEST_P(LinearTest, ARemakeIsCalledOnceInBackwardAndGivesTheSame) {
  const at::Tensor offsets = offsets_of({4, 0, 5});
  for (const bool grouped : {false, true}) {
    const at::Tensor w = grouped ? draw({3, 8, 16}) : draw({8, 16});
    const at::Tensor data = draw({9, 16}), dy = draw({9, 8});
    const auto run = [&](bool remake, int& calls) {
      const Weight weight = test::weight_of(w, dtype(), device(), bucket_types()[0]);
      Remakable x{test::leaf(data, dtype(), device()), {}};
      if (remake) x.remake = [&calls, kept = x.value.detach().clone()] { return ++calls, kept; };
      const at::Tensor y = grouped ? grouped_linear(x, weight, offsets) : linear(x, weight);
      EXPECT_EQ(calls, 0);
      // Not kept: what stands in its memory afterwards does not matter.
      if (remake) x.value.detach().fill_(7);
      y.backward(dy);
      return std::pair{x.value.grad(), weight.grad};
    };
    int calls = 0, none = 0;
    const auto kept = run(false, none), remade = run(true, calls);
    EXPECT_EQ(calls, 1);
    EXPECT_TRUE(same_bits(remade.first, kept.first));
    EXPECT_TRUE(same_bits(remade.second, kept.second));
  }
}

TEST_P(LinearTest, FrozenWeightsAndInputsGetNothing) {
  for (const bool grouped : {false, true}) {
    Weight frozen{grouped ? draw({2, 8, 16}) : draw({8, 16}), {}};
    const at::Tensor offsets = offsets_of({2, 3});
    const at::Tensor x = test::leaf(draw({5, 16}), dtype(), device());
    const auto apply = [&](const at::Tensor& input, const Weight& weight) {
      return grouped ? grouped_linear({input, {}}, weight, offsets) : linear(input, weight);
    };
    apply(x, frozen).backward(draw({5, 8}));
    EXPECT_TRUE(x.grad().defined());
    const Weight weight = test::weight_of(frozen.value, dtype(), device(), bucket_types()[0]);
    const at::Tensor constant = draw({5, 16});
    apply(constant, weight).backward(draw({5, 8}));
    EXPECT_FALSE(constant.grad().defined());
    EXPECT_GT(weight.grad.abs().max().item<double>(), 0);
    EXPECT_FALSE(apply(constant, frozen).requires_grad());
  }
}

TEST(LinearErrors, NameWhatIsWrong) {
  const auto message = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  const Weight dense{at::zeros({3, 4}), {}}, experts{at::zeros({2, 3, 4}), {}};
  const at::Tensor offsets = at::tensor({1, 2}, at::TensorOptions(at::kInt));
  EXPECT_NE(message([&] {
              linear(at::zeros({2, 5}), dense);
            }).find("[linear] x: expected [T, 4]"),
            std::string::npos);
  EXPECT_NE(message([&] {
              linear(at::zeros({2, 4}, at::kDouble), dense);
            }).find("Double"),
            std::string::npos);
  const auto grouped = [&](const at::Tensor& x, const Weight& weight, const at::Tensor& ends) {
    return message([&] { grouped_linear({x, {}}, weight, ends); });
  };
  EXPECT_EQ(grouped(at::zeros({2, 4}), experts, offsets), "");
  EXPECT_NE(grouped(at::zeros({2, 5}), experts, offsets).find("[grouped_linear] x"),
            std::string::npos);
  EXPECT_NE(grouped(at::zeros({2, 4}), dense, offsets).find("[E, N, K]"), std::string::npos);
  EXPECT_NE(grouped(at::zeros({2, 4}), experts, offsets.narrow(0, 0, 1)).find("offsets"),
            std::string::npos);
  EXPECT_NE(grouped(at::zeros({2, 4}), experts, offsets.to(at::kLong)).find("offsets"),
            std::string::npos);
}

}  // namespace
}  // namespace dsv3::ops
