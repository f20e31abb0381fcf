// Builds without CUDA.
#include "training/device.h"

namespace dsv3::cuda {

bool built_in() {
  return false;
}
std::string gpu_name(int) {
  return "";
}

}  // namespace dsv3::cuda
