// What the parity test compares with transformers: one forward and backward of a checkpoint in
// FP32.
//   parity_dump CHECKPOINT TOKENS.json OUT.safetensors [EXPORT_DIR]
// TOKENS: {"num_sequences": B, "tokens": [B·S ids]}. OUT: logits [B·S, V], loss [] (mean over the
// next tokens of each sequence) and "grad.NAME" for every tensor of the checkpoint that is trained.
// EXPORT_DIR: the weights, saved again.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>

#include <map>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "checkpoint/hf_config.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/weights.h"
#include "model/model.h"
#include "ops/cross_entropy.h"

namespace dsv3 {
namespace {

TokenBatch read_batch(const char* path) {
  const auto json = nlohmann::json::parse(read_file(path));
  TokenBatch batch;
  batch.num_sequences = json["num_sequences"].get<int64_t>();
  batch.tokens =
      at::tensor(json["tokens"].get<std::vector<int32_t>>(), at::TensorOptions(at::kInt));
  batch.sequence_length = batch.tokens.numel() / batch.num_sequences;
  batch.positions =
      at::arange(batch.sequence_length, at::TensorOptions(at::kInt)).repeat({batch.num_sequences});
  at::Tensor labels = batch.tokens.view({batch.num_sequences, -1}).roll(-1, 1);
  labels.select(1, batch.sequence_length - 1).fill_(ops::kIgnoreLabel);
  batch.labels = labels.reshape({-1});
  return batch;
}

void write(const char* path, const std::map<std::string, at::Tensor>& tensors) {
  std::vector<TensorPlan> plan;
  for (const auto& [name, tensor] : tensors) {
    plan.push_back({name, StoredType::kF32, tensor.sizes().vec()});
  }
  SafetensorsWriter writer(path, std::move(plan));
  for (const auto& planned : writer.order()) {
    const at::Tensor host = tensors.at(planned.name).detach().to(at::kFloat).contiguous();
    writer.write({static_cast<const std::byte*>(host.const_data_ptr()), host.nbytes()});
  }
  writer.commit();
}

void dump(int argc, char** argv) {
  ModelConfig config = load_hf_config(argv[1]).model;
  config.dtype = DType::kF32;
  config.mtp.num_nextn_predict_layers = 0;
  ParameterSet parameters;
  const Model model(config, parameters);
  parameters.allocate({.dtype = DType::kF32});
  load_weights(argv[1], parameters, config.num_layers);

  const TokenBatch batch = read_batch(argv[2]);
  std::map<std::string, at::Tensor> out;
  out["logits"] = model.logits(batch);
  const int64_t valid = batch.num_sequences * (batch.sequence_length - 1);
  const LossScales scales{
      .main = at::full({}, 1.0 / static_cast<double>(valid), at::TensorOptions(at::kFloat)),
      .mtp = {},
      .balance = {}};
  const LossOutput loss = model.loss(batch, scales, Recompute::kNone);
  loss.objective.backward();
  out["loss"] = loss.loss_sum.div(static_cast<double>(valid));
  for (const auto& parameter : parameters.parameters()) {
    if (!parameter.spec.trainable) continue;
    for (const auto& piece : parameter.spec.pieces) {
      out["grad." + piece.name] = parameter.piece_view(piece, parameter.weight.grad);
    }
  }
  write(argv[3], out);
  if (argc > 4) save_weights(argv[4], parameters, config);
}

}  // namespace
}  // namespace dsv3

int main(int argc, char** argv) {
  if (argc != 4 && argc != 5) {
    fmt::print(stderr, "usage: parity_dump CHECKPOINT TOKENS.json OUT.safetensors [EXPORT_DIR]\n");
    return 2;
  }
  try {
    dsv3::dump(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "parity_dump: {}\n", error.what());
    return 1;
  }
  return 0;
}
