// Derived defaults, and schedules that mix steps and tokens.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "config/draft.h"
#include "config/load.h"

namespace dsv3 {
namespace {

using Unit = SchedulePiece::Unit;
__extension__ using Wide = __int128;

constexpr int64_t kFarAway =
    4'000'000'000'000'000'000;  // beyond every count that a config can name
constexpr int64_t kMaxSimulatedSteps = 2'000'000;

int64_t clamp(Wide value) {
  return value > kFarAway ? kFarAway : static_cast<int64_t>(value);
}

/// A moment of training.
struct Moment {
  int64_t steps = 0;
  int64_t tokens = 0;
  int64_t in(Unit unit) const { return unit == Unit::kSteps ? steps : tokens; }
};

int64_t batch_at(const Schedule& batch, const Config& config, Moment now) {
  const int64_t multiple =
      config.training.micro_batch_size * std::max<int64_t>(1, config.parallel.data_parallel_size);
  const double wanted = batch.at(now.steps, now.tokens);
  return std::max<int64_t>(1, std::llround(wanted / static_cast<double>(multiple))) * multiple;
}

/// The first moment at which the count in `unit` has reached `target`, walking step by step while
/// the batch changes and at once where it no longer does. False when that takes too many steps.
bool advance(const Schedule& batch, const Config& config, Unit unit, int64_t target, Moment& now) {
  const SchedulePiece& last = batch.pieces.back();
  for (int64_t walked = 0; now.in(unit) < target; ++walked) {
    const Wide tokens_per_step = Wide{batch_at(batch, config, now)} * config.data.sequence_length;
    const bool steady = batch.is_constant() || (batch.pieces.size() > 1 && last.from == last.to &&
                                                last.begin > 0 && now.in(last.unit) >= last.begin);
    Wide steps = 1;
    if (steady) {
      steps = unit == Unit::kSteps
                  ? Wide{target} - now.steps
                  : (Wide{target} - now.tokens + tokens_per_step - 1) / tokens_per_step;
    }
    now.tokens = clamp(now.tokens + steps * tokens_per_step);
    now.steps = clamp(now.steps + steps);
    if (now.in(unit) < target && (now.tokens == kFarAway || walked == kMaxSimulatedSteps))
      return false;
  }
  return true;
}

/// Where each piece of `schedule` begins in its own unit. The batch schedule is known up to the
/// piece that is being placed, which is all that the walk needs.
class Placement {
 public:
  Placement(Schedule& schedule, const std::vector<bool>* absolute, const Config& config,
            const Schedule& batch)
      : schedule_(schedule), absolute_(absolute), config_(config), batch_(batch) {}

  /// An error message, or empty.
  std::string run() {
    const bool is_batch = &schedule_ == &batch_;
    Moment now;
    int64_t start = 0;
    for (size_t i = 0; i < schedule_.pieces.size(); ++i) {
      SchedulePiece& piece = schedule_.pieces[i];
      if (i > 0) {
        const SchedulePiece& before = schedule_.pieces[i - 1];
        if (piece.unit == before.unit) {
          start += before.length;
        } else {
          const Schedule known =
              is_batch ? Schedule{{schedule_.pieces.begin(), schedule_.pieces.begin() + i}}
                       : batch_;
          if (!advance(known, config_, before.unit, start + before.length, now)) {
            return fmt::format(
                "piece {} follows one that counts in {}, and the batch changes for too long to "
                "tell "
                "where that is; give all pieces in one unit",
                i + 1, before.unit == Unit::kSteps ? "steps" : "tokens");
          }
          start = piece.begin = now.in(piece.unit);
        }
      }
      if (absolute_ != nullptr && (*absolute_)[i]) {
        const int64_t end = piece.length;
        if (end <= start) {
          return fmt::format("piece {} ends at {} {}, but begins at {}", i + 1, end,
                             piece.unit == Unit::kSteps ? "steps" : "tokens", start);
        }
        piece.length = end - start;
      }
    }
    return "";
  }

 private:
  Schedule& schedule_;
  const std::vector<bool>* absolute_;
  const Config& config_;
  const Schedule& batch_;
};

int64_t up_to_multiple(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

void derive_model(Draft& draft) {
  ModelConfig& model = draft.config.model;
  const int64_t width = model.hidden_size;
  if (model.mla.num_heads == 0) model.mla.num_heads = std::max<int64_t>(1, width / 128);
  if (model.intermediate_size == 0) model.intermediate_size = up_to_multiple(width * 11 / 4, 16);
  if (model.moe.moe_intermediate_size == 0)
    model.moe.moe_intermediate_size = up_to_multiple(width * 11 / 16, 16);
  if (!draft.is_given("model.max_position_embeddings")) {
    model.max_position_embeddings =
        std::max(model.max_position_embeddings, draft.config.data.sequence_length);
  }
}

}  // namespace

void resolve(Draft& draft, Issues& issues) {
  derive_model(draft);
  Config& config = draft.config;
  TrainingConfig& training = config.training;
  constexpr std::string_view kBatch = "training.global_batch_size";
  if (!draft.is_given(kBatch)) {
    const int64_t multiple =
        training.micro_batch_size * std::max<int64_t>(1, config.parallel.data_parallel_size);
    training.global_batch_size =
        Schedule::constant(static_cast<double>(up_to_multiple(8, multiple)));
  }
  const auto place = [&](std::string_view key, Schedule& schedule) {
    if (draft.has_failed(key)) return;
    const std::string wrong =
        Placement(schedule, draft.absolute_ends(key), config, training.global_batch_size).run();
    if (wrong.empty()) return;
    issues.list.push_back(draft.blame({{key}}, wrong));
    draft.mark_failed(key);
  };
  place(kBatch, training.global_batch_size);
  if (draft.has_failed(kBatch)) return;
  for (const Field& field : schema()) {
    const Slot slot = field.slot(config);
    const auto* schedule = std::get_if<Schedule*>(&slot);
    if (schedule != nullptr && field.key != kBatch) place(field.key, **schedule);
  }
}

int64_t global_batch_at(const Config& config, int64_t steps_done, int64_t tokens_done) {
  return batch_at(config.training.global_batch_size, config, {steps_done, tokens_done});
}

}  // namespace dsv3
