#include "checkpoint/state_tensors.h"

#include <c10/core/GradMode.h>

#include "base/error.h"
#include "checkpoint/tensor_files.h"

namespace dsv3 {

namespace fs = std::filesystem;

std::vector<at::Tensor> StateTensors::all() const {
  std::vector<at::Tensor> tensors = values;
  tensors.insert(tensors.end(), buffers.begin(), buffers.end());
  for (const Companion& companion : companions) {
    for (const at::Tensor& flat : companion.flats) {
      if (flat.defined()) tensors.push_back(flat);
    }
  }
  return tensors;
}

uint64_t StateTensors::num_bytes() const {
  uint64_t bytes = 0;
  for (const at::Tensor& tensor : all()) bytes += tensor.nbytes();
  return bytes;
}

StateTensors state_of(const ParameterSet& parameters, std::vector<Companion> companions) {
  const c10::AutoGradMode no_gradients(false);
  StateTensors state;
  for (const Bucket& bucket : parameters.buckets()) state.values.push_back(bucket.values.detach());
  for (const Parameter& parameter : parameters.parameters()) {
    if (!parameter.spec.trainable) state.buffers.push_back(parameter.value().detach());
  }
  for (const Companion& companion : companions) {
    DSV3_CHECK(companion.flats.size() == parameters.buckets().size(),
               "companion {} has {} tensors for {} buckets", companion.prefix,
               companion.flats.size(), parameters.buckets().size());
  }
  state.companions = std::move(companions);
  return state;
}

at::Tensor value_in(const StateTensors& state, const ParameterSet& parameters,
                    const Parameter& parameter) {
  if (parameter.spec.trainable)
    return part_of(parameter, state.values[static_cast<size_t>(parameter.bucket)]);
  size_t index = 0;
  for (const Parameter& other : parameters.parameters()) {
    if (&other == &parameter) break;
    if (!other.spec.trainable) ++index;
  }
  return state.buffers[index];
}

void load_companion(const fs::path& checkpoint, const ParameterSet& parameters,
                    const Companion& target, bool part_only) {
  const c10::AutoGradMode no_gradients(false);
  const WeightFiles files(checkpoint, target.prefix);
  detail::NameCheck check(files);
  std::vector<std::pair<std::string, at::Tensor>> places;
  for (const Parameter& parameter : parameters.parameters()) {
    if (!parameter.spec.trainable) continue;
    const at::Tensor& flat = target.flats[static_cast<size_t>(parameter.bucket)];
    if (!flat.defined()) continue;
    const at::Tensor part = part_of(parameter, flat);
    for (const auto& piece : parameter.spec.pieces) {
      const std::string name = target.prefix + "." + piece.name;
      const at::Tensor view = parameter.piece_view(piece, part);
      check.expect(name, view.sizes().vec());
      places.emplace_back(name, view);
    }
  }
  for (const std::string& name : files.names()) {
    if (!part_only && !check.expected(name)) check.unexpected(name);
  }
  check.raise(checkpoint, "the saved state '" + target.prefix + "' does not fit the run");
  for (const auto& [name, view] : places)
    detail::fill(*files.find(name), files.file_of(name), view);
}

bool has_companion(const fs::path& checkpoint, const std::string& prefix) {
  return fs::exists(checkpoint / (prefix + ".safetensors")) ||
         fs::exists(checkpoint / (prefix + ".safetensors.index.json"));
}

}  // namespace dsv3
