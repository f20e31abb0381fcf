// What loads: the specification's shapes, presets, overrides, printing and round trips.
#include <filesystem>
#include <random>

#include "base/file.h"
#include "config/schema.h"
#include "config_testing.h"

namespace dsv3 {
namespace {

using testing::load;

TEST(LoadConfig, EmptyGivesDefaults) {
  for (const char* text : {"", "{}", "# nothing\n", "model:\ndata:\n"}) {
    const Config config = load(text);
    EXPECT_EQ(config.model.num_layers, 12) << text;
    EXPECT_EQ(config.model.hidden_size, 1024);
    EXPECT_EQ(config.model.mla.num_heads, 8);
    EXPECT_EQ(config.model.intermediate_size, 2816);
    EXPECT_EQ(config.model.moe.moe_intermediate_size, 704);
    EXPECT_EQ(config.training.global_batch_size, Schedule::constant(8));
  }
}

TEST(LoadConfig, TheSpecificationsFirstShape) {
  const Config config = load(
      "model: {num_layers: 12, mla: {d_model: 1024, d_latent: 256}, moe: {num_experts: 16, "
      "num_experts_per_token: 2}}\n"
      "parallel: {tensor_parallel_size: 2, pipeline_parallel_size: 1, expert_parallel_size: 1}\n");
  EXPECT_EQ(config.model.num_layers, 12);
  EXPECT_EQ(config.model.hidden_size, 1024);
  EXPECT_EQ(config.model.mla.kv_lora_rank, 256);
  EXPECT_EQ(config.model.mla.q_lora_rank, 0);
  EXPECT_EQ(config.model.moe.num_experts, 16);
  EXPECT_EQ(config.model.moe.num_experts_per_token, 2);
  EXPECT_EQ(config.parallel.tensor_parallel_size, 2);
}

TEST(LoadConfig, TheSpecificationsSecondShape) {
  const Config config = load(
      "model: {num_layers: 61, mla: {d_model: 7168, d_latent: 1536, use_fp8_kv: true}, moe: "
      "{num_experts: 256, num_experts_per_token: 8, use_deep_ep: true}}\n"
      "parallel: {tensor_parallel_size: 4, pipeline_parallel_size: 4, expert_parallel_size: 2}\n");
  EXPECT_EQ(config.model.hidden_size, 7168);
  EXPECT_EQ(config.model.mla.kv_lora_rank, 1536);
  EXPECT_EQ(config.model.mla.num_heads, 56);
  EXPECT_TRUE(config.model.mla.use_fp8_kv);
  EXPECT_TRUE(config.model.moe.use_deep_ep);
  EXPECT_EQ(num_processes(config.parallel), 16);
}

TEST(LoadConfig, NullMeansFullRankQuery) {
  EXPECT_EQ(load("model: {preset: deepseek_v3, mla: {q_lora_rank: null}}").model.mla.q_lora_rank,
            0);
  EXPECT_EQ(load("model: {preset: deepseek_v3, mla: {q_lora_rank: ~}}").model.mla.q_lora_rank, 0);
}

TEST(LoadConfig, IntegersMayBeWrittenAsWholeFloats) {
  EXPECT_EQ(load("training: {steps: 1.0e5}").training.steps, 100000);
  EXPECT_EQ(load("training: {steps: +12}").training.steps, 12);
}

TEST(LoadConfig, DerivedDefaultsFollowOtherKeys) {
  EXPECT_EQ(load("data: {sequence_length: 8192}").model.max_position_embeddings, 8192);
  EXPECT_EQ(load("data: {sequence_length: 128}").model.max_position_embeddings, 4096);
  EXPECT_EQ(load("training: {micro_batch_size: 3}").training.global_batch_size,
            Schedule::constant(9));
  EXPECT_EQ(load("parallel: {data_parallel_size: 16}").training.global_batch_size,
            Schedule::constant(16));
  EXPECT_EQ(load("model: {hidden_size: 100}").model.mla.num_heads, 1);
  EXPECT_EQ(load("model: {hidden_size: 100}").model.intermediate_size, 288);
}

TEST(LoadConfig, Sources) {
  const std::vector<DataSource> one = {{"a b.txt", 1.0}};
  EXPECT_EQ(load("data: {train: a b.txt}").data.train, one);
  EXPECT_EQ(load("data: {train: [a b.txt]}").data.train, one);
  EXPECT_EQ(load("data: {train: {path: a b.txt}}").data.train, one);
  EXPECT_TRUE(load("data: {train: }").data.train.empty());
  const std::vector<DataSource> two = {{"a", 0.25}, {"b", 3.0}};
  EXPECT_EQ(load("data:\n  train:\n    - {path: a, weight: 0.25}\n    - path: b\n      weight: 3\n")
                .data.train,
            two);
  EXPECT_EQ(testing::error_of("data: {train: [{path: a, wieght: 1}]}"),
            "run.yaml:1:26: data.train.wieght: unknown key, did you mean weight?");
  EXPECT_EQ(testing::error_of("data: {train: [{path: a, weight: 0}]}"),
            "run.yaml:1:34: data.train.weight: must be more than 0, at most 1e9, got 0");
  EXPECT_EQ(testing::error_of("data: {train: [{weight: 1}]}"),
            "run.yaml:1:16: data.train: expected a path that is not empty, got a map");
}

TEST(Presets, AreDefaultsThatKeysOverride) {
  const Config v3 = load("model: {preset: deepseek_v3}");
  EXPECT_EQ(v3.model.num_layers, 61);
  EXPECT_EQ(v3.model.mla.q_lora_rank, 1536);
  EXPECT_EQ(v3.model.moe.n_group, 8);
  EXPECT_EQ(v3.model.moe.topk_group, 4);
  EXPECT_EQ(v3.model.moe.routed_scaling_factor, 2.5);
  EXPECT_EQ(v3.model.mtp.num_nextn_predict_layers, 1);
  EXPECT_EQ(v3.model.initializer_range, 0.006);
  EXPECT_EQ(v3.model.moe.sequence_loss_alpha, 1e-4);
  EXPECT_EQ(v3.model.rope.type, RopeConfig::Type::kNone);
  const Config shorter = load("model: {num_layers: 4, preset: deepseek_v3, mla: {d_model: 512}}");
  EXPECT_EQ(shorter.model.num_layers, 4);
  EXPECT_EQ(shorter.model.hidden_size, 512);
  EXPECT_EQ(shorter.model.moe.num_experts, 256);
  EXPECT_EQ(load("", {"model.preset=v3slice"}).model.num_layers, 3);
}

TEST(Presets, UnknownNameSuggests) {
  EXPECT_EQ(testing::error_of("model:\n  preset: deepseek_v4\n"),
            "run.yaml:2:11: model.preset: unknown preset deepseek_v4, did you mean deepseek_v3? "
            "(there are deepseek_v3, deepseek_v2_lite, moonlight_16b, small, lite12, v3slice)");
}

TEST(Presets, AllLoadValidateAndPrintBack) {
  for (const std::string_view name : preset_names()) {
    SCOPED_TRACE(name);
    const Config config = preset_config(name);
    EXPECT_EQ(config.model.preset, name);
    EXPECT_NO_THROW(validate(config));
    EXPECT_EQ(load(to_yaml(config)), config);
  }
}

TEST(Overrides, WinOverFileAndAliases) {
  EXPECT_EQ(load("model: {mla: {d_model: 256}}", {"model.hidden_size=512"}).model.hidden_size, 512);
  EXPECT_EQ(load("model: {hidden_size: 256}", {"model.mla.d_model=512"}).model.hidden_size, 512);
  EXPECT_EQ(load("training: {steps: 5}", {"training.steps=6", "training.steps=7"}).training.steps,
            7);
  EXPECT_EQ(load("", {"data.train=[a, b]"}).data.train.size(), 2u);
  EXPECT_EQ(load("", {"model={num_layers: 5, moe: {num_experts: 8}}"}).model.moe.num_experts, 8);
  EXPECT_EQ(load("model: {moe: {num_experts: 16}}", {"model.moe={n_group: 4, topk_group: 4}"})
                .model.moe.num_experts,
            16);
  EXPECT_EQ(load("model:\n", {"model.num_layers=3"}).model.num_layers, 3);
}

TEST(Overrides, TextsNeedNoQuoting) {
  EXPECT_EQ(load("", {"training.sample_prompt=In the beginning: God"}).training.sample_prompt,
            "In the beginning: God");
  EXPECT_EQ(load("", {"training.sample_prompt=[x"}).training.sample_prompt, "[x");
  EXPECT_EQ(load("", {"training.sample_prompt="}).training.sample_prompt, "");
  EXPECT_EQ(load("", {"training.sample_prompt=a=b"}).training.sample_prompt, "a=b");
}

TEST(Overrides, ReachIntoASchedule) {
  const Config config = load("optimizer: {learning_rate: {type: cosine, peak: 1e-3}}",
                             {"optimizer.learning_rate.peak=2e-3", "training.steps=50"});
  EXPECT_EQ(config.optimizer.learning_rate.peak(), 2e-3);
  EXPECT_EQ(config.optimizer.learning_rate.pieces.front().length, 50);
}

TEST(Printing, TextsSurvive) {
  for (const char* text : {"",
                           "null",
                           "true",
                           "No",
                           "1e3",
                           ".5",
                           "a b",
                           "a: b",
                           "#x",
                           "\"q\"",
                           "back\\slash",
                           "tab\there",
                           "two\nlines",
                           "  spaces  ",
                           "Größe",
                           "日本",
                           "\xF0\x9F\x98\x80",
                           "\xC2\x85",
                           "\xE2\x80\xA8",
                           "\xEF\xBB\xBF",
                           "'",
                           "-",
                           "- a",
                           "{",
                           "*a",
                           "&a",
                           "!x",
                           "%",
                           "@",
                           "`",
                           "~",
                           "/a/b-c_d.txt"}) {
    SCOPED_TRACE(text);
    Config config = load("");
    config.training.sample_prompt = text;
    config.data.train = {{std::string("x") + text, 0.1}};
    EXPECT_EQ(load(to_yaml(config)), config) << to_yaml(config);
  }
}

TEST(Printing, EveryFieldIsPrintedOnce) {
  const std::string yaml = to_yaml(load(""));
  for (const Field& field : schema()) {
    const std::string name(field.key.substr(field.key.rfind('.') + 1));
    EXPECT_NE(yaml.find(" " + name + ":"), std::string::npos) << field.key;
  }
}

// --- round trips of random configs
// ------------------------------------------------------------------

class RandomConfig {
 public:
  explicit RandomConfig(uint64_t seed) : random_(seed) {}

  Config make() {
    Config config = load("");
    for (const Field& field : schema()) {
      const Slot slot = field.slot(config);
      if (field.key == "model.preset") continue;
      if (const auto* integer = std::get_if<int64_t*>(&slot)) **integer = whole(field.range);
      if (const auto* number = std::get_if<double*>(&slot)) **number = real(field.range);
      if (const auto* flag = std::get_if<bool*>(&slot)) **flag = pick(2) == 0;
      if (const auto* choice = std::get_if<Choice>(&slot))
        *choice->index = static_cast<uint8_t>(pick(field.choices.size()));
      if (const auto* text = std::get_if<std::string*>(&slot))
        **text = field.choices.empty() ? words() : field.choices[pick(field.choices.size())];
      if (const auto* schedule = std::get_if<Schedule*>(&slot)) **schedule = pieces(field.range);
      if (const auto* range = std::get_if<StepRange*>(&slot); range != nullptr && pick(2) == 0) {
        (*range)->first = whole({1, 1000});
        (*range)->last = (*range)->first + whole({0, 9});
      }
      if (const auto* sources = std::get_if<std::vector<DataSource>*>(&slot)) {
        (*sources)->clear();
        for (size_t i = pick(3); i > 0; --i)
          (*sources)->push_back({"f" + words(), real({.min = 0, .max = 9, .above_min = true})});
      }
    }
    repair(config);
    return config;
  }

 private:
  size_t pick(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random_); }
  int64_t whole(const Range& range) {
    return std::uniform_int_distribution<int64_t>(static_cast<int64_t>(range.min),
                                                  static_cast<int64_t>(range.max))(random_);
  }
  double real(const Range& range) {
    const double high = std::min(range.max, pick(2) ? 1e9 : range.min + 1.0);
    double value = std::uniform_real_distribution<double>(range.min, high)(random_);
    if (range.whole) value = std::ceil(value);
    return range.contains(value) ? value : 0.5;
  }
  std::string words() {
    static const char* kWords[] = {"alpha", "b:c", "\"", "\\", "\n", " ", "#", "ß", "0", "-"};
    std::string text;
    for (size_t i = pick(5); i > 0; --i) text += kWords[pick(std::size(kWords))];
    return text;
  }
  Schedule pieces(const Range& range) {
    if (pick(2) == 0) return Schedule::constant(real(range));
    Schedule schedule;
    const auto unit = static_cast<SchedulePiece::Unit>(pick(2));
    for (size_t i = pick(4); i > 0; --i) {
      SchedulePiece piece{.shape = static_cast<SchedulePiece::Shape>(pick(4)), .from = real(range)};
      piece.to = piece.shape == SchedulePiece::Shape::kConstant ? piece.from : real(range);
      piece.length = whole({1, 1e12});
      piece.unit = unit;
      schedule.pieces.push_back(piece);
    }
    SchedulePiece last{.from = real(range)};
    last.to = last.from;
    if (!schedule.pieces.empty()) last.unit = unit;
    schedule.pieces.push_back(last);
    return schedule;
  }

  /// Makes the values obey the rules between keys.
  void repair(Config& config) {
    ModelConfig& model = config.model;
    model.mla.num_heads = std::max<int64_t>(1, model.mla.num_heads);
    model.intermediate_size = std::max<int64_t>(1, model.intermediate_size);
    model.mla.qk_rope_head_dim &= ~int64_t{1};
    model.moe.moe_intermediate_size = std::max<int64_t>(1, model.moe.moe_intermediate_size);
    model.moe.n_group = whole({1, 8});
    model.moe.topk_group = whole({1, static_cast<double>(model.moe.n_group)});
    model.moe.num_experts = model.moe.n_group * whole({2, 64});
    model.moe.num_experts_per_token = whole({1, 2.0 * static_cast<double>(model.moe.topk_group)});
    model.moe.first_k_dense_replace = whole({0, static_cast<double>(model.num_layers)});
    model.rope.beta_fast = model.rope.beta_slow + 1;
    model.max_position_embeddings =
        std::max(model.max_position_embeddings, config.data.sequence_length);
    model.mtp.num_nextn_predict_layers = pick(2);
    config.parallel = {.data_parallel_size = whole({0, 4}), .zero_stage = whole({0, 3})};
    config.data.validation_every = config.data.validation.empty() ? whole({2, 100}) : 0;
    config.data.validation_overlap =
        whole({0, static_cast<double>(config.data.sequence_length - 1)});
    config.training.micro_batch_size = 1;
    for (auto& piece : config.training.global_batch_size.pieces) {
      piece.from = std::ceil(piece.from / 12) * 12;
      piece.to = std::ceil(piece.to / 12) * 12;
      if (piece.from > 16e6 || piece.to > 16e6) piece.from = piece.to = 12;
    }
  }

  std::mt19937_64 random_;
};

TEST(Printing, RandomConfigsLoadBackToThemselves) {
  const uint64_t first = std::random_device{}();
  for (uint64_t seed = first; seed < first + 200; ++seed) {
    SCOPED_TRACE(seed);
    const Config config = RandomConfig(seed).make();
    const std::string yaml = to_yaml(config);
    Config again;
    ASSERT_NO_THROW(again = load(yaml)) << yaml;
    ASSERT_EQ(again, config) << yaml << "\n---\n" << to_yaml(again);
    ASSERT_EQ(to_yaml(again), yaml);
  }
}

TEST(LoadConfig, FilesAreNamed) {
  EXPECT_THROW(load_config("/nowhere/at/all.yaml"), std::runtime_error);
  const auto path = std::filesystem::temp_directory_path() /
                    ("dsv3_config_" + std::to_string(std::random_device{}()) + ".yaml");
  write_file_atomically(path, "model: {num_layers: zero}\n");
  try {
    load_config(path);
    ADD_FAILURE() << "a word was taken for a number";
  } catch (const ConfigErrors& error) {
    EXPECT_EQ(error.errors.front().find(path.string() + ":1:21: model.num_layers: "), 0u)
        << error.what();
  }
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace dsv3
