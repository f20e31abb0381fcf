// The decision whether an optimizer step is taken, on the host.
#include "kernels/detail/decide_step.h"

namespace dsv3::kernels::cpu {

void decide_step(const DecideStep& p) {
  kernels::detail::decide(p);
}

}  // namespace dsv3::kernels::cpu
