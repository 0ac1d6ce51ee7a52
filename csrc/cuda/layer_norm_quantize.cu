// Layer normalisation that ends in codes on CUDA: a warp per row, which comes from the cache after the first
// of three readings.
#include "core/norm_quantize.h"
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

struct Moments {
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

}  // namespace

void layer_norm_quantize(const LayerNormQuantizeArgs& args, Stream stream) {
  if (args.channels == 0) return;
  const int64_t vector = 16 / float_size(args.type);
  const bool vectors = args.channels % vector == 0 && is_aligned(args.x, 16) &&
                       is_aligned(args.codes, vector) && is_aligned(args.weight, 16) &&
                       is_aligned(args.bias, 16) && is_aligned(args.modulation, 16);
  with_vectors(args.type, vectors, [&](auto type, auto size) {
    launch(layer_norm_kernel<decltype(type)::value, decltype(size)::value>,
           {ceil_div(args.rows, kWarps), 1, 1, kThreads, 0, stream, "layer_norm_quantize"}, args);
  });
}

}  // namespace adpdm::cuda
