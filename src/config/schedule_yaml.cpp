// Schedules in YAML: a number, a list of pieces, or a map with `type` that stands for such a list.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "config/values.h"

namespace dsv3 {
namespace {

using Shape = SchedulePiece::Shape;
using Unit = SchedulePiece::Unit;

constexpr size_t kMaxPieces = 64;
constexpr Range kLength{1, 1e15};
constexpr Range kLengthOrZero{0, 1e15};
constexpr std::string_view kShapes[] = {"constant", "linear", "cosine", "log"};

/// A length with its unit; `absolute` when it is the count at which the piece ends.
struct Extent {
  int64_t count = 0;
  Unit unit = Unit::kSteps;
  bool absolute = false;
};

/// Reads the keys of one map that describes a schedule or a piece, and remembers what is wrong.
class MapReader {
 public:
  MapReader(const Node& node, std::string_view key, Issues& issues)
      : node_(node), key_(detail::shown(node, key)), issues_(issues) {}

  bool good() const { return good_; }
  bool has(std::string_view name) const { return node_.find(name) != nullptr; }

  void fail(const Place& place, std::string message) {
    issues_.add(place, key_, std::move(message));
    good_ = false;
  }
  void fail(std::string message) { fail(node_.place, std::move(message)); }

  /// An issue for each key that is not among `names`.
  void allow(std::span<const std::string_view> names) {
    for (const Node& item : node_.items) {
      if (std::ranges::find(names, item.key) != names.end()) continue;
      const std::string_view near = nearest(item.key, names);
      std::string list;
      for (const std::string_view name : names)
        list += fmt::format("{}{}", list.empty() ? "" : ", ", name);
      issues_.add(item.key_place, path(item.key),
                  near.empty() ? fmt::format("unknown key, expected one of {}", list)
                               : fmt::format("unknown key, did you mean {}?", near));
      good_ = false;
    }
  }

  std::optional<double> number(std::string_view name, const Range& range) {
    const Node* item = node_.find(name);
    if (item == nullptr) return std::nullopt;
    const auto value = detail::number_from(*item, path(name), range, issues_);
    good_ = good_ && value.has_value();
    return value;
  }
  double number(std::string_view name, const Range& range, double otherwise) {
    return number(name, range).value_or(otherwise);
  }
  double needed(std::string_view name, const Range& range) {
    if (!has(name)) fail(fmt::format("{} is missing, give a number", name));
    return number(name, range).value_or(0.0);
  }

  std::optional<int64_t> integer(std::string_view name, const Range& range) {
    const Node* item = node_.find(name);
    if (item == nullptr) return std::nullopt;
    const auto value = detail::integer_from(*item, path(name), range, issues_);
    good_ = good_ && value.has_value();
    return value;
  }

  size_t word(std::string_view name, std::span<const std::string_view> choices, size_t otherwise) {
    const Node* item = node_.find(name);
    if (item == nullptr) return otherwise;
    const auto found = item->is_scalar() ? std::ranges::find(choices, item->text) : choices.end();
    if (found != choices.end()) return static_cast<size_t>(found - choices.begin());
    std::string list;
    for (const std::string_view choice : choices)
      list += fmt::format("{}{}", list.empty() ? "" : ", ", choice);
    issues_.add(item->place, path(name),
                fmt::format("expected one of {}, got {}", list, item->describe()));
    good_ = false;
    return otherwise;
  }

  /// `NAME_steps` or `NAME_tokens` (`steps` or `tokens` for an empty name), whichever is given.
  std::optional<Extent> extent(const std::string& name, const Range& range, bool absolute = false) {
    const std::string prefix = name.empty() ? "" : name + "_";
    const std::string steps = prefix + "steps", tokens = prefix + "tokens";
    if (has(steps) && has(tokens))
      fail(fmt::format("{} and {} are both given, keep one", steps, tokens));
    const bool in_steps = has(steps);
    const auto count = integer(in_steps ? steps : tokens, range);
    if (!count) return std::nullopt;
    return Extent{*count, in_steps ? Unit::kSteps : Unit::kTokens, absolute};
  }

 private:
  std::string path(std::string_view name) const { return fmt::format("{}.{}", key_, name); }

  const Node& node_;
  std::string key_;
  Issues& issues_;
  bool good_ = true;
};

void append(WrittenSchedule& written, Shape shape, double from, double to, const Extent& extent) {
  if (extent.count == 0) return;
  written.schedule.pieces.push_back(
      {.shape = shape, .from = from, .to = to, .length = extent.count, .unit = extent.unit});
  written.absolute.push_back(extent.absolute);
}

void append_open(WrittenSchedule& written, double value) {
  auto& pieces = written.schedule.pieces;
  const Unit unit = pieces.empty() ? Unit::kSteps : pieces.back().unit;
  pieces.push_back(
      {.shape = Shape::kConstant, .from = value, .to = value, .length = 0, .unit = unit});
  written.absolute.push_back(false);
}

// --- a list of pieces ---------------------------------------------------------------------------

void read_piece(const Node& node, std::string_view key, const Range& range, bool last,
                WrittenSchedule& written, Issues& issues, bool& good) {
  if (!node.is_map()) {
    issues.add(
        node.place, detail::shown(node, key),
        fmt::format("expected a piece such as {{shape: linear, from: 0, to: 1, steps: 100}}, "
                    "got {}",
                    node.describe()));
    good = false;
    return;
  }
  MapReader map(node, key, issues);
  static constexpr std::string_view kNames[] = {"shape", "value",  "from",        "to",
                                                "steps", "tokens", "until_steps", "until_tokens"};
  map.allow(kNames);
  const bool changes = map.has("from") || map.has("to");
  const auto shape = static_cast<Shape>(map.word("shape", kShapes, changes ? 1 : 0));
  auto& pieces = written.schedule.pieces;
  double from = 0, to = 0;
  if (shape == Shape::kConstant) {
    if (changes) map.fail("a constant piece has value, not from and to");
    from = to = map.needed("value", range);
  } else {
    if (map.has("value"))
      map.fail(fmt::format("a {} piece has from and to, not value",
                           kShapes[static_cast<size_t>(shape)]));
    if (!map.has("from") && pieces.empty()) map.fail("from is missing in the first piece");
    from = map.number("from", range, pieces.empty() ? 0.0 : pieces.back().to);
    to = map.needed("to", range);
  }
  auto extent = map.extent("", kLength);
  const auto until = map.extent("until", kLength, true);
  if (extent && until) map.fail("a length and an end are both given, keep one");
  if (until) extent = until;
  const bool has_length =
      map.has("steps") || map.has("tokens") || map.has("until_steps") || map.has("until_tokens");
  if (!has_length && !last)
    map.fail("only the last piece may be open: give steps, tokens, until_steps or until_tokens");
  if (!has_length && shape != Shape::kConstant)
    map.fail("a piece that changes needs a length: steps, tokens, until_steps or until_tokens");
  good = good && map.good();
  if (!map.good()) return;
  if (extent) {
    append(written, shape, from, to, *extent);
  } else {
    append_open(written, from);
  }
}

std::optional<WrittenSchedule> read_list(const Node& node, std::string_view key, const Range& range,
                                         Issues& issues) {
  if (node.items.empty() || node.items.size() > kMaxPieces) {
    issues.add(node.place, detail::shown(node, key),
               fmt::format("a schedule has between 1 and {} pieces, got {}", kMaxPieces,
                           node.items.size()));
    return std::nullopt;
  }
  WrittenSchedule written;
  bool good = true;
  for (const Node& item : node.items)
    read_piece(item, key, range, &item == &node.items.back(), written, issues, good);
  return good ? std::optional(written) : std::nullopt;
}

// --- shorthand ----------------------------------------------------------------------------------

/// The last stretch of a warm-up, hold and decay: to `total`, less what came before in its unit.
void append_until(WrittenSchedule& written, MapReader& map, Shape shape, double from, double to,
                  Extent total) {
  const auto& pieces = written.schedule.pieces;
  const bool mixed = std::ranges::any_of(
      pieces, [&](const SchedulePiece& piece) { return piece.unit != total.unit; });
  total.absolute = mixed;
  if (!mixed) {
    const int64_t end = total.count;
    for (const SchedulePiece& piece : pieces) total.count -= piece.length;
    if (total.count <= 0) {
      map.fail(fmt::format("the pieces before the end take {}, but the end is at {}",
                           end - total.count, end));
      return;
    }
  }
  append(written, shape, from, to, total);
}

void expand_cosine(MapReader& map, const Range& range, int64_t training_steps,
                   WrittenSchedule& written) {
  static constexpr std::string_view kNames[] = {
      "type", "peak", "min", "warmup_steps", "warmup_tokens", "total_steps", "total_tokens"};
  map.allow(kNames);
  const double peak = map.needed("peak", range);
  const double min = map.number("min", range, 0.0);
  const auto warmup = map.extent("warmup", kLengthOrZero);
  const auto total = map.extent("total", kLength);
  if (!map.good()) return;
  if (warmup) append(written, Shape::kLinear, 0.0, peak, *warmup);
  // A run shorter than its warm-up ends in it.
  const bool too_short =
      !total && warmup && warmup->unit == Unit::kSteps && warmup->count >= training_steps;
  if (!too_short)
    append_until(written, map, Shape::kCosine, peak, min, total.value_or(Extent{training_steps}));
}

void expand_wsd(MapReader& map, const Range& range, int64_t training_steps,
                WrittenSchedule& written) {
  static constexpr std::string_view kNames[] = {
      "type",          "peak",         "min",           "decay",       "warmup_steps",
      "warmup_tokens", "stable_steps", "stable_tokens", "decay_steps", "decay_tokens"};
  static constexpr std::string_view kDecays[] = {"linear", "cosine"};
  map.allow(kNames);
  const double peak = map.needed("peak", range);
  const double min = map.number("min", range, 0.0);
  const Shape shape = map.word("decay", kDecays, 0) == 0 ? Shape::kLinear : Shape::kCosine;
  const auto warmup = map.extent("warmup", kLengthOrZero);
  const auto stable = map.extent("stable", kLengthOrZero);
  const auto decay = map.extent("decay", kLength);
  if (!decay && map.good()) map.fail("decay_steps or decay_tokens is missing");
  if (!map.good()) return;
  Extent rise = warmup.value_or(Extent{}), fall = *decay;
  const bool in_steps = rise.unit == Unit::kSteps && fall.unit == Unit::kSteps;
  if (!stable && in_steps && rise.count + fall.count > training_steps) {
    // A trial run of a few steps keeps the shape: warm-up and decay shrink in proportion.
    const double share =
        static_cast<double>(rise.count) / static_cast<double>(rise.count + fall.count);
    rise.count = static_cast<int64_t>(share * static_cast<double>(training_steps));
    fall.count = training_steps - rise.count;
  }
  append(written, Shape::kLinear, 0.0, peak, rise);
  if (stable) {
    append(written, Shape::kConstant, peak, peak, *stable);
  } else if (!in_steps) {
    map.fail("stable_steps or stable_tokens is missing, for warm-up or decay count tokens");
  } else if (const int64_t rest = training_steps - rise.count - fall.count; rest > 0) {
    append(written, Shape::kConstant, peak, peak, {rest});
  }
  append(written, shape, peak, min, fall);
}

/// The report's five pieces (§4.2), with values and lengths scaled on request.
void expand_report(MapReader& map, const Range& range, WrittenSchedule& written) {
  static constexpr std::string_view kNames[] = {"type",         "peak",         "min",  "final",
                                                "warmup_steps", "total_tokens", "scale"};
  constexpr double kTotal = 14.8e12;
  map.allow(kNames);
  if (map.has("scale") && map.has("total_tokens"))
    map.fail("scale and total_tokens are both given, keep one");
  const double peak = map.number("peak", range, 2.2e-4);
  const bool own_peak = map.has("peak");
  const double min = map.number("min", range, own_peak ? peak / 10 : 2.2e-5);
  const double end = map.number("final", range, own_peak ? peak * (7.3e-6 / 2.2e-4) : 7.3e-6);
  const int64_t warmup = map.integer("warmup_steps", kLengthOrZero).value_or(2000);
  const auto total = map.integer("total_tokens", {1, 1e15});
  double scale = map.number("scale", {.min = 0, .max = 1000, .above_min = true}, 1.0);
  if (!map.good()) return;
  if (total) scale = static_cast<double>(*total) / kTotal;
  const auto tokens = [&](double count, bool absolute = false) {
    return Extent{std::max<int64_t>(1, std::llround(count * scale)), Unit::kTokens, absolute};
  };
  append(written, Shape::kLinear, 0.0, peak, {warmup});
  append(written, Shape::kConstant, peak, peak, tokens(10e12, true));
  append(written, Shape::kCosine, peak, min, tokens(4.3e12));
  append(written, Shape::kConstant, min, min, tokens(333e9));
  append_open(written, end);
}

std::optional<WrittenSchedule> read_shorthand(const Node& node, std::string_view key,
                                              const Range& range, const ReadContext& context) {
  static constexpr std::string_view kTypes[] = {"constant", "linear", "cosine", "wsd",
                                                "deepseek_v3"};
  MapReader map(node, key, context.issues);
  if (!map.has("type")) {
    map.fail(
        "expected a number, a list of pieces, or a map with type (constant, linear, cosine, "
        "wsd, deepseek_v3)");
    return std::nullopt;
  }
  const size_t type = map.word("type", kTypes, std::size(kTypes));
  WrittenSchedule written;
  static constexpr std::string_view kConstantNames[] = {"type", "value"};
  static constexpr std::string_view kLinearNames[] = {"type", "from", "to", "steps", "tokens"};
  switch (type) {
    case 0:
      map.allow(kConstantNames);
      append_open(written, map.needed("value", range));
      break;
    case 1: {
      map.allow(kLinearNames);
      const double from = map.needed("from", range), to = map.needed("to", range);
      append(written, Shape::kLinear, from, to,
             map.extent("", kLength).value_or(Extent{context.training_steps}));
      break;
    }
    case 2:
      expand_cosine(map, range, context.training_steps, written);
      break;
    case 3:
      expand_wsd(map, range, context.training_steps, written);
      break;
    case 4:
      expand_report(map, range, written);
      break;
    default:
      break;
  }
  if (!map.good() || written.schedule.pieces.empty()) return std::nullopt;
  // Values that the form supplies itself, such as a start at 0, may not suit this key.
  for (const SchedulePiece& piece : written.schedule.pieces) {
    for (const double value : {piece.from, piece.to}) {
      if (range.contains(value)) continue;
      map.fail(fmt::format("takes the value {} on its way, every value must be {}",
                           print_number(value), range.text()));
      return std::nullopt;
    }
  }
  return written;
}

}  // namespace

std::optional<WrittenSchedule> read_schedule(const Node& node, std::string_view key,
                                             const Range& range, const ReadContext& context) {
  if (node.is_map()) return read_shorthand(node, key, range, context);
  if (node.is_sequence()) return read_list(node, key, range, context.issues);
  const auto value = detail::number_from(node, key, range, context.issues);
  if (!value) return std::nullopt;
  return WrittenSchedule{Schedule::constant(*value), {false}};
}

std::string print_schedule(const Schedule& schedule, int indent) {
  if (schedule == Schedule::constant(schedule.pieces.front().to))
    return print_number(schedule.pieces.front().to);
  std::string text;
  for (const SchedulePiece& piece : schedule.pieces) {
    text += fmt::format("\n{:{}}- {{shape: {}, ", "", indent,
                        kShapes[static_cast<size_t>(piece.shape)]);
    text += piece.shape == Shape::kConstant
                ? fmt::format("value: {}", print_number(piece.from))
                : fmt::format("from: {}, to: {}", print_number(piece.from), print_number(piece.to));
    if (piece.length > 0)
      text +=
          fmt::format(", {}: {}", piece.unit == Unit::kSteps ? "steps" : "tokens", piece.length);
    text += "}";
  }
  return text;
}

}  // namespace dsv3
