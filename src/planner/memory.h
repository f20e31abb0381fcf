#pragma once

#include "planner/plan.h"

namespace dsv3 {

/// Bytes of activations that one token leaves for backward in one layer, by the recomputation
/// policy, before any split over ranks. An estimate from the shapes that the operators save
/// (docs/ARCHITECTURE.md).
double activation_bytes_per_token(const ModelConfig& config, int64_t layer, Recompute recompute);

/// Memory of the fullest rank: parameters are split as declared (tensor and expert parallelism),
/// layers over the pipeline's stages, optimizer state as ZeRO says; 1F1B keeps as many
/// micro-batches as stages follow.
MemoryPlan plan_memory(const Config& config, const ParameterSet& parameters, const Layout& layout);

}  // namespace dsv3
