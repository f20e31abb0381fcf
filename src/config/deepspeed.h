#pragma once

#include <functional>
#include <string_view>

#include "config/assign.h"
#include "config/config.h"

namespace dsv3 {

/// Translates a DeepSpeed config into keys of ours and sets them in `root`, the YAML's tree.
/// `base` is the config without it: what "auto" stands for. `is_given` tells whether the user wrote
/// a key of ours. A key that we do not implement, or a value that asks for something we lack, is an
/// issue that names it with its place.
void apply_deepspeed(const Node& deepspeed, const Config& base,
                     const std::function<bool(std::string_view)>& is_given, Node& root,
                     Issues& issues);

}  // namespace dsv3
