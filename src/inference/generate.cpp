#include "inference/generate.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/tensor.h>

#include <algorithm>

#include "base/error.h"

namespace dsv3 {
namespace {

void check_ids(const std::vector<int32_t>& ids, int64_t vocab_size) {
  for (size_t i = 0; i < ids.size(); ++i) {
    require(ids[i] >= 0 && ids[i] < vocab_size,
            "token {} has id {}, but the vocabulary holds ids 0 … {}", i, ids[i], vocab_size - 1);
  }
}

/// One sequence, from `first_position` on.
TokenBatch one_sequence(const std::vector<int32_t>& tokens, int64_t first_position,
                        const at::Device& device) {
  const auto length = static_cast<int64_t>(tokens.size());
  TokenBatch batch;
  batch.num_sequences = 1;
  batch.sequence_length = length;
  batch.tokens = at::tensor(tokens, at::TensorOptions(at::kInt)).to(device);
  batch.positions = at::arange(first_position, first_position + length,
                               at::TensorOptions(at::kInt).device(device));
  return batch;
}

int32_t draw(const at::Tensor& logits, const SamplingOptions& options, SamplingRandom& random) {
  const at::Tensor last = logits.select(0, logits.size(0) - 1).to(at::kFloat).cpu().contiguous();
  return static_cast<int32_t>(sample_token(
      {last.const_data_ptr<float>(), static_cast<size_t>(last.numel())}, options, random));
}

}  // namespace

Generation generate(const Model& model, const at::Device& device,
                    const std::vector<int32_t>& prompt, const GenerateOptions& options) {
  const ModelConfig& config = model.config();
  options.sampling.check();
  require(options.max_tokens >= 0, "tokens: expected at least 0, got {}", options.max_tokens);
  require(!prompt.empty(), "the prompt holds no token");
  check_ids(prompt, config.vocab_size);
  const auto length = static_cast<int64_t>(prompt.size());
  const int64_t room = config.max_position_embeddings - length;
  require(room > 0, "the prompt's {} tokens leave no room in a context of {}", length,
          config.max_position_embeddings);

  const int64_t limit = std::min(options.max_tokens, room);
  SamplingRandom random(options.seed);
  LatentCache cache = model.make_cache(1, length + limit);
  Generation result;
  result.stop =
      limit < options.max_tokens ? Generation::Stop::kContextFull : Generation::Stop::kLength;
  std::vector<int32_t> next = prompt;
  for (int64_t count = 0; count < limit; ++count) {
    const at::Tensor logits = model.logits(one_sequence(next, cache.length(), device), &cache);
    const int32_t token = draw(logits, options.sampling, random);
    if (std::ranges::find(options.stop_tokens, token) != options.stop_tokens.end()) {
      result.stop = Generation::Stop::kEndOfDocument;
      break;
    }
    result.tokens.push_back(token);
    if (options.on_token && !options.on_token(token)) {
      result.stop = Generation::Stop::kCallback;
      break;
    }
    next = {token};
  }
  return result;
}

at::Tensor sequence_logits(const Model& model, const at::Device& device,
                           const std::vector<int32_t>& tokens) {
  check_ids(tokens, model.config().vocab_size);
  return model.logits(one_sequence(tokens, 0, device)).to(at::kFloat).cpu().contiguous();
}

std::vector<int32_t> encode_prompt(const Tokenizer& tokenizer, std::string_view text) {
  std::vector<int32_t> ids;
  if (tokenizer.specials().end_of_document >= 0) {
    ids.push_back(tokenizer.specials().end_of_document);
  }
  tokenizer.encode(text, ids);
  return ids;
}

std::string generate_text(const Model& model, const at::Device& device, const Tokenizer& tokenizer,
                          std::string_view prompt, GenerateOptions options) {
  if (tokenizer.specials().end_of_document >= 0) {
    options.stop_tokens.push_back(tokenizer.specials().end_of_document);
  }
  StreamDecoder decoder(tokenizer);
  std::string text;
  const auto inner = options.on_token;
  options.on_token = [&](int32_t token) {
    // Ids beyond the tokenizer's are padding of the vocabulary: they decode to nothing.
    if (token < tokenizer.vocab_size()) text += decoder.push(token);
    return !inner || inner(token);
  };
  generate(model, device, encode_prompt(tokenizer, prompt), options);
  return text + decoder.finish();
}

}  // namespace dsv3
