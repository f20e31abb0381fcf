#include "config/deepspeed.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "config/schema.h"
#include "config/values.h"

namespace dsv3 {
namespace {

using Names = std::span<const std::string_view>;

constexpr Range kCount{1, 1e9};
constexpr Range kSteps{0, 1e12};
constexpr Range kRate{0, 1e9};

/// One map of the DeepSpeed file, under its path.
struct Section {
  const Node* node = nullptr;
  std::string path;

  std::string inside(std::string_view name) const {
    return path.empty() ? std::string(name) : fmt::format("{}.{}", path, name);
  }
};

bool is_auto(const Node& node) {
  return node.is_scalar() && node.text == "auto";
}

class Translator {
 public:
  Translator(const Config& base, const std::function<bool(std::string_view)>& is_given, Node& root,
             Issues& issues)
      : base_(base), is_given_(is_given), root_(root), issues_(issues) {}

  void run(const Node& document) {
    const Section top{&document, ""};
    static constexpr std::string_view kNames[] = {"train_batch_size",
                                                  "train_micro_batch_size_per_gpu",
                                                  "gradient_accumulation_steps",
                                                  "bf16",
                                                  "fp16",
                                                  "zero_optimization",
                                                  "gradient_clipping",
                                                  "optimizer",
                                                  "scheduler",
                                                  "activation_checkpointing",
                                                  "steps_per_print",
                                                  "wall_clock_breakdown"};
    if (!is_map(document, "deepspeed")) return;
    allow(top, kNames);
    batches(top);
    precision(top);
    copy(top, "gradient_clipping", "optimizer.clip");
    copy(top, "steps_per_print", "training.log_every");
    must_be_off(top, "wall_clock_breakdown");
    if (const auto zero = section(top, "zero_optimization")) {
      static constexpr std::string_view kZero[] = {"stage"};
      allow(*zero, kZero);
      copy(*zero, "stage", "parallel.zero_stage");
    }
    optimizer(top);
    scheduler(top);
    activation_checkpointing(top);
  }

 private:
  void fail(const Place& place, std::string_view key, std::string message) {
    issues_.add(place, key, std::move(message));
  }

  bool is_map(const Node& node, std::string_view path) {
    if (node.is_map()) return true;
    fail(node.place, path, fmt::format("expected a map, got {}", node.describe()));
    return false;
  }

  void allow(const Section& section, Names names) {
    for (const Node& item : section.node->items) {
      if (std::ranges::find(names, item.key) != names.end()) continue;
      std::string list;
      for (const std::string_view name : names)
        list += fmt::format("{}{}", list.empty() ? "" : ", ", name);
      const std::string_view near = nearest(item.key, names);
      const std::string hint = near.empty() ? "" : fmt::format("; did you mean {}?", near);
      fail(item.key_place, section.inside(item.key),
           fmt::format("not implemented, remove it (read here: {}){}", list, hint));
    }
  }

  /// The map `name`, unless it is missing or "auto".
  std::optional<Section> section(const Section& parent, std::string_view name) {
    const Node* node = parent.node->find(name);
    if (node == nullptr || is_auto(*node)) return std::nullopt;
    Section found{node, parent.inside(name)};
    return is_map(*node, found.path) ? std::optional(found) : std::nullopt;
  }

  const Node* value(const Section& section, std::string_view name) {
    const Node* node = section.node->find(name);
    return node == nullptr || is_auto(*node) ? nullptr : node;
  }

  void set(const Section& section, const Node& from, std::string_view name, std::string_view key) {
    Node node = from;
    node.label = section.inside(name);
    assign(root_, key, std::move(node), issues_);
  }

  void copy(const Section& section, std::string_view name, std::string_view key) {
    if (const Node* node = value(section, name)) set(section, *node, name, key);
  }

  void set_integer(const Section& section, std::string_view name, std::string_view key,
                   int64_t number) {
    const Node* node = section.node->find(name);
    const Place place = node != nullptr ? node->place : section.node->place;
    assign(root_, key, scalar_node(fmt::format("{}", number), place, section.inside(name)),
           issues_);
  }

  std::optional<int64_t> integer(const Section& section, std::string_view name,
                                 const Range& range) {
    const Node* node = value(section, name);
    if (node == nullptr) return std::nullopt;
    return detail::integer_from(*node, section.inside(name), range, issues_);
  }

  double number(const Section& section, std::string_view name, const Range& range, double missing,
                double automatic) {
    const Node* node = section.node->find(name);
    if (node == nullptr) return missing;
    if (is_auto(*node)) return automatic;
    return detail::number_from(*node, section.inside(name), range, issues_).value_or(missing);
  }

  bool flag(const Section& section, std::string_view name, bool otherwise) {
    const Node* node = value(section, name);
    if (node == nullptr) return otherwise;
    if (node->is_scalar() && !node->quoted && (node->text == "true" || node->text == "false"))
      return node->text == "true";
    fail(node->place, section.inside(name),
         fmt::format("expected true or false, got {}", node->describe()));
    return otherwise;
  }

  void must_be_off(const Section& section, std::string_view name) {
    if (!flag(section, name, false)) return;
    fail(section.node->find(name)->place, section.inside(name),
         "true is not implemented, set false or remove it");
  }

  // --- batch sizes ------------------------------------------------------------------------------

  void batches(const Section& top) {
    constexpr std::string_view kTrain = "train_batch_size";
    constexpr std::string_view kMicro = "train_micro_batch_size_per_gpu";
    constexpr std::string_view kAccumulation = "gradient_accumulation_steps";
    const auto train = integer(top, kTrain, kCount);
    const auto micro = integer(top, kMicro, kCount);
    const auto accumulation = integer(top, kAccumulation, kCount);
    const bool dp_given = base_.parallel.data_parallel_size > 0;
    const int64_t dp = std::max<int64_t>(1, base_.parallel.data_parallel_size);
    int64_t micro_size = micro.value_or(base_.training.micro_batch_size);
    int64_t sequences = micro_size * accumulation.value_or(1);
    if (train && accumulation && top.node->find(kMicro) == nullptr) {
      if (*train % (*accumulation * dp) != 0) {
        fail(top.node->find(kTrain)->place, kTrain,
             fmt::format("{}({}) must be a multiple of {}({}) × dp({})", kTrain, *train,
                         kAccumulation, *accumulation, dp));
        return;
      }
      micro_size = *train / (*accumulation * dp);
      sequences = micro_size * *accumulation;
      set_integer(top, kTrain, "training.micro_batch_size", micro_size);
    } else if (micro) {
      set_integer(top, kMicro, "training.micro_batch_size", *micro);
    }
    if (train && accumulation) {
      if (*train % sequences != 0 || (dp_given && *train / sequences != dp)) {
        fail(top.node->find(kTrain)->place, kTrain,
             fmt::format("{}({}) must be micro batch({}) × {}({}) × dp{}", kTrain, *train,
                         micro_size, kAccumulation, *accumulation,
                         dp_given ? fmt::format("({}) = {}", dp, sequences * dp) : ""));
        return;
      }
      if (!dp_given && *train / sequences > 1)
        set_integer(top, kTrain, "parallel.data_parallel_size", *train / sequences);
    }
    if (train) {
      set_integer(top, kTrain, "training.global_batch_size", *train);
    } else if (accumulation) {
      set_integer(top, kAccumulation, "training.global_batch_size",
                  std::min<int64_t>(sequences, 1'000'000'000) * dp);
    }
  }

  // --- precision --------------------------------------------------------------------------------

  void precision(const Section& top) {
    static constexpr std::string_view kEnabled[] = {"enabled"};
    // The loss scale's keys say nothing where FP16 is off, but templates carry them.
    static constexpr std::string_view kFp16[] = {
        "enabled",    "auto_cast",           "loss_scale",     "loss_scale_window",
        "hysteresis", "initial_scale_power", "min_loss_scale", "consecutive_hysteresis"};
    if (const auto fp16 = section(top, "fp16")) {
      allow(*fp16, kFp16);
      if (flag(*fp16, "enabled", false)) {
        fail(fp16->node->find("enabled")->place, "fp16.enabled",
             "FP16 is not implemented: BF16 has FP32's range and needs no loss scaling, use "
             "bf16.enabled");
      }
    }
    const auto bf16 = section(top, "bf16");
    if (!bf16) return;
    allow(*bf16, kEnabled);
    const Node* enabled = value(*bf16, "enabled");
    if (enabled == nullptr) return;
    const bool on = flag(*bf16, "enabled", false);
    assign(root_, "model.dtype", scalar_node(on ? "bf16" : "fp32", enabled->place, "bf16.enabled"),
           issues_);
  }

  // --- optimizer --------------------------------------------------------------------------------

  void optimizer(const Section& top) {
    const auto found = section(top, "optimizer");
    if (!found) return;
    static constexpr std::string_view kNames[] = {"type", "params"};
    allow(*found, kNames);
    const Node* type = value(*found, "type");
    if (found->node->find("type") == nullptr || (type != nullptr && type->text != "AdamW")) {
      fail(type != nullptr ? type->place : found->node->place, "optimizer.type",
           fmt::format("only AdamW is implemented, got {}",
                       type != nullptr ? type->describe() : "nothing"));
    }
    const auto params = section(*found, "params");
    if (!params) return;
    static constexpr std::string_view kParams[] = {"lr", "betas", "eps", "weight_decay"};
    allow(*params, kParams);
    copy(*params, "lr", "optimizer.learning_rate");
    copy(*params, "eps", "optimizer.eps");
    copy(*params, "weight_decay", "optimizer.weight_decay");
    const Node* betas = value(*params, "betas");
    if (betas == nullptr) return;
    if (betas->is_sequence() && betas->items.size() == 2) {
      set(*params, betas->items[0], "betas", "optimizer.beta1");
      set(*params, betas->items[1], "betas", "optimizer.beta2");
    } else {
      fail(betas->place, "optimizer.params.betas",
           fmt::format("expected two numbers such as [0.9, 0.95], got {}", betas->describe()));
    }
  }

  // --- scheduler --------------------------------------------------------------------------------

  /// The learning rate that the optimizer section gives, or the YAML's highest.
  double peak_rate(const Section& top) {
    const double yaml = base_.optimizer.learning_rate.peak();
    const auto found = section(top, "optimizer");
    const auto params = found ? section(*found, "params") : std::nullopt;
    Issues ignored;
    const Node* lr = params ? value(*params, "lr") : nullptr;
    return lr != nullptr ? detail::number_from(*lr, "lr", kRate, ignored).value_or(yaml) : yaml;
  }

  /// Steps of the YAML's own warm-up.
  double yaml_warmup() const {
    const SchedulePiece& first = base_.optimizer.learning_rate.pieces.front();
    const bool rises = first.unit == SchedulePiece::Unit::kSteps && first.to > first.from;
    return rises ? static_cast<double>(first.length) : 0.0;
  }

  static void piece(Node& list, const char* shape, double from, double to, double steps) {
    if (steps < 1) return;
    Node map = map_node(list.place);
    put(map, "shape", scalar_node(shape, list.place));
    put(map, "from", scalar_node(print_number(from), list.place));
    put(map, "to", scalar_node(print_number(to), list.place));
    put(map, "steps", scalar_node(fmt::format("{:.0f}", steps), list.place));
    list.items.push_back(std::move(map));
  }

  double whole_steps(const Section& section, std::string_view name, double missing,
                     double automatic) {
    Range range = kSteps;
    range.whole = true;
    return number(section, name, range, missing, automatic);
  }

  void scheduler(const Section& top) {
    const auto found = section(top, "scheduler");
    if (!found) return;
    static constexpr std::string_view kNames[] = {"type", "params"};
    static constexpr std::string_view kTypes[] = {"WarmupLR", "WarmupDecayLR", "WarmupCosineLR"};
    allow(*found, kNames);
    const Node* type = found->node->find("type");
    if (type != nullptr && is_auto(*type)) return;
    if (type == nullptr || std::ranges::find(kTypes, type->text) == std::end(kTypes)) {
      fail(type != nullptr ? type->place : found->node->place, "scheduler.type",
           fmt::format("expected one of WarmupLR, WarmupDecayLR, WarmupCosineLR, got {}",
                       type != nullptr ? type->describe() : "nothing"));
      return;
    }
    const Node no_params = map_node(found->node->place);
    Section params{&no_params, "scheduler.params"};
    if (const auto given = section(*found, "params")) params = *given;
    Node list;
    list.kind = Node::Kind::kSequence;
    list.place = found->node->place;
    list.label = "scheduler";
    const size_t before = issues_.list.size();
    if (type->text == "WarmupCosineLR") {
      cosine(top, params, list);
    } else {
      warmup(top, params, type->text == "WarmupDecayLR", list);
    }
    if (issues_.list.size() == before)
      assign(root_, "optimizer.learning_rate", std::move(list), issues_);
  }

  /// "linear" or "log"; DeepSpeed's default is log.
  const char* warmup_shape(const Section& params) {
    const Node* type = value(params, "warmup_type");
    if (type == nullptr) return "log";
    if (type->is_scalar() && type->text == "linear") return "linear";
    if (!type->is_scalar() || type->text != "log") {
      fail(type->place, params.inside("warmup_type"),
           fmt::format("expected linear or log, got {}", type->describe()));
    }
    return "log";
  }

  double steps_after(const Section& params, double warmup) {
    if (params.node->find("total_num_steps") == nullptr) {
      fail(params.node->place, params.inside("total_num_steps"),
           "is missing, give the total steps");
      return 1;
    }
    const double total =
        whole_steps(params, "total_num_steps", 1, static_cast<double>(base_.training.steps));
    if (total <= warmup) {
      fail(params.node->find("total_num_steps")->place, params.inside("total_num_steps"),
           fmt::format("total_num_steps({:.0f}) must be more than warmup_num_steps({:.0f})", total,
                       warmup));
      return 1;
    }
    return total - warmup;
  }

  void warmup(const Section& top, const Section& params, bool decays, Node& list) {
    static constexpr std::string_view kNames[] = {
        "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "total_num_steps"};
    allow(params, Names(kNames).first(decays ? 5 : 4));
    const double min = number(params, "warmup_min_lr", kRate, 0.0, 0.0);
    const double max = number(params, "warmup_max_lr", kRate, 0.001, peak_rate(top));
    const double steps = whole_steps(params, "warmup_num_steps", 1000, yaml_warmup());
    piece(list, warmup_shape(params), min, max, steps);
    if (decays) {
      piece(list, "linear", max, min, steps_after(params, steps));
    } else {
      Node hold = map_node(list.place);
      put(hold, "value", scalar_node(print_number(max), list.place));
      list.items.push_back(std::move(hold));
    }
  }

  void cosine(const Section& top, const Section& params, Node& list) {
    static constexpr std::string_view kNames[] = {
        "total_num_steps", "warmup_min_ratio", "warmup_num_steps", "cos_min_ratio", "warmup_type"};
    allow(params, kNames);
    const double peak = peak_rate(top);
    const double low = number(params, "warmup_min_ratio", {0, 1}, 0.0, 0.0);
    const double end = number(params, "cos_min_ratio", {0, 1}, 1e-4, 1e-4);
    const double steps = whole_steps(params, "warmup_num_steps", 1000, yaml_warmup());
    piece(list, warmup_shape(params), low * peak, peak, steps);
    piece(list, "cosine", peak, end * peak, steps_after(params, steps));
  }

  // --- activation checkpointing
  // -------------------------------------------------------------------

  /// DeepSpeed's section does not say what is recomputed: it means whole layers, unless the YAML
  /// chooses.
  void activation_checkpointing(const Section& top) {
    const auto found = section(top, "activation_checkpointing");
    if (!found) return;
    static constexpr std::string_view kNames[] = {
        "partition_activations",           "cpu_checkpointing",
        "contiguous_memory_optimization",  "number_checkpoints",
        "synchronize_checkpoint_boundary", "profile"};
    allow(*found, kNames);
    for (const std::string_view name : kNames) {
      if (name != "number_checkpoints") must_be_off(*found, name);
    }
    const Node* number = value(*found, "number_checkpoints");
    if (number != nullptr && !number->is_null())
      fail(number->place, found->inside("number_checkpoints"), "not implemented, set null");
    if (!is_given_("training.recompute"))
      assign(root_, "training.recompute",
             scalar_node("full", found->node->place, "activation_checkpointing"), issues_);
  }

  const Config& base_;
  const std::function<bool(std::string_view)>& is_given_;
  Node& root_;
  Issues& issues_;
};

}  // namespace

void apply_deepspeed(const Node& deepspeed, const Config& base,
                     const std::function<bool(std::string_view)>& is_given, Node& root,
                     Issues& issues) {
  Translator(base, is_given, root, issues).run(deepspeed);
}

}  // namespace dsv3
