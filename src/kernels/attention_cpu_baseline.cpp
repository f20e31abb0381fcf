// The host's attention, compiled for any machine of the architecture (flags in CMakeLists.txt).
#include "kernels/detail/attention_backward_body.h"
#include "kernels/detail/attention_bodies.h"

namespace dsv3::kernels::detail {

const AttentionBody kAttentionBaseline[2] = {
    {"baseline", DType::kF32, forward<Mode::kFloat>, backward<Mode::kFloat>, scratch<Mode::kFloat>},
    {"baseline", DType::kBF16, forward<Mode::kWidened>, backward<Mode::kWidened>,
     scratch<Mode::kWidened>}};

}  // namespace dsv3::kernels::detail
