#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dsv3 {

/// One stretch of a schedule. Over its length the value goes from `from` to `to`.
struct SchedulePiece {
  /// kLog rises as from + (to - from) · log(1 + n) / log(length), n counted from the piece's start
  /// (the warm-up that DeepSpeed's schedulers use unless told otherwise).
  enum class Shape : uint8_t { kConstant, kLinear, kCosine, kLog };
  enum class Unit : uint8_t { kSteps, kTokens };

  Shape shape = Shape::kConstant;
  double from = 0;
  double to = 0;
  int64_t length = 0;  // in `unit`; 0 = open end, allowed for the last piece only
  Unit unit = Unit::kSteps;
  int64_t begin = 0;  // in `unit`; 0 = where the piece before ended. The reader of configs fills it
                      // in where the unit changes: only it knows how steps and tokens correspond

  bool operator==(const SchedulePiece&) const = default;
};

/// A quantity that changes during training: pieces one after another; after the last, its `to`
/// holds. Learning rate, bias update rate, MTP loss weight and batch size are all schedules.
struct Schedule {
  std::vector<SchedulePiece> pieces;

  static Schedule constant(double value);

  /// Value at a moment, given the steps and tokens already finished (0 at the start of training).
  /// A piece that follows one of the other unit must have its `begin` (std::logic_error otherwise).
  double at(int64_t steps_done, int64_t tokens_done) const;

  /// True when every piece is constant with the same value.
  bool is_constant() const;

  /// The largest value that the schedule takes.
  double peak() const;

  bool operator==(const Schedule&) const = default;
};

}  // namespace dsv3
