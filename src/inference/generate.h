#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"
#include "inference/sampling.h"
#include "model/model.h"

namespace dsv3 {

struct GenerateOptions {
  int64_t max_tokens = 200;
  SamplingOptions sampling = {};
  uint64_t seed = 1;
  std::vector<int32_t> stop_tokens = {};       // end of document; drawn, but not handed out
  std::function<bool(int32_t)> on_token = {};  // called with each token; false stops. May be empty
};

struct Generation {
  enum class Stop : uint8_t { kLength, kEndOfDocument, kContextFull, kCallback };
  std::vector<int32_t> tokens;  // new ones only
  Stop stop = Stop::kLength;
};

/// Continues `prompt` token by token over the latent cache (MLA in its cached form). The prompt is
/// read in one forward; each new token costs one more. Ends after max_tokens, at a stop token,
/// where max_position_embeddings is reached, or when the callback says so. The same seed gives the
/// same tokens. device: of the model's parameters. Throws std::invalid_argument on an empty prompt,
/// an id outside the vocabulary, or a prompt that fills the context.
Generation generate(const Model& model, const at::Device& device,
                    const std::vector<int32_t>& prompt, const GenerateOptions& options);

/// Logits of a whole sequence without a cache: [T, V] FP32 on the host. Ids are checked against the
/// vocabulary.
at::Tensor sequence_logits(const Model& model, const at::Device& device,
                           const std::vector<int32_t>& tokens);

/// The ids of a prompt as training saw the start of a document: end-of-document, then the text.
std::vector<int32_t> encode_prompt(const Tokenizer& tokenizer, std::string_view text);

/// generate() as text: the continuation of `prompt`, whole UTF-8.
std::string generate_text(const Model& model, const at::Device& device, const Tokenizer& tokenizer,
                          std::string_view prompt, GenerateOptions options);

}  // namespace dsv3
