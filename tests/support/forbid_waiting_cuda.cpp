// Builds with CUDA.
#include <c10/cuda/CUDAFunctions.h>

#include "support/forbid_waiting.h"

namespace dsv3::test {

ForbidWaiting::ForbidWaiting() {
  c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR);
}
ForbidWaiting::~ForbidWaiting() {
  c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED);
}

}  // namespace dsv3::test
