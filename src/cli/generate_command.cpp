#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>

#include "base/error.h"
#include "cli/checks.h"
#include "cli/commands.h"
#include "data/tokenizer.h"
#include "inference/generate.h"
#include "inference/run.h"
#include "training/device.h"

namespace dsv3::cli {
namespace {

struct GenerateArguments {
  std::string directory, prompt, tokenizer, dtype, device = "auto";
  int64_t max_tokens = 200, threads = 0;
  uint64_t seed = 1;
  SamplingOptions sampling{.temperature = 0.8, .top_k = 0, .top_p = 0.95};
  bool no_prompt = false, averaged = false;
};

constexpr const char* kExamples = R"(Examples:
  dsv3 generate runs/first --prompt "In the beginning"
  dsv3 generate runs/first --prompt "And God said" --tokens 500 --temperature 0.7 --seed 3
  dsv3 generate runs/first --prompt "Blessed" --temperature 0      always the likeliest token

The text goes to stdout as it is made, the summary to stderr. The same seed gives the same text.)";

OpenedModel open(const GenerateArguments& arguments) {
  OpenOptions options;
  options.device = choose_device(arguments.device);
  options.averaged = arguments.averaged;
  if (arguments.dtype == "fp32") options.dtype = DType::kF32;
  if (arguments.dtype == "bf16") options.dtype = DType::kBF16;
  return open_model(arguments.directory, options);
}

std::unique_ptr<Tokenizer> tokenizer_of(const OpenedModel& opened,
                                        const GenerateArguments& arguments) {
  std::string spec = arguments.tokenizer;
  if (spec.empty()) {
    require(opened.run.has_value(),
            "{} says nothing of its tokenizer (tokenizer.json is not read yet): give --tokenizer "
            "bytes if it was trained on bytes",
            opened.checkpoint.string());
    spec = opened.run->data.tokenizer;
  }
  auto tokenizer = make_tokenizer(spec);
  require(tokenizer->vocab_size() <= opened.config().vocab_size,
          "tokenizer '{}' has {} ids, but the model's vocabulary has {}", spec,
          tokenizer->vocab_size(), opened.config().vocab_size);
  return tokenizer;
}

const char* reason(Generation::Stop stop) {
  switch (stop) {
    case Generation::Stop::kLength:
      return "the number of tokens asked for";
    case Generation::Stop::kEndOfDocument:
      return "end of document";
    case Generation::Stop::kContextFull:
      return "the model's context is full";
    case Generation::Stop::kCallback:
      return "output closed";
  }
  return "?";
}

/// Whether the reader is still there.
bool print_now(const std::string& text) {
  return text.empty() || (std::fwrite(text.data(), 1, text.size(), stdout) == text.size() &&
                          std::fflush(stdout) == 0);
}

void run_generate(const GenerateArguments& arguments) {
  arguments.sampling.check();
  configure_process(arguments.threads, /*deterministic=*/false);
  const OpenedModel opened = open(arguments);
  const auto tokenizer = tokenizer_of(opened, arguments);
  GenerateOptions options;
  options.max_tokens = arguments.max_tokens;
  options.sampling = arguments.sampling;
  options.seed = arguments.seed;
  options.stop_tokens = opened.stop_tokens;
  if (tokenizer->specials().end_of_document >= 0) {
    options.stop_tokens.push_back(tokenizer->specials().end_of_document);
  }
  // Ids beyond the tokenizer's are padding of the vocabulary: they decode to nothing.
  StreamDecoder decoder(*tokenizer);
  options.on_token = [&](int32_t token) {
    return token >= tokenizer->vocab_size() || print_now(decoder.push(token));
  };
  if (!arguments.no_prompt && !print_now(arguments.prompt)) return;
  const auto start = std::chrono::steady_clock::now();
  const Generation result =
      generate(*opened.model, opened.device, encode_prompt(*tokenizer, arguments.prompt), options);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (!print_now(decoder.finish() + "\n")) return;
  fmt::print(stderr, "{} tokens in {:.2f} s ({:.1f} tokens/s), ended by {}\n", result.tokens.size(),
             seconds, static_cast<double>(result.tokens.size()) / std::max(seconds, 1e-9),
             reason(result.stop));
}

}  // namespace

void add_generate_command(CLI::App& app) {
  const auto arguments = std::make_shared<GenerateArguments>();
  CLI::App* command =
      app.add_subcommand("generate", "Continue a prompt with a trained model, streamed");
  command->footer(kExamples);
  command->add_option("DIR", arguments->directory, "A run or a checkpoint")->required();
  command->add_option("--prompt", arguments->prompt, "Text to continue (empty: a new document)");
  command->add_option("--tokens", arguments->max_tokens, "Most tokens to make")
      ->check(non_negative())
      ->capture_default_str();
  command
      ->add_option("--temperature", arguments->sampling.temperature,
                   "Logits are divided by it; 0 = always the likeliest")
      ->capture_default_str();
  command->add_option("--top-k", arguments->sampling.top_k, "Only the k likeliest (0 = all)")
      ->capture_default_str();
  command
      ->add_option("--top-p", arguments->sampling.top_p,
                   "Only the fewest likeliest that together reach p")
      ->capture_default_str();
  command->add_option("--seed", arguments->seed, "Seed of the draws")->capture_default_str();
  command->add_flag("--no-prompt", arguments->no_prompt, "Do not print the prompt before the text");
  command->add_flag("--ema", arguments->averaged,
                    "The weights' moving average instead of the weights (training.ema)");
  command->add_option("--tokenizer", arguments->tokenizer, "Tokenizer (default: the run's)");
  command->add_option("--dtype", arguments->dtype, "Precision (default: the model's own)")
      ->check(CLI::IsMember({"fp32", "bf16"}));
  command->add_option("--device", arguments->device, "Where to compute: auto, cpu, cuda")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  command->add_option("--threads", arguments->threads, "CPU threads (0 = all cores)")
      ->check(non_negative());
  command->callback([arguments] { run_generate(*arguments); });
}

}  // namespace dsv3::cli
