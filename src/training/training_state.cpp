#include "training/training_state.h"

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"

namespace dsv3 {

std::string to_json(const TrainingState& state) {
  nlohmann::ordered_json json;
  json["step"] = state.step;
  json["tokens"] = state.tokens;
  json["optimizer_steps"] = state.optimizer_steps;
  json["ema_updates"] = state.ema_updates;
  json["evaluated_step"] = state.evaluated_step;
  json["finished"] = state.finished;
  json["seed"] = state.seed;
  json["data"] = nlohmann::ordered_json::parse(to_json(state.data));
  json["watch"] = nlohmann::ordered_json::parse(state.watch);
  json["saved_at"] = state.saved_at;
  json["working_directory"] = state.working_directory;
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

TrainingState load_training_state(const std::filesystem::path& checkpoint) {
  const auto path = checkpoint / "state.json";
  const std::string text = read_file(path);
  try {
    const auto json = nlohmann::json::parse(text);
    TrainingState state;
    json.at("step").get_to(state.step);
    json.at("tokens").get_to(state.tokens);
    json.at("optimizer_steps").get_to(state.optimizer_steps);
    json.at("ema_updates").get_to(state.ema_updates);
    json.at("evaluated_step").get_to(state.evaluated_step);
    json.at("finished").get_to(state.finished);
    json.at("seed").get_to(state.seed);
    state.data = loader_state_from_json(json.at("data").dump());
    state.watch = json.at("watch").dump();
    json.at("saved_at").get_to(state.saved_at);
    json.at("working_directory").get_to(state.working_directory);
    require(state.step >= 0 && state.tokens >= 0 && state.optimizer_steps >= 0 &&
                state.ema_updates >= 0,
            "a count is negative");
    return state;
  } catch (const std::exception& error) {
    throw IoError(fmt::format("{}: not the state of a run: {}", path.string(), error.what()));
  }
}

}  // namespace dsv3
