#include "training/tiny.h"

#include <stdlib.h>

#include "base/file.h"

namespace dsv3::test {

TemporaryDirectory::TemporaryDirectory() {
  std::string name = (std::filesystem::temp_directory_path() / "dsv3_training_XXXXXX").string();
  path_ = ::mkdtemp(name.data());
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

ModelConfig tiny_model() {
  ModelConfig model;
  model.dtype = DType::kF32;
  model.num_layers = 2;
  model.vocab_size = 264;
  model.hidden_size = 32;
  model.intermediate_size = 48;
  model.max_position_embeddings = 64;
  model.initializer_range = 0.05;
  model.mla = {.num_heads = 2,
               .q_lora_rank = 0,
               .kv_lora_rank = 16,
               .qk_nope_head_dim = 8,
               .qk_rope_head_dim = 8,
               .v_head_dim = 8};
  model.moe.num_experts = 4;
  model.moe.num_experts_per_token = 2;
  model.moe.num_shared_experts = 1;
  model.moe.moe_intermediate_size = 16;
  model.moe.first_k_dense_replace = 1;
  model.mtp.num_nextn_predict_layers = 1;
  return model;
}

std::string tiny_text(int lines) {
  std::string text;
  for (int i = 0; i < lines; ++i)
    text += i % 2 == 0 ? "in the beginning was the word\n" : "and the word was in the beginning\n";
  return text;
}

Config tiny_config(const std::filesystem::path& directory, const std::string& text) {
  const auto path = directory / "text.txt";
  write_file_atomically(path, text);
  Config config;
  config.model = tiny_model();
  config.data.train = {{.path = path.string()}};
  config.data.document_split = "line";
  config.data.validation_every = 3;
  config.data.sequence_length = 16;
  config.data.num_workers = 1;
  config.training.steps = 4;
  config.training.micro_batch_size = 2;
  config.training.global_batch_size = Schedule::constant(4);
  config.training.device = "cpu";
  config.training.num_threads = 1;
  config.optimizer.learning_rate = Schedule::constant(3e-3);
  return config;
}

Batch random_batch(Random& random, const ModelConfig& model, int64_t sequences, int64_t length,
                   bool none_valid) {
  Batch batch{.num_sequences = sequences,
              .sequence_length = length,
              .tokens = {},
              .labels = {},
              .positions = {},
              .documents = {}};
  for (int64_t i = 0; i < sequences * length; ++i) {
    batch.tokens.push_back(static_cast<int32_t>(random.integer(0, model.vocab_size - 1)));
    const bool valid = !none_valid && random.integer(0, 2) != 0;
    batch.labels.push_back(valid ? static_cast<int32_t>(random.integer(0, model.vocab_size - 1))
                                 : kIgnoreLabelId);
    batch.positions.push_back(static_cast<int32_t>(i % length));
    batch.documents.push_back(static_cast<int32_t>(i % length < length / 2 ? 0 : 1));
  }
  return batch;
}

Batch rows_of(const Batch& batch, int64_t first, int64_t count) {
  const auto part = [&](const std::vector<int32_t>& whole) {
    const auto begin = whole.begin() + first * batch.sequence_length;
    return std::vector<int32_t>(begin, begin + count * batch.sequence_length);
  };
  return {.num_sequences = count,
          .sequence_length = batch.sequence_length,
          .tokens = part(batch.tokens),
          .labels = part(batch.labels),
          .positions = part(batch.positions),
          .documents = part(batch.documents)};
}

}  // namespace dsv3::test
