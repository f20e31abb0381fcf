// NUMERICS trap 5: the router works in FP32; its bias is a buffer that no optimizer sees and that
// every checkpoint holds.
#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include "checkpoint/temporary_directory.h"
#include "checkpoint/weights.h"
#include "moe/moe.h"
#include "optim/adamw.h"
#include "support/compare.h"
#include "support/random.h"

namespace dsv3 {
namespace {

const std::string kPrefix = "model.layers.1.mlp.";
const std::string kBias = kPrefix + "gate.e_score_correction_bias";

struct Layer {
  ModelConfig config;
  ParameterSet parameters;
  Moe moe;

  explicit Layer(DType dtype, DType gradient_dtype = DType::kF32) {
    config.hidden_size = 16;
    config.moe.num_experts = 6;
    config.moe.num_experts_per_token = 2;
    config.moe.num_shared_experts = 1;
    config.moe.moe_intermediate_size = 8;
    moe = Moe::declare(parameters, config, 1, kPrefix);
    parameters.allocate({.dtype = dtype, .gradient_dtype = gradient_dtype});
    parameters.initialize(5);
  }
};

bool within(const at::Tensor& x, const at::Tensor& whole) {
  const auto* p = static_cast<const char*>(x.const_data_ptr());
  const auto* begin = static_cast<const char*>(whole.const_data_ptr());
  return p >= begin && p < begin + whole.nbytes();
}

TEST(MoeDeclaration, TheGateIsFp32WhateverTheModelIs) {
  for (const auto gradient : {DType::kF32, DType::kBF16}) {
    const Layer layer(DType::kBF16, gradient);
    EXPECT_TRUE(layer.moe.gate->spec.float32);
    EXPECT_EQ(layer.moe.gate->value().scalar_type(), at::kFloat);
    EXPECT_EQ(layer.moe.gate->weight.grad.scalar_type(), at::kFloat);
    EXPECT_EQ(layer.moe.experts_down->value().scalar_type(), at::kBFloat16);
  }
}

TEST(MoeDeclaration, TheBiasIsAnFp32BufferInNoBucket) {
  for (const auto dtype : {DType::kF32, DType::kBF16}) {
    const Layer layer(dtype);
    const Parameter& bias = *layer.moe.gate_bias;
    EXPECT_FALSE(bias.spec.trainable);
    EXPECT_FALSE(bias.spec.decay);
    EXPECT_EQ(bias.value().scalar_type(), at::kFloat);
    EXPECT_FALSE(bias.value().requires_grad());
    EXPECT_FALSE(bias.weight.grad.defined());
    EXPECT_EQ(bias.bucket, -1);
    int64_t in_buckets = 0;
    for (const auto& bucket : layer.parameters.buckets()) {
      EXPECT_FALSE(within(bias.value(), bucket.values));
      EXPECT_FALSE(within(bias.value(), bucket.grads));
    }
    for (const auto& parameter : layer.parameters.parameters()) {
      if (parameter.bucket >= 0) in_buckets += parameter.spec.numel();
    }
    EXPECT_EQ(layer.parameters.total_parameters(), in_buckets);
  }
}

TEST(MoeDeclaration, TheOptimizerLeavesTheBiasAlone) {
  test::Random random(test::fresh_seed());
  Layer layer(DType::kBF16);
  at::Tensor bias = layer.moe.gate_bias->value();
  bias.copy_(random.normal({6}, at::kFloat));
  const at::Tensor before = bias.clone();
  for (auto& bucket : layer.parameters.buckets())
    bucket.grads.copy_(random.normal({bucket.numel()}, bucket.grads.scalar_type()));
  const at::Tensor gate = layer.moe.gate->value().detach().clone();
  AdamW optimizer(layer.parameters.buckets(), {.weight_decay = 0.5, .clip = 1e-3});
  optimizer.step(0.1);
  EXPECT_TRUE(test::same_bits(bias, before));
  EXPECT_FALSE(gate.equal(layer.moe.gate->value().detach()));
}

TEST(MoeDeclaration, TheBiasIsSavedInFp32AndLoadedBack) {
  test::Random random(test::fresh_seed());
  const test::TemporaryDirectory directory;
  Layer saved(DType::kBF16), loaded(DType::kBF16);
  at::Tensor bias = saved.moe.gate_bias->value();
  bias.copy_(random.normal({6}, at::kFloat));
  save_weights(directory.path() / "weights", saved.parameters, saved.config);
  const WeightFiles files(directory.path() / "weights");
  const auto* tensor = files.find(kBias);
  ASSERT_NE(tensor, nullptr);
  EXPECT_EQ(tensor->type, StoredType::kF32);
  load_weights(directory.path() / "weights", loaded.parameters, saved.config.num_layers);
  EXPECT_TRUE(test::same_bits(loaded.moe.gate_bias->value(), bias));
}

}  // namespace
}  // namespace dsv3
