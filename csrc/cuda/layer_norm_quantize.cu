// Layer normalisation that ends in codes on CUDA: a warp per row, which comes from the cache after the first
// of three readings. Where channels are rotated, the third is by threads that have a block of channels each.
#include "core/norm_quantize.h"
#include "cuda/hadamard.cuh"
#include "cuda/launch.cuh"
#include "cuda/norm_quantize.cuh"
#include "cuda/reduce.cuh"

namespace adpdm::cuda {
namespace {

constexpr int kThreads = 128;  // small blocks: a row of 1280 keeps 32 lanes busy for 5 vectors
constexpr int kWarps = kThreads / kWarpSize;

// A row of x, and its walk by a warp.
template <FloatType kType, int kSize>
struct Row {
  const void* x;
  int64_t first;     // element
  int64_t channels;  // a multiple of kSize

  // Calls body(values [kSize], channel) for the vectors of this lane.
  template <typename Body>
  ADPDM_DEVICE void for_each(Body&& body) const {
    for (int64_t c = lane_index() * kSize; c < channels; c += kWarpSize * kSize) {
      RawVector<kType, kSize> raw;
      raw.load_from(x, first + c);
      float values[kSize];
      raw.unpack(values);
      body(values, c);
    }
  }
};

struct alignas(8) Moments {
  float mean;
  float inv_deviation;
};

// Lane sums in float32, the rest in float64; distances from the first value do not cancel however far the
// mean is from 0.
template <FloatType kType, int kSize>
ADPDM_DEVICE Moments moments_of(const Row<kType, kSize>& row, float eps) {
  const float origin = load_float(row.x, row.first, kType);
  float sum = 0.0f;
  row.for_each([&](const float(&x)[kSize], int64_t) {
    ADPDM_UNROLL
    for (float value : x) sum = sum + (value - origin);
  });
  const double size = static_cast<double>(row.channels);
  const double exact = static_cast<double>(origin) + warp_reduce(static_cast<double>(sum), Sum()) / size;
  const float mean = static_cast<float>(exact);
  float squares = 0.0f;
  row.for_each([&](const float(&x)[kSize], int64_t) {
    ADPDM_UNROLL
    for (float value : x) squares = fused_multiply_add(value - mean, value - mean, squares);
  });
  const double error = exact - static_cast<double>(mean);
  const double variance = warp_reduce(static_cast<double>(squares), Sum()) / size - error * error;
  const double inv_deviation = 1.0 / sqrt((variance < 0.0 ? 0.0 : variance) + static_cast<double>(eps));
  return {mean, static_cast<float>(inv_deviation)};
}

// table [kSize] f32 from element c on, or `otherwise` where there is no table.
template <int kSize>
ADPDM_DEVICE void load_row(const float* table, int64_t c, float otherwise, float (&values)[kSize]) {
  if (table == nullptr) {
    ADPDM_UNROLL
    for (float& value : values) value = otherwise;
  } else if constexpr (kSize == 1) {
    values[0] = load(table + c);
  } else {
    ADPDM_UNROLL
    for (int i = 0; i < kSize; i += 4) load_vector<FloatType::kFloat32>(table, c + i, values + i);
  }
}

template <FloatType kType, int kSize>
ADPDM_KERNEL(kThreads, 4)
layer_norm_kernel(LayerNormQuantizeArgs args) {
  const int64_t index = block_x() * kWarps + warp_index();
  if (index >= args.rows) return;
  const Row<kType, kSize> row = {args.x, index * args.channels, args.channels};
  const Moments m = moments_of(row, args.eps);
  const Quantizer q = current_quantizer(args.qparams, signed_range(args.num_bits));
  const bool modulated = args.modulation != nullptr;
  const float* scale =
      modulated ? args.modulation + index / args.rows_per_image * 2 * args.channels : nullptr;
  const float* shift = modulated ? scale + args.channels : nullptr;
  row.for_each([&](float(&x)[kSize], int64_t c) {
    NormCoefficients<kSize> k;
    load_row(args.weight, c, 1.0f, k.factor);
    load_row(args.bias, c, 0.0f, k.offset);
    load_row(scale, c, 0.0f, k.gain);
    load_row(shift, c, 0.0f, k.shift);
    ADPDM_UNROLL
    for (int i = 0; i < kSize; ++i) {
      k.factor[i] = m.inv_deviation * k.factor[i];
      k.offset[i] = fused_multiply_add(-m.mean, k.factor[i], k.offset[i]);
      k.gain[i] = 1.0f + k.gain[i];
    }
    normalize(x, k, modulated, false);
    store_codes(args.codes + row.first + c, x, q);
  });
}

// Rows of a block of threads where channels are rotated: enough that most threads have a block of channels.
int64_t rotated_rows(int64_t channels, int block) {
  const int64_t rows = ceil_div(int64_t{kThreads} * block, channels);
  return rows < kWarps ? kWarps : rows;
}

// The values of a thread's block of channels become y. Modulation by itself: together, 64 channels would need
// more registers than there are.
template <int kBlock>
ADPDM_DEVICE void normalize_block(const LayerNormQuantizeArgs& args, const Moments& m, int64_t image,
                                  const RotatedPlace& place, float (&values)[kBlock]) {
  const auto channel = [&](int j) { return static_cast<int>(place.channel + j * place.stride); };
  ADPDM_UNROLL
  for (int j = 0; j < kBlock; ++j) {
    const float factor = m.inv_deviation * (args.weight != nullptr ? load(args.weight + channel(j)) : 1.0f);
    const float bias = args.bias != nullptr ? load(args.bias + channel(j)) : 0.0f;
    values[j] = fused_multiply_add(values[j], factor, fused_multiply_add(-m.mean, factor, bias));
  }
  if (args.modulation == nullptr) return;
  const float* scale = args.modulation + image * 2 * args.channels;
  const float* shift = scale + args.channels;
  ADPDM_UNROLL
  for (int j = 0; j < kBlock; ++j) {
    values[j] = fused_multiply_add(values[j], 1.0f + load(scale + channel(j)), load(shift + channel(j)));
  }
}

template <FloatType kType, int kSize, int kBlock>
ADPDM_KERNEL(kThreads, 4)
layer_norm_rotate_kernel(LayerNormQuantizeArgs args, int64_t rows) {
  auto* moments = reinterpret_cast<Moments*>(shared_memory());  // [rows]
  const int64_t first_row = block_x() * rows;
  for (int64_t r = warp_index(); r < rows && first_row + r < args.rows; r += kWarps) {
    const Row<kType, kSize> row = {args.x, (first_row + r) * args.channels, args.channels};
    const Moments m = moments_of(row, args.eps);
    if (lane_index() == 0) shared_store(moments + r, m);
  }
  block_barrier();
  const Quantizer q = current_quantizer(args.qparams, signed_range(args.num_bits));
  for (int64_t i = thread_index(); i < rows * (args.channels / kBlock); i += kThreads) {
    const RotatedPlace place(i, args.channels, kBlock);
    const int64_t row = first_row + place.row;
    if (row >= args.rows) return;
    const Moments m = shared_load(moments + place.row);
    const int64_t image = row / args.rows_per_image, first = row * args.channels + place.channel;
    float values[kBlock];
    load_block<kType>(args.x, first, place.stride, values);
    normalize_block(args, m, image, place, values);
    store_rotated(values, q, args.codes + first, place.stride);
  }
}

template <FloatType kType, int kSize>
void launch_layer_norm(const LayerNormQuantizeArgs& args, Stream stream) {
  const char* op = "layer_norm_quantize";
  if (args.hadamard == 0) {
    return launch(layer_norm_kernel<kType, kSize>,
                  {ceil_div(args.rows, kWarps), 1, 1, kThreads, 0, stream, op}, args);
  }
  with_hadamard_block(args.hadamard, [&](auto block) {
    const int64_t rows = rotated_rows(args.channels, block());
    const int64_t shared = rows * static_cast<int64_t>(sizeof(Moments));
    launch(layer_norm_rotate_kernel<kType, kSize, block()>,
           {ceil_div(args.rows, rows), 1, 1, kThreads, shared, stream, op}, args, rows);
  });
}

}  // namespace

void layer_norm_quantize(const LayerNormQuantizeArgs& args, Stream stream) {
  if (args.channels == 0) return;
  const int64_t vector = 16 / float_size(args.type);
  const bool vectors = args.channels % vector == 0 && is_aligned(args.x, 16) &&
                       is_aligned(args.codes, vector) && is_aligned(args.weight, 16) &&
                       is_aligned(args.bias, 16) && is_aligned(args.modulation, 16);
  with_vectors(args.type, vectors, [&](auto type, auto size) {
    launch_layer_norm<decltype(type)::value, decltype(size)::value>(args, stream);
  });
}

}  // namespace adpdm::cuda
