#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace dsv3 {

/// Counts that leave as a table: tokens by MoE layer and expert.
struct CountTable {
  std::string name;
  std::vector<int64_t> layers;               // the layer's id, by row
  std::vector<std::vector<int64_t>> counts;  // [layers][E]
};

/// What is known of one optimizer step (or of the evaluation after it): metric names and values.
struct Record {
  int64_t step = 0;  // optimizer steps finished, 1 after the first
  std::vector<std::pair<std::string, double>> values;
  std::vector<CountTable> tables;

  void add(std::string name, double value) { values.emplace_back(std::move(name), value); }
  /// The value of `name`, NaN when the record does not hold it.
  double get(std::string_view name) const;
  bool has(std::string_view name) const;
};

/// Something that happened to the run beside its steps: "checkpoint", "resume", "skipped_step", …
/// `details` holds what else is known of it, under keys other than "time", "step" and "event".
using EventValue = std::variant<bool, int64_t, double, std::string, std::vector<int64_t>,
                                std::vector<std::string>>;
using EventDetails = std::vector<std::pair<std::string, EventValue>>;
struct Event {
  int64_t step = 0;  // optimizer steps finished when it happened
  std::string name;
  EventDetails details;
};

// The names that every part uses; docs/metrics.md has each one's formula and unit. Losses are in
// nats per token, times in seconds, memory in GB (1e9 bytes).
namespace metric {
inline constexpr const char* kLoss = "train/loss";
inline constexpr const char* kBitsPerByte = "train/bits_per_byte";  // byte tokenizer only
inline constexpr const char* kAccuracy = "train/accuracy";
inline constexpr const char* kLearningRate = "train/lr";
inline constexpr const char* kGradNorm = "train/grad_norm";
inline constexpr const char* kUpdateToWeight = "train/update_to_weight";
inline constexpr const char* kTokens = "train/tokens";  // since the start
inline constexpr const char* kSequences = "train/global_batch_size";
inline constexpr const char* kTokensPerSecond = "train/tokens_per_sec";
inline constexpr const char* kTflops = "train/tflops";
inline constexpr const char* kMfu = "train/mfu";  // known GPUs only
inline constexpr const char* kStepTime = "train/step_time";
inline constexpr const char* kDataTime = "train/time_data";
inline constexpr const char* kForwardTime = "train/time_forward";
inline constexpr const char* kBackwardTime = "train/time_backward";
inline constexpr const char* kOptimizerTime = "train/time_optimizer";
inline constexpr const char* kCommunicationTime = "train/time_communication";
inline constexpr const char* kCheckpointTime = "train/time_checkpoint";
inline constexpr const char* kGpuMemory = "train/gpu_memory_allocated_gb";  // CUDA only
inline constexpr const char* kHostMemory = "train/host_memory_gb";
inline constexpr const char* kKvCacheSize = "mla/kv_cache_size_mb";
inline constexpr const char* kCompressionRatio = "mla/compression_ratio";
inline constexpr const char* kFallbackRate = "mla/fallback_rate";
inline constexpr const char* kMtpLoss = "mtp/loss";              // also by depth
inline constexpr const char* kMtpAcceptance = "mtp/acceptance";  // also by depth
inline constexpr const char* kMaxViolation = "moe/max_vio";  // this and the next five: by layer too
inline constexpr const char* kMicroViolation = "moe/max_vio_micro";
inline constexpr const char* kLoadImbalance = "moe/load_imbalance";
inline constexpr const char* kEntropy = "moe/entropy";
inline constexpr const char* kUtilization = "moe/utilization";
inline constexpr const char* kBiasSpread = "moe/bias_spread";
inline constexpr const char* kBalanceLoss = "moe/balance_loss";
inline constexpr const char* kExpertDistribution = "moe/expert_distribution";  // a CountTable
inline constexpr const char* kEvalLoss = "eval/loss";
inline constexpr const char* kEvalBitsPerByte = "eval/bits_per_byte";
inline constexpr const char* kEvalAccuracy = "eval/accuracy";
inline constexpr const char* kEvalTokens = "eval/tokens";
/// of the weights' moving average
inline constexpr const char* kEvalEmaLoss = "eval/ema_loss";
inline constexpr const char* kEvalEmaBitsPerByte = "eval/ema_bits_per_byte";
inline constexpr const char* kEvalEmaAccuracy = "eval/ema_accuracy";
inline constexpr const char* kEvalTime = "eval/time";
}  // namespace metric

/// "moe/max_vio/layer_3", "mtp/loss/depth_1" (depths count from 1).
std::string name_of_layer(std::string_view metric, int64_t layer);
std::string name_of_depth(std::string_view metric, int64_t depth);

/// A count with three digits and a decimal suffix: 950, 12.3K, 4.10M, 671B.
std::string short_count(double value);

/// A length of time: 42s, 3m05s, 2h07m, 5d03h; "-" when not finite or negative.
std::string short_time(double seconds);

}  // namespace dsv3
