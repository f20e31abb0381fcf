// Builds without CUDA.
#include "support/forbid_waiting.h"

namespace dsv3::test {

ForbidWaiting::ForbidWaiting() = default;
ForbidWaiting::~ForbidWaiting() = default;

}  // namespace dsv3::test
