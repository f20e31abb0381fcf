// Builds without CUDA.
#include "base/error.h"
#include "bench/ops/timer.h"

namespace dsv3::bench::cuda {

std::unique_ptr<Timer> make_timer() {
  invalid("device: cuda, but this program was built without CUDA");
}

}  // namespace dsv3::bench::cuda
