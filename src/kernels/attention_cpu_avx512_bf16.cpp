// The host's attention in BF16 dot products, for machines with AVX512-BF16 (flags in
// CMakeLists.txt).
#include "kernels/detail/attention_backward_body.h"
#include "kernels/detail/attention_bodies.h"

namespace dsv3::kernels::detail {

const AttentionBody kAttentionAvx512Bf16 = {"avx512_bf16", DType::kBF16, forward<Mode::kPairs>,
                                            backward<Mode::kPairs>, scratch<Mode::kPairs>};

}  // namespace dsv3::kernels::detail
