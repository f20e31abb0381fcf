#pragma once

#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "config/config.h"
#include "nn/companion.h"
#include "nn/parameter.h"

namespace dsv3::test {

/// A small set of every kind of parameter: plain, fused, stacked experts, FP32 gate, bias, MTP.
struct Fixture {
  ModelConfig model;
  ParameterSet parameters;

  explicit Fixture(DType dtype, bool mtp = true, int64_t hidden = 6) {
    model.num_layers = 1;
    model.vocab_size = 5;
    model.hidden_size = hidden;
    model.intermediate_size = 4;
    model.dtype = dtype;
    model.mla.num_heads = 1;
    model.moe.num_experts = 2;
    model.moe.moe_intermediate_size = 3;
    model.mtp.num_nextn_predict_layers = mtp ? 1 : 0;
    plain("model.embed_tokens.weight", {5, hidden}, -1);
    plain("model.norm.weight", {hidden}, 1);
    plain("lm_head.weight", {5, hidden}, 1);
    const std::string mlp = "model.layers.0.mlp.";
    parameters.declare({.name = mlp + "experts.gate_up_proj",
                        .shape = {2, 6, hidden},
                        .pieces = {{mlp + "experts.0.gate_proj.weight", 0, 0, 3, 0},
                                   {mlp + "experts.0.up_proj.weight", 0, 3, 6, 0},
                                   {mlp + "experts.1.gate_proj.weight", 1, 0, 3, 0},
                                   {mlp + "experts.1.up_proj.weight", 1, 3, 6, 0}},
                        .layer = 0,
                        .expert = true});
    plain(mlp + "gate.weight", {2, hidden}, 0, true);
    plain(mlp + "gate.e_score_correction_bias", {2}, 0, true, false);
    if (mtp) plain("model.layers.1.enorm.weight", {hidden}, 2);
    parameters.allocate({.dtype = dtype});
    fill();
  }

  void plain(const std::string& name, std::vector<int64_t> shape, int64_t layer,
             bool float32 = false, bool trainable = true) {
    const int64_t rows = shape[0];
    parameters.declare({.name = name,
                        .shape = std::move(shape),
                        .pieces = {{.name = name, .row_end = rows}},
                        .layer = layer,
                        .float32 = float32,
                        .trainable = trainable});
  }
  void fill() {
    const c10::AutoGradMode off(false);
    for (auto& p : parameters.parameters()) {
      p.value().detach().copy_(at::randn(p.spec.shape, at::TensorOptions(at::kFloat)));
    }
  }
};

inline void expect_equal(const ParameterSet& a, const ParameterSet& b) {
  for (const auto& p : a.parameters()) {
    EXPECT_TRUE(at::equal(p.value(), b.find(p.spec.name)->value())) << p.spec.name;
  }
}

/// A companion of random numbers in `type`; in the buckets of `only` (all when undefined).
inline Companion random_companion(const ParameterSet& parameters, const std::string& prefix,
                                  at::ScalarType type, at::ScalarType only = at::kByte) {
  const c10::AutoGradMode off(false);
  Companion companion{prefix, {}};
  for (const Bucket& bucket : parameters.buckets()) {
    const bool has = only == at::kByte || bucket.values.scalar_type() == only;
    companion.flats.push_back(has ? at::randn({bucket.numel()}, at::TensorOptions(at::kFloat))
                                        .to(bucket.values.device(), type)
                                  : at::Tensor());
  }
  return companion;
}

}  // namespace dsv3::test
