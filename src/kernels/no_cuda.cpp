// Builds without CUDA: every device body throws. One line per operation, by family.
#include "base/error.h"
#include "kernels/kernels.h"

#define DSV3_NO_CUDA(name, Params)                                                               \
  void name(const Params&, Stream) {                                                             \
    throw CudaError("[" #name                                                                    \
                    "] this program was built without CUDA; use device cpu or build with nvcc"); \
  }

namespace dsv3::kernels::cuda {

// elementwise
DSV3_NO_CUDA(rms_norm_forward, RmsNormForward)
DSV3_NO_CUDA(rms_norm_backward, RmsNormBackward)
DSV3_NO_CUDA(swiglu_forward, SwigluForward)
DSV3_NO_CUDA(swiglu_backward, SwigluBackward)
DSV3_NO_CUDA(rope_query, RopeQuery)
DSV3_NO_CUDA(rope_key_forward, RopeKeyForward)
DSV3_NO_CUDA(rope_key_backward, RopeKeyBackward)
DSV3_NO_CUDA(embedding_forward, EmbeddingForward)
DSV3_NO_CUDA(embedding_backward, EmbeddingBackward)
int64_t embedding_backward_scratch(int64_t, int64_t, int64_t) {
  throw CudaError("[embedding_backward] this program was built without CUDA");
}

// optimizer
DSV3_NO_CUDA(normal_fill, NormalFill)
DSV3_NO_CUDA(adamw, AdamW)
DSV3_NO_CUDA(adamw_fp8, AdamWFp8)
DSV3_NO_CUDA(sum_of_squares, SumOfSquares)
DSV3_NO_CUDA(finish_norm, FinishNorm)
DSV3_NO_CUDA(decide_step, DecideStep)
DSV3_NO_CUDA(locate_non_finite, LocateNonFinite)

// loss
DSV3_NO_CUDA(cross_entropy, CrossEntropy)
DSV3_NO_CUDA(cross_entropy_statistics, CrossEntropyStatistics)
DSV3_NO_CUDA(cross_entropy_finish, CrossEntropyFinish)

// quantize
DSV3_NO_CUDA(quantize_tiles, QuantizeTiles)
DSV3_NO_CUDA(quantize_blocks, QuantizeBlocks)
DSV3_NO_CUDA(dequantize, Dequantize)
DSV3_NO_CUDA(latent_cache_write, LatentCacheWrite)

// routing
DSV3_NO_CUDA(route_forward, RouteForward)
DSV3_NO_CUDA(route_backward, RouteBackward)
DSV3_NO_CUDA(split_bf16, SplitBf16)
DSV3_NO_CUDA(make_permutation, MakePermutation)
DSV3_NO_CUDA(permute_forward, PermuteForward)
DSV3_NO_CUDA(combine_forward, CombineForward)
DSV3_NO_CUDA(combine_backward, CombineBackward)
DSV3_NO_CUDA(add_load, AddLoad)
DSV3_NO_CUDA(load_statistics, LoadStatistics)

// products
DSV3_NO_CUDA(grouped_product, GroupedProduct)
DSV3_NO_CUDA(grouped_weight_grad, GroupedWeightGrad)

}  // namespace dsv3::kernels::cuda
