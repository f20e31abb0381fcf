#include <algorithm>

#include "base/error.h"
#include "kernels/attention.h"
#include "kernels/detail/attention_bodies.h"

namespace dsv3::kernels {
namespace {

std::vector<AttentionBody> find_bodies() {
  std::vector<AttentionBody> bodies;
#if defined(__x86_64__)
  // These also ask whether the system saves the wide registers.
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const auto add = [&](const AttentionBody(&pair)[2]) {
    bodies.insert(bodies.end(), std::begin(pair), std::end(pair));
  };
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    bodies.push_back(detail::kAttentionAvx512Bf16);
  }
  if (avx512) add(detail::kAttentionAvx512);
  if (avx2) add(detail::kAttentionAvx2);
#endif
  bodies.insert(bodies.end(), std::begin(detail::kAttentionBaseline),
                std::end(detail::kAttentionBaseline));
  return bodies;
}

const AttentionBody& body_for(DType dtype) {
  const auto& bodies = attention_bodies();
  const auto body = std::find_if(bodies.begin(), bodies.end(),
                                 [&](const AttentionBody& b) { return b.dtype == dtype; });
  require(body != bodies.end(), "[attention] dtype: expected fp32 or bf16, got {}", name_of(dtype));
  return *body;
}

}  // namespace

const std::vector<AttentionBody>& attention_bodies() {
  static const std::vector<AttentionBody> bodies = find_bodies();
  return bodies;
}

int64_t attention_scratch(const AttentionProblem& problem) {
  return body_for(problem.dtype).scratch(problem);
}

namespace cpu {

void attention_forward(const AttentionForward& p) {
  body_for(p.problem.dtype).forward(p);
}

void attention_backward(const AttentionBackward& p) {
  body_for(p.problem.dtype).backward(p);
}

}  // namespace cpu
}  // namespace dsv3::kernels
