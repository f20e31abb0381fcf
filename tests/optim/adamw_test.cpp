#include "optim/adamw.h"

#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/optimizer.h"
#include "support/compare.h"
#include "support/random.h"

namespace dsv3 {
namespace {

using Numbers = std::vector<double>;

/// The update in float64, number by number (arXiv:1711.05101 algorithm 2; torch.optim.AdamW).
struct PlainAdamW {
  AdamWOptions options;
  std::vector<Numbers> weights, m, v;  // by bucket
  std::vector<int64_t> decay_end;
  int step = 0;
  double moved = 0, before = 0;  // Σ (w after - w before)², Σ (w before)² of the last step

  double update(const std::vector<Numbers>& gradients, double lr) {
    double squares = 0;
    for (const auto& bucket : gradients)
      for (const double g : bucket) squares += g * g;
    const double norm = std::sqrt(squares);
    const double scale = options.clip > 0 ? std::min(1.0, options.clip / (norm + 1e-6)) : 1.0;
    ++step;
    moved = before = 0;
    for (size_t b = 0; b < weights.size(); ++b) {
      for (size_t i = 0; i < weights[b].size(); ++i) {
        const double g = gradients[b][i] * scale;
        double& w = weights[b][i];
        const double old = w;
        before += w * w;
        if (static_cast<int64_t>(i) < decay_end[b]) w -= lr * options.weight_decay * w;
        m[b][i] = options.beta1 * m[b][i] + (1 - options.beta1) * g;
        v[b][i] = options.beta2 * v[b][i] + (1 - options.beta2) * g * g;
        const double corrected_m = m[b][i] / (1 - std::pow(options.beta1, step));
        const double corrected_v = v[b][i] / (1 - std::pow(options.beta2, step));
        w -= lr * corrected_m / (std::sqrt(corrected_v) + options.eps);
        moved += (w - old) * (w - old);
      }
    }
    return norm;
  }
};

Numbers numbers_of(const at::Tensor& flat) {
  const at::Tensor host = flat.detach().to(at::kCPU, at::kDouble);
  return {host.data_ptr<double>(), host.data_ptr<double>() + host.numel()};
}

at::Tensor tensor_of(const Numbers& numbers, at::ScalarType type, const at::Device& device) {
  at::Tensor host = at::zeros({static_cast<int64_t>(numbers.size())}, at::kDouble);
  std::ranges::copy(numbers, host.data_ptr<double>());
  return host.to(type).to(device);
}

struct Case {
  at::ScalarType weights, gradients;
  DType moments;
  bool masters;
  double clip;
};

class AdamWTest : public testing::TestWithParam<at::Device> {
 protected:
  uint64_t seed_ = test::fresh_seed();
  test::Random random_{seed_};

  /// A bucket of `size` elements with random values; `decay_end` of them decay.
  Bucket make_bucket(int64_t size, int64_t decay_end, at::ScalarType weights,
                     at::ScalarType gradients) {
    Bucket bucket;
    Numbers values(static_cast<size_t>(size));
    for (double& value : values) value = random_.normal();
    bucket.values = tensor_of(values, weights, GetParam());
    bucket.grads = at::zeros({size}, bucket.values.options().dtype(gradients));
    bucket.decay_end = decay_end;
    return bucket;
  }

  Numbers draw_gradients(Bucket& bucket, double size) {
    Numbers drawn(static_cast<size_t>(bucket.numel()));
    for (double& value : drawn) value = size * random_.normal();
    bucket.grads.copy_(tensor_of(drawn, bucket.grads.scalar_type(), GetParam()));
    return numbers_of(bucket.grads);  // as rounded
  }
};

TEST_P(AdamWTest, FollowsTheFormulaInFloat64) {
  SCOPED_TRACE(test::seed_text(seed_));
  const std::vector<Case> cases{{at::kFloat, at::kFloat, DType::kF32, true, 1.0},
                                {at::kFloat, at::kFloat, DType::kF32, true, 0.0},
                                {at::kBFloat16, at::kFloat, DType::kF32, true, 1.0},
                                {at::kBFloat16, at::kBFloat16, DType::kBF16, true, 1.0},
                                {at::kBFloat16, at::kFloat, DType::kF32, false, 1e9}};
  for (const auto& c : cases) {
    const AdamWOptions options{.eps = 1e-8,
                               .weight_decay = 0.1,
                               .clip = c.clip,
                               .master_weights = c.masters,
                               .moment_dtype = c.moments};
    std::vector<Bucket> buckets{make_bucket(1000, 700, c.weights, c.gradients),
                                make_bucket(37, 0, at::kFloat, at::kFloat),
                                make_bucket(1, 1, c.weights, c.gradients)};
    PlainAdamW plain{.options = options, .weights = {}, .m = {}, .v = {}, .decay_end = {}};
    for (const auto& bucket : buckets) {
      plain.weights.push_back(numbers_of(bucket.values));
      plain.m.emplace_back(bucket.numel(), 0.0);
      plain.v.emplace_back(bucket.numel(), 0.0);
      plain.decay_end.push_back(bucket.decay_end);
    }
    AdamW optimizer(buckets, options);
    for (int step = 0; step < 5; ++step) {
      std::vector<Numbers> gradients;
      for (auto& bucket : buckets)
        gradients.push_back(draw_gradients(bucket, step == 2 ? 1e-3 : 0.5));
      const double expected_norm = plain.update(gradients, 1e-2);
      const GradientNorm norm = optimizer.step(1e-2);
      EXPECT_NEAR(norm.norm.item<float>(), expected_norm, 1e-5 * expected_norm);
      EXPECT_EQ(norm.skip.item<int>(), 0);
      const Numbers moved = numbers_of(norm.moved);
      const double near = c.weights == at::kFloat ? 1e-5 : 2e-2;
      EXPECT_NEAR(moved[0], plain.moved, near * plain.moved);
      EXPECT_NEAR(moved[1], plain.before, near * plain.before);
      for (const auto& bucket : buckets) EXPECT_EQ(bucket.grads.ne(0).sum().item<int64_t>(), 0);
    }
    // BF16 weights without masters lose small updates; BF16 moments lose 8 bits: only then is the
    // bar that low.
    const bool exact = c.moments == DType::kF32 && (c.masters || c.weights == at::kFloat);
    for (size_t b = 0; b < buckets.size(); ++b) {
      const bool rounded = buckets[b].values.scalar_type() == at::kBFloat16;
      const double bar =
          rounded ? (exact ? 0x1p-8 : 2e-2) : (c.moments == DType::kF32 ? 2e-6 : 2e-2);
      // Against the weight and its five steps of about 1e-2: one element alone may end near zero.
      const at::Tensor expected = tensor_of(plain.weights[b], at::kDouble, GetParam());
      EXPECT_TRUE(test::close_to_terms(buckets[b].values, expected, expected.abs().add(0.05), bar))
          << "bucket " << b << ", clip " << c.clip << ", masters " << c.masters;
    }
  }
}

TEST_P(AdamWTest, MastersKeepWhatBFloat16WouldLose) {
  // 1 - 1e-4 rounds back to 1 in BF16: only a master weight can move.
  for (const bool masters : {true, false}) {
    std::vector<Bucket> buckets{make_bucket(256, 0, at::kBFloat16, at::kFloat)};
    buckets[0].values.fill_(1.0);
    AdamW optimizer(buckets, {.weight_decay = 0, .clip = 0, .master_weights = masters});
    for (int step = 0; step < 100; ++step) {
      buckets[0].grads.fill_(1.0);
      optimizer.step(1e-4);
    }
    const double expected = masters ? 0.98828125 : 1.0;  // 0.99 to the nearest BF16
    EXPECT_NEAR(buckets[0].values.to(at::kFloat).mean().item<float>(), expected, 2e-3);
    EXPECT_EQ(buckets[0].values.ne(1.0).any().item<bool>(), masters);
  }
}

TEST_P(AdamWTest, RandomRoundingKeepsOnAverageWhatNearestWouldLose) {
  // Steps of 1e-4 from 1, where BF16's neighbours are 2^-8 below and 2^-7 above.
  std::vector<Bucket> buckets{make_bucket(20000, 0, at::kBFloat16, at::kBFloat16)};
  buckets[0].values.fill_(1.0);
  AdamW optimizer(buckets, {.weight_decay = 0,
                            .clip = 0,
                            .master_weights = false,
                            .moment_dtype = DType::kBF16,
                            .stochastic_rounding = true,
                            .seed = seed_});
  for (int step = 0; step < 100; ++step) {
    buckets[0].grads.fill_(1.0);
    optimizer.step(1e-4);
  }
  // A weight's spread after 100 steps is about sqrt(0.01 · 2^-8) = 6e-3, the mean's 5e-5.
  EXPECT_NEAR(buckets[0].values.to(at::kDouble).mean().item<double>(), 0.99, 5e-4);
}

TEST_P(AdamWTest, RandomRoundingDependsOnSeedStepAndElementOnly) {
  const auto run = [&](uint64_t seed, int steps) {
    random_ = test::Random(seed_);
    std::vector<Bucket> buckets{make_bucket(2051, 1000, at::kBFloat16, at::kBFloat16),
                                make_bucket(77, 0, at::kBFloat16, at::kBFloat16)};
    AdamW optimizer(buckets, {.master_weights = false,
                              .moment_dtype = DType::kBF16,
                              .stochastic_rounding = true,
                              .seed = seed});
    for (int step = 0; step < steps; ++step) {
      for (auto& bucket : buckets) draw_gradients(bucket, 1.0);
      optimizer.step(1e-3);
    }
    return buckets[0].values.clone();
  };
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(test::same_bits(run(5, 3), run(5, 3)));
  EXPECT_FALSE(test::same_bits(run(5, 3), run(6, 3)));
}

TEST_P(AdamWTest, TheRunningMeanFollowsTheWeights) {
  SCOPED_TRACE(test::seed_text(seed_));
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    std::vector<Bucket> buckets{make_bucket(3001, 2000, type, at::kFloat),
                                make_bucket(9, 9, at::kFloat, at::kFloat)};
    AdamW optimizer(buckets, {.master_weights = false, .ema_decay = 0.75});
    Numbers mean = numbers_of(buckets[0].values);
    for (int step = 0; step < 4; ++step) {
      for (auto& bucket : buckets) draw_gradients(bucket, 1.0);
      optimizer.step(1e-2);
      const Numbers now = numbers_of(buckets[0].values);
      for (size_t i = 0; i < mean.size(); ++i) mean[i] += 0.25 * (now[i] - mean[i]);
    }
    EXPECT_TRUE(test::close(optimizer.ema(0), tensor_of(mean, at::kDouble, GetParam()), 1e-6));
  }
  std::vector<Bucket> buckets{make_bucket(8, 0, at::kFloat, at::kFloat)};
  EXPECT_FALSE(AdamW(buckets, {}).ema(0).defined());
  EXPECT_THROW(AdamW(buckets, {.ema_decay = 1.0}), std::invalid_argument);
}

TEST_P(AdamWTest, LoadedWeightsBecomeTheMasters) {
  std::vector<Bucket> buckets{make_bucket(100, 100, at::kBFloat16, at::kFloat)};
  AdamW optimizer(buckets, {.weight_decay = 0});
  buckets[0].values.fill_(3.0);
  optimizer.reset_masters();
  optimizer.step(0.0);
  EXPECT_EQ(buckets[0].values.ne(3.0).sum().item<int64_t>(), 0);
}

TEST_P(AdamWTest, ANormThatIsNoNumberChangesNothing) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    std::vector<Bucket> buckets{make_bucket(300, 100, at::kFloat, at::kFloat),
                                make_bucket(5, 0, at::kFloat, at::kFloat)};
    const at::Tensor before = buckets[0].values.clone();
    AdamW optimizer(buckets, {});
    buckets[1].grads[3].fill_(bad);
    buckets[0].grads.fill_(1.0);
    const GradientNorm norm = optimizer.step(0.1);
    EXPECT_EQ(norm.skip.item<int>(), kernels::kSkipNotFinite);
    EXPECT_EQ(numbers_of(norm.moved), (Numbers{0, 0}));
    EXPECT_EQ(optimizer.steps_done(), 0);
    EXPECT_TRUE(test::same_bits(buckets[0].values, before));
    EXPECT_EQ(buckets[1].grads.ne(0).sum().item<int64_t>(), 0) << "the bad gradient must not stay";
  }
}

TEST_P(AdamWTest, HowFarTheWeightsMovedIsSummedOverEveryPart) {
  SCOPED_TRACE(test::seed_text(seed_));
  // Part borders (2048 elements), unaligned starts, and ranges without decay or without the rest.
  for (const int64_t size : {1, 2047, 2048, 2049, 4100, 70000}) {
    for (const int64_t decay_end : {int64_t{0}, size / 2, size}) {
      std::vector<Bucket> buckets{make_bucket(size, decay_end, at::kFloat, at::kFloat)};
      const at::Tensor before = buckets[0].values.to(at::kDouble);
      AdamW optimizer(buckets, {});
      draw_gradients(buckets[0], 1.0);
      const Numbers moved = numbers_of(optimizer.step(1e-2).moved);
      const at::Tensor change = buckets[0].values.to(at::kDouble).sub(before);
      const double expected = change.mul(change).sum().item<double>();
      EXPECT_NEAR(moved[0], expected, 1e-4 * expected) << size << ", " << decay_end;
      const double weight = before.mul(before).sum().item<double>();
      EXPECT_NEAR(moved[1], weight, 1e-6 * weight) << size << ", " << decay_end;
    }
  }
}

TEST_P(AdamWTest, ASkippedStepIsAsIfItHadNotBeen) {
  SCOPED_TRACE(test::seed_text(seed_));
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto losses = [&](double loss, double other) {
    return tensor_of({loss, other}, at::kDouble, GetParam());
  };
  // Two runs with the same gradients; the second one meets bad losses and a spike on the way.
  std::vector<at::Tensor> found;
  for (const bool disturbed : {false, true}) {
    random_ = test::Random(seed_);
    std::vector<Bucket> buckets{make_bucket(1000, 500, at::kBFloat16, at::kFloat)};
    AdamW optimizer(buckets, {.moment_dtype = DType::kBF16});
    const StepGuard good{.losses = losses(8, 1), .loss_scale = 0.25, .loss_limit = 2.0};
    for (int step = 0; step < 4; ++step) {
      draw_gradients(buckets[0], 1.0);
      EXPECT_EQ(optimizer.step(1e-2, good).skip.item<int>(), 0);
      if (!disturbed) continue;
      const auto skip_of = [&](const StepGuard& guard) {
        buckets[0].grads.fill_(0.5);
        const int skip = optimizer.step(1e-2, guard).skip.item<int>();
        EXPECT_EQ(buckets[0].grads.ne(0).sum().item<int64_t>(), 0);
        return skip;
      };
      EXPECT_EQ(skip_of({.losses = losses(kNan, 1)}), kernels::kSkipNotFinite);
      EXPECT_EQ(skip_of({.losses = losses(1, -kInfinity)}), kernels::kSkipNotFinite);
      EXPECT_EQ(skip_of({.losses = losses(8.001, 1), .loss_scale = 0.25, .loss_limit = 2.0}),
                kernels::kSkipSpike);
    }
    EXPECT_EQ(optimizer.steps_done(), 4);
    found.push_back(buckets[0].values.clone());
  }
  EXPECT_TRUE(test::same_bits(found[0], found[1]));
}

TEST_P(AdamWTest, TwoRunsGiveTheSameBits) {
  at::Tensor first;
  for (int run = 0; run < 2; ++run) {
    random_ = test::Random(seed_);
    std::vector<Bucket> buckets{make_bucket(10007, 5000, at::kFloat, at::kFloat)};
    AdamW optimizer(buckets, {});
    for (int step = 0; step < 3; ++step) {
      draw_gradients(buckets[0], 1.0);
      optimizer.step(1e-3);
    }
    if (run == 0)
      first = buckets[0].values.clone();
    else
      EXPECT_TRUE(test::same_bits(buckets[0].values, first));
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, AdamWTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) { return info.param.is_cuda() ? "cuda" : "cpu"; });

}  // namespace
}  // namespace dsv3
