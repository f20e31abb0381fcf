// The CUDA side of `dsv3 verify` in a build without CUDA.
#include "cli/machine.h"

namespace dsv3::cli {

CudaFacts cuda_facts() {
  CudaFacts facts;
  facts.driver_present = nvidia_driver_present();
  facts.why_off = facts.driver_present
                      ? "a GPU is here, but this build is for the CPU only: install CUDA 13's nvcc "
                        "and run scripts/build_kernels.sh --cuda"
                      : "this build is for the CPU only";
  return facts;
}

}  // namespace dsv3::cli
