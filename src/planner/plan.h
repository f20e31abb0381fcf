#pragma once

#include <array>
#include <string>

#include "config/config.h"
#include "nn/parameter.h"
#include "planner/flops.h"

namespace dsv3 {

/// Parameters of one part of the model.
struct PartCount {
  int64_t total = 0;
  double active = 0;  // that one token uses
};

/// How many processes, and how they are arranged: tp · pp · cp · dp = ranks; ep is folded over tp ·
/// cp · dp.
struct Layout {
  int64_t ranks = 1;
  int64_t tensor = 1, pipeline = 1, context = 1, data = 1, expert = 1;
  int64_t zero_stage = 0;
};

/// Bytes on the fullest rank.
struct MemoryPlan {
  double weights = 0, gradients = 0, masters = 0, moments = 0;
  double activations = 0;  // estimate, by the recomputation policy
  double logits = 0;       // estimate: the head's chunk of logits
  int64_t stage = 0;       // pipeline stage of that rank
  double total() const { return weights + gradients + masters + moments + activations + logits; }
};

/// What a config amounts to, from the model's declarations; nothing is allocated.
struct Plan {
  std::array<PartCount, kNumModelParts> parts;  // by ModelPart
  PartCount model;                              // without the MTP modules
  double flops_per_token = 0;                   // to train, MTP included
  double flops_per_token_without_mtp = 0;
  double tokens_per_step = 0;  // at the start of training
  Layout layout;
  MemoryPlan memory;
};

/// Plans `config` (resolved: vocab_size known) on `ranks` processes; 0 = the fewest that its layout
/// allows. Throws std::invalid_argument with the equation when `ranks` does not fit.
Plan make_plan(const Config& config, int64_t ranks = 0);

/// As a table for people.
std::string to_text(const Plan& plan, const Config& config);
/// As one JSON object: parameters, flops_per_token, layout, memory_bytes.
std::string to_json(const Plan& plan);

}  // namespace dsv3
