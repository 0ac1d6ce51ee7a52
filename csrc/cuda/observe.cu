// Activation histograms on CUDA: counted in shared memory, added to the table once per block. Integer counts
// and extrema are the same in any order.
#include "core/observe.h"
#include "core/quant_math.h"
#include "cuda/elementwise.cuh"
#include "cuda/launch.cuh"
#include "cuda/nvtx.h"
#include "cuda/quantizer.cuh"
#include "cuda/reduce.cuh"

namespace adpdm::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerSm = 2;  // enough bytes under way; more blocks only add more histograms
constexpr int kVectors = 4;      // of a thread, all loaded before the first is used
constexpr int kZeroBin = kHistogramSideBins;

// 32-bit counts of a block; a block sees fewer elements than this.
constexpr int64_t kMaxBlockElements = int64_t{1} << 31;

template <FloatType kType>
constexpr int64_t kWarpElements = int64_t{kWarpSize} * kVectors* kVector<kType>;

// What one thread has seen besides the bins. Zeros are counted here: exact zeros are common, and all threads
// of a warp would wait for each other at their bin.
struct Seen {
  int32_t zeros = 0;
  float smallest = INFINITY;
  float largest = -INFINITY;
  bool has_nan = false;
};

ADPDM_DEVICE void count(float x, int32_t* histogram, Seen* seen) {
  const int bin = histogram_bin(x);
  if (bin == kZeroBin) {
    ++seen->zeros;
  } else {
    atomic_add_shared(histogram + bin, 1);
  }
  seen->smallest = at_most(x, seen->smallest);  // drop a NaN
  seen->largest = at_least(x, seen->largest);
  seen->has_nan = seen->has_nan || x != x;
}

// The order of floats without NaN is that of their bits: ascending for positive ones, descending for
// negative. The table holds no NaN, or one that orders below (as minimum) or above (as maximum) all numbers.
ADPDM_DEVICE void lower_to(float* extremum, float x) {
  const uint32_t bits = float_to_bits(x);
  if (bits >> 31 != 0) {
    atomic_max(reinterpret_cast<uint32_t*>(extremum), bits);
  } else {
    atomic_min(reinterpret_cast<int32_t*>(extremum), static_cast<int32_t>(bits));
  }
}

ADPDM_DEVICE void raise_to(float* extremum, float x) {
  const uint32_t bits = float_to_bits(x);
  if (bits >> 31 != 0) {
    atomic_min(reinterpret_cast<uint32_t*>(extremum), bits);
  } else {
    atomic_max(reinterpret_cast<int32_t*>(extremum), static_cast<int32_t>(bits));
  }
}

// Widens extrema [2] in the table; NaN sticks. One thread of a block.
ADPDM_DEVICE void widen(float* extrema, float smallest, float largest, bool has_nan) {
  // A NaN from before this launch may have either sign, so nothing may be ordered against it. One from a
  // block of this launch is seen or not; it has the sign that wins every comparison.
  const float lowest = load_coherent(extrema);
  if (lowest != lowest) return;
  lower_to(extrema, has_nan ? bits_to_float(0xffffffffu) : smallest);
  raise_to(extrema + 1, has_nan ? bits_to_float(0x7fffffffu) : largest);
}

template <FloatType kType>
ADPDM_KERNEL(kThreads, kBlocksPerSm)
observe_kernel(RowView x, ObserverTables tables, bool vectors) {
  auto* histogram = reinterpret_cast<int32_t*>(shared_memory());
  for (int bin = thread_index(); bin < kHistogramBins; bin += kThreads) shared_store(histogram + bin, 0);
  block_barrier();
  Seen seen;
  const int64_t size = x.rows * x.columns, step = grid_x() * kWarps * kWarpElements<kType>;
  for (int64_t first = (block_x() * kWarps + warp_index()) * kWarpElements<kType>; first < size;
       first += step) {
    if (vectors && size - first >= kWarpElements<kType>) {
      Bytes16 raw[kVectors];
      load_chunks<kType>(x, first, raw);
      ADPDM_UNROLL
      for (int c = 0; c < kVectors; ++c) {
        float values[kVector<kType>];
        unpack_vector<kType>(raw[c], values);
        ADPDM_UNROLL
        for (float value : values) count(value, histogram, &seen);
      }
    } else {
      const int64_t end = first + kWarpElements<kType> < size ? first + kWarpElements<kType> : size;
      for (int64_t i = first + lane_index(); i < end; i += kWarpSize) {
        count(load_float(x.data, element_offset(x, i), kType), histogram, &seen);
      }
    }
  }
  const int32_t zeros = warp_reduce(seen.zeros, Sum());
  if (lane_index() == 0) atomic_add_shared(histogram + kZeroBin, zeros);
  auto* scratch = reinterpret_cast<float*>(histogram + kHistogramBins + 1);
  const float smallest = block_min(seen.smallest, scratch);  // its barriers also close the histogram
  const float largest = block_max(seen.largest, scratch);
  const bool has_nan = block_max(seen.has_nan ? 1 : 0, reinterpret_cast<int32_t*>(scratch)) != 0;
  const int64_t row = clamped_index(tables.step_index, tables.num_steps);
  int64_t* counts = tables.counts + row * kHistogramBins;
  for (int bin = thread_index(); bin < kHistogramBins; bin += kThreads) {
    const int32_t added = shared_load(histogram + bin);
    if (added != 0) atomic_add(reinterpret_cast<uint64_t*>(counts) + bin, static_cast<uint64_t>(added));
  }
  if (thread_index() == 0) widen(tables.extrema + row * 2, smallest, largest, has_nan);
}

constexpr int64_t kSharedBytes = (kHistogramBins + 1) * 4 + kReduceScratchBytes<float>;

int64_t num_blocks(int64_t size, int64_t warp_elements) {
  const int64_t whole = (size + kWarps * warp_elements - 1) / (kWarps * warp_elements);
  const int64_t resident = int64_t{current_device_info().num_sms} * kBlocksPerSm;
  // A block sees at most one share of its warps more than size / blocks.
  const int64_t least = size / (kMaxBlockElements - kWarps * warp_elements) + 1;
  return whole < resident ? whole : (resident < least ? least : resident);
}

}  // namespace

void observe(const RowView& view, const ObserverTables& tables, Stream stream) {
  const Range range([&] { return range_text("observe", {view.rows, view.columns}, view.type); });
  const RowView x = collapse(view);
  const bool vectors = rows_have_vectors(x);
  with_float_type(x.type, [&](auto type) {
    constexpr FloatType kType = decltype(type)::value;
    const int64_t blocks = num_blocks(x.rows * x.columns, kWarpElements<kType>);
    launch(observe_kernel<kType>, {blocks, 1, 1, kThreads, kSharedBytes, stream, "observe"}, x, tables,
           vectors);
  });
}

}  // namespace adpdm::cuda
