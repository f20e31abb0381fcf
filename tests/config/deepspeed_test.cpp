// DeepSpeed JSON beside and inside a YAML.
#include <filesystem>
#include <random>

#include "base/file.h"
#include "config_testing.h"

namespace dsv3 {
namespace {

using testing::error_of;
using testing::errors_of;

Config with(const std::string& json, const std::string& yaml = "",
            const std::vector<std::string>& overrides = {}) {
  return load_config_text(yaml, "run.yaml", overrides, DeepSpeedText{json, "ds.json"});
}

std::string wrong(const std::string& json, const std::string& yaml = "") {
  return error_of(yaml, {}, json);
}

TEST(DeepSpeed, ReadsWhatWeImplement) {
  const Config config = with(R"({
    "train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 16,
    "bf16": {"enabled": false}, "fp16": {"enabled": false}, "zero_optimization": {"stage": 2},
    "gradient_clipping": 0.5, "steps_per_print": 10, "wall_clock_breakdown": false,
    "optimizer": {"type": "AdamW",
                  "params": {"lr": 1e-3, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.01}},
    "activation_checkpointing": {"partition_activations": false, "number_checkpoints": null}})");
  EXPECT_EQ(config.training.global_batch_size, Schedule::constant(64));
  EXPECT_EQ(config.training.micro_batch_size, 4);
  EXPECT_EQ(config.model.dtype, DType::kF32);
  EXPECT_EQ(config.parallel.zero_stage, 2);
  EXPECT_EQ(config.parallel.data_parallel_size, 0);
  EXPECT_EQ(config.optimizer.clip, 0.5);
  EXPECT_EQ(config.training.log_every, 10);
  EXPECT_EQ(config.optimizer.learning_rate, Schedule::constant(1e-3));
  EXPECT_EQ(config.optimizer.beta1, 0.8);
  EXPECT_EQ(config.optimizer.beta2, 0.99);
  EXPECT_EQ(config.optimizer.eps, 1e-6);
  EXPECT_EQ(config.optimizer.weight_decay, 0.01);
  EXPECT_EQ(config.training.recompute, Recompute::kFull);
}

TEST(DeepSpeed, AutoTakesTheYamlsValue) {
  const std::string yaml =
      "model: {dtype: fp32}\ntraining: {micro_batch_size: 2, global_batch_size: 6, recompute: "
      "selective, steps: 50}\noptimizer: {clip: 0.7, learning_rate: 3e-4}";
  const Config plain = testing::load(yaml);
  EXPECT_EQ(with(R"({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
      "gradient_accumulation_steps": "auto", "bf16": {"enabled": "auto"}, "gradient_clipping": "auto",
      "zero_optimization": {"stage": "auto"}, "steps_per_print": "auto", "scheduler": "auto",
      "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto",
      "weight_decay": "auto"}}, "activation_checkpointing": {}})",
                 yaml),
            plain);
}

TEST(DeepSpeed, WinsOverTheYamlAndLosesToTheCommandLine) {
  const std::string json = R"({"gradient_clipping": 0.5})";
  EXPECT_EQ(with(json, "optimizer: {clip: 2}").optimizer.clip, 0.5);
  EXPECT_EQ(with(json, "optimizer: {clip: 2}", {"optimizer.clip=3"}).optimizer.clip, 3);
}

TEST(DeepSpeed, BatchSizesFollowFromEachOther) {
  const Config two =
      with(R"({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3})");
  EXPECT_EQ(two.training.global_batch_size, Schedule::constant(12));
  const Config micro = with(R"({"train_batch_size": 12, "gradient_accumulation_steps": 3})");
  EXPECT_EQ(micro.training.micro_batch_size, 4);
  const Config yaml_micro = with(R"({"train_micro_batch_size_per_gpu": "auto",
                                     "gradient_accumulation_steps": 3})",
                                 "training: {micro_batch_size: 5}");
  EXPECT_EQ(yaml_micro.training.global_batch_size, Schedule::constant(15));
  const Config replicas = with(R"({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4,
                                   "gradient_accumulation_steps": 3})");
  EXPECT_EQ(replicas.parallel.data_parallel_size, 2);
  EXPECT_EQ(wrong("{\"train_batch_size\": 25, \"train_micro_batch_size_per_gpu\": 4,\n"
                  "\"gradient_accumulation_steps\": 3}"),
            "ds.json:1:22: train_batch_size: train_batch_size(25) must be micro batch(4) × "
            "gradient_accumulation_steps(3) × dp");
}

TEST(DeepSpeed, Schedulers) {
  const auto rate = [](const std::string& type, const std::string& params) {
    return with(
               R"({"optimizer": {"type": "AdamW", "params": {"lr": 2e-3}}, "scheduler": {"type": ")" +
                   type + R"(", "params": )" + params + "}}",
               "training: {steps: 100}")
        .optimizer.learning_rate;
  };
  const Schedule warm = rate("WarmupLR", R"({"warmup_num_steps": 10, "warmup_max_lr": 1e-2,
                                             "warmup_type": "linear"})");
  EXPECT_EQ(warm.at(0, 0), 0.0);
  EXPECT_DOUBLE_EQ(warm.at(5, 0), 5e-3);
  EXPECT_EQ(warm.at(1000, 0), 1e-2);
  const Schedule log = rate("WarmupLR", R"({"warmup_max_lr": "auto"})");
  EXPECT_NEAR(log.at(9, 0), 2e-3 / 3, 1e-12) << "DeepSpeed warms up by the logarithm by default";
  const Schedule decay = rate("WarmupDecayLR", R"({"warmup_num_steps": 10, "warmup_max_lr": "auto",
                                  "warmup_type": "linear", "total_num_steps": "auto"})");
  EXPECT_EQ(decay.at(10, 0), 2e-3);
  EXPECT_DOUBLE_EQ(decay.at(55, 0), 1e-3);
  EXPECT_EQ(decay.at(100, 0), 0.0);
  const Schedule cosine = rate("WarmupCosineLR", R"({"warmup_num_steps": 10, "total_num_steps": 110,
                                   "cos_min_ratio": 0.1, "warmup_type": "linear"})");
  EXPECT_EQ(cosine.at(10, 0), 2e-3);
  EXPECT_DOUBLE_EQ(cosine.at(60, 0), 1.1e-3);
  EXPECT_DOUBLE_EQ(cosine.at(110, 0), 2e-4);
}

TEST(DeepSpeed, RefusesByNameAndPlace) {
  EXPECT_EQ(wrong("{\n  \"zero_optimization\": {\"stage\": 1,\n    \"overlap_comm\": true}}"),
            "ds.json:3:5: zero_optimization.overlap_comm: not implemented, remove it (read here: "
            "stage)");
  EXPECT_EQ(wrong("{\"gradient_cliping\": 1}").substr(0, 57),
            "ds.json:1:2: gradient_cliping: not implemented, remove it");
  EXPECT_EQ(wrong("{\"fp16\": {\"enabled\": true}}").substr(0, 54),
            "ds.json:1:22: fp16.enabled: FP16 is not implemented: B");
  EXPECT_EQ(wrong("{\"fp16\": {\"enabled\": false, \"loss_scal\": 0}}").substr(0, 61),
            "ds.json:1:29: fp16.loss_scal: not implemented, remove it (rea");
  EXPECT_EQ(wrong("{\"optimizer\": {\"type\": \"Lion\"}}"),
            "ds.json:1:24: optimizer.type: only AdamW is implemented, got the string \"Lion\"");
  EXPECT_EQ(
      wrong("{\"activation_checkpointing\": {\"cpu_checkpointing\": true}}"),
      "ds.json:1:52: activation_checkpointing.cpu_checkpointing: true is not implemented, set "
      "false or remove it");
  EXPECT_EQ(wrong("{\"scheduler\": {\"type\": \"OneCycle\"}}").substr(0, 42),
            "ds.json:1:24: scheduler.type: expected one");
}

TEST(DeepSpeed, WrongValuesNameTheJsonsKey) {
  EXPECT_EQ(wrong("{\n \"gradient_clipping\": \"much\"}"),
            "ds.json:2:23: gradient_clipping: expected a finite number, got the string \"much\"");
  EXPECT_EQ(wrong("{\"zero_optimization\": {\"stage\": 7}}"),
            "ds.json:1:33: zero_optimization.stage: must be between 0 and 3, got 7");
  EXPECT_EQ(wrong("{\"optimizer\": {\"type\": \"AdamW\", \"params\": {\"lr\": -1}}}"),
            "ds.json:1:50: optimizer.params.lr: must be at least 0, at most 1e9, got -1");
  EXPECT_EQ(wrong("{\"train_batch_size\": 0}"),
            "ds.json:1:22: train_batch_size: must be at least 1, at most 1e9, got 0");
  EXPECT_EQ(wrong("[1]"), "ds.json:1:1: deepspeed: expected a map, got a list");
}

TEST(DeepSpeed, JsonSyntax) {
  EXPECT_EQ(wrong("{\"a\": }").substr(0, 32), "ds.json:1:7: JSON: syntax error:");
  EXPECT_EQ(
      wrong("{\n\"fp16\": {},\n\"fp16\": {}}"),
      "ds.json:3:1: fp16: the key is given twice in one map (first at ds.json:2:1), keep one");
  EXPECT_NE(wrong(std::string(100000, '[')).find("ds.json:1:33: JSON: nested deeper"),
            std::string::npos);
  EXPECT_NE(wrong("\xff").find("ds.json:1:1: JSON: byte 0xff"), std::string::npos);
}

TEST(DeepSpeed, InsideTheYamlAndAsAPath) {
  const Config inside =
      testing::load("deepspeed: {gradient_clipping: 0.5, bf16: {enabled: auto}}\n");
  EXPECT_EQ(inside.optimizer.clip, 0.5);
  EXPECT_EQ(
      error_of("deepspeed:\n  zero_optimization: {stage: 1, offload: 2}\n"),
      "run.yaml:2:33: zero_optimization.offload: not implemented, remove it (read here: stage)");
  const auto directory = std::filesystem::temp_directory_path() /
                         ("dsv3_deepspeed_" + std::to_string(std::random_device{}()));
  std::filesystem::create_directory(directory);
  write_file_atomically(directory / "ds.json", "{\"gradient_clipping\": 0.25}");
  write_file_atomically(directory / "run.yaml", "deepspeed: ds.json\n");
  EXPECT_EQ(load_config(directory / "run.yaml").optimizer.clip, 0.25);
  write_file_atomically(directory / "plain.yaml", "");
  EXPECT_EQ(load_config(directory / "plain.yaml", {}, directory / "ds.json").optimizer.clip, 0.25);
  const std::string override = "deepspeed=" + (directory / "ds.json").string();
  EXPECT_EQ(load_config(directory / "plain.yaml", {override}).optimizer.clip, 0.25);
  std::filesystem::remove_all(directory);
  EXPECT_EQ(error_of("deepspeed: nowhere.json"),
            "run.yaml:1:12: deepspeed: cannot open nowhere.json: No such file or directory");
}

}  // namespace
}  // namespace dsv3
