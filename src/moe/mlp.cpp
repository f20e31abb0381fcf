#include "moe/moe.h"
#include "ops/linear.h"
#include "ops/swiglu.h"

namespace dsv3 {

Mlp Mlp::declare(ParameterSet& parameters, const ModelConfig& config, int64_t layer,
                 const std::string& prefix, int64_t intermediate_size) {
  const int64_t hidden = config.hidden_size;
  Mlp mlp;
  mlp.gate_up = &parameters.declare({
      .name = prefix + "gate_up_proj.weight",
      .shape = {2 * intermediate_size, hidden},
      .pieces = {{.name = prefix + "gate_proj.weight", .row_end = intermediate_size, .tp_dim = 0},
                 {.name = prefix + "up_proj.weight",
                  .row_begin = intermediate_size,
                  .row_end = 2 * intermediate_size,
                  .tp_dim = 0}},
      .layer = layer,
      .init_std = config.initializer_range,
  });
  mlp.down = &parameters.declare({
      .name = prefix + "down_proj.weight",
      .shape = {hidden, intermediate_size},
      .pieces = {{.name = prefix + "down_proj.weight", .row_end = hidden, .tp_dim = 1}},
      .layer = layer,
      .init_std = config.initializer_range,
  });
  return mlp;
}

at::Tensor Mlp::forward(const ops::Remakable& x, const ForwardContext& context) const {
  const at::Tensor projected = ops::linear(context.keep_or_remake(x), gate_up->weight);
  return ops::linear(context.keep_or_remake(ops::swiglu(projected)), down->weight);
}

}  // namespace dsv3
