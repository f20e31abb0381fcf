#pragma once

#include "kernels/attention.h"

namespace dsv3::kernels::detail {

// Each is compiled in its own source with its own flags (kernels/CMakeLists.txt).
extern const AttentionBody kAttentionBaseline[2];  // FP32, BF16; any machine
extern const AttentionBody kAttentionAvx2[2];      // AVX2 and FMA
extern const AttentionBody kAttentionAvx512[2];    // AVX-512 F, BW, CD, DQ, VL
extern const AttentionBody kAttentionAvx512Bf16;   // those and AVX512-BF16; BF16 only

}  // namespace dsv3::kernels::detail
