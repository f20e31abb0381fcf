// Every class of error with its exact place and words.
#include "config_testing.h"

namespace dsv3 {
namespace {

using testing::error_of;
using testing::errors_of;

TEST(ConfigErrors, UnknownKeyNamesTheNearest) {
  EXPECT_EQ(error_of("model:\n  num_layer: 4\n"),
            "run.yaml:2:3: model.num_layer: unknown key, did you mean model.num_layers?");
  EXPECT_EQ(error_of("model: {mla: {kv_lora_rnak: 4}}"),
            "run.yaml:1:15: model.mla.kv_lora_rnak: unknown key, did you mean "
            "model.mla.kv_lora_rank?");
  EXPECT_EQ(error_of("modle: {num_layers: 4}"),
            "run.yaml:1:1: modle: unknown key, did you mean model?");
}

TEST(ConfigErrors, UnknownKeyOfAnotherSectionIsFoundThere) {
  EXPECT_EQ(error_of("training: {learning_rate: 1e-3}"),
            "run.yaml:1:12: training.learning_rate: unknown key, did you mean "
            "optimizer.learning_rate?");
}

TEST(ConfigErrors, UnknownKeyNearNothingListsTheSection) {
  EXPECT_EQ(error_of("monitor: {zzzzzzzz: 4}"),
            "run.yaml:1:11: monitor.zzzzzzzz: unknown key, monitor has tensorboard, wandb, "
            "prometheus, per_layer_every");
}

TEST(ConfigErrors, WrongType) {
  EXPECT_EQ(error_of("model:\n  num_layers: many\n"),
            "run.yaml:2:15: model.num_layers: expected an integer, got many");
  EXPECT_EQ(error_of("model:\n  num_layers: '4'\n"),
            "run.yaml:2:15: model.num_layers: expected an integer, got the string \"4\"");
  EXPECT_EQ(error_of("model:\n  num_layers: [4]\n"),
            "run.yaml:2:15: model.num_layers: expected an integer, got a list");
  EXPECT_EQ(error_of("model:\n  num_layers: {a: 4}\n"),
            "run.yaml:2:15: model.num_layers: expected an integer, got a map");
  EXPECT_EQ(
      error_of("model:\n  num_layers: 4.5\n"),
      "run.yaml:2:15: model.num_layers: expected a whole number, between 1 and 4096, got 4.5");
  EXPECT_EQ(error_of("model:\n  num_layers:\n"),
            "run.yaml:2:3: model.num_layers: expected an integer, got nothing");
  EXPECT_EQ(error_of("training: {deterministic: yes}"),
            "run.yaml:1:27: training.deterministic: expected true or false, got yes");
  EXPECT_EQ(error_of("optimizer: {eps: small}"),
            "run.yaml:1:18: optimizer.eps: expected a finite number, got small");
  EXPECT_EQ(error_of("data: {tokenizer: [a]}"),
            "run.yaml:1:19: data.tokenizer: expected a text, got a list");
}

TEST(ConfigErrors, WrongWord) {
  EXPECT_EQ(error_of("model: {dtype: bf61}"),
            "run.yaml:1:16: model.dtype: expected one of fp32, bf16, got bf61; did you mean bf16?");
  EXPECT_EQ(error_of("model: {dtype: quadruple}"),
            "run.yaml:1:16: model.dtype: expected one of fp32, bf16, got quadruple");
  EXPECT_EQ(error_of("data: {document_split: 7}"),
            "run.yaml:1:24: data.document_split: expected one of line, blank, file, got 7");
}

TEST(ConfigErrors, OutOfRange) {
  EXPECT_EQ(error_of("model: {num_layers: 0}"),
            "run.yaml:1:21: model.num_layers: must be between 1 and 4096, got 0");
  EXPECT_EQ(error_of("model: {num_layers: -3}"),
            "run.yaml:1:21: model.num_layers: must be between 1 and 4096, got -3");
  EXPECT_EQ(error_of("data: {fim_rate: 1.5}"),
            "run.yaml:1:18: data.fim_rate: must be between 0 and 1, got 1.5");
  EXPECT_EQ(error_of("optimizer: {beta1: 1}"),
            "run.yaml:1:20: optimizer.beta1: must be at least 0 and less than 1, got 1");
  EXPECT_EQ(error_of("optimizer: {eps: 0}"),
            "run.yaml:1:18: optimizer.eps: must be more than 0, at most 1e9, got 0");
  EXPECT_EQ(error_of("parallel: {zero_stage: 4}"),
            "run.yaml:1:24: parallel.zero_stage: must be between 0 and 3, got 4");
}

TEST(ConfigErrors, HugeAndStrangeNumbers) {
  for (const char* text : {"99999999999999999999", "1e400", ".nan", ".inf", "-.inf", "nan", "inf",
                           "0x10", "1e", "1_000", "--4", "1.2.3"}) {
    SCOPED_TRACE(text);
    EXPECT_EQ(error_of(std::string("model: {num_layers: ") + text + "}").substr(0, 34),
              "run.yaml:1:21: model.num_layers: e");
    EXPECT_EQ(error_of(std::string("optimizer: {clip: ") + text + "}").substr(0, 33),
              std::string(text) == "99999999999999999999" ? "run.yaml:1:19: optimizer.clip: mu"
                                                          : "run.yaml:1:19: optimizer.clip: ex");
  }
}

TEST(ConfigErrors, SectionThatIsNoMap) {
  EXPECT_EQ(error_of("model: 3"),
            "run.yaml:1:8: model: is a section, expected a map of keys, got 3");
  EXPECT_EQ(error_of("model:\n  moe: [1, 2]\n"),
            "run.yaml:2:8: model.moe: is a section, expected a map of keys, got a list");
  EXPECT_EQ(
      error_of("- 1\n- 2\n"),
      "run.yaml:1:1: YAML: expected a map of sections (model, data, training, …), got a list");
}

TEST(ConfigErrors, RepeatedKeys) {
  EXPECT_EQ(error_of("model:\n  num_layers: 4\n  num_layers: 4\n"),
            "run.yaml:3:3: num_layers: the key is given twice in one map (first at run.yaml:2:3), "
            "keep one");
  EXPECT_EQ(error_of("model:\n  hidden_size: 256\n  mla: {d_model: 256}\n"),
            "run.yaml:3:9: model.mla.d_model: is the same as model.hidden_size, given at "
            "run.yaml:2:3; keep one");
}

TEST(ConfigErrors, SyntaxHasItsPlace) {
  EXPECT_EQ(error_of("model:\n  num_layers: 4\n bad: [1\n").substr(0, 27),
            "run.yaml:3:2: YAML: syntax ");
  EXPECT_EQ(error_of("a: 1\n---\nb: 2\n"),
            "run.yaml:3:1: YAML: a second document, expected one document");
  EXPECT_EQ(error_of("model: {num_layers: !!int 4}"),
            "run.yaml:1:21: YAML: the tag tag:yaml.org,2002:int is not supported, write a plain "
            "value");
  EXPECT_EQ(error_of("? [a]\n: 1\n"), "run.yaml:1:3: YAML: a key is a list, expected a name");
  EXPECT_EQ(error_of("model:\n  dtype: bf\x01\n"),
            "run.yaml:2:12: YAML: byte 0x01 is a control character, expected text in UTF-8");
  EXPECT_EQ(error_of("model:\n  dtype: bf\xff\n"),
            "run.yaml:2:12: YAML: byte 0xff is not valid UTF-8, expected text in UTF-8");
}

TEST(ConfigErrors, BombsAreRefused) {
  std::string bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 12; ++i) {
    bomb += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [";
    for (int j = 0; j < 10; ++j) bomb += (j ? ", *a" : "*a") + std::to_string(i - 1);
    bomb += "]\n";
  }
  EXPECT_NE(error_of(bomb).find(" YAML: aliases expand to more than 16 MiB"), std::string::npos);
  EXPECT_NE(error_of("a: &a [*a]").find("run.yaml:1:8: YAML: "), std::string::npos);
  EXPECT_EQ(error_of(std::string(40, '[') + std::string(40, ']')),
            "run.yaml:1:33: YAML: nested deeper than 32 levels");
  EXPECT_NE(error_of(std::string(100000, '[')).find("YAML: "), std::string::npos);
  EXPECT_NE(error_of(std::string(100000, '{')).find("YAML: "), std::string::npos);
  EXPECT_EQ(error_of(std::string(300000, ' ')),
            "run.yaml:1:1: YAML: the text has 300000 bytes, at most 262144 are read");
}

TEST(ConfigErrors, AnchorsWithinReasonWork) {
  const Config config =
      testing::load("data:\n  train: &files [a.txt, b.txt]\n  validation: *files\n");
  EXPECT_EQ(config.data.validation, config.data.train);
  EXPECT_EQ(config.data.train.size(), 2u);
}

TEST(ConfigErrors, AllAtOnceInTheOrderOfTheFile) {
  const auto errors = errors_of(
      "model:\n  num_layers: 0\n  moe: {num_experts: 4, num_experts_per_token: 5}\n"
      "data:\n  colour: red\n",
      {"optimizer.clip=-1"});
  ASSERT_EQ(errors.size(), 4u) << ::testing::PrintToString(errors);
  EXPECT_EQ(errors[0].substr(0, 14), "run.yaml:2:15:");
  EXPECT_EQ(errors[1],
            "run.yaml:3:25: model.moe.num_experts_per_token: num_experts_per_token(5) must be at "
            "most num_experts(4)");
  EXPECT_EQ(errors[2].substr(0, 40), "run.yaml:5:3: data.colour: unknown key, ");
  EXPECT_EQ(errors[3], "command line: optimizer.clip: must be at least 0, at most 1e9, got -1");
}

// --- rules between keys
// ---------------------------------------------------------------------------

TEST(ConfigRules, Experts) {
  EXPECT_EQ(
      error_of("model:\n  moe: {num_experts: 10, n_group: 4, topk_group: 2}\n",
               {"model.moe.num_experts_per_token=2"}),
      "run.yaml:2:9: model.moe.num_experts: num_experts(10) must be a multiple of n_group(4)");
  EXPECT_EQ(error_of("model:\n  moe:\n    num_experts: 16\n    num_experts_per_token: 4\n"
                     "    n_group: 4\n    topk_group: 5\n"),
            "run.yaml:6:5: model.moe.topk_group: topk_group(5) must be at most n_group(4)");
  EXPECT_EQ(error_of("model:\n  moe: {num_experts: 16, n_group: 4, topk_group: 1}\n"),
            "run.yaml:2:38: model.moe.topk_group: num_experts_per_token(8) must be at most the "
            "experts of the chosen groups: topk_group(1) × num_experts(16) / n_group(4) = 4");
  EXPECT_EQ(error_of("model:\n  moe: {num_experts: 8, n_group: 8, topk_group: 8}\n"),
            "run.yaml:2:25: model.moe.n_group: group_score top2_sum needs 2 experts in a group: "
            "num_experts(8) / n_group(8) = 1");
  EXPECT_EQ(error_of("model: {num_layers: 2, moe: {num_experts: 8, first_k_dense_replace: 3}}"),
            "run.yaml:1:46: model.moe.first_k_dense_replace: first_k_dense_replace(3) must be at "
            "most num_layers(2)");
}

TEST(ConfigRules, Heads) {
  EXPECT_EQ(error_of("model: {mla: {num_heads: 9}}\nparallel: {tensor_parallel_size: 2}\n"),
            "run.yaml:1:15: model.mla.num_heads: num_heads(9) must be a multiple of "
            "tensor_parallel_size(2)");
  EXPECT_EQ(error_of("model: {mla: {qk_rope_head_dim: 7}}"),
            "run.yaml:1:15: model.mla.qk_rope_head_dim: qk_rope_head_dim(7) must be even: rotary "
            "embedding turns pairs");
}

TEST(ConfigRules, Parallel) {
  EXPECT_EQ(error_of("parallel: {expert_parallel_size: 2}"),
            "run.yaml:1:12: parallel.expert_parallel_size: expert_parallel_size(2) needs experts, "
            "but num_experts is 0");
  EXPECT_EQ(error_of("model: {moe: {num_experts: 9}}\nparallel: {expert_parallel_size: 2}"),
            "run.yaml:1:15: model.moe.num_experts: num_experts(9) must be a multiple of "
            "expert_parallel_size(2)");
  EXPECT_EQ(error_of("model: {moe: {num_experts: 8}}\n"
                     "parallel: {expert_parallel_size: 4, data_parallel_size: 2}"),
            "run.yaml:2:12: parallel.expert_parallel_size: data_parallel_size(2) × "
            "context_parallel_size(1) × tensor_parallel_size(1) = 2 must be a multiple of "
            "expert_parallel_size(4)");
  EXPECT_EQ(error_of("model: {num_layers: 4}\nparallel: {pipeline_parallel_size: 8}"),
            "run.yaml:2:12: parallel.pipeline_parallel_size: pipeline_parallel_size(8) must be at "
            "most num_layers(4)");
  // Experts fold over the context axis too.
  EXPECT_EQ(
      num_processes(testing::load("model: {moe: {num_experts: 8}}\n"
                                  "parallel: {expert_parallel_size: 2, context_parallel_size: 2}")
                        .parallel),
      2);
  EXPECT_EQ(error_of("parallel: {context_parallel_size: 3}"),
            "run.yaml:1:12: parallel.context_parallel_size: sequence_length(4096) must be a "
            "multiple of context_parallel_size(3)");
}

// What no router, rotary or group body takes is refused before a run starts.
TEST(ConfigRules, LimitsOfTheKernels) {
  for (const char* key : {"num_experts: 513", "num_experts_per_token: 17", "n_group: 65"}) {
    EXPECT_NE(error_of(std::string("model: {moe: {") + key + "}}").find("must be between"),
              std::string::npos)
        << key;
  }
  EXPECT_NE(error_of("model: {mla: {qk_rope_head_dim: 1026}}").find("must be between"),
            std::string::npos);
}

TEST(ConfigRules, WidthsOfAGpusProducts) {
  const auto refused = [](const std::string& yaml) {
    try {
      require_cuda_widths(testing::load(yaml).model);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_NE(refused("model: {hidden_size: 65}").find("model.hidden_size: 65"), std::string::npos);
  EXPECT_NE(refused("model: {moe: {num_experts: 8, moe_intermediate_size: 33}}")
                .find("model.moe.moe_intermediate_size: 33"),
            std::string::npos);
  EXPECT_EQ(refused("model: {hidden_size: 64}"), "");
  EXPECT_EQ(refused("model: {hidden_size: 65, dtype: fp32}"), "");
}

TEST(ConfigRules, BatchLengthAndData) {
  EXPECT_EQ(error_of("training: {micro_batch_size: 3, global_batch_size: 8}"),
            "run.yaml:1:33: training.global_batch_size: global_batch_size(8) must be a multiple of "
            "micro_batch_size(3) × dp(1) = 3");
  EXPECT_EQ(error_of("training: {global_batch_size: 2.5}"),
            "run.yaml:1:31: training.global_batch_size: must be whole, at least 1, at most "
            "16777216, got 2.5");
  EXPECT_EQ(error_of("model: {max_position_embeddings: 128}\ndata: {sequence_length: 256}\n"),
            "run.yaml:2:8: data.sequence_length: sequence_length(256) must be at most "
            "model.max_position_embeddings(128)");
  EXPECT_EQ(error_of("data: {validation_every: 1}"),
            "run.yaml:1:8: data.validation_every: validation_every(1) holds every document out, "
            "expected 0 or at least 2");
  EXPECT_EQ(error_of("data: {sequence_length: 64, validation_overlap: 64}"),
            "run.yaml:1:29: data.validation_overlap: validation_overlap(64) must be less than "
            "sequence_length(64)");
  EXPECT_EQ(error_of("data: {validation: v.txt, validation_every: 9}"),
            "run.yaml:1:27: data.validation_every: validation and validation_every(9) are both "
            "given, keep one");
  EXPECT_EQ(error_of("model: {rope: {type: yarn, beta_fast: 1, beta_slow: 2}}"),
            "run.yaml:1:28: model.rope.beta_fast: beta_fast(1) must be more than beta_slow(2)");
}

TEST(ConfigRules, RuleAboutDefaultsPointsToTheSection) {
  EXPECT_EQ(error_of("\nmodel:\n  preset: deepseek_v3\n  moe: {num_shared_experts: 3}\n",
                     {"parallel.tensor_parallel_size=3"}),
            "command line: parallel.tensor_parallel_size: num_heads(128) must be a multiple of "
            "tensor_parallel_size(3)");
  EXPECT_EQ(error_of("\nmodel:\n  preset: deepseek_v3\n  moe:\n    n_group: 7\n"),
            "run.yaml:5:5: model.moe.n_group: num_experts(256) must be a multiple of n_group(7)");
}

TEST(ConfigRules, ValidateChecksConfigsMadeInCode) {
  Config config = preset_config("small");
  EXPECT_NO_THROW(validate(config));
  config.model.num_layers = 0;
  config.data.fim_rate = 2;
  try {
    validate(config);
    FAIL() << "two impossible values were accepted";
  } catch (const ConfigErrors& error) {
    EXPECT_EQ(error.errors.size(), 2u) << error.what();
    EXPECT_EQ(error.errors.front(), "model.num_layers: must be between 1 and 4096, got 0");
  }
}

// --- overrides
// ------------------------------------------------------------------------------------

TEST(ConfigOverrides, ErrorsNameTheCommandLine) {
  EXPECT_EQ(error_of("", {"model.num_layer=3"}),
            "command line: model.num_layer: unknown key, did you mean model.num_layers?");
  EXPECT_EQ(error_of("", {"fast"}), "command line: fast: expected key.path=value");
  EXPECT_EQ(error_of("", {"=3"}), "command line: =3: expected key.path=value");
  EXPECT_EQ(error_of("", {"model.num_layers=[1"}).substr(0, 62),
            "command line: model.num_layers: the value is no YAML: syntax e");
  EXPECT_EQ(errors_of("model: 3", {"model.num_layers=4"}).front(),
            "command line: model.num_layers: cannot be set, because model holds 3 and not a map");
}

TEST(ConfigProcesses, OneProcessOnly) {
  ParallelConfig parallel;
  EXPECT_NO_THROW(require_single_process(parallel));
  parallel.tensor_parallel_size = 2;
  try {
    require_single_process(parallel);
    FAIL() << "two processes were accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(
        error.what(),
        "parallel: tp(2) × pp(1) × cp(1) × dp(1) = 2 processes, but this run has 1; to fit "
        "one process add: parallel.tensor_parallel_size=1");
  }
  EXPECT_EQ(
      num_processes(
          {.tensor_parallel_size = 4, .pipeline_parallel_size = 4, .expert_parallel_size = 2}),
      16);
  EXPECT_EQ(num_processes({.tensor_parallel_size = 2, .expert_parallel_size = 8}), 8);
}

}  // namespace
}  // namespace dsv3
