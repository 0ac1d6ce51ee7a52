// The backward passes of fake quantization on CUDA. Their sums are added in the order of the CPU
// (docs/numerics.md: 16 float32 lanes over a block of 1024, then float64 over lanes, blocks and chunks), so
// they have its bits.
#include "core/fake_quantize.h"
#include "cuda/elementwise.cuh"
#include "cuda/fake_quantizer.cuh"
#include "cuda/launch.cuh"
#include "cuda/nvtx.h"

namespace adpdm::cuda {
namespace {

constexpr int kLanes = 16;            // threads over a block
constexpr int kBlockElements = 1024;  // 64 terms a lane
constexpr int kChunkBlocks = 16;
constexpr int64_t kChunk = int64_t{kChunkBlocks} * kBlockElements;
constexpr int kThreads = kLanes * kChunkBlocks;  // a chunk for a thread block
constexpr int kBatch = 8;                        // loads of a thread under way at once

// Groups of a mixture that share a reading of x: 3 sums each stay in registers.
constexpr int kMixtureGroups = 8;

// Lane sums in shared memory: [sum][lane][block], with a gap so that both ways of walking it hit 32 banks.
constexpr int kLaneStride = kChunkBlocks + 1;
constexpr int kSumStride = kLanes * kLaneStride;

int64_t num_chunks(int64_t size) { return (size + kChunk - 1) / kChunk; }

struct ChunkSumsArgs {
  const void* x;     // [size] of type
  const void* grad;  // [size] of type
  void* grad_x;      // [size] of type; written where there is one group
  int64_t size;
  const float* scale;          // [num_groups]
  const float* zero_point;     // [num_groups]
  const int32_t* group_index;  // [1] current group, or nullptr: all groups
  int64_t num_groups;
  CodeRange range;
  double* partial;  // [groups][chunks][sums]
};

// Sums of the groups that one thread adds up: of grad * d/dscale, grad where x is clamped, grad * (q -
// zero_point). The last only matters for the importance in a mixture.
template <int kGroups>
constexpr int kSums = kGroups == 1 ? 2 : 3;

template <int kSumCount>
ADPDM_DEVICE void add_terms(float x, float grad, const FakeQuantizer& q, float (&sums)[kSumCount],
                            bool* inside) {
  const auto terms = fake_quantize_terms(x, q.inv_scale, q.low, q.high);
  sums[0] = sums[0] + grad * terms.scale_grad;
  sums[1] = terms.inside ? sums[1] : sums[1] + grad;
  if constexpr (kSumCount == 3) sums[2] = sums[2] + grad * terms.steps;
  *inside = terms.inside;
}

// Lane sums of `num_groups` groups over elements first, first + 16, .. of one block.
template <FloatType kType, int kGroups>
ADPDM_DEVICE void sum_lane(const ChunkSumsArgs& args, int64_t first, const FakeQuantizer* quantizers,
                           int num_groups, float (&sums)[kGroups][kSums<kGroups>]) {
  for (int begin = 0; begin < kBlockElements; begin += kBatch * kLanes) {
    float x[kBatch], grad[kBatch];
    ADPDM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int64_t index = first + begin + i * kLanes;
      x[i] = index < args.size ? load_float(args.x, index, kType) : 0.0f;
      grad[i] = index < args.size ? load_float(args.grad, index, kType) : 0.0f;
    }
    ADPDM_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      if (g >= num_groups) break;
      const FakeQuantizer q = load_shared_quantizer(quantizers + g);
      ADPDM_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        bool inside;
        add_terms(x[i], grad[i], q, sums[g], &inside);
        const int64_t index = first + begin + i * kLanes;
        if (kGroups == 1 && index < args.size) {
          store_float(args.grad_x, index, kType, grad[i] * (inside ? 1.0f : 0.0f));
        }
      }
    }
  }
}

// Adds the 16 lanes of every block, then the blocks, in order, and calls write(s, sum) for each sum s of the
// chunk.
template <int kSumCount, typename Write>
ADPDM_DEVICE void fold_chunk(const float* lanes, double* blocks, Write&& write) {
  for (int i = thread_index(); i < kSumCount * kChunkBlocks; i += kThreads) {
    const float* first = lanes + i / kChunkBlocks * kSumStride + i % kChunkBlocks;
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += static_cast<double>(shared_load(first + l * kLaneStride));
    shared_store(blocks + i, sum);
  }
  block_barrier();
  if (thread_index() >= kSumCount) return;
  double sum = 0;
  for (int b = 0; b < kChunkBlocks; ++b) sum += shared_load(blocks + thread_index() * kChunkBlocks + b);
  write(thread_index(), sum);
}

template <int kGroups>
constexpr int64_t kChunkSharedBytes = kGroups*(static_cast<int64_t>(sizeof(FakeQuantizer)) +
                                               kSums<kGroups> * (kChunkBlocks * 8 + kSumStride * 4));

// One block sums one chunk for kGroups groups; blocks that share a chunk are neighbours, for the cache.
template <FloatType kType, int kGroups>
ADPDM_KERNEL(kThreads, 2)
chunk_sums_kernel(ChunkSumsArgs args) {
  constexpr int kCount = kSums<kGroups>;
  const int64_t groups = args.group_index != nullptr ? 1 : args.num_groups;
  const int64_t batches = (groups + kGroups - 1) / kGroups, chunks = (args.size + kChunk - 1) / kChunk;
  const int64_t chunk = block_x() / batches, first_group = block_x() % batches * kGroups;
  const int num_groups = static_cast<int>(groups - first_group < kGroups ? groups - first_group : kGroups);
  auto* quantizers = reinterpret_cast<FakeQuantizer*>(shared_memory());
  auto* blocks = reinterpret_cast<double*>(quantizers + kGroups);
  auto* lanes = reinterpret_cast<float*>(blocks + kGroups * kCount * kChunkBlocks);
  if (thread_index() < num_groups) {
    const int64_t group = args.group_index != nullptr ? clamped_index(args.group_index, args.num_groups)
                                                      : first_group + thread_index();
    store_shared_quantizer(quantizers + thread_index(),
                           load_fake_quantizer(args.scale, args.zero_point, nullptr, group, args.range));
  }
  block_barrier();
  const int lane = thread_index() % kLanes, block = thread_index() / kLanes;
  float sums[kGroups][kCount] = {};
  sum_lane<kType, kGroups>(args, chunk * kChunk + block * kBlockElements + lane, quantizers, num_groups,
                           sums);
  ADPDM_UNROLL
  for (int s = 0; s < kGroups * kCount; ++s) {
    shared_store(lanes + s * kSumStride + lane * kLaneStride + block, sums[s / kCount][s % kCount]);
  }
  block_barrier();
  fold_chunk<kGroups * kCount>(lanes, blocks, [&](int s, double sum) {
    const int64_t group = first_group + s / kCount;
    if (group < groups) store(args.partial + (group * chunks + chunk) * kCount + s % kCount, sum);
  });
}

// ---- the last sums, and what becomes of them ----

constexpr int kFoldThreads = 128;
constexpr int kFoldTile = 256;  // chunks read ahead

// sums [kSumCount] = partial [chunks][kSumCount] added up in order, in every thread.
template <int kSumCount>
ADPDM_DEVICE void fold_chunks(const double* partial, int64_t chunks, double (&sums)[kSumCount]) {
  auto* tile = reinterpret_cast<double*>(shared_memory());  // [kFoldTile][kSumCount]
  double sum = 0;
  for (int64_t begin = 0; begin < chunks; begin += kFoldTile) {
    const int count = static_cast<int>(chunks - begin < kFoldTile ? chunks - begin : kFoldTile);
    for (int i = thread_index(); i < count * kSumCount; i += kFoldThreads) {
      shared_store(tile + i, load(partial + begin * kSumCount + i));
    }
    block_barrier();
    if (thread_index() < kSumCount) {
      for (int c = 0; c < count; ++c) sum += shared_load(tile + c * kSumCount + thread_index());
    }
    block_barrier();
  }
  if (thread_index() < kSumCount) shared_store(tile + thread_index(), sum);
  block_barrier();
  for (int s = 0; s < kSumCount; ++s) sums[s] = shared_load(tile + s);
}

template <int kSumCount>
constexpr int64_t kFoldSharedBytes = int64_t{kFoldTile} * kSumCount * 8;

// Rows of the groups other than the current one are 0.
ADPDM_KERNEL(kFoldThreads, 1)
fake_quantize_grads_kernel(FakeQuantizeArgs args, const double* partial, int64_t chunks, float* grad_scale,
                           float* grad_zero_point) {
  double sums[2];
  fold_chunks(partial, chunks, sums);
  const int64_t current = clamped_index(args.group_index, args.num_groups);
  for (int64_t g = thread_index(); g < args.num_groups; g += kFoldThreads) {
    const double scale = load(args.scale + g);
    store(grad_scale + g, g == current ? static_cast<float>(sums[0]) : 0.0f);
    store(grad_zero_point + g, g == current ? static_cast<float>(-scale * sums[1]) : 0.0f);
  }
}

// A block for a group.
ADPDM_KERNEL(kFoldThreads, 1)
mixture_grads_kernel(MixtureArgs args, const double* partial, int64_t chunks, MixtureGrads grads) {
  const int64_t g = block_x();
  double sums[3];
  fold_chunks(partial + g * chunks * 3, chunks, sums);
  if (thread_index() != 0) return;
  const double scale = load(args.scale + g), importance = load(args.importance + g);
  store(grads.scale + g, static_cast<float>(importance * sums[0]));
  store(grads.zero_point + g, static_cast<float>(-importance * scale * sums[1]));
  store(grads.importance + g, static_cast<float>(scale * sums[2]));
}

// ---- per channel ----

constexpr int kChannelThreads = 128;
constexpr int kBlockChannels = kChannelThreads / kLanes;

// The lanes' values added in order; in lane 0 of each half warp.
ADPDM_DEVICE double fold_half_warp(float value) {
  double sum = static_cast<double>(value);
  for (int l = 1; l < kLanes; ++l) sum += static_cast<double>(shuffle_down(value, l));
  return sum;
}

// Half a warp for a channel, its rows in order, a block of 1024 at a time. Meant for weights, whose rows are
// long; rows of one element leave 15 lanes idle.
template <FloatType kType>
ADPDM_KERNEL(kChannelThreads, 4)
channel_grads_kernel(FakeQuantizeArgs args, const void* grad, void* grad_x, float* grad_scale,
                     float* grad_zero_point) {
  const ChannelView& shape = args.shape;
  const int lane = thread_index() % kLanes;
  const int64_t channel = block_x() * kBlockChannels + thread_index() / kLanes;
  const bool exists = channel < shape.channels;  // the other half of the warp may have a channel
  const int64_t current = clamped_index(args.group_index, args.num_groups);
  const FakeQuantizer q = load_fake_quantizer(args.scale, args.zero_point, nullptr,
                                              current * shape.channels + (exists ? channel : 0), args.range);
  double totals[2] = {};
  for (int64_t outer = 0; outer < shape.outer; ++outer) {
    for (int64_t begin = 0; begin < shape.inner; begin += kBlockElements) {
      const int64_t row = (outer * shape.channels + channel) * shape.inner;
      const int64_t end = begin + kBlockElements < shape.inner ? begin + kBlockElements : shape.inner;
      float sums[2] = {};
      for (int64_t i = begin + lane; exists && i < end; i += kLanes) {
        const float upstream = load_float(grad, row + i, kType);
        bool inside;
        add_terms(load_float(args.x, row + i, kType), upstream, q, sums, &inside);
        store_float(grad_x, row + i, kType, upstream * (inside ? 1.0f : 0.0f));
      }
      totals[0] += fold_half_warp(sums[0]);
      totals[1] += fold_half_warp(sums[1]);
    }
  }
  if (lane != 0 || !exists) return;
  for (int64_t g = 0; g < args.num_groups; ++g) {
    const int64_t index = g * shape.channels + channel;
    store(grad_scale + index, g == current ? static_cast<float>(totals[0]) : 0.0f);
    store(grad_zero_point + index,
          g == current ? static_cast<float>(-static_cast<double>(q.scale) * totals[1]) : 0.0f);
  }
}

int64_t partial_bytes(int64_t size, int64_t groups, int sums) { return num_chunks(size) * groups * sums * 8; }

}  // namespace

int64_t fake_quantize_backward_workspace(const FakeQuantizeArgs& args) {
  const ChannelView& shape = args.shape;
  return shape.channels == 1 ? partial_bytes(shape.outer * shape.inner, 1, kSums<1>) : 0;
}

void fake_quantize_backward(const FakeQuantizeArgs& args, const void* grad, void* grad_x, float* grad_scale,
                            float* grad_zero_point, void* workspace, Stream stream) {
  const Range range([&] {
    return range_text("fake_quantize_backward", {args.shape.outer, args.shape.channels, args.shape.inner},
                      args.type);
  });
  const char* op = "fake_quantize_backward";
  const ChannelView& shape = args.shape;
  if (shape.channels != 1) {
    const int64_t blocks = (shape.channels + kBlockChannels - 1) / kBlockChannels;
    with_float_type(args.type, [&](auto type) {
      launch(channel_grads_kernel<decltype(type)::value>, {blocks, 1, 1, kChannelThreads, 0, stream, op},
             args, grad, grad_x, grad_scale, grad_zero_point);
    });
    return;
  }
  const ChunkSumsArgs sums = {args.x,           grad,
                              grad_x,           shape.outer * shape.inner,
                              args.scale,       args.zero_point,
                              args.group_index, args.num_groups,
                              args.range,       static_cast<double*>(workspace)};
  const int64_t chunks = num_chunks(sums.size);
  with_float_type(args.type, [&](auto type) {
    launch(chunk_sums_kernel<decltype(type)::value, 1>,
           {chunks, 1, 1, kThreads, kChunkSharedBytes<1>, stream, op}, sums);
  });
  launch(fake_quantize_grads_kernel, {1, 1, 1, kFoldThreads, kFoldSharedBytes<2>, stream, op}, args,
         sums.partial, chunks, grad_scale, grad_zero_point);
}

int64_t fake_quantize_mixture_backward_workspace(const MixtureArgs& args) {
  return partial_bytes(args.size, args.num_groups, kSums<kMixtureGroups>);
}

void fake_quantize_mixture_backward(const MixtureArgs& args, const void* grad, const MixtureGrads& grads,
                                    void* workspace, Stream stream) {
  const Range range([&] {
    return range_text("fake_quantize_mixture_backward", {args.num_groups, args.size}, args.type);
  });
  const char* op = "fake_quantize_mixture_backward";
  mixture_grad_x(args, grad, grads.x, stream);
  const ChunkSumsArgs sums = {
      args.x,          grad,    nullptr,         args.size,  args.scale,
      args.zero_point, nullptr, args.num_groups, args.range, static_cast<double*>(workspace)};
  const int64_t chunks = num_chunks(args.size);
  const int64_t batches = (args.num_groups + kMixtureGroups - 1) / kMixtureGroups;
  with_float_type(args.type, [&](auto type) {
    launch(chunk_sums_kernel<decltype(type)::value, kMixtureGroups>,
           {chunks * batches, 1, 1, kThreads, kChunkSharedBytes<kMixtureGroups>, stream, op}, sums);
  });
  launch(mixture_grads_kernel, {args.num_groups, 1, 1, kFoldThreads, kFoldSharedBytes<3>, stream, op}, args,
         sums.partial, chunks, grads);
}

}  // namespace adpdm::cuda
