// Softmax cross-entropy in one read and one write of memory, for rows that no single
// multiprocessor holds (V = 129,280 in BF16 is 258 KB): a cluster of thread blocks keeps a row,
// each block a slice of it. Two blocks hold V3's row; clusters of two leave no multiprocessor idle.
//
// A cluster takes every n-th row. Within a block each warp works by itself: it takes every 16th
// chunk (1 KB) of the slice, and passes its chunks of one row after the other through a ring of
// stages in shared memory, which the copy engine loads and stores. In step s a warp
//   1. overwrites its chunk s - n - kLag by the gradient (n chunks are the warp's part of a row),
//      where a row's first chunk waits for the messages of all warps,
//   2. hands that chunk to the copy engine to be stored, and lets it load a chunk into the stage of
//      the one before, whose store has left shared memory,
//   3. waits for its chunk s and adds it to its maximum and sum of exponentials; behind the row's
//      last chunk it sends both to all warps of the cluster.
// So a row leaves at the pace at which the next one comes in, and no warp waits for another's
// latency: messages have kLag steps to arrive. They are stored into the blocks' shared memory
// asynchronously and counted there at a barrier. Sums are joined in a fixed order: the same bits on
// every run.
//
// Bytes: T·V read, T·V written. Two exponentials an element take 45 % of the time in which an H200
// moves it.

#include <algorithm>

#include "kernels/detail/cross_entropy.cuh"
#include "kernels/detail/cross_entropy_plan.h"
#include "kernels/detail/logits.cuh"

namespace dsv3::kernels::cuda {
namespace {

using detail::kWarp;
using detail::Softmax;
using Plan = kernels::detail::CrossEntropyPlan;
namespace ptx = detail::ptx;

constexpr int kWarps = Plan::kWarps;
constexpr int kThreads = kWarps * kWarp;
constexpr int kWords = Plan::kChunkBytes / 16 / kWarp;  // 16-byte words of a lane in a chunk
static_assert(kWords * 16 * kWarp == Plan::kChunkBytes);

__device__ __forceinline__ void wait_loaded(uint64_t* barrier, uint32_t parity) {
  while (!ptx::barrier_try_wait(barrier, parity)) {
  }
}
__device__ __forceinline__ void wait_received(uint64_t* barrier, uint32_t parity) {
  while (!ptx::barrier_try_wait_cluster(barrier, parity)) {
  }
}

/// Logits in 16 bytes.
template <typename T>
inline constexpr int kPerWord = detail::kPerWord<T, uint4>;

/// What a lane has seen of a row.
struct Scan {
  float largest = -INFINITY;
  float power = 0.0f;  // reference_power(largest)
  float sum = 0.0f;    // as Softmax's
  int best = 0;        // the first chunk with the largest, among the warp's
  int best_stage = 0;  // where it stands

  /// Adds chunk j of the row: its largest first, on packed pairs, then an exponential a logit.
  template <typename T>
  __device__ __forceinline__ void add(const uint4* chunk, int words, int j, int stage) {
    constexpr int kPer = kPerWord<T>;
    const int lane = threadIdx.x % kWarp;
    constexpr uint32_t kEmpty = sizeof(T) == 2 ? 0xff80ff80u : 0xff800000u;  // -inf
    uint4 w[kWords];
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      w[i] = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
      if (lane + i * kWarp < words) w[i] = chunk[lane + i * kWarp];
      top = fmaxf(top, detail::largest_of<T>(w[i]));
    }
    if (top > largest) {
      const float before = power;
      power = detail::reference_power(top);
      if (largest != -INFINITY) sum *= ptx::exp2_approx(before - power);
      largest = top;
      best = j;
      best_stage = stage;
    }
    float parts[2] = {};
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      float v[kPer];
      detail::unpack<T>(w[i], v);
#pragma unroll
      for (int e = 0; e < kPer; ++e) parts[e % 2] += detail::scaled_exp(v[e], power);
    }
    sum += parts[0] + parts[1];
  }

  /// Where in `chunk` the lane's first largest logit stands, in logits.
  template <typename T>
  __device__ int place(const uint4* chunk, int words) const {
    constexpr int kPer = kPerWord<T>;
    const int lane = threadIdx.x % kWarp;
    int place = 0;
#pragma unroll
    for (int i = kWords - 1; i >= 0; --i) {
      if (lane + i * kWarp >= words) continue;
      float v[kPer];
      detail::unpack<T>(chunk[lane + i * kWarp], v);
#pragma unroll
      for (int e = kPer - 1; e >= 0; --e) {
        place = v[e] == largest ? (lane + i * kWarp) * kPer + e : place;
      }
    }
    return place;
  }
};

/// A block's shared memory.
struct Shared {
  unsigned char* ring;  // [kWarps, stages, kChunkBytes]
  uint4* messages;      // [kSlots, blocks · kWarps], written by all blocks
  uint64_t* loaded;     // [kWarps, stages] barriers
  uint64_t* received;   // [kSlots] barriers

  __device__ Shared(unsigned char* base, const Plan& plan)
      : ring(base),
        messages(reinterpret_cast<uint4*>(base + plan.stages * kWarps * Plan::kChunkBytes)),
        loaded(reinterpret_cast<uint64_t*>(messages + Plan::kSlots * plan.blocks * kWarps)),
        received(loaded + plan.stages * kWarps) {}
};

/// A place in the sequence of a warp's chunks: chunk j of a row, the stage it passes through, and
/// the parity of that stage's barrier.
struct Cursor {
  int row = 0, j = 0, stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int chunks, int stages) {
    if (++j == chunks) {
      j = 0;
      ++row;
    }
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// The chunks of one warp.
template <typename T>
struct Chunks {
  T* first;             // the warp's first chunk of the cluster's first row
  int64_t row_stride;   // elements to the cluster's next row
  int num_rows, count;  // of the cluster; the warp's chunks of a row
  uint32_t last_bytes;  // of a row's last chunk; the others have kChunkBytes
  int stages;
  unsigned char* ring;  // the warp's
  uint64_t* loaded;     // the warp's

  __device__ __forceinline__ uint4* at(int stage) const {
    return reinterpret_cast<uint4*>(ring + stage * Plan::kChunkBytes);
  }
  __device__ __forceinline__ uint32_t bytes(int j) const {
    return j == count - 1 ? last_bytes : uint32_t{Plan::kChunkBytes};
  }
  __device__ __forceinline__ int words(int j) const { return static_cast<int>(bytes(j) / 16); }
  __device__ __forceinline__ T* global(const Cursor& c) const {
    return first + c.row * row_stride + c.j * (kWarps * Plan::kChunkBytes / int{sizeof(T)});
  }
  __device__ __forceinline__ void load(const Cursor& c) const {
    ptx::barrier_expect(loaded + c.stage, bytes(c.j));
    ptx::bulk_load(at(c.stage), global(c), bytes(c.j), loaded + c.stage);
  }
  __device__ __forceinline__ void store(const Cursor& c) const {
    ptx::bulk_store(global(c), at(c.stage), bytes(c.j));
    ptx::bulk_commit();
  }
};

/// A block's part of the work.
struct Block {
  CrossEntropy p;
  Shared shared;
  int blocks, rank;           // of the cluster
  int64_t clusters, cluster;  // row r of the cluster is token cluster + r · clusters
  int64_t begin, size;        // ids of the slice
  float scale;
};

/// Sends the warp's softmax of a row to all warps of the cluster. Two slots do: a warp that sends
/// row k's has received row k-1's, so that all warps have sent that, and each of them had received
/// row k-2's before. This needs n > kLag.
__device__ __forceinline__ void send(const Block& block, int row, const Softmax& s) {
  const Shared& shared = block.shared;
  const int blocks = block.blocks;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, slot = row % Plan::kSlots;
  if (warp == 0 && lane == 0) {
    ptx::barrier_expect(shared.received + slot,
                        static_cast<uint32_t>(blocks * kWarps * sizeof(uint4)));
  }
  if (lane < blocks) {
    const int from = block.rank * kWarps + warp;
    const uint32_t to = ptx::shared_address(shared.messages + slot * blocks * kWarps + from);
    const uint32_t barrier = ptx::shared_address(shared.received + slot);
    ptx::store_cluster(ptx::cluster_address(to, lane),
                       make_uint4(__float_as_uint(s.largest), __float_as_uint(s.sum), s.argmax, 0),
                       ptx::cluster_address(barrier, lane));
  }
  __syncwarp();
}

/// The row as all warps of the cluster know it, when they have sent it.
__device__ Softmax receive(const Block& block, int row) {
  const int slot = row % Plan::kSlots, count = block.blocks * kWarps;
  wait_received(block.shared.received + slot, row / Plan::kSlots % 2);
  Softmax s = detail::empty_softmax();
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp) {
    const uint4 m = block.shared.messages[slot * count + i];
    s.merge({__uint_as_float(m.x), __uint_as_float(m.y), m.z});
  }
  __syncwarp();
  return detail::join_lanes(s);
}

/// What a warp knows of the row whose gradient it writes.
struct Target {
  Softmax softmax;
  float factor, power;  // gradient = factor · 2^(logit · log2 e - power)
  int64_t token;
  int label, next_label;  // next_label: of the cluster's next row, loaded ahead
  bool valid;             // the label is an id
  int label_chunk;        // the warp's chunk with the label, or -1
  int label_place;        // the label within that chunk
};

/// The warp's softmax of a row whose chunks it has all seen; `begin` is the slice's first id.
template <typename T>
__device__ Softmax close_scan(const Chunks<T>& chunks, const Scan& scan, int64_t begin) {
  constexpr int kPerChunk = Plan::kChunkBytes / int{sizeof(T)};
  Softmax s{scan.largest, scan.sum, ~0u};
  const float top = detail::warp_largest(scan.largest + 0.0f);
  if (scan.largest == top && top != -INFINITY) {
    const int place = scan.place<T>(chunks.at(scan.best_stage), chunks.words(scan.best));
    const int chunk = scan.best * kWarps + static_cast<int>(threadIdx.x / kWarp);
    s.argmax = static_cast<unsigned>(begin + int64_t{chunk} * kPerChunk + place);
  }
  __syncwarp();
  return detail::join_lanes(s);
}

/// Begins the gradient of the cluster's row `row`, whose label is `label`.
template <typename T>
__device__ __forceinline__ Target begin_row(const Block& block, int row, int label) {
  constexpr int kPerChunk = Plan::kChunkBytes / int{sizeof(T)};
  const CrossEntropy& p = block.p;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Target t;
  t.token = block.cluster + row * block.clusters;
  t.label = label;
  const int64_t next = t.token + block.clusters;
  t.next_label = next < p.num_tokens ? p.labels[next] : kIgnoredLabel;
  t.valid = label >= 0 && label < p.vocab;
  t.softmax = receive(block, row);
  t.factor = block.scale / t.softmax.sum;
  t.power = detail::reference_power(t.softmax.largest);
  const int64_t local = label - block.begin;
  const int chunk = static_cast<int>(local / kPerChunk);
  const bool ours = t.valid && local >= 0 && local < block.size && chunk % kWarps == warp;
  t.label_chunk = ours ? chunk / kWarps : -1;
  t.label_place = ours ? static_cast<int>(local % kPerChunk) : 0;
  if (!t.valid && block.rank == 0 && warp == 0 && lane == 0) {
    p.losses[t.token] = label == kIgnoredLabel ? 0.0f : NAN;
    p.correct[t.token] = 0;
  }
  return t;
}

/// Overwrites a chunk by its gradient. The lane that has the label writes the loss.
template <typename T>
__device__ __forceinline__ void write_gradient(const Block& block, const Target& t, uint4* chunk,
                                               int words, int j) {
  constexpr int kPer = kPerWord<T>;
  const int lane = threadIdx.x % kWarp;
  const bool has_label = j == t.label_chunk && t.label_place / kPer % kWarp == lane;
  T* const at = reinterpret_cast<T*>(chunk) + t.label_place;
  const float logit = has_label ? detail::to_float(*at) : 0.0f;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (lane + i * kWarp >= words) continue;
    float v[kPer];
    detail::unpack<T>(chunk[lane + i * kWarp], v);
#pragma unroll
    for (int e = 0; e < kPer; ++e) v[e] = t.factor * detail::scaled_exp(v[e], t.power);
    uint4 word;
    detail::pack<T>(v, word);
    chunk[lane + i * kWarp] = t.valid ? word : make_uint4(0, 0, 0, 0);
  }
  if (has_label) {
    *at = detail::from_float<T>(t.factor * detail::scaled_exp(logit, t.power) - block.scale);
    block.p.losses[t.token] = t.softmax.loss(logit);
    block.p.correct[t.token] = t.softmax.argmax == static_cast<unsigned>(t.label);
  }
}

template <typename T>
__device__ Chunks<T> chunks_of(const Block& block, int stages) {
  constexpr int kPerChunk = Plan::kChunkBytes / int{sizeof(T)};
  const int warp = threadIdx.x / kWarp;
  const int all = static_cast<int>((block.size + kPerChunk - 1) / kPerChunk);
  const int count = (all - warp + kWarps - 1) / kWarps;
  const bool has_end = (count - 1) * kWarps + warp == all - 1;
  const int64_t last = has_end ? block.size - int64_t{all - 1} * kPerChunk : kPerChunk;
  const int64_t rows = block.p.num_tokens - block.cluster;
  return {.first = static_cast<T*>(block.p.logits) + block.cluster * block.p.vocab + block.begin +
                   warp * kPerChunk,
          .row_stride = block.clusters * block.p.vocab,
          .num_rows = static_cast<int>((rows + block.clusters - 1) / block.clusters),
          .count = count,
          .last_bytes = static_cast<uint32_t>(last * int64_t{sizeof(T)}),
          .stages = stages,
          .ring = block.shared.ring + warp * stages * Plan::kChunkBytes,
          .loaded = block.shared.loaded + warp * stages};
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) cluster_kernel(CrossEntropy p, Plan plan) {
  extern __shared__ __align__(128) unsigned char base[];
  const int rank = static_cast<int>(ptx::cluster_rank()), lane = threadIdx.x % kWarp;
  const Block block{.p = p,
                    .shared = Shared(base, plan),
                    .blocks = plan.blocks,
                    .rank = rank,
                    .clusters = gridDim.x / plan.blocks,
                    .cluster = blockIdx.x / plan.blocks,
                    .begin = rank * plan.slice,
                    .size = min(plan.slice, p.vocab - rank * plan.slice),
                    .scale = *p.scale};
  const Chunks<T> chunks = chunks_of<T>(block, plan.stages);
  const int count = chunks.count;
  if (lane == 0) {
    for (int i = 0; i < plan.stages; ++i) ptx::barrier_init(chunks.loaded + i, 1);
    if (threadIdx.x == 0) {
      for (int i = 0; i < Plan::kSlots; ++i) ptx::barrier_init(block.shared.received + i, 1);
    }
    ptx::fence_barrier_init();
    ptx::fence_async_shared();
  }
  __syncthreads();
  // Before this no block may write into another, which might not run yet.
  ptx::cluster_arrive();
  ptx::cluster_wait();
  Cursor scanned, written, loaded;
  if (lane == 0) {
    for (int i = 0; i < plan.stages && loaded.row < chunks.num_rows; ++i) {
      chunks.load(loaded);
      loaded.advance(count, plan.stages);
    }
  }
  Scan scan;
  Target target{};
  target.next_label = p.labels[block.cluster];
  for (int step = -count - Plan::kLag; written.row < chunks.num_rows; ++step) {
    if (step >= 0) {
      if (written.j == 0) target = begin_row<T>(block, written.row, target.next_label);
      write_gradient<T>(block, target, chunks.at(written.stage), chunks.words(written.j),
                        written.j);
      ptx::fence_async_shared();
      __syncwarp();
      if (lane == 0) {
        chunks.store(written);
        if (step > 0 && loaded.row < chunks.num_rows) {
          ptx::bulk_wait_read<1>();
          chunks.load(loaded);
          loaded.advance(count, plan.stages);
        }
      }
      written.advance(count, plan.stages);
    }
    if (scanned.row == chunks.num_rows) continue;
    wait_loaded(chunks.loaded + scanned.stage, scanned.parity);
    scan.add<T>(chunks.at(scanned.stage), chunks.words(scanned.j), scanned.j, scanned.stage);
    if (scanned.j == count - 1) {
      send(block, scanned.row, close_scan(chunks, scan, block.begin));
      scan = Scan();
    }
    scanned.advance(count, plan.stages);
  }
  if (lane == 0) ptx::bulk_wait_all();
}

bool is_sm90() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major == 9;
}

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  kernels::detail::raise_cuda("cross_entropy", "launch failed", cudaGetErrorString(error));
}

template <typename T>
bool launch(const CrossEntropy& p, const Plan& plan, cudaStream_t stream) {
  auto* const kernel = cluster_kernel<T>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(Plan::kMostSharedBytes)));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(Plan::shared_bytes(plan.blocks, plan.stages));
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
  if (plan.blocks == 0 || !detail::aligned16(p.logits) || !is_sm90()) return false;
  return bf16 ? launch<__nv_bfloat16>(p, plan, stream) : launch<float>(p, plan, stream);
}

}  // namespace dsv3::kernels::cuda
