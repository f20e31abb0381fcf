#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace dsv3::ops {

using Tensors = std::vector<at::Tensor>;

/// True when gradients are being recorded and one of `inputs` (undefined ones allowed) requires
/// one.
bool recording(const Tensors& inputs);

/// Inside: nothing is recorded, views are plain, and autocast chooses no dtypes. Every operator of
/// ours runs its body under it.
class NoRecord {
 public:
  NoRecord();
  ~NoRecord();
  NoRecord(const NoRecord&) = delete;
  NoRecord& operator=(const NoRecord&) = delete;

 private:
  struct Guards;
  Guards* guards_;
};

/// Enters one coarse operator of ours into autograd's graph: `backward` receives the gradients of
/// `outputs` (an undefined tensor where none came) and returns those of `inputs` (undefined =
/// none). It runs once, with recording off; what it returns cannot be differentiated again
/// (std::invalid_argument for who tries). `outputs` must have been made under NoRecord. Captured
/// tensors are what the operator saves: capture inputs as they are; never capture an output itself
/// (a cycle), but output.detach().
void record(const char* name, const Tensors& inputs, const Tensors& outputs,
            std::function<Tensors(const Tensors& grads)> backward);

}  // namespace dsv3::ops
