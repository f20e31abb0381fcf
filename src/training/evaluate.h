#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "data/loader.h"
#include "model/model.h"

namespace dsv3 {

struct EvaluationOptions {
  at::Device device = at::Device(at::kCPU);
  int64_t sequences_per_batch = 1;
  int64_t num_batches = 0;  // 0 = the whole split
  bool mask_documents = false;
  std::function<bool()> stop_requested = {};  // asked before each batch; true ends the pass early
  /// Told before each batch how many are done, and of how many.
  std::function<void(int64_t done, int64_t all)> progress = {};
};

struct Evaluation {
  bool complete = true;      // false: the pass was ended early; the rest is then without meaning
  double loss = 0;           // nats per label
  double bits_per_byte = 0;  // summed nats / ln 2 / bytes of the labels' text; NaN
                             // where the tokenizer's ids stand for no text
  double accuracy = 0;       // share of labels that argmax guesses
  int64_t tokens = 0;        // labels that counted
  int64_t bytes = 0;         // of their text
  double seconds = 0;
};

/// The model's loss over one ordered pass of `loader` (a validation split), from its first sample.
/// Records no gradient, runs no MTP module, counts no expert load and changes no bias. Throws
/// std::invalid_argument on an empty split.
Evaluation evaluate(const Model& model, Loader& loader, const EvaluationOptions& options);

}  // namespace dsv3
