#include "moe/moe.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>

#include "moe/balance.h"
#include "support/compare.h"
#include "support/gradients.h"
#include "support/random.h"

namespace dsv3 {
namespace {

using test::close;

const std::string kPrefix = "model.layers.1.mlp.";
constexpr double kBalance = 0.5;

/// One layer's result, with everything that flows back.
struct Result {
  at::Tensor y, dx, balance;
  std::vector<int64_t> counts;
  std::map<std::string, at::Tensor> grads;  // by the parameter's name behind the prefix
  double narrowest = std::numeric_limits<double>::infinity();
};

std::vector<size_t> order_of(const std::vector<double>& values) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::stable_sort(order, [&](size_t a, size_t b) { return values[a] > values[b]; });
  return order;
}

/// The best k of `values`; `narrowest` learns how close the next one is.
std::vector<size_t> best(const std::vector<double>& values, int64_t k, double& narrowest) {
  auto order = order_of(values);
  const auto count = static_cast<size_t>(k);
  if (count < order.size())
    narrowest = std::min(narrowest, values[order[count - 1]] - values[order[count]]);
  order.resize(count);
  return order;
}

/// One token's experts from its biased scores.
std::vector<size_t> choose(const MoeConfig& moe, std::vector<double> biased, double& narrowest) {
  const auto size = static_cast<size_t>(moe.num_experts / moe.n_group);
  std::vector<double> groups;
  for (size_t begin = 0; begin < biased.size(); begin += size) {
    std::vector<double> members(biased.begin() + static_cast<long>(begin),
                                biased.begin() + static_cast<long>(begin + size));
    std::ranges::sort(members, std::greater<>());
    const bool two = moe.group_score == MoeConfig::GroupScore::kTop2Sum && size > 1;
    groups.push_back(two ? members[0] + members[1] : members[0]);
  }
  const auto chosen = best(groups, moe.topk_group, narrowest);
  for (size_t e = 0; e < biased.size(); ++e) {
    if (std::ranges::find(chosen, e / size) == chosen.end())
      biased[e] = -std::numeric_limits<double>::infinity();
  }
  return best(biased, moe.num_experts_per_token, narrowest);
}

std::vector<double> row(const at::Tensor& x, int64_t t) {
  const at::Tensor values = x.detach().select(0, t).contiguous();
  return {values.const_data_ptr<double>(), values.const_data_ptr<double>() + values.numel()};
}

class MoeTest : public testing::TestWithParam<test::Place> {
 protected:
  ModelConfig draw_config() {
    ModelConfig config;
    const auto pick = [&](int64_t a, int64_t b) { return random_.integer(0, 1) == 0 ? a : b; };
    config.hidden_size = pick(24, 20);
    config.initializer_range = 0.3;
    auto& moe = config.moe;
    moe.num_experts = 8;
    moe.num_experts_per_token = pick(1, 3);
    moe.n_group = pick(1, 4);
    moe.topk_group = moe.n_group == 1 ? 1 : 2;
    moe.num_shared_experts = pick(0, 2);
    moe.moe_intermediate_size = pick(8, 12);
    moe.scoring = pick(0, 1) == 0 ? MoeConfig::Scoring::kSigmoid : MoeConfig::Scoring::kSoftmax;
    moe.group_score =
        pick(0, 1) == 0 ? MoeConfig::GroupScore::kTop2Sum : MoeConfig::GroupScore::kMax;
    // A single weight, normalised, is 1 whatever its score: of its gradient only rounding is left.
    moe.norm_topk_prob = pick(0, 1) == 1 && moe.num_experts_per_token > 1;
    moe.routed_scaling_factor = 2.5;
    moe.sequence_loss_alpha = 1e-4;  // not 0: the layer then gives the loss, without α
    return config;
  }

  /// Runs the layer that `config` and `seed` make.
  struct Case {
    ModelConfig config;
    ParameterSet parameters;
    Moe moe;
    at::Tensor x, dy;
    at::Tensor valid;  // [T] or undefined, on the CPU

    Case(const ModelConfig& given, const test::Place& place, bool padded, uint64_t seed)
        : config(given) {
      test::Random random(seed);
      const auto type = place.dtype == at::kDouble  ? DType::kF64
                        : place.dtype == at::kFloat ? DType::kF32
                                                    : DType::kBF16;
      moe = Moe::declare(parameters, config, 1, kPrefix);
      parameters.allocate({.dtype = type, .cuda = place.device.is_cuda()});
      parameters.initialize(seed);
      moe.gate_bias->value().copy_(random.normal({8}, at::kDouble, place.device, 0.3, -0.5));
      x = random.normal({kTokens, config.hidden_size}, place.dtype, place.device);
      dy = random.normal({kTokens, config.hidden_size}, place.dtype, place.device);
      if (!padded) return;
      valid = at::full({kTokens}, true, at::TensorOptions(at::kBool));
      valid.narrow(0, kLength - 4, 4).fill_(false);
    }
  };

  Result run(const Case& c, Recompute recompute);
  static Result run_plain(const Case& c);

  static constexpr int64_t kLength = 11, kTokens = 2 * kLength;
  uint64_t seed_ = test::fresh_seed();
  test::Random random_{seed_};
  testing::ScopedTrace trace_{__FILE__, __LINE__, test::seed_text(seed_)};
};

Result MoeTest::run(const Case& c, Recompute recompute) {
  for (const auto& bucket : c.parameters.buckets()) bucket.grads.zero_();
  ForwardContext context;
  context.num_sequences = 2;
  context.sequence_length = kLength;
  context.recompute = recompute;
  if (c.valid.defined()) context.valid = c.valid.to(c.x.device());
  const at::Tensor leaf = c.x.detach().clone().requires_grad_();
  MoeStatistics statistics;
  const at::Tensor y = c.moe.forward({leaf, {}}, context, &statistics);
  const auto wide = statistics.balance_loss.scalar_type();
  ((y * c.dy).to(wide).sum() + statistics.balance_loss * kBalance).backward();
  Result result{y.detach(), leaf.grad(), statistics.balance_loss.detach(), {}, {}};
  const at::Tensor counts = statistics.counts.cpu();
  for (int64_t e = 0; e < counts.numel(); ++e) result.counts.push_back(counts[e].item<int32_t>());
  for (const auto& parameter : c.parameters.parameters()) {
    if (parameter.spec.trainable)
      result.grads[parameter.spec.name.substr(kPrefix.size())] = parameter.weight.grad.clone();
  }
  return result;
}

/// The layer in float64 as a loop over experts; ATen differentiates.
Result MoeTest::run_plain(const Case& c) {
  const MoeConfig& moe = c.config.moe;
  std::map<std::string, at::Tensor> w;
  for (const auto& parameter : c.parameters.parameters())
    w[parameter.spec.name.substr(kPrefix.size())] =
        test::leaf(parameter.value(), at::kDouble, at::kCPU);
  const at::Tensor x = test::leaf(c.x, at::kDouble, at::kCPU);
  const auto mlp = [](const at::Tensor& input, const at::Tensor& gate_up, const at::Tensor& down) {
    const auto halves = input.matmul(gate_up.t()).chunk(2, 1);
    return (halves[0] * at::sigmoid(halves[0]) * halves[1]).matmul(down.t());
  };
  const at::Tensor logits = x.matmul(w["gate.weight"].t());
  const at::Tensor scores =
      moe.scoring == MoeConfig::Scoring::kSigmoid ? at::sigmoid(logits) : at::softmax(logits, 1);
  const at::Tensor biased = scores + w["gate.e_score_correction_bias"];
  Result result;
  // Choices, and the mask of raw choices for the balance loss.
  const auto doubles = at::TensorOptions(at::kDouble);
  at::Tensor chosen = at::zeros({kTokens, moe.num_experts}, doubles), raw = chosen.clone();
  for (int64_t t = 0; t < kTokens; ++t) {
    for (const size_t e : choose(moe, row(biased, t), result.narrowest))
      chosen[t][static_cast<int64_t>(e)].fill_(1.0);
    for (const size_t e : best(row(scores, t), moe.num_experts_per_token, result.narrowest))
      raw[t][static_cast<int64_t>(e)].fill_(1.0);
  }
  at::Tensor weights = scores * chosen;
  if (moe.norm_topk_prob) weights = weights / (weights.sum(1, true) + 1e-20);
  at::Tensor y = at::zeros(x.sizes(), doubles);
  for (int64_t e = 0; e < moe.num_experts; ++e) {
    const at::Tensor out = mlp(x, w["experts.gate_up_proj"][e], w["experts.down_proj"][e]);
    y = y + weights.narrow(1, e, 1) * moe.routed_scaling_factor * out;
  }
  if (moe.num_shared_experts > 0)
    y = y + mlp(x, w["shared_experts.gate_up_proj.weight"], w["shared_experts.down_proj.weight"]);

  const at::Tensor valid =
      c.valid.defined() ? c.valid.to(at::kDouble) : at::full({kTokens}, 1.0, doubles);
  at::Tensor balance = at::zeros({}, doubles);
  for (int64_t begin = 0; begin < kTokens; begin += kLength) {
    const at::Tensor v = valid.narrow(0, begin, kLength).unsqueeze(1);
    const at::Tensor s = scores.narrow(0, begin, kLength);
    const double n = v.sum().item<double>();
    const at::Tensor f = (raw.narrow(0, begin, kLength) * v).sum(0) *
                         (static_cast<double>(moe.num_experts) /
                          (static_cast<double>(moe.num_experts_per_token) * n));
    balance = balance + (f * (s / s.sum(1, true) * v).sum(0) / n).sum();
  }
  ((y * c.dy.to(at::kCPU, at::kDouble)).sum() + balance * kBalance).backward();
  result.y = y.detach();
  result.dx = x.grad();
  result.balance = balance.detach();
  const at::Tensor counts = (chosen * valid.unsqueeze(1)).sum(0);
  for (int64_t e = 0; e < moe.num_experts; ++e)
    result.counts.push_back(static_cast<int64_t>(counts[e].item<double>()));
  for (const auto& [name, value] : w) {
    if (name != "gate.e_score_correction_bias") result.grads[name] = value.grad();
  }
  return result;
}

std::vector<test::Place> all_places() {
  auto result = test::places();
  for (const auto& device : test::devices()) result.push_back({device, at::kDouble});
  return result;
}

INSTANTIATE_TEST_SUITE_P(Places, MoeTest, testing::ValuesIn(all_places()), test::place_name);

TEST_P(MoeTest, ForwardAndEveryGradientEqualALoopOverExpertsInFloat64) {
  const auto dtype = GetParam().dtype;
  // BF16: a gradient passes at most a dozen roundings.
  const double most = dtype == at::kDouble  ? 1e-12
                      : dtype == at::kFloat ? 1e-5
                                            : test::tolerance(at::kBFloat16, 12);
  for (int draw = 0; draw < 6; ++draw) {
    const ModelConfig config = draw_config();
    const bool padded = draw % 2 == 1;
    uint64_t seed = seed_ + static_cast<uint64_t>(draw) * 1000;
    auto c = std::make_unique<Case>(config, GetParam(), padded, seed);
    Result expected = run_plain(*c);
    while (expected.narrowest < 1e-5) {  // FP32 could choose other experts than float64
      c = std::make_unique<Case>(config, GetParam(), padded, ++seed);
      expected = run_plain(*c);
    }
    for (const auto recompute : {Recompute::kNone, Recompute::kSelective}) {
      SCOPED_TRACE(testing::Message()
                   << "D " << config.hidden_size << ", I " << config.moe.moe_intermediate_size
                   << ", K " << config.moe.num_experts_per_token << ", groups "
                   << config.moe.n_group << ", shared " << config.moe.num_shared_experts
                   << (padded ? ", padded" : "") << ", recompute " << static_cast<int>(recompute));
      const Result actual = run(*c, recompute);
      EXPECT_TRUE(close(actual.y, expected.y, most));
      EXPECT_TRUE(close(actual.dx, expected.dx, most)) << "dx";
      EXPECT_TRUE(close(actual.balance, expected.balance, dtype == at::kDouble ? 1e-12 : 1e-5));
      EXPECT_EQ(actual.counts, expected.counts);
      ASSERT_EQ(actual.grads.size(), expected.grads.size());
      for (const auto& [name, grad] : expected.grads)
        EXPECT_TRUE(close(actual.grads.at(name), grad, most)) << name;
    }
  }
}

TEST_P(MoeTest, CountTokensCountsValidOnesOnly) {
  const int64_t tokens = random_.integer(1, 70), num_experts = random_.integer(3, 40);
  const at::Tensor experts = random_.integers({tokens, 3}, num_experts, GetParam().device);
  const at::Tensor valid = random_.integers({tokens}, 2, GetParam().device).to(at::kBool);
  std::vector<int32_t> expected(static_cast<size_t>(num_experts), 0);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < 3; ++k)
      expected[static_cast<size_t>(experts[t][k].item<int32_t>())] += valid[t].item<bool>();
  }
  const at::Tensor counts = count_tokens(experts, valid, num_experts);
  EXPECT_EQ(counts.scalar_type(), at::kInt);
  EXPECT_TRUE(counts.cpu().equal(at::tensor(expected, at::TensorOptions(at::kInt))));
  EXPECT_THROW(count_tokens(experts, valid.narrow(0, 0, 0), num_experts), std::invalid_argument);
}

}  // namespace
}  // namespace dsv3
