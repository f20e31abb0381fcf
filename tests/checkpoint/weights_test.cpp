#include "checkpoint/weights.h"
#include "checkpoint/catalogue.h"

#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "checkpoint/fixture.h"
#include "checkpoint/hf_config.h"
#include "checkpoint/temporary_directory.h"

namespace dsv3 {

using test::expect_equal, test::Fixture;

namespace {

class Weights : public ::testing::Test {
 protected:
  std::string load_error(ParameterSet& parameters) {
    try {
      load_weights(target_, parameters, 1);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  }
  /// Rewrites the saved file with one change per tensor.
  void rewrite(const std::function<void(std::vector<TensorPlan>&)>& change) {
    const auto path = target_ / "model.safetensors";
    std::map<std::string, std::vector<std::byte>> data;
    std::vector<TensorPlan> plan;
    {
      const SafetensorsFile file(path);
      for (const auto& t : file.tensors()) {
        data[t.name] = {t.bytes.begin(), t.bytes.end()};
        plan.push_back({t.name, t.type, t.shape});
      }
    }
    change(plan);
    SafetensorsWriter writer(path, plan);
    for (const auto& t : writer.order()) {
      auto bytes = data[t.name];
      bytes.resize(t.num_bytes(), std::byte{1});
      writer.write(bytes);
    }
    writer.commit();
  }

  test::TemporaryDirectory directory_;
  std::filesystem::path target_ = directory_.path() / "run" / "checkpoints" / "step_5";
};

TEST_F(Weights, SavedWeightsLoadBackEqualAndSaveEqualBytes) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Fixture a(dtype), b(dtype);
    save_weights(target_, a.parameters, a.model, {.extra_files = {{"dsv3.yaml", "x: 1\n"}}});
    load_weights(target_, b.parameters, 1);
    expect_equal(a.parameters, b.parameters);
    const auto second = directory_.path() / "second";
    save_weights(second, b.parameters, b.model);
    EXPECT_EQ(read_file(target_ / "model.safetensors"), read_file(second / "model.safetensors"));
    EXPECT_EQ(read_file(target_ / "config.json"), read_file(second / "config.json"));
    EXPECT_EQ(read_file(target_ / "dsv3.yaml"), "x: 1\n");
  }
}

TEST_F(Weights, TypesAreConverted) {
  Fixture wide(DType::kF32), narrow(DType::kBF16);
  save_weights(target_, wide.parameters, wide.model);
  load_weights(target_, narrow.parameters, 1);
  for (const auto& p : wide.parameters.parameters()) {
    const at::Tensor& loaded = narrow.parameters.find(p.spec.name)->value();
    EXPECT_TRUE(at::equal(p.value().to(loaded.scalar_type()), loaded)) << p.spec.name;
  }
  save_weights(target_, narrow.parameters, narrow.model);
  load_weights(target_, wide.parameters, 1);
  for (const auto& p : wide.parameters.parameters()) {
    const at::Tensor& saved = narrow.parameters.find(p.spec.name)->value();
    EXPECT_TRUE(at::equal(p.value(), saved.to(at::kFloat))) << p.spec.name;
  }
}

TEST_F(Weights, ReleasedLayoutOfMtpAndBias) {
  Fixture a(DType::kBF16);
  save_weights(target_, a.parameters, a.model);
  const WeightFiles files(target_);
  for (const char* name : {"model.layers.1.embed_tokens.weight", "model.layers.1.enorm.weight",
                           "model.layers.1.shared_head.head.weight"}) {
    EXPECT_NE(files.find(name), nullptr) << name;
  }
  const auto* bias = files.find("model.layers.0.mlp.gate.e_score_correction_bias");
  ASSERT_NE(bias, nullptr);
  EXPECT_EQ(bias->type, StoredType::kF32);
  // A model without the MTP module ignores its layer; one with it needs it.
  Fixture b(DType::kBF16, /*mtp=*/false);
  EXPECT_EQ(load_error(b.parameters), "");
  save_weights(target_, b.parameters, b.model);
  EXPECT_NE(load_error(a.parameters).find("missing (1): model.layers.1.enorm.weight"),
            std::string::npos);
}

TEST_F(Weights, SeveralShardsAndAnIndex) {
  Fixture a(DType::kF32), b(DType::kF32);
  save_weights(target_, a.parameters, a.model, {.max_shard_bytes = 200});
  EXPECT_TRUE(std::filesystem::exists(target_ / "model.safetensors.index.json"));
  EXPECT_FALSE(std::filesystem::exists(target_ / "model.safetensors"));
  load_weights(target_, b.parameters, 1);
  expect_equal(a.parameters, b.parameters);
}

TEST_F(Weights, EveryMisfitIsNamedAtOnceAndNothingIsChanged) {
  Fixture a(DType::kF32), b(DType::kF32);
  save_weights(target_, a.parameters, a.model);
  rewrite([](std::vector<TensorPlan>& plan) {
    std::erase_if(plan, [](const auto& t) { return t.name == "model.norm.weight"; });
    for (auto& t : plan) {
      if (t.name == "lm_head.weight") t.shape = {6, 5};
    }
    plan.push_back({"model.layers.0.surprise", StoredType::kF32, {1}});
    plan.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", StoredType::kF32, {1}});
  });
  const at::Tensor before = b.parameters.find("model.embed_tokens.weight")->value().clone();
  const std::string message = load_error(b.parameters);
  EXPECT_NE(message.find("missing (1): model.norm.weight"), std::string::npos) << message;
  EXPECT_NE(message.find("unexpected (1): model.layers.0.surprise"), std::string::npos) << message;
  EXPECT_NE(message.find("lm_head.weight: expected shape [5, 6], got [6, 5]"), std::string::npos)
      << message;
  EXPECT_TRUE(at::equal(before, b.parameters.find("model.embed_tokens.weight")->value()));
}

TEST_F(Weights, TensorsWithoutElementsAreIgnored) {
  Fixture a(DType::kF32), b(DType::kF32);
  save_weights(target_, a.parameters, a.model);
  rewrite([](std::vector<TensorPlan>& plan) {
    plan.push_back({"model.layers.0.mlp.shared_experts.up_proj.weight", StoredType::kF32, {0, 6}});
    plan.push_back(
        {"model.layers.0.mlp.shared_experts.down_proj.weight", StoredType::kF32, {6, 0}});
  });
  EXPECT_EQ(load_error(b.parameters), "");
}

TEST_F(Weights, CopiesThatDifferAreRefused) {
  Fixture a(DType::kF32);
  save_weights(target_, a.parameters, a.model);
  rewrite([](std::vector<TensorPlan>& plan) {
    for (auto& t : plan) {
      if (t.name == "model.layers.1.embed_tokens.weight") t.shape = {6, 6};
    }
  });
  EXPECT_NE(load_error(a.parameters).find("differs from model.embed_tokens.weight"),
            std::string::npos);
}

TEST_F(Weights, ReplacingACheckpointLeavesNoTrace) {
  Fixture a(DType::kF32), b(DType::kF32);
  save_weights(target_, a.parameters, a.model);
  save_weights(target_, b.parameters, b.model, {.max_shard_bytes = 200});
  load_weights(target_, a.parameters, 1);
  expect_equal(a.parameters, b.parameters);
  EXPECT_FALSE(std::filesystem::exists(target_ / "model.safetensors"));
  const std::filesystem::directory_iterator entries(target_.parent_path());
  EXPECT_EQ(std::distance(begin(entries), end(entries)), 1);
}

TEST_F(Weights, AFailingSaveLeavesTheOldOne) {
  Fixture a(DType::kF32), b(DType::kF32);
  save_weights(target_, a.parameters, a.model);
  EXPECT_THROW(
      save_weights(target_, b.parameters, b.model, {.extra_files = {{"no/such/place", "x"}}}),
      IoError);
  load_weights(target_, b.parameters, 1);
  expect_equal(a.parameters, b.parameters);
  const std::filesystem::directory_iterator entries(target_.parent_path());
  EXPECT_EQ(std::distance(begin(entries), end(entries)), 1);
}

TEST_F(Weights, NewestCheckpointIsTheHighestStep) {
  const auto run = directory_.path() / "run";
  EXPECT_THROW(latest_checkpoint(run), std::invalid_argument);
  Fixture a(DType::kF32);
  for (const int64_t step : {9, 10, 2}) {
    save_weights(checkpoint_directory(run, step), a.parameters, a.model);
  }
  std::filesystem::create_directories(run / "checkpoints" / ".step_99.tmp");
  std::filesystem::create_directories(run / "checkpoints" / "step_98x");
  EXPECT_EQ(latest_checkpoint(run), checkpoint_directory(run, 10));
}

}  // namespace
}  // namespace dsv3
