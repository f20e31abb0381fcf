#include "ops/autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <utility>

#include "base/error.h"
#include "ops/range.h"

namespace dsv3::ops {
namespace {

namespace autograd = torch::autograd;

/// Operators choose their dtypes themselves: the router's product stays FP32 under autocast.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard without{c10::autocast_dispatch_keyset};
};

/// A node whose backward is a closure.
class Operator final : public autograd::Node {
 public:
  Operator(const char* name, std::function<Tensors(const Tensors&)> backward)
      : name_(name), path_(Range::backward_path()), backward_(std::move(backward)) {}

  std::string name() const override { return name_; }

  void release_variables() override { backward_ = nullptr; }

 protected:
  autograd::variable_list apply(autograd::variable_list&& grads) override {
    DSV3_CHECK(backward_ != nullptr, "[{}] backward ran twice through one graph", name_);
    const Range range(path_);
    const bool records = c10::GradMode::is_enabled();  // for a second derivative
    const NoAutocast no_autocast;
    const c10::AutoGradMode grad_mode(false);
    Tensors result = backward_(grads);
    if (records) refuse_derivative(grads, result);
    return result;
  }

 private:
  /// Whoever differentiates `gradients` again gets an error, not the zeros of constants: their node
  /// leads to all that they depend on, so that no search for a derivative passes it by.
  void refuse_derivative(const Tensors& grads, Tensors& gradients) const {
    const std::shared_ptr<Operator> node(
        new Operator(name_,
                     [name = name_](const Tensors&) -> Tensors {
                       invalid(
                           "[{}] its gradient cannot be differentiated: there is no second "
                           "derivative",
                           name);
                     }),
        autograd::deleteNode);
    autograd::edge_list edges = next_edges();
    for (const auto& grad : grads) {
      if (grad.defined() && grad.requires_grad())
        edges.push_back(autograd::impl::gradient_edge(grad));
    }
    node->set_next_edges(std::move(edges));
    for (auto& gradient : gradients) {
      if (!gradient.defined()) continue;
      gradient = gradient.detach();
      const auto number = node->add_input_metadata(gradient);
      autograd::impl::set_gradient_edge(gradient, {node, number});
    }
  }

  const char* name_;
  const Range::Path path_;
  std::function<Tensors(const Tensors&)> backward_;
};

}  // namespace

struct NoRecord::Guards {
  NoAutocast no_autocast;
  c10::AutoGradMode grad_mode{false};
  at::AutoDispatchBelowADInplaceOrView below;
};

NoRecord::NoRecord() : guards_(new Guards) {}
NoRecord::~NoRecord() {
  delete guards_;
}

bool recording(const Tensors& inputs) {
  if (!c10::GradMode::is_enabled()) return false;
  for (const auto& input : inputs) {
    if (input.defined() && input.requires_grad()) return true;
  }
  return false;
}

void record(const char* name, const Tensors& inputs, const Tensors& outputs,
            std::function<Tensors(const Tensors& grads)> backward) {
  const std::shared_ptr<Operator> node(new Operator(name, std::move(backward)),
                                       autograd::deleteNode);
  autograd::edge_list edges;
  edges.reserve(inputs.size());
  for (const auto& input : inputs) {
    edges.push_back(input.defined() && input.requires_grad() ? autograd::impl::gradient_edge(input)
                                                             : autograd::Edge());
  }
  node->set_next_edges(std::move(edges));
  for (const auto& output : outputs) {
    const auto number = node->add_input_metadata(output);
    autograd::impl::set_gradient_edge(output, {node, number});
  }
}

}  // namespace dsv3::ops
