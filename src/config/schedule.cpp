#include "config/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/error.h"

namespace dsv3 {
namespace {

using Shape = SchedulePiece::Shape;
using Unit = SchedulePiece::Unit;

double value_in(const SchedulePiece& piece, int64_t elapsed) {
  if (piece.length == 0 || elapsed >= piece.length) return piece.to;
  const auto done = static_cast<double>(std::max<int64_t>(0, elapsed));
  const auto length = static_cast<double>(piece.length);
  switch (piece.shape) {
    case Shape::kConstant:
      return piece.from;
    case Shape::kLinear:
      return piece.from + (piece.to - piece.from) * (done / length);
    case Shape::kCosine:
      return piece.to +
             0.5 * (piece.from - piece.to) * (1.0 + std::cos(std::numbers::pi * done / length));
    case Shape::kLog:
      if (piece.length < 2) return piece.to;
      return piece.from + (piece.to - piece.from) * (std::log1p(done) / std::log(length));
  }
  return piece.to;
}

}  // namespace

Schedule Schedule::constant(double value) {
  return {{{.shape = Shape::kConstant, .from = value, .to = value}}};
}

double Schedule::at(int64_t steps_done, int64_t tokens_done) const {
  DSV3_CHECK(!pieces.empty(), "a schedule needs at least one piece");
  const auto now = [&](const SchedulePiece& piece) {
    return piece.unit == Unit::kSteps ? steps_done : tokens_done;
  };
  const SchedulePiece* current = pieces.data();
  int64_t start = current->begin;
  for (size_t i = 1; i < pieces.size() && current->length > 0; ++i) {
    const SchedulePiece& next = pieces[i];
    DSV3_CHECK(next.begin > 0 || next.unit == current->unit,
               "piece {} of a schedule changes the unit and has no begin", i + 1);
    const int64_t next_start = next.begin > 0 ? next.begin : start + current->length;
    if (now(next) < next_start) break;
    current = &next;
    start = next_start;
  }
  return value_in(*current, now(*current) - start);
}

bool Schedule::is_constant() const {
  return std::ranges::all_of(pieces, [&](const SchedulePiece& piece) {
    return piece.from == pieces.front().from && piece.to == pieces.front().from;
  });
}

double Schedule::peak() const {
  double peak = pieces.empty() ? 0.0 : pieces.front().from;
  for (const SchedulePiece& piece : pieces) peak = std::max({peak, piece.from, piece.to});
  return peak;
}

}  // namespace dsv3
