// AdamW's options: decay classes, the running mean, random rounding, weights written as FP8.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "kernels/detail/adamw.h"
#include "kernels/optimizer.h"
#include "ops/dispatch.h"
#include "support/compare.h"
#include "support/random.h"

namespace dsv3::ops {
namespace {

using test::close;
using test::same_bits;

class AdamWOptionsTest : public testing::TestWithParam<at::Device> {
 protected:
  uint64_t seed_ = test::fresh_seed();
  test::Random random_{seed_};
};
INSTANTIATE_TEST_SUITE_P(Devices, AdamWOptionsTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) {
                           return std::string(info.param.is_cuda() ? "cuda" : "cpu");
                         });

/// A range's tensors; master may be undefined.
struct Range {
  at::Tensor weights, master, gradients, exp_avg, exp_avg_sq;

  Range clone() const {
    return {weights.clone(), master.defined() ? master.clone() : master, gradients.clone(),
            exp_avg.clone(), exp_avg_sq.clone()};
  }
  Range cut(int64_t begin, int64_t size) const {
    const auto part = [&](const at::Tensor& x) {
      return x.defined() ? x.narrow(0, begin, size) : x;
    };
    return {part(weights), part(master), part(gradients), part(exp_avg), part(exp_avg_sq)};
  }
};

Range draw(test::Random& random, int64_t size, at::ScalarType weight, at::ScalarType gradient,
           at::ScalarType moment, bool master, at::Device device) {
  Range r{random.normal({size}, weight, device),
          {},
          random.normal({size}, gradient, device),
          random.normal({size}, moment, device, 0.1),
          random.normal({size}, moment, device, 0.1).abs_()};
  if (master) {
    r.master = random.normal({size}, at::kFloat, device);
    r.weights.copy_(r.master);
  }
  return r;
}

kernels::AdamW step_of(const Range& r, float weight_decay = 0.1f) {
  return {.size = r.exp_avg.numel(),
          .weight_dtype = dtype_of(r.weights, "adamw", "weights"),
          .gradient_dtype = dtype_of(r.gradients, "adamw", "gradients"),
          .moment_dtype = dtype_of(r.exp_avg, "adamw", "exp_avg"),
          .weights = r.weights.mutable_data_ptr(),
          .master = r.master.defined() ? r.master.mutable_data_ptr<float>() : nullptr,
          .gradients = r.gradients.mutable_data_ptr(),
          .exp_avg = r.exp_avg.mutable_data_ptr(),
          .exp_avg_sq = r.exp_avg_sq.mutable_data_ptr(),
          .learning_rate = 0.01f,
          .beta1 = 0.9f,
          .beta2 = 0.95f,
          .eps = 1e-8f,
          .weight_decay = weight_decay,
          .correction1 = 0.271f,
          .correction2 = 0.142625f,
          .gradient_scale = nullptr,
          .skip = nullptr,
          .zero_gradients = false};
}

void run(const Range& r, const kernels::AdamW& p) {
  kernels::adamw(p, stream_of(r.weights));
}

TEST_P(AdamWOptionsTest, ElementsBehindTheDecayEndDoNotDecay) {
  SCOPED_TRACE(test::seed_text(seed_));
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t end : {0, 1, 1003, 2048, 4999, 5000}) {
      const Range start = draw(random_, 5000, dtype, dtype, dtype, false, GetParam());
      const Range both = start.clone(), all = start.clone(), none = start.clone();
      auto p = step_of(both);
      p.decay_end = end;
      run(both, p);
      run(all, step_of(all));
      run(none, step_of(none, 0.0f));
      EXPECT_TRUE(same_bits(both.weights.narrow(0, 0, end), all.weights.narrow(0, 0, end)));
      EXPECT_TRUE(same_bits(both.weights.narrow(0, end, 5000 - end),
                            none.weights.narrow(0, end, 5000 - end)));
      EXPECT_TRUE(same_bits(both.exp_avg_sq, all.exp_avg_sq));
    }
  }
}

TEST_P(AdamWOptionsTest, Bf16ErrsNoMoreThanLibTorch) {
  SCOPED_TRACE(test::seed_text(seed_));
  const Range start =
      draw(random_, 30011, at::kBFloat16, at::kBFloat16, at::kBFloat16, false, GetParam());
  const Range ours = start.clone(), theirs = start.clone();
  auto p = step_of(ours);
  p.correction1 = static_cast<float>(1 - std::pow(0.9, 3));
  p.correction2 = static_cast<float>(1 - std::pow(0.95, 3));
  run(ours, p);
  at::_fused_adamw_({theirs.weights}, {theirs.gradients}, {theirs.exp_avg}, {theirs.exp_avg_sq}, {},
                    {at::full({}, 3, theirs.weights.options().dtype(at::kFloat))}, 0.01, 0.9, 0.95,
                    0.1, 1e-8, false, false);
  const auto wide = [](const at::Tensor& x) { return x.to(at::kDouble); };
  const at::Tensor g = wide(start.gradients);
  const at::Tensor m = wide(start.exp_avg) * 0.9 + g * 0.1;
  const at::Tensor v = wide(start.exp_avg_sq) * 0.95 + g * g * 0.05;
  const at::Tensor w =
      wide(start.weights) * (1 - 0.001) -
      m / (1 - std::pow(0.9, 3)) * 0.01 / ((v / (1 - std::pow(0.95, 3))).sqrt() + 1e-8);
  using test::relative_error;
  EXPECT_LE(relative_error(ours.weights, w), 1.2 * relative_error(theirs.weights, w));
  EXPECT_LE(relative_error(ours.exp_avg, m), 1.2 * relative_error(theirs.exp_avg, m));
  EXPECT_LE(relative_error(ours.exp_avg_sq, v), 1.2 * relative_error(theirs.exp_avg_sq, v));
}

TEST_P(AdamWOptionsTest, TheRunningMeanIsOfTheWeightsThatAreKept) {
  SCOPED_TRACE(test::seed_text(seed_));
  for (const bool master : {false, true}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      for (const int64_t size : {0, 1, 2051}) {
        const Range r =
            draw(random_, size, at::kBFloat16, at::kFloat, at::kFloat, master, GetParam());
        const at::Tensor ema = random_.normal({size}, dtype, GetParam()), before = ema.clone();
        auto p = step_of(r);
        p.ema = ema.mutable_data_ptr();
        p.ema_dtype = dtype_of(ema, "adamw", "ema");
        p.ema_decay = 0.9f;
        run(r, p);
        const at::Tensor kept = (master ? r.master : r.weights).to(at::kDouble);
        const at::Tensor expected = before.to(at::kDouble) * 0.9 + kept * 0.1;
        // Against the terms, not their sum, which may be a small difference.
        const double error = (ema.to(at::kDouble) - expected).norm().item<double>();
        const double terms = (before.to(at::kDouble).norm() + kept.norm()).item<double>();
        EXPECT_LE(error, test::tolerance(dtype, 8) * terms) << dtype;
      }
    }
  }
}

/// Random rounding of everything that is BF16, with `first_index` for the range's element 0.
kernels::AdamW random_step(const Range& r, int64_t first_index) {
  auto p = step_of(r);
  p.stochastic_rounding = true;
  p.seed = 77;
  p.step = 9;
  p.first_index = first_index;
  return p;
}

TEST_P(AdamWOptionsTest, RandomRoundingTakesANeighbourAndKeepsTheMean) {
  SCOPED_TRACE(test::seed_text(seed_));
  constexpr int64_t kSize = 40000;
  // All elements alike, so that their mean is an expectation.
  const auto fill = [&](double value, at::ScalarType type) {
    return at::full({kSize}, value, at::TensorOptions(type).device(GetParam()));
  };
  const double w = random_.uniform(0.5, 2.0), g = random_.uniform(0.5, 2.0);
  const Range exact{fill(w, at::kBFloat16).to(at::kFloat),
                    {},
                    fill(g, at::kFloat),
                    fill(0.1, at::kBFloat16).to(at::kFloat),
                    fill(0.2, at::kBFloat16).to(at::kFloat)};
  const Range rounded{fill(w, at::kBFloat16),
                      {},
                      fill(g, at::kFloat),
                      fill(0.1, at::kBFloat16),
                      fill(0.2, at::kBFloat16)};
  run(exact, step_of(exact));
  run(rounded, random_step(rounded, 0));
  for (const auto& [actual, expected] : {std::pair(rounded.weights, exact.weights),
                                         {rounded.exp_avg, exact.exp_avg},
                                         {rounded.exp_avg_sq, exact.exp_avg_sq}}) {
    const double target = expected[0].item<double>();
    const double gap = std::exp2(std::floor(std::log2(target)) - 7);
    const at::Tensor off = actual.to(at::kDouble).sub(target);
    EXPECT_LT(off.abs().max().item<double>(), gap);
    // The mean of `size` roundings spreads by less than gap / 2 / sqrt(size).
    EXPECT_LT(std::abs(off.mean().item<double>()), 5 * gap / 2 / std::sqrt(kSize));
  }
}

TEST_P(AdamWOptionsTest, RandomBitsFollowTheElementWhateverTheCut) {
  SCOPED_TRACE(test::seed_text(seed_));
  constexpr int64_t kFirst = 24, kSize = 3000;
  const Range start =
      draw(random_, kSize, at::kBFloat16, at::kBFloat16, at::kBFloat16, false, GetParam());
  const Range whole = start.clone();
  run(whole, random_step(whole, kFirst));
  for (const int64_t at : {8, 1000, 1003, 2999}) {
    const Range cut = start.clone();
    run(cut.cut(0, at), random_step(cut.cut(0, at), kFirst));
    run(cut.cut(at, kSize - at), random_step(cut.cut(at, kSize - at), kFirst + at));
    EXPECT_TRUE(same_bits(cut.weights, whole.weights)) << "cut at " << at;
    EXPECT_TRUE(same_bits(cut.exp_avg, whole.exp_avg)) << "cut at " << at;
    EXPECT_TRUE(same_bits(cut.exp_avg_sq, whole.exp_avg_sq)) << "cut at " << at;
  }
  const Range elsewhere = start.clone();
  run(elsewhere, random_step(elsewhere, kFirst + 8));
  EXPECT_FALSE(same_bits(elsewhere.weights, whole.weights));
  auto later = random_step(start, kFirst);
  later.step = 10;
  const Range next = start.clone();
  run(start, later);
  EXPECT_FALSE(same_bits(start.weights, whole.weights));
  for (int i = 0; i < 10; ++i) {
    const Range again = next.clone();
    run(again, random_step(again, kFirst));
    EXPECT_TRUE(same_bits(again.weights, whole.weights));
  }
}

TEST_P(AdamWOptionsTest, RandomBitsArePhiloxOfSeedIndexAndStep) {
  SCOPED_TRACE(test::seed_text(seed_));
  constexpr int64_t kSize = 4099;
  for (const int64_t first : {int64_t{0}, int64_t{13}, int64_t{1} << 40}) {
    const Range r = draw(random_, kSize, at::kFloat, at::kFloat, at::kBFloat16, false, GetParam());
    r.exp_avg.zero_();
    auto p = random_step(r, first);
    p.beta1 = 0.0f;  // the moment is the gradient
    const at::Tensor gradients = r.gradients.cpu();
    run(r, p);
    const at::Tensor actual = r.exp_avg.to(at::kFloat).cpu();
    namespace detail = kernels::detail;
    const auto key = detail::philox_key(p.seed);
    for (int64_t i = 0; i < kSize; ++i) {
      const auto words = detail::rounding_words(p, key, first + i, detail::Rounded::kExpAvg);
      const uint32_t random = detail::rounding_bits(words, static_cast<int>((first + i) % 8));
      const auto bits = std::bit_cast<uint32_t>(gradients.const_data_ptr<float>()[i]);
      ASSERT_EQ(std::bit_cast<uint32_t>(actual.const_data_ptr<float>()[i]),
                detail::round_at_random(bits, random) << 16)
          << "element " << i;
    }
  }
}

TEST_P(AdamWOptionsTest, RandomRoundingKeepsInfinityAndNan) {
  const Range r = draw(random_, 64, at::kBFloat16, at::kBFloat16, at::kBFloat16, false, GetParam());
  r.exp_avg.fill_(std::numeric_limits<double>::quiet_NaN());
  r.exp_avg_sq.fill_(std::numeric_limits<double>::infinity());
  run(r, random_step(r, 0));
  EXPECT_EQ(r.exp_avg.isnan().sum().item<int64_t>(), 64);
  EXPECT_EQ(r.exp_avg_sq.isinf().sum().item<int64_t>(), 64);
}

struct Fp8 {
  at::Tensor codes, scales;
};

Fp8 run_fp8(const Range& r, const kernels::AdamW& step, int64_t rows, int64_t columns,
            bool power_of_two) {
  const auto options = r.weights.options();
  const int64_t across = (columns + 127) / 128;
  const Fp8 out{at::full({rows, columns}, 0x55, options.dtype(at::kByte)),
                at::full({(rows + 127) / 128, across + 1}, -1.0, options.dtype(at::kFloat))};
  kernels::adamw_fp8({.update = step,
                      .rows = rows,
                      .columns = columns,
                      .codes = out.codes.mutable_data_ptr<uint8_t>(),
                      .scales = out.scales.mutable_data_ptr<float>(),
                      .scale_stride = across + 1,
                      .rule = {.power_of_two = power_of_two}},
                     stream_of(r.weights));
  return out;
}

/// LibTorch's own rounding to E4M3, block by block.
Fp8 quantised(const at::Tensor& kept, int64_t rows, int64_t columns, bool power_of_two) {
  const at::Tensor w = kept.cpu().to(at::kFloat).view({rows, columns});
  Fp8 out{at::zeros({rows, columns}, at::kByte),
          at::full({(rows + 127) / 128, (columns + 127) / 128 + 1}, -1.0)};
  for (int64_t i = 0; i < rows; i += 128) {
    for (int64_t j = 0; j < columns; j += 128) {
      const int64_t height = std::min<int64_t>(128, rows - i);
      const int64_t width = std::min<int64_t>(128, columns - j);
      const at::Tensor block = w.narrow(0, i, height).narrow(1, j, width);
      const float amax = std::max(block.abs().max().item<float>(), 0x1p-100f);
      float scale = amax / 448.0f, inverse = 448.0f / amax;
      if (power_of_two) {
        scale = std::exp2(std::ceil(std::log2(scale)));
        inverse = 1.0f / scale;
      }
      out.scales[i / 128][j / 128] = scale;
      const at::Tensor codes =
          block.mul(at::full({}, inverse)).contiguous().to(at::kFloat8_e4m3fn).view(at::kByte);
      out.codes.narrow(0, i, height).narrow(1, j, width).copy_(codes);
    }
  }
  return out;
}

TEST_P(AdamWOptionsTest, WeightsAsFp8AreThoseOfAdamWQuantisedBlockByBlock) {
  SCOPED_TRACE(test::seed_text(seed_));
  for (const auto& [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 5}, {1, 1}, {3, 130}, {128, 128}, {129, 256}, {200, 333}, {300, 136}}) {
    for (const bool master : {false, true}) {
      for (const auto weight : {at::kFloat, at::kBFloat16}) {
        if (master && weight == at::kFloat) continue;
        for (const bool power_of_two : {false, true}) {
          SCOPED_TRACE(testing::Message() << rows << " × " << columns << c10::toString(weight)
                                          << (master ? ", master" : ""));
          const Range start = draw(random_, rows * columns, weight, at::kBFloat16, at::kBFloat16,
                                   master, GetParam());
          const Range plain = start.clone(), both = start.clone();
          auto p = step_of(both);
          p.zero_gradients = true;
          const Fp8 actual = run_fp8(both, p, rows, columns, power_of_two);
          run(plain, step_of(plain));
          EXPECT_TRUE(same_bits(both.weights, plain.weights));
          EXPECT_TRUE(same_bits(both.exp_avg, plain.exp_avg));
          EXPECT_EQ(both.gradients.abs().sum().item<double>(), 0.0);
          const Fp8 expected =
              quantised(master ? both.master : both.weights, rows, columns, power_of_two);
          EXPECT_TRUE(same_bits(actual.scales, expected.scales));
          EXPECT_TRUE(same_bits(actual.codes, expected.codes));
          if (!master) continue;
          const Range alone = start.clone();
          auto without = step_of(alone);
          without.weights = nullptr;
          EXPECT_TRUE(same_bits(run_fp8(alone, without, rows, columns, power_of_two).codes,
                                expected.codes));
          EXPECT_TRUE(same_bits(alone.weights, start.weights));
        }
      }
    }
  }
}

TEST_P(AdamWOptionsTest, Fp8IsLeftAloneWhenTheStepIsSkipped) {
  const Range r = draw(random_, 256, at::kFloat, at::kFloat, at::kFloat, false, GetParam());
  const at::Tensor skip = at::full({1}, 1, at::TensorOptions(at::kInt).device(GetParam()));
  auto p = step_of(r);
  p.skip = skip.const_data_ptr<int32_t>();
  p.zero_gradients = true;
  const Fp8 out = run_fp8(r, p, 2, 128, false);
  EXPECT_EQ(out.codes.ne(0x55).sum().item<int64_t>(), 0);
  EXPECT_EQ(out.scales.ne(-1).sum().item<int64_t>(), 0);
  EXPECT_EQ(r.gradients.abs().sum().item<double>(), 0.0);
}

TEST(AdamWOptionsErrors, NameWhatIsWrong) {
  test::Random random(1);
  const Range r = draw(random, 256, at::kFloat, at::kFloat, at::kFloat, false, at::kCPU);
  EXPECT_THROW(run_fp8(r, step_of(r), 3, 128, false), std::invalid_argument);
  auto p = step_of(r);
  p.first_index = -1;
  EXPECT_THROW(run(r, p), std::invalid_argument);
  p = step_of(r);
  p.weights = nullptr;
  EXPECT_THROW(run_fp8(r, p, 2, 128, false), std::invalid_argument);
}

}  // namespace
}  // namespace dsv3::ops
