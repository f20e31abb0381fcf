// The host's attention, compiled for machines with AVX512 (flags in CMakeLists.txt).
#include "kernels/detail/attention_backward_body.h"
#include "kernels/detail/attention_bodies.h"

namespace dsv3::kernels::detail {

const AttentionBody kAttentionAvx512[2] = {
    {"avx512", DType::kF32, forward<Mode::kFloat>, backward<Mode::kFloat>, scratch<Mode::kFloat>},
    {"avx512", DType::kBF16, forward<Mode::kWidened>, backward<Mode::kWidened>,
     scratch<Mode::kWidened>}};

}  // namespace dsv3::kernels::detail
