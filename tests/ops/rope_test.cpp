#include "ops/rope.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <gtest/gtest.h>

#include <cmath>

#include "support/gradients.h"

namespace dsv3 {
namespace {

using test::Named;

struct Sizes {
  int64_t tokens, heads, nope, rope, value, pad;
};

const Sizes kSizes[] = {{1, 1, 0, 2, 1, 0},         {3, 2, 5, 6, 3, 1},      {67, 4, 32, 16, 32, 0},
                        {20, 128, 128, 64, 128, 8}, {130, 3, 24, 8, 40, 16}, {9, 5, 33, 10, 7, 3},
                        {0, 2, 8, 8, 8, 0},         {300, 2, 16, 64, 16, 0}};

at::Tensor make_table(int64_t positions, int64_t rope_dim) {
  at::Tensor table = at::empty({positions, rope_dim}, at::TensorOptions(at::kFloat));
  auto* data = table.mutable_data_ptr<float>();
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t i = 0; i < rope_dim / 2; ++i) {
      const double angle = static_cast<double>(p) * std::pow(1e4, -2.0 * i / rope_dim);
      data[p * rope_dim + 2 * i] = static_cast<float>(std::cos(angle));
      data[p * rope_dim + 2 * i + 1] = static_cast<float>(std::sin(angle));
    }
  }
  return table;
}

/// Written apart from ops::reference: complex multiplication pair by pair; `type` decides the
/// arithmetic.
at::Tensor rotated(const at::Tensor& x, const at::Tensor& table, const at::Tensor& positions) {
  std::vector<at::Tensor> columns;
  const at::Tensor rows = table.index_select(0, positions).to(x.device(), x.scalar_type());
  for (int64_t i = 0; i < x.size(-1); i += 2) {
    at::Tensor c = rows.select(1, i), s = rows.select(1, i + 1);
    if (x.dim() == 3) c = c.unsqueeze(1), s = s.unsqueeze(1);
    const at::Tensor a = x.select(-1, i), b = x.select(-1, i + 1);
    columns.push_back(a.mul(c).sub(b.mul(s)));
    columns.push_back(a.mul(s).add(b.mul(c)));
  }
  return at::stack(columns, -1);
}

class Rope : public ::testing::TestWithParam<test::Place> {};

TEST_P(Rope, Query) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [T, H, N, R, Vd, pad] : kSizes) {
    SCOPED_TRACE(::testing::Message() << "T " << T << " H " << H << " N " << N << " R " << R);
    const at::Tensor table = make_table(50, R), positions = random.integers({T}, 50);
    const at::Tensor data = random.normal({T, H * (N + R) + pad}, dtype);
    const at::Tensor dy = random.normal({T, H, N + R}, dtype);
    const auto run = [&, H = H, N = N, R = R](at::ScalarType type, at::Device place,
                                              int kind) -> Named {
      const at::Tensor big = test::leaf(data, type, place);
      const at::Tensor q = big.narrow(1, 0, H * (N + R)).unflatten(1, {H, N + R});
      const at::Tensor y =
          kind == 0 ? ops::rope_query(q, table.to(place), positions.to(place))
                    : at::cat({q.narrow(2, 0, N),
                               rotated(q.narrow(2, N, R), table.to(place), positions.to(place))},
                              2);
      test::backward({y}, {dy});
      return {{"q", y}, {"dq", big.grad()}};
    };
    const Named oracle = run(at::kDouble, at::kCPU, 1);
    test::expect_agree(run(dtype, device, 0), oracle,
                       dtype == at::kBFloat16 ? run(dtype, device, 2) : Named{});
    test::expect_agree(run(at::kDouble, device, 0), oracle, {});
  }
}

TEST_P(Rope, KeyValue) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [T, H, N, R, Vd, pad] : kSizes) {
    SCOPED_TRACE(::testing::Message() << "T " << T << " H " << H << " N " << N << " R " << R);
    const at::Tensor table = make_table(50, R), positions = random.integers({T}, 50);
    const at::Tensor kv_data = random.normal({T, H, N + Vd}, dtype);
    const at::Tensor rope_data = random.normal({T, R + pad}, dtype);
    const at::Tensor dk = random.normal({T, H, N + R}, dtype),
                     dv = random.normal({T, H, Vd}, dtype);
    const auto run = [&, T = T, H = H, N = N, R = R, Vd = Vd, pad = pad](
                         at::ScalarType type, at::Device place, int kind) -> Named {
      const at::Tensor kv = test::leaf(kv_data, type, place);
      const at::Tensor big = test::leaf(rope_data, type, place);
      const at::Tensor k_rope = big.narrow(1, pad, R);
      at::Tensor k, v;
      if (kind == 0) {
        std::tie(k, v) = ops::rope_key_value(kv, k_rope, table.to(place), positions.to(place), Vd);
      } else {
        const at::Tensor shared = rotated(k_rope, table.to(place), positions.to(place));
        k = at::cat({kv.narrow(2, 0, N), shared.unsqueeze(1).expand({T, H, R})}, 2);
        v = kv.narrow(2, N, Vd);
      }
      test::backward({k, v}, {dk, dv});
      return {{"k", k}, {"v", v}, {"dkv", kv.grad()}, {"dk_rope", big.grad()}};
    };
    const Named ours = run(dtype, device, 0), oracle = run(at::kDouble, at::kCPU, 1);
    test::expect_agree(ours, oracle, dtype == at::kBFloat16 ? run(dtype, device, 2) : Named{});
    test::expect_agree(run(at::kDouble, device, 0), oracle, {});
    EXPECT_TRUE(test::same_bits(ours[3].second, run(dtype, device, 0)[3].second));
  }
}

TEST_P(Rope, QueryInPlaceGivesTheSameBits) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [T, H, N, R, Vd, pad] : kSizes) {
    SCOPED_TRACE(::testing::Message() << "T " << T << " H " << H << " N " << N << " R " << R);
    const at::Tensor table = make_table(50, R).to(device);
    const at::Tensor positions = random.integers({T}, 50, device);
    const at::Tensor data = random.normal({T, H * (N + R) + pad}, dtype, device);
    const at::Tensor dy = random.normal({T, H, N + R}, dtype, device), dy_before = dy.clone();
    const auto run = [&, H = H, N = N, R = R](bool in_place, bool own_gradient) {
      const at::Tensor start = data.detach().clone().requires_grad_();
      const at::Tensor big = start.mul(1.0);  // no leaf, saved by nobody
      const at::Tensor q = big.narrow(1, 0, H * (N + R)).unflatten(1, {H, N + R});
      const at::Tensor y =
          in_place ? ops::rope_query_(q, table, positions) : ops::rope_query(q, table, positions);
      EXPECT_EQ(y.const_data_ptr() == q.const_data_ptr(), in_place || q.numel() == 0);
      if (own_gradient) {
        test::backward({y}, {dy});
      } else {
        y.backward(dy);
      }
      return std::pair(y.detach().clone(), start.grad());
    };
    const auto expected = run(false, true);
    for (const bool own_gradient : {true, false}) {
      const auto actual = run(true, own_gradient);
      EXPECT_TRUE(test::same_bits(actual.first, expected.first));
      EXPECT_TRUE(test::same_bits(actual.second, expected.second));
      EXPECT_TRUE(test::same_bits(dy, dy_before)) << "a gradient that others hold stays";
    }
  }
}

TEST_P(Rope, TenRunsGiveTheSameBits) {
  const auto [device, dtype] = GetParam();
  test::Random random(test::fresh_seed());
  const int64_t T = 33, H = 128, N = 128, R = 64, Vd = 128;
  const at::Tensor table = make_table(64, R).to(device);
  const at::Tensor positions = random.integers({T}, 64, device);
  const at::Tensor kv_data = random.normal({T, H, N + Vd}, dtype);
  const at::Tensor rope_data = random.normal({T, R}, dtype);
  const at::Tensor dk = random.normal({T, H, N + R}, dtype), dv = random.normal({T, H, Vd}, dtype);
  Named first;
  for (int i = 0; i < 10; ++i) {
    const at::Tensor kv = test::leaf(kv_data, dtype, device);
    const at::Tensor k_rope = test::leaf(rope_data, dtype, device);
    const auto [k, v] = ops::rope_key_value(kv, k_rope, table, positions, Vd);
    test::backward({k, v}, {dk, dv});
    const Named run{{"k", k}, {"dkv", kv.grad()}, {"dk_rope", k_rope.grad()}};
    if (i == 0) first = run;
    for (size_t j = 0; j < run.size(); ++j) {
      EXPECT_TRUE(test::same_bits(run[j].second, first[j].second)) << run[j].first;
    }
  }
}

TEST(RopeGradient, AgreesWithFiniteDifferences) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const int64_t T = 4, H = 3, N = 2, R = 6, Vd = 2;
  const at::Tensor table = make_table(9, R), positions = random.integers({T}, 9);
  const at::Tensor kv_data = random.normal({T, H, N + Vd}, at::kDouble);
  const at::Tensor rope_data = random.normal({T, R}, at::kDouble);
  const at::Tensor dk = random.normal({T, H, N + R}, at::kDouble);
  const auto objective = [&](const at::Tensor& k_rope) {
    return std::get<0>(ops::rope_key_value(kv_data, k_rope, table, positions, Vd)).mul(dk).sum();
  };
  const at::Tensor k_rope = test::leaf(rope_data, at::kDouble);
  objective(k_rope).backward();
  for (int64_t i = 0; i < rope_data.numel(); ++i) {
    constexpr double kStep = 1e-4;
    at::Tensor up = rope_data.clone(), down = rope_data.clone();
    up.view(-1)[i] += kStep;
    down.view(-1)[i] -= kStep;
    const double slope =
        (objective(up).item<double>() - objective(down).item<double>()) / (2 * kStep);
    EXPECT_NEAR(k_rope.grad().view(-1)[i].item<double>(), slope, 1e-8);
  }
}

TEST_P(Rope, HeadsFirstGradientsAndUnusedOutputs) {
  const auto [device, dtype] = GetParam();
  test::Random random(21);
  const int64_t T = 13, H = 4, N = 16, R = 8, Vd = 24;
  const at::Tensor table = make_table(20, R).to(device),
                   positions = random.integers({T}, 20, device);
  const at::Tensor kv_data = random.normal({T, H, N + Vd}, dtype);
  const at::Tensor rope_data = random.normal({T, R}, dtype);
  // As attention hands them back: heads first in memory.
  const at::Tensor dk = random.normal({H, T, N + R}, dtype, device).transpose(0, 1);
  const at::Tensor dv = random.normal({H, T, Vd}, dtype, device).transpose(0, 1);
  const auto run = [&](bool strided, bool use_k, bool use_v) {
    const at::Tensor kv = test::leaf(kv_data, dtype, device),
                     kr = test::leaf(rope_data, dtype, device);
    const auto [k, v] = ops::rope_key_value(kv, kr, table, positions, Vd);
    at::Tensor objective;
    if (use_k) k.backward(strided ? dk : dk.contiguous(), /*retain_graph=*/use_v);
    if (use_v) v.backward(strided ? dv : dv.contiguous());
    return std::pair(kv.grad(), kr.grad());
  };
  const auto [dkv_k, drope_k] = run(true, true, false);
  EXPECT_TRUE(test::same_bits(dkv_k, run(false, true, false).first));
  EXPECT_TRUE(test::same_bits(dkv_k.narrow(2, 0, N), dk.narrow(2, 0, N)));
  EXPECT_EQ(dkv_k.narrow(2, N, Vd).abs().sum().item<double>(), 0.0);
  const auto [dkv_v, drope_v] = run(true, false, true);
  EXPECT_TRUE(test::same_bits(dkv_v.narrow(2, N, Vd), dv));
  EXPECT_EQ(dkv_v.narrow(2, 0, N).abs().sum().item<double>(), 0.0);
  EXPECT_EQ(drope_v.abs().sum().item<double>(), 0.0);
}

TEST_P(Rope, ValueIsAViewAndPositionsMatter) {
  const auto [device, dtype] = GetParam();
  test::Random random(22);
  const at::Tensor kv = random.normal({3, 2, 12}, dtype, device);
  const at::Tensor kr = random.normal({3, 4}, dtype, device);
  const at::Tensor table = make_table(9, 4).to(device);
  const auto [k, v] = ops::rope_key_value(kv, kr, table, random.integers({3}, 1, device), 7);
  EXPECT_EQ(v.const_data_ptr(),
            static_cast<const char*>(kv.const_data_ptr()) + 5 * kv.element_size());
  // Position 0 does not rotate.
  EXPECT_TRUE(test::same_bits(k.select(1, 1).narrow(1, 5, 4), kr));
}

TEST(RopeErrors, NameTheArgument) {
  test::Random random(23);
  const at::Tensor q = random.normal({2, 1, 6}, at::kFloat), table = make_table(4, 4);
  at::Tensor positions = random.integers({2}, 4);
  EXPECT_NO_THROW(ops::rope_query(q, table, positions));
  EXPECT_THROW(ops::rope_query(q, make_table(4, 8), positions), std::invalid_argument);
  EXPECT_THROW(ops::rope_query(q, table, positions.to(at::kLong)), std::invalid_argument);
  EXPECT_THROW(ops::rope_query(q, table, random.integers({3}, 4)), std::invalid_argument);
  EXPECT_THROW(ops::rope_query(q, table.to(at::kDouble), positions), std::invalid_argument);
  positions.select(0, 1).fill_(4);
  try {
    ops::rope_query(q, table, positions);
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("positions[1] is 4, expected 0 … 3"),
              std::string::npos)
        << error.what();
  }
}

INSTANTIATE_TEST_SUITE_P(Places, Rope, ::testing::ValuesIn(test::places()), test::place_name);

}  // namespace
}  // namespace dsv3
