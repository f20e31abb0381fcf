#include <ATen/TensorOperators.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/optimizer.h"
#include "ops/adamw.h"
#include "ops/dispatch.h"
#include "support/compare.h"
#include "support/random.h"

namespace dsv3::ops {
namespace {

using test::close;
using test::close_to_terms;
using test::same_bits;

class AdamWTest : public testing::TestWithParam<at::Device> {};
INSTANTIATE_TEST_SUITE_P(Devices, AdamWTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) {
                           return std::string(info.param.is_cuda() ? "cuda" : "cpu");
                         });

struct State {
  at::Tensor weights, master, gradients, exp_avg, exp_avg_sq;

  State clone() const {
    return {weights.clone(), master.defined() ? master.clone() : master, gradients.clone(),
            exp_avg.clone(), exp_avg_sq.clone()};
  }
};

constexpr float kRate = 0.01f, kBeta1 = 0.9f, kBeta2 = 0.95f, kEps = 1e-8f, kDecay = 0.1f;

kernels::AdamW parameters(const State& state, int step) {
  return {.size = state.weights.numel(),
          .weight_dtype = dtype_of(state.weights, "adamw", "weights"),
          .gradient_dtype = dtype_of(state.gradients, "adamw", "gradients"),
          .moment_dtype = dtype_of(state.exp_avg, "adamw", "exp_avg"),
          .weights = state.weights.mutable_data_ptr(),
          .master = state.master.defined() ? state.master.mutable_data_ptr<float>() : nullptr,
          .gradients = state.gradients.mutable_data_ptr(),
          .exp_avg = state.exp_avg.mutable_data_ptr(),
          .exp_avg_sq = state.exp_avg_sq.mutable_data_ptr(),
          .learning_rate = kRate,
          .beta1 = kBeta1,
          .beta2 = kBeta2,
          .eps = kEps,
          .weight_decay = kDecay,
          .correction1 = 1.0f - static_cast<float>(std::pow(kBeta1, step)),
          .correction2 = 1.0f - static_cast<float>(std::pow(kBeta2, step)),
          .gradient_scale = nullptr,
          .skip = nullptr,
          .zero_gradients = false,
          .partials = nullptr};
}

/// One step in float64 from the stored values.
State exact_step(const State& state, int step, double gradient_scale) {
  const auto wide = [](const at::Tensor& x) { return x.to(at::kDouble); };
  const at::Tensor g = wide(state.gradients) * gradient_scale;
  at::Tensor w = wide(state.master.defined() ? state.master : state.weights);
  w = w - static_cast<double>(kRate) * static_cast<double>(kDecay) * w;
  const at::Tensor m =
      wide(state.exp_avg) * static_cast<double>(kBeta1) + g * (1.0 - static_cast<double>(kBeta1));
  const at::Tensor v = wide(state.exp_avg_sq) * static_cast<double>(kBeta2) +
                       g * g * (1.0 - static_cast<double>(kBeta2));
  const double c1 = 1.0 - std::pow(kBeta1, step), c2 = 1.0 - std::pow(kBeta2, step);
  w = w - static_cast<double>(kRate) / c1 * m / ((v / c2).sqrt() + static_cast<double>(kEps));
  return {w, w, g, m, v};
}

/// Absolute values of what the sums of weights and exp_avg are made of.
State terms_of(const State& before, const State& after, double gradient_scale) {
  const auto size = [](const at::Tensor& x) { return x.to(at::kDouble).abs(); };
  return {size(before.weights) + size(after.weights),
          {},
          {},
          size(before.exp_avg) + size(before.gradients) * gradient_scale,
          {}};
}

State random_state(test::Random& random, int64_t size, at::ScalarType weight,
                   at::ScalarType gradient, at::ScalarType moment, bool master, at::Device device) {
  State state{random.normal({size}, weight, device),
              {},
              random.normal({size}, gradient, device),
              random.normal({size}, moment, device, 0.1),
              random.normal({size}, moment, device, 0.1).abs_()};
  if (master) {
    state.master = random.normal({size}, at::kFloat, device);
    state.weights.copy_(state.master);
  }
  return state;
}

void step_on(const State& state, kernels::AdamW p) {
  kernels::adamw(p, stream_of(state.weights));
}

TEST_P(AdamWTest, AgreesWithFloat64ForEveryCombinationOfTypes) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const auto types = {at::kFloat, at::kBFloat16};
  for (const auto weight : types) {
    for (const auto gradient : types) {
      for (const auto moment : types) {
        for (const bool master : {false, true}) {
          if (master && weight == at::kFloat) continue;
          for (const int64_t size :
               {int64_t{0}, int64_t{1}, int64_t{7}, int64_t{1000}, int64_t{20011}}) {
            SCOPED_TRACE(testing::Message() << c10::toString(weight) << c10::toString(gradient)
                                            << c10::toString(moment) << (master ? ", master" : "")
                                            << ", size " << size);
            const State state =
                random_state(random, size, weight, gradient, moment, master, GetParam());
            const State expected = exact_step(state, 3, 0.5);
            const State terms = terms_of(state, expected, 0.5);
            const at::Tensor scale =
                at::full({1}, 0.5, at::TensorOptions(at::kFloat).device(GetParam()));
            auto p = parameters(state, 3);
            p.gradient_scale = scale.const_data_ptr<float>();
            step_on(state, p);
            EXPECT_TRUE(close_to_terms(state.weights, expected.weights, terms.weights,
                                       test::tolerance(weight, 4)));
            EXPECT_TRUE(close_to_terms(state.exp_avg, expected.exp_avg, terms.exp_avg,
                                       test::tolerance(moment, 4)));
            EXPECT_TRUE(close(state.exp_avg_sq, expected.exp_avg_sq, test::tolerance(moment, 4)));
            if (master) {
              EXPECT_TRUE(close_to_terms(state.master, expected.weights, terms.weights,
                                         test::tolerance(at::kFloat, 4)));
              EXPECT_TRUE(same_bits(state.weights, state.master.to(weight)));
            }
          }
        }
      }
    }
  }
}

TEST_P(AdamWTest, AgreesWithLibTorchOverSeveralSteps) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const auto options = at::TensorOptions(at::kFloat).device(GetParam());
  State ours{random.normal({5003}, at::kFloat, GetParam()),
             {},
             {},
             at::zeros({5003}, options),
             at::zeros({5003}, options)};
  State theirs = State{ours.weights, {}, ours.weights, ours.exp_avg, ours.exp_avg_sq}.clone();
  for (int step = 1; step <= 5; ++step) {
    ours.gradients = random.normal({5003}, at::kFloat, GetParam());
    step_on(ours, parameters(ours, step));
    at::_fused_adamw_({theirs.weights}, {ours.gradients}, {theirs.exp_avg}, {theirs.exp_avg_sq}, {},
                      {at::full({}, step, options)}, kRate, kBeta1, kBeta2, kDecay, kEps, false,
                      false);
  }
  EXPECT_TRUE(close(ours.weights, theirs.weights, 1e-6));
  EXPECT_TRUE(close(ours.exp_avg, theirs.exp_avg, 1e-6));
  EXPECT_TRUE(close(ours.exp_avg_sq, theirs.exp_avg_sq, 1e-6));
}

TEST_P(AdamWTest, ARangeThatIsNotAlignedGivesTheSameAndLeavesItsNeighbours) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const State whole =
      random_state(random, 2050, at::kBFloat16, at::kBFloat16, at::kBFloat16, false, GetParam());
  const State before = whole.clone();
  const auto range = [](const State& s) {
    const auto cut = [](const at::Tensor& x) { return x.narrow(0, 3, 1999); };
    return State{cut(s.weights), {}, cut(s.gradients), cut(s.exp_avg), cut(s.exp_avg_sq)};
  };
  const State aligned = range(whole).clone();
  auto p = parameters(range(whole), 2);
  p.zero_gradients = true;
  step_on(whole, p);
  step_on(aligned, parameters(aligned, 2));
  EXPECT_TRUE(close(range(whole).weights, aligned.weights, 1e-3));
  EXPECT_TRUE(close(range(whole).exp_avg_sq, aligned.exp_avg_sq, 1e-3));
  EXPECT_EQ(range(whole).gradients.abs().sum().item<double>(), 0.0);
  for (const auto& [now, then] :
       {std::pair(whole.weights, before.weights), std::pair(whole.gradients, before.gradients)}) {
    EXPECT_TRUE(same_bits(now.narrow(0, 0, 3), then.narrow(0, 0, 3)));
    EXPECT_TRUE(same_bits(now.narrow(0, 2002, 48), then.narrow(0, 2002, 48)));
  }
}

TEST_P(AdamWTest, SkipLeavesWeightsAndMomentsButZeroesGradients) {
  test::Random random(test::fresh_seed());
  const State state =
      random_state(random, 3001, at::kFloat, at::kFloat, at::kFloat, false, GetParam());
  const State before = state.clone();
  const at::Tensor skip = at::full({1}, 1, at::TensorOptions(at::kInt).device(GetParam()));
  auto p = parameters(state, 1);
  p.skip = skip.const_data_ptr<int32_t>();
  p.zero_gradients = true;
  step_on(state, p);
  EXPECT_TRUE(same_bits(state.weights, before.weights));
  EXPECT_TRUE(same_bits(state.exp_avg, before.exp_avg));
  EXPECT_TRUE(same_bits(state.exp_avg_sq, before.exp_avg_sq));
  EXPECT_EQ(state.gradients.abs().sum().item<double>(), 0.0);
}

/// The operator on tensors: every option against its reference, and the reference against plain
/// loops.
TEST_P(AdamWTest, TheOperatorAgreesWithItsReference) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const auto place = at::TensorOptions(GetParam());
  struct Types {
    at::ScalarType weight, gradient, moment, ema;
    bool master;
  };
  for (const auto& types : {Types{at::kFloat, at::kFloat, at::kFloat, at::kFloat, false},
                            Types{at::kBFloat16, at::kFloat, at::kBFloat16, at::kFloat, true},
                            Types{at::kBFloat16, at::kBFloat16, at::kFloat, at::kBFloat16, false},
                            Types{at::kDouble, at::kDouble, at::kDouble, at::kDouble, false}}) {
    for (const int64_t size : {0, 1, 13, 4099}) {
      for (const int skip : {0, 1}) {
        SCOPED_TRACE(testing::Message()
                     << c10::toString(types.weight) << ", size " << size << ", skip " << skip);
        const State s = random_state(random, size, types.weight, types.gradient, types.moment,
                                     types.master, GetParam());
        const AdamWRange range{s.weights,    s.master,
                               s.gradients,  s.exp_avg,
                               s.exp_avg_sq, random.normal({size}, types.ema, GetParam())};
        const AdamWStep step{.learning_rate = 0.01,
                             .beta1 = 0.875,
                             .beta2 = 0.9375,
                             .eps = 0x1p-20,
                             .weight_decay = 0.125,
                             .decay_end = size / 3,
                             .ema_decay = 0.75,
                             .corrections = at::full({2}, 0.25, place.dtype(at::kFloat)),
                             .gradient_scale = at::full({1}, 0.5, place.dtype(at::kFloat)),
                             .skip = at::full({1}, skip, place.dtype(at::kInt)),
                             .zero_gradients = true};
        const AdamWRange expected = reference::adamw(range, step);
        const at::Tensor mean = range.ema.clone();
        const State before = s.clone();
        adamw_(range, step);
        const auto most = [&](at::ScalarType type) { return test::tolerance(type, 8); };
        const State terms = terms_of(before, {expected.weights, {}, {}, {}, {}}, 0.5);
        EXPECT_TRUE(
            close_to_terms(range.weights, expected.weights, terms.weights, most(types.weight)));
        EXPECT_TRUE(
            close_to_terms(range.exp_avg, expected.exp_avg, terms.exp_avg, most(types.moment)));
        EXPECT_TRUE(close(range.exp_avg_sq, expected.exp_avg_sq, most(types.moment)));
        const at::Tensor mean_terms = mean.to(at::kDouble).abs() + expected.weights.abs();
        EXPECT_TRUE(
            close_to_terms(range.ema, expected.ema, mean_terms,
                           std::max(most(types.ema), types.master ? 0.0 : most(types.weight))));
        EXPECT_EQ(range.gradients.abs().sum().item<double>(), 0.0);
        if (types.master) {
          EXPECT_TRUE(
              close_to_terms(range.master, expected.master, terms.weights, most(at::kFloat)));
        }
        if (skip != 0) {
          EXPECT_TRUE(same_bits(range.weights, before.weights));
        }
      }
    }
  }
}

TEST(AdamWReference, IsThatOfPlainLoops) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const State s = random_state(random, 57, at::kDouble, at::kDouble, at::kDouble, false, at::kCPU);
  const at::Tensor ema = random.normal({57}, at::kDouble);
  const AdamWStep step{.learning_rate = 0.02,
                       .weight_decay = 0.3,
                       .decay_end = 20,
                       .ema_decay = 0.9,
                       .correction1 = 0.19,
                       .correction2 = 0.0975};
  const AdamWRange after =
      reference::adamw({s.weights, {}, s.gradients, s.exp_avg, s.exp_avg_sq, ema}, step);
  const auto at_index = [](const at::Tensor& x, int64_t i) {
    return x.const_data_ptr<double>()[i];
  };
  for (int64_t i = 0; i < 57; ++i) {
    const double g = at_index(s.gradients, i);
    double w = at_index(s.weights, i);
    if (i < 20) w -= 0.02 * 0.3 * w;
    const double m = 0.9 * at_index(s.exp_avg, i) + 0.1 * g;
    const double v = 0.95 * at_index(s.exp_avg_sq, i) + 0.05 * g * g;
    w -= 0.02 * (m / 0.19) / (std::sqrt(v / 0.0975) + 1e-8);
    EXPECT_NEAR(at_index(after.weights, i), w, 1e-13 * (1 + std::abs(w)));
    EXPECT_NEAR(at_index(after.exp_avg, i), m, 1e-14);
    EXPECT_NEAR(at_index(after.exp_avg_sq, i), v, 1e-14);
    EXPECT_NEAR(at_index(after.ema, i), 0.9 * at_index(ema, i) + 0.1 * w,
                1e-13 * (1 + std::abs(w)));
  }
}

TEST(AdamWErrors, NameTheTensorThatDoesNotFit) {
  test::Random random(2);
  const State s = random_state(random, 8, at::kFloat, at::kFloat, at::kFloat, false, at::kCPU);
  const AdamWRange good{s.weights, {}, s.gradients, s.exp_avg, s.exp_avg_sq};
  const AdamWStep step{.learning_rate = 0.1, .correction1 = 0.1, .correction2 = 0.05};
  EXPECT_NO_THROW(adamw_(good, step));
  AdamWRange bad = good;
  bad.gradients = s.gradients.narrow(0, 0, 7);
  try {
    adamw_(bad, step);
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "[adamw] gradients: expected shape [8], got [7]");
  }
  bad = good;
  bad.exp_avg = at::zeros({16}).slice(0, 0, 16, 2);
  EXPECT_THROW(adamw_(bad, step), std::invalid_argument);
  bad = good;
  bad.exp_avg_sq = s.exp_avg_sq.to(at::kBFloat16);
  EXPECT_THROW(adamw_(bad, step), std::invalid_argument);
  bad = good;
  bad.master = s.weights.clone();
  EXPECT_THROW(adamw_(bad, step), std::invalid_argument);
  bad = good;
  bad.ema = at::zeros({8}, at::kDouble);
  EXPECT_THROW(adamw_(bad, step), std::invalid_argument);
  AdamWStep wrong = step;
  wrong.skip = at::zeros({1});
  EXPECT_THROW(adamw_(good, wrong), std::invalid_argument);
  wrong = step;
  wrong.moved = at::zeros({2, 2}, at::kDouble);
  EXPECT_THROW(adamw_(good, wrong), std::invalid_argument);
}

TEST(AdamWErrors, NameWhatIsWrong) {
  test::Random random(1);
  const State state = random_state(random, 8, at::kFloat, at::kFloat, at::kFloat, true, at::kCPU);
  EXPECT_THROW(step_on(state, parameters(state, 1)), std::invalid_argument);
  auto p =
      parameters(random_state(random, 8, at::kFloat, at::kFloat, at::kFloat, false, at::kCPU), 0);
  EXPECT_THROW(step_on(state, p), std::invalid_argument);
}

struct Norm {
  at::Tensor norm, clip_factor, not_finite;
};

Norm gradient_norm(const std::vector<at::Tensor>& buffers, double max_norm, at::Device device) {
  const auto options = at::TensorOptions(at::kDouble).device(device);
  const at::Tensor partials = at::empty({kernels::kSumOfSquaresPartials}, options);
  const at::Tensor sums = at::empty({static_cast<int64_t>(buffers.size())}, options);
  for (size_t i = 0; i < buffers.size(); ++i) {
    kernels::sum_of_squares({.size = buffers[i].numel(),
                             .dtype = dtype_of(buffers[i], "sum_of_squares", "x"),
                             .x = buffers[i].const_data_ptr(),
                             .partials = partials.mutable_data_ptr<double>(),
                             .result = sums.mutable_data_ptr<double>() + i},
                            stream_of(sums));
  }
  Norm result{at::empty({1}, options.dtype(at::kFloat)), at::empty({1}, options.dtype(at::kFloat)),
              at::empty({1}, options.dtype(at::kInt))};
  kernels::finish_norm({.count = static_cast<int32_t>(buffers.size()),
                        .sums = sums.const_data_ptr<double>(),
                        .max_norm = static_cast<float>(max_norm),
                        .norm = result.norm.mutable_data_ptr<float>(),
                        .clip_factor = result.clip_factor.mutable_data_ptr<float>(),
                        .not_finite = result.not_finite.mutable_data_ptr<int32_t>()},
                       stream_of(sums));
  return result;
}

TEST_P(AdamWTest, GradientNormIsThatOfAllBuffersTogether) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const int64_t size : {0, 1, 15, 4097, 300001}) {
    const std::vector<at::Tensor> buffers = {
        random.normal({size}, at::kFloat, GetParam(), 3.0),
        random.normal({size + 9}, at::kBFloat16, GetParam()).narrow(0, 1, size)};
    double sum = 0.0;
    for (const auto& x : buffers) sum += x.to(at::kDouble).square().sum().item<double>();
    const Norm actual = gradient_norm(buffers, 0.5, GetParam());
    EXPECT_NEAR(actual.norm.item<double>(), std::sqrt(sum), 1e-6 * std::sqrt(sum));
    EXPECT_NEAR(actual.clip_factor.item<double>(), std::min(1.0, 0.5 / (std::sqrt(sum) + 1e-6)),
                1e-6);
    EXPECT_EQ(actual.not_finite.item<int32_t>(), 0);
    EXPECT_EQ(gradient_norm(buffers, 0.0, GetParam()).clip_factor.item<double>(), 1.0);
    EXPECT_TRUE(same_bits(gradient_norm(buffers, 0.5, GetParam()).norm, actual.norm));
  }
}

TEST_P(AdamWTest, ANormThatIsNotFiniteIsFlagged) {
  for (const double bad :
       {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    at::Tensor x = at::zeros({1000}, at::TensorOptions(at::kFloat).device(GetParam()));
    x[517] = bad;
    EXPECT_EQ(gradient_norm({x}, 1.0, GetParam()).not_finite.item<int32_t>(), 1);
  }
}

}  // namespace
}  // namespace dsv3::ops
