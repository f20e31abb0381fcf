// Softmax cross-entropy in one read and one write of memory, for rows that no single
// multiprocessor holds (V = 129,280 in BF16 is 258 KB): a cluster of up to 8 thread blocks keeps a
// row, each block a slice of it.
//
// A cluster takes every n-th row. A block has several stages, slices of consecutive rows, in
// shared memory: the copy engine loads the rows ahead and stores the rows behind while the threads
// work. Half of the threads look for each slice's largest logit and sum of exponentials and send
// them to all blocks of the cluster; the other half wait for all blocks' numbers of a row,
// overwrite its slice in shared memory by the gradient, hand it to the copy engine to be stored and
// let it load a row ahead into the stage whose store has left shared memory. The halves work on
// different rows at the same time, so that what one waits for (barriers, reductions, other blocks)
// is hidden behind the other's arithmetic; all that joins them is the messages and the stages.
//
// Messages are stored into the other blocks' shared memory asynchronously and counted there at a
// barrier; a barrier of the whole cluster for each row would flush the memory pipeline. Sums are
// joined in a fixed order: the same bits on every run.
//
// Bytes: T·V read, T·V written. Two exponentials an element take 59 % of the time in which an H200
// moves it.

#include <algorithm>

#include "kernels/detail/cross_entropy.cuh"
#include "kernels/detail/cross_entropy_plan.h"
#include "kernels/detail/logits.cuh"

namespace dsv3::kernels::cuda {
namespace {

using detail::kWarp;
using detail::Softmax;
using kernels::detail::CrossEntropyPlan;
namespace ptx = detail::ptx;

constexpr int kScanThreads = 256, kGradientThreads = 256;
constexpr int kThreads = kScanThreads + kGradientThreads, kScanWarps = kScanThreads / kWarp;
constexpr int kScanBarrier = 1, kGradientBarrier = 2;
constexpr int kMostStages = 8, kMostBlocks = 8;
constexpr int kMostWords = 44 * 1024 / 16;  // of a slice
/// Rows whose messages are on their way or being read. A block sends row k's when its own gradient
/// of row k - stages is complete, which needed every other block's numbers of that row, and these
/// were sent when that block's gradient of row k - 2 · stages was complete.
constexpr int kSlots = 2 * kMostStages;

__device__ __forceinline__ void wait_loaded(uint64_t* barrier, uint32_t parity) {
  while (!ptx::barrier_try_wait(barrier, parity)) {
  }
}
__device__ __forceinline__ void wait_received(uint64_t* barrier, uint32_t parity) {
  while (!ptx::barrier_try_wait_cluster(barrier, parity)) {
  }
}

/// What a block tells the others of a row: largest, sum, argmax, the label's logit (-inf where the
/// block does not hold it).
__device__ __forceinline__ uint4 message(const Softmax& s, float label_logit) {
  return make_uint4(__float_as_uint(s.largest), __float_as_uint(s.sum), s.argmax,
                    __float_as_uint(label_logit));
}

/// A row as all blocks of the cluster know it.
struct Row {
  Softmax softmax;
  float label_logit;
};
__device__ __forceinline__ Row join_blocks(const uint4* messages, int blocks) {
  const int lane = threadIdx.x % kWarp;
  Softmax s = detail::empty_softmax();
  float label_logit = -INFINITY;
  if (lane < blocks) {
    const uint4 m = messages[lane];
    s.largest = __uint_as_float(m.x);
    s.sum = __uint_as_float(m.y);
    s.argmax = m.z;
    label_logit = __uint_as_float(m.w) + 0.0f;
  }
  __syncwarp();
  return {detail::join_lanes(s), detail::warp_largest(label_logit)};
}

/// Overwrites the slice by its gradient; `label` within the slice, or outside it. By `thread` of
/// kGradientThreads.
template <typename T>
__device__ __forceinline__ void write_gradient(uint4* slice, int words, int thread, int64_t label,
                                               const Row& row, float scale) {
  constexpr int kPer = detail::kPerWord<T, uint4>;
  const float factor = scale / row.softmax.sum;
  const float power = detail::reference_power(row.softmax.largest);
#pragma unroll 2
  for (int i = thread; i < words; i += kGradientThreads) {
    float v[kPer];
    detail::unpack<T>(slice[i], v);
#pragma unroll
    for (int e = 0; e < kPer; ++e) v[e] = factor * detail::scaled_exp(v[e], power);
    detail::pack<T>(v, slice[i]);
  }
  if (label >= 0 && label < int64_t{words} * kPer && label / kPer % kGradientThreads == thread) {
    const float p = factor * detail::scaled_exp(row.label_logit, power);
    reinterpret_cast<T*>(slice)[label] = detail::from_float<T>(p - scale);
  }
}

__device__ void write_zeros(uint4* slice, int words, int thread) {
#pragma unroll 1
  for (int i = thread; i < words; i += kGradientThreads) slice[i] = make_uint4(0, 0, 0, 0);
}

/// A block's slice of its cluster's rows, and the stages they pass through.
template <typename T>
struct Slices {
  T* first;            // of the cluster's first row
  int64_t row_stride;  // elements to the cluster's next row
  int num_rows;
  uint32_t bytes;
  unsigned char* buffers;
  int64_t stage_bytes;
  uint64_t* loaded;  // [stages] barriers

  __device__ uint4* at(int stage) const {
    return reinterpret_cast<uint4*>(buffers + stage * stage_bytes);
  }
  __device__ void load(int row, int stage) const {
    if (row >= num_rows) return;
    ptx::barrier_expect(loaded + stage, bytes);
    ptx::bulk_load(at(stage), first + row * row_stride, bytes, loaded + stage);
  }
  __device__ void store(int row, int stage) const {
    ptx::bulk_store(first + row * row_stride, at(stage), bytes);
    ptx::bulk_commit();
  }
};

/// The stage of a row, and the parity of its barrier's phase.
struct Stage {
  int index = 0;
  uint32_t parity = 0;

  __device__ void advance(int stages) {
    if (++index < stages) return;
    index = 0;
    parity ^= 1;
  }
};

struct alignas(16) Shared {
  uint4 messages[kSlots][kMostBlocks];  // written by all blocks
  uint64_t loaded[kMostStages], received[kSlots];
  Softmax parts[2][kScanWarps];
};

static_assert(sizeof(Shared) + CrossEntropyPlan::kSharedBytes <= 227 * 1024);

/// Where a block stands.
struct Place {
  int rank;                   // in its cluster
  int64_t clusters, cluster;  // of the grid
  int64_t begin, count;       // the slice's first id and its elements
  int words;                  // of 16 bytes
};

/// Sends this block's softmax of row k to all blocks of the cluster; one warp. `label_logit` is
/// -inf where another block holds it.
__device__ void send(Shared& shared, int k, int rank, int blocks, const Softmax& s,
                     float label_logit) {
  const int lane = threadIdx.x % kWarp, slot = k % kSlots;
  if (lane == 0) {
    ptx::barrier_expect(shared.received + slot, blocks * static_cast<int>(sizeof(uint4)));
  }
  if (lane < blocks) {
    const uint32_t to = ptx::shared_address(&shared.messages[slot][rank]);
    const uint32_t barrier = ptx::shared_address(shared.received + slot);
    ptx::store_cluster(ptx::cluster_address(to, lane), message(s, label_logit),
                       ptx::cluster_address(barrier, lane));
  }
  __syncwarp();
}

/// The first half of the threads: what each row's slice adds to its softmax.
template <typename T>
__device__ void scan_rows(const CrossEntropy& p, const CrossEntropyPlan& plan, const Place& place,
                          const Slices<T>& slices, Shared& shared) {
  constexpr int kWords = (kMostWords + kScanThreads - 1) / kScanThreads;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Stage stage;
  int label_next = p.labels[place.cluster];
  for (int k = 0; k < slices.num_rows; ++k, stage.advance(plan.stages)) {
    const int label = label_next;
    if (k + 1 < slices.num_rows) label_next = p.labels[place.cluster + (k + 1) * place.clusters];
    wait_loaded(shared.loaded + stage.index, stage.parity);
    detail::LogitChunk<T, uint4, kScanThreads, kWords> chunk;
    chunk.load(slices.at(stage.index), place.words);
    const Softmax part = chunk.scan(static_cast<unsigned>(place.begin));
    if (lane == 0) shared.parts[k % 2][warp] = part;
    ptx::group_barrier(kScanBarrier, kScanThreads);
    if (warp != 0) continue;
    const Softmax s =
        detail::join_lanes(lane < kScanWarps ? shared.parts[k % 2][lane] : detail::empty_softmax());
    const int64_t local = label - place.begin;
    const bool ours = label >= 0 && local >= 0 && local < place.count;
    const auto* slice = reinterpret_cast<const T*>(slices.at(stage.index));
    const float label_logit = ours ? detail::to_float(slice[local]) : -INFINITY;
    __syncwarp();  // all lanes have read the slice before it may be overwritten
    send(shared, k, place.rank, plan.blocks, s, label_logit);
  }
}

/// The second half: each row's gradient, and the copies.
template <typename T>
__device__ void write_rows(const CrossEntropy& p, const CrossEntropyPlan& plan, const Place& place,
                           const Slices<T>& slices, Shared& shared) {
  const int thread = threadIdx.x - kScanThreads;
  const bool copies = thread == kGradientThreads - kWarp;  // it feeds the copy engine
  if (copies) {
    for (int row = 0; row < plan.stages; ++row) slices.load(row, row);
  }
  const float scale = *p.scale;
  Stage stage;
  int label_next = p.labels[place.cluster], stage_before = 0;
  for (int k = 0; k < slices.num_rows; ++k, stage.advance(plan.stages)) {
    const int label = label_next;
    if (k + 1 < slices.num_rows) label_next = p.labels[place.cluster + (k + 1) * place.clusters];
    wait_loaded(shared.loaded + stage.index, stage.parity);
    wait_received(shared.received + k % kSlots, k / kSlots % 2);
    const Row row = join_blocks(shared.messages[k % kSlots], plan.blocks);
    const bool valid = label >= 0 && label < p.vocab;
    if (valid) {
      write_gradient<T>(slices.at(stage.index), place.words, thread, label - place.begin, row,
                        scale);
    } else {
      write_zeros(slices.at(stage.index), place.words, thread);
    }
    ptx::fence_async_shared();
    ptx::group_barrier(kGradientBarrier, kGradientThreads);
    if (copies) {
      slices.store(k, stage.index);
      if (k > 0) {
        ptx::bulk_wait_read<1>();
        slices.load(k - 1 + plan.stages, stage_before);
      }
    }
    stage_before = stage.index;
    if (place.rank == 0 && thread == 0) {
      const int64_t token = place.cluster + k * place.clusters;
      const float otherwise = label == kIgnoredLabel ? 0.0f : NAN;
      p.losses[token] = valid ? row.softmax.loss(row.label_logit) : otherwise;
      p.correct[token] = valid && row.softmax.argmax == static_cast<unsigned>(label);
    }
  }
  if (copies) ptx::bulk_wait_all();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    cluster_kernel(CrossEntropy p, CrossEntropyPlan plan) {
  extern __shared__ __align__(128) unsigned char buffers[];
  __shared__ Shared shared;
  Place place;
  place.rank = static_cast<int>(ptx::cluster_rank());
  place.clusters = gridDim.x / plan.blocks;
  place.cluster = blockIdx.x / plan.blocks;
  place.begin = place.rank * plan.slice;
  place.count = min(plan.slice, p.vocab - place.begin);
  place.words = static_cast<int>(place.count / detail::kPerWord<T, uint4>);
  const int64_t rows_left = p.num_tokens - place.cluster;
  const Slices<T> slices{
      .first = static_cast<T*>(p.logits) + place.cluster * p.vocab + place.begin,
      .row_stride = place.clusters * p.vocab,
      .num_rows = static_cast<int>((rows_left + place.clusters - 1) / place.clusters),
      .bytes = static_cast<uint32_t>(place.count * sizeof(T)),
      .buffers = buffers,
      .stage_bytes = plan.stage_bytes,
      .loaded = shared.loaded};
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.stages; ++i) ptx::barrier_init(shared.loaded + i, 1);
    for (int i = 0; i < kSlots; ++i) ptx::barrier_init(shared.received + i, 1);
    ptx::fence_barrier_init();
    ptx::fence_async_shared();
  }
  __syncthreads();
  // Before this no block may write into another, which might not run yet.
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x < kScanThreads) {
    scan_rows(p, plan, place, slices, shared);
  } else {
    write_rows(p, plan, place, slices, shared);
  }
}

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  kernels::detail::raise_cuda("cross_entropy", "launch failed", cudaGetErrorString(error));
}

template <typename T>
bool launch(const CrossEntropy& p, const CrossEntropyPlan& plan, cudaStream_t stream) {
  auto* const kernel = cluster_kernel<T>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(CrossEntropyPlan::kSharedBytes)));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(CrossEntropyPlan::kSharedBytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  if (clusters == 0) return false;
  const auto used = static_cast<unsigned>(std::min<int64_t>(clusters, p.num_tokens));
  config.gridDim = dim3(used * static_cast<unsigned>(plan.blocks));
  check_cuda(cudaLaunchKernelEx(&config, kernel, p, plan));
  return true;
}

}  // namespace

bool detail::cross_entropy_sm90(const CrossEntropy& p, cudaStream_t stream) {
  const bool bf16 = p.dtype == DType::kBF16;
  if (!bf16 && p.dtype != DType::kF32) return false;
  const auto plan = kernels::detail::cross_entropy_plan(p.vocab, size_of(p.dtype));
  if (plan.blocks == 0 || !detail::aligned16(p.logits) || !detail::has_sm90()) return false;
  return bf16 ? launch<__nv_bfloat16>(p, plan, stream) : launch<float>(p, plan, stream);
}

}  // namespace dsv3::kernels::cuda
