#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "checkpoint/safetensors.h"
#include "cli/checks.h"
#include "cli/commands.h"
#include "cli/progress_bar.h"
#include "data/loader.h"
#include "inference/generate.h"
#include "inference/run.h"
#include "training/device.h"
#include "training/evaluate.h"

namespace dsv3::cli {
namespace {

struct EvalArguments {
  std::string directory, tokens, logits, dtype, device = "auto", tokenizer, document_split;
  std::vector<std::string> data;
  int64_t sequence_length = 0, batch_size = 8, threads = 0;
  bool json = false, averaged = false;
};

constexpr const char* kExamples = R"(Examples:
  dsv3 eval runs/first                            the run's own validation split
  dsv3 eval runs/first book.txt --json            every token of another text, as JSON
  dsv3 eval CHECKPOINT --tokens tokens.json --logits out.safetensors
                                                  logits [T, V] of a list of ids, for comparisons

DIR is a run of `dsv3 train` (its newest checkpoint is taken), or a directory with config.json and
safetensors in F32 or BF16 under the released names (DeepSeek-V3, Moonlight, DeepSeek-V2-Lite, …).
DATA is text, JSONL (also .gz, .zst), a token shard, a Megatron pair or a glob.
Loss is in nats per token; perplexity is e^loss; bits per byte are those of the text itself.)";

/// The ids of `path`: a JSON list of whole numbers within the vocabulary.
std::vector<int32_t> read_tokens(const std::string& path, int64_t vocab_size) {
  nlohmann::json json;
  try {
    // Anything deeper than a list of numbers is refused before it can exhaust the stack.
    const auto shallow = [&path](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
      require(depth <= 2, "{}: expected a list of token ids, as in [0, 17, 4]", path);
      return true;
    };
    json = nlohmann::json::parse(read_file(path), shallow);
  } catch (const nlohmann::json::exception& error) {
    invalid("{}: not valid JSON ({})", path, error.what());
  }
  require(json.is_array(), "{}: expected a list of token ids, as in [0, 17, 4]", path);
  require(!json.empty(), "{}: the list holds no token", path);
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < json.size(); ++i) {
    require(json[i].is_number_integer(), "{}: element {}: expected a whole number, got {}", path, i,
            json[i].dump());
    const bool inside =
        json[i].get<double>() >= 0 && json[i].get<double>() < static_cast<double>(vocab_size);
    require(inside, "{}: element {}: token id {} is not in the vocabulary of {} (0 … {})", path, i,
            json[i].dump(), vocab_size, vocab_size - 1);
    tokens.push_back(json[i].get<int32_t>());
  }
  return tokens;
}

void write_logits(const OpenedModel& opened, const EvalArguments& arguments) {
  const auto tokens = read_tokens(arguments.tokens, opened.config().vocab_size);
  const at::Tensor logits = sequence_logits(*opened.model, opened.device, tokens);
  SafetensorsWriter writer(arguments.logits, {{"logits", StoredType::kF32, logits.sizes().vec()}});
  writer.write({static_cast<const std::byte*>(logits.const_data_ptr()), logits.nbytes()});
  writer.commit();
  fmt::print("logits [{}, {}] F32 of {} written to {}\n", logits.size(0), logits.size(1),
             opened.checkpoint.string(), arguments.logits);
}

/// What to read: the run's own settings where there is a run, and DATA in full where it is given.
DataConfig data_config(const OpenedModel& opened, const EvalArguments& arguments) {
  DataConfig data;
  if (opened.run) data = opened.run->data;
  if (!arguments.data.empty()) {
    data.validation.clear();
    for (const auto& path : arguments.data) data.validation.push_back({path, 1.0});
    data.validation_every = 0;
  } else {
    require(opened.run.has_value(),
            "{} is a checkpoint without a run: name the DATA to evaluate on",
            opened.checkpoint.string());
    require(!data.validation.empty() || data.validation_every > 0,
            "the run has no validation split: name the DATA to evaluate on");
  }
  if (!arguments.tokenizer.empty()) data.tokenizer = arguments.tokenizer;
  if (!arguments.document_split.empty()) data.document_split = arguments.document_split;
  if (arguments.sequence_length > 0) {
    data.sequence_length = arguments.sequence_length;
  } else if (!opened.run) {
    data.sequence_length = std::min(data.sequence_length, opened.config().max_position_embeddings);
  }
  require(
      opened.run.has_value() || !arguments.tokenizer.empty(),
      "{} says nothing of its tokenizer: give --tokenizer bytes, or compare logits with --tokens",
      opened.checkpoint.string());
  return data;
}

void print_evaluation(const OpenedModel& opened, const Evaluation& result, bool as_json) {
  if (as_json) {
    nlohmann::ordered_json json;
    json["checkpoint"] = opened.checkpoint.string();
    json["loss"] = result.loss;
    json["perplexity"] = std::exp(result.loss);
    if (result.bytes > 0) json["bits_per_byte"] = result.bits_per_byte;
    json["accuracy"] = result.accuracy;
    json["tokens"] = result.tokens;
    json["bytes"] = result.bytes;
    json["seconds"] = result.seconds;
    fmt::print("{}\n", json.dump());
    return;
  }
  fmt::print("checkpoint      {}\n", opened.checkpoint.string());
  fmt::print("tokens          {}\n", result.tokens);
  fmt::print("bytes           {}\n", result.bytes);
  fmt::print("loss            {:.5f} nats per token\n", result.loss);
  fmt::print("perplexity      {:.4f}\n", std::exp(result.loss));
  if (result.bytes > 0) fmt::print("bits per byte   {:.5f}\n", result.bits_per_byte);
  fmt::print("accuracy        {:.2f} % of next tokens\n", 100 * result.accuracy);
  fmt::print("time            {:.1f} s, {:.0f} tokens/s\n", result.seconds,
             static_cast<double>(result.tokens) / std::max(result.seconds, 1e-9));
}

void evaluate_data(const OpenedModel& opened, const EvalArguments& arguments) {
  const DataConfig data = data_config(opened, arguments);
  LoaderOptions options;
  options.split = Split::kValidation;
  if (opened.run) options.seed = opened.run->training.seed;
  Loader loader(data, options);
  require(loader.tokenizer().vocab_size() <= opened.config().vocab_size,
          "tokenizer '{}' has {} ids, but the model's vocabulary has {}", data.tokenizer,
          loader.tokenizer().vocab_size(), opened.config().vocab_size);
  ProgressBar bar("eval");
  const Evaluation result =
      evaluate(*opened.model, loader,
               {.device = opened.device,
                .sequences_per_batch = arguments.batch_size,
                .mask_documents = data.mask_across_documents,
                .progress = [&](int64_t done, int64_t all) {
                  bar.show(static_cast<double>(done) / static_cast<double>(all),
                           fmt::format("{}/{} batches", done, all));
                }});
  bar.clear();
  print_evaluation(opened, result, arguments.json);
}

void run_eval(const EvalArguments& arguments) {
  const bool wants_logits = !arguments.tokens.empty() || !arguments.logits.empty();
  if (wants_logits) {
    require(!arguments.tokens.empty() && !arguments.logits.empty(),
            "--tokens and --logits belong together: ids in, logits out");
    require(arguments.data.empty(), "give either DATA or --tokens with --logits, not both");
  }
  configure_process(arguments.threads, /*deterministic=*/false);
  OpenOptions options;
  options.device = choose_device(arguments.device);
  // Logits are for comparisons: in full precision unless told otherwise.
  if (arguments.dtype == "fp32" || (arguments.dtype.empty() && wants_logits)) {
    options.dtype = DType::kF32;
  } else if (arguments.dtype == "bf16") {
    options.dtype = DType::kBF16;
  }
  options.averaged = arguments.averaged;
  const OpenedModel opened = open_model(arguments.directory, options);
  wants_logits ? write_logits(opened, arguments) : evaluate_data(opened, arguments);
}

}  // namespace

void add_eval_command(CLI::App& app) {
  const auto arguments = std::make_shared<EvalArguments>();
  CLI::App* command = app.add_subcommand(
      "eval", "Loss, perplexity and bits per byte of a run or checkpoint; or its logits");
  command->footer(kExamples);
  command->add_option("DIR", arguments->directory, "A run or a checkpoint")->required();
  command->add_option("DATA", arguments->data,
                      "Files to evaluate on, in full (default: the run's validation split)");
  command->add_option("--tokens", arguments->tokens, "JSON list of token ids to run");
  command->add_option("--logits", arguments->logits,
                      "safetensors file to write: logits [T, V] in F32");
  command
      ->add_option("--dtype", arguments->dtype,
                   "Precision to compute in (default: the model's own; fp32 with --logits)")
      ->check(CLI::IsMember({"fp32", "bf16"}));
  command->add_option("--device", arguments->device, "Where to compute: auto, cpu, cuda")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  command->add_option("--tokenizer", arguments->tokenizer,
                      "Tokenizer of DATA that is text (default: the run's)");
  command
      ->add_option("--document-split", arguments->document_split,
                   "How text falls into documents (default: the run's)")
      ->check(CLI::IsMember({"file", "line", "blank"}));
  command
      ->add_option("--sequence-length", arguments->sequence_length,
                   "Tokens per sequence (default: the run's)")
      ->check(positive());
  command->add_option("--batch-size", arguments->batch_size, "Sequences per forward")
      ->check(positive())
      ->capture_default_str();
  command->add_option("--threads", arguments->threads, "CPU threads (0 = all cores)")
      ->check(non_negative());
  command->add_flag("--ema", arguments->averaged,
                    "The weights' moving average instead of the weights (training.ema)");
  command->add_flag("--json", arguments->json, "Print one JSON object");
  command->callback([arguments] { run_eval(*arguments); });
}

}  // namespace dsv3::cli
