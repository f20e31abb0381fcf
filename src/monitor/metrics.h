#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace dsv3 {

/// What is known of one optimizer step (or of the evaluation after it): metric names and values.
struct Record {
  int64_t step = 0;  // optimizer steps finished, 1 after the first
  std::vector<std::pair<std::string, double>> values;

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

// The names that every part uses. Units: losses in nats per token, times in seconds, memory in GB
// (1e9 bytes).
namespace metric {
inline constexpr const char* kLoss = "train/loss";
/// byte tokenizer only
inline constexpr const char* kBitsPerByte = "train/bits_per_byte";
/// share of next tokens that argmax guesses
inline constexpr const char* kAccuracy = "train/accuracy";
inline constexpr const char* kLearningRate = "train/lr";
/// before clipping
inline constexpr const char* kGradNorm = "train/grad_norm";
/// input tokens since the start
inline constexpr const char* kTokens = "train/tokens";
inline constexpr const char* kSequences = "train/global_batch_size";
inline constexpr const char* kTokensPerSecond = "train/tokens_per_sec";
/// model TFLOP/s, causal (planner/flops.h)
inline constexpr const char* kTflops = "train/tflops";
/// share of the GPU's BF16 peak, 0..1
inline constexpr const char* kMfu = "train/mfu";
inline constexpr const char* kStepTime = "train/step_time";
/// of it: waiting for the loader
inline constexpr const char* kDataTime = "train/data_time";
/// most since the start
inline constexpr const char* kGpuMemory = "train/gpu_memory_allocated_gb";
/// resident set
inline constexpr const char* kHostMemory = "train/host_memory_gb";
/// mean over the depths
inline constexpr const char* kMtpLoss = "mtp/loss";
/// share of depth-1 argmax guesses that are right
inline constexpr const char* kMtpAcceptance = "mtp/acceptance";
/// worst layer's max load / mean load - 1
inline constexpr const char* kMaxViolation = "moe/max_vio";
/// mean over layers of std(load) / mean(load)
inline constexpr const char* kLoadImbalance = "moe/load_imbalance";
/// per sequence, mean over layers, without α
inline constexpr const char* kBalanceLoss = "moe/balance_loss";
inline constexpr const char* kEvalLoss = "eval/loss";
inline constexpr const char* kEvalBitsPerByte = "eval/bits_per_byte";
inline constexpr const char* kEvalAccuracy = "eval/accuracy";
inline constexpr const char* kEvalTokens = "eval/tokens";
inline constexpr const char* kEvalTime = "eval/time";
}  // namespace metric

/// A count with three digits and a decimal suffix: 950, 12.3K, 4.10M, 671B.
std::string short_count(double value);

/// A length of time: 42s, 3m05s, 2h07m, 5d03h; "-" when not finite or negative.
std::string short_time(double seconds);

}  // namespace dsv3
