// Normalisation that ends in codes, on the CPU: sums per channel in parallel, coefficients, then the codes in
// parallel.
#include "core/norm_quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/float_convert.h"
#include "core/row_view.h"
#include "cpu/chunks.h"
#include "cpu/norm_quantize_kernels.h"

namespace adpdm::cpu {
namespace {

// Images are taken together up to this many elements (2 MiB of float32), so that the second pass over them
// reads what the first has left in the cache.
constexpr int64_t kRoundElements = int64_t{1} << 19;

// Elements per thread of the two passes, some 20 us of work on a Zen 3 (0.15 ns, and 0.8 ns with SiLU):
// waking another thread takes 5 us on an idle machine and many times that on a busy one.
constexpr int64_t kMinSummed = 131072;
constexpr int64_t kMinNormalized = 32768;

// Coefficients are read in vectors of 16 from any channel on.
constexpr int64_t kPadding = 16;

float element(const void* data, FloatType type, int64_t i) {
  if (type == FloatType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t half = static_cast<const uint16_t*>(data)[i];
  return type == FloatType::kBFloat16 ? bf16_to_float(half) : f16_to_float(half);
}

// The tables of the images of one round; kept between calls, because fresh pages cost more than small ones
// take to fill.
struct NormTables {
  std::vector<double> sums;  // [images, chunks, 2, C]: sums, then squares
  std::vector<float> rows;   // [images, 5, C + kPadding]: origin, factor, offset, gain, shift
};
enum Row { kOrigin, kFactor, kOffset, kGain, kShift, kRows };

// Where the codes of one source go.
struct Target {
  Quantizer quantizer;
  int8_t* codes;  // of its first channel in the first pixel
  int64_t step;   // bytes between pixels
};

// One call, and how its work is cut.
struct GroupNorm {
  const GroupNormQuantizeArgs& args;
  const Target* targets;  // [num_sources]
  NormTables& tables;
  int64_t first_image;   // of the round
  int64_t chunk_pixels;  // a multiple of 64 where several make a chunk
  int64_t chunks;        // of an image

  float* row(int64_t image, Row which) const {
    return tables.rows.data() + (image * kRows + which) * (args.channels + kPadding);
  }
  double* sums(int64_t image, int64_t chunk) const {
    return tables.sums.data() + (image * chunks + chunk) * 2 * args.channels;
  }
};

GroupNorm make_group_norm(const GroupNormQuantizeArgs& args, const Target* targets, NormTables& tables) {
  int64_t chunk_pixels = std::max<int64_t>(1, kChunk / args.channels);
  if (chunk_pixels > 64) chunk_pixels = chunk_pixels / 64 * 64;
  return {args, targets, tables, 0, chunk_pixels, ceil_div(args.pixels, chunk_pixels)};
}

// Calls body(index of the source, its first channel, its pixels of the chunk).
template <typename Body>
void for_each_source(const GroupNorm& norm, int64_t image, int64_t chunk, Body&& body) {
  const GroupNormQuantizeArgs& args = norm.args;
  const int64_t pixel = chunk * norm.chunk_pixels;
  int64_t channel = 0;
  for (int s = 0; s < args.num_sources; ++s) {
    const NormSource& source = args.sources[s];
    const int64_t begin = ((norm.first_image + image) * args.pixels + pixel) * source.channels;
    const NormBlock block{static_cast<const char*>(source.data) + begin * float_size(args.type), args.type,
                          std::min(norm.chunk_pixels, args.pixels - pixel), source.channels};
    body(s, channel, block);
    channel += source.channels;
  }
}

// The values of the first pixel: sums of distances from them do not cancel however far the mean is from 0,
// unless that pixel is an outlier.
void set_origin(const GroupNorm& norm, int64_t image) {
  float* origin = norm.row(image, kOrigin);
  for_each_source(norm, image, 0, [&](int, int64_t channel, const NormBlock& block) {
    for (int64_t c = 0; c < block.channels; ++c) origin[channel + c] = element(block.data, block.type, c);
  });
}

// Adds the chunks of an image, in order, into the first.
void add_chunks(const GroupNorm& norm, int64_t image) {
  double* total = norm.sums(image, 0);
  for (int64_t chunk = 1; chunk < norm.chunks; ++chunk) {
    const double* sums = norm.sums(image, chunk);
    for (int64_t i = 0; i < 2 * norm.args.channels; ++i) total[i] += sums[i];
  }
}

struct Moments {
  float mean;
  float inv_deviation;
};

// Of channels [first, last) of an image: the moments of the channels, and the distance of their means.
Moments group_moments(const GroupNorm& norm, int64_t image, int64_t first, int64_t last) {
  const float* origin = norm.row(image, kOrigin);
  const double* sums = norm.sums(image, 0);
  const double* squares = sums + norm.args.channels;
  const auto pixels = static_cast<double>(norm.args.pixels);
  double mean = 0;
  for (int64_t c = first; c < last; ++c) mean += static_cast<double>(origin[c]) + sums[c] / pixels;
  mean /= static_cast<double>(last - first);
  double variance = 0;
  for (int64_t c = first; c < last; ++c) {
    const double shift = sums[c] / pixels;
    const double distance = static_cast<double>(origin[c]) + shift - mean;
    variance += squares[c] / pixels - shift * shift + distance * distance;
  }
  variance /= static_cast<double>(last - first);
  const double inv_deviation = 1.0 / std::sqrt(std::max(variance, 0.0) + static_cast<double>(norm.args.eps));
  return {static_cast<float>(mean), static_cast<float>(inv_deviation)};
}

void set_coefficients(const GroupNorm& norm, int64_t image) {
  const GroupNormQuantizeArgs& args = norm.args;
  const int64_t group_channels = args.channels / args.norm_groups;
  for (int64_t group = 0; group < args.norm_groups; ++group) {
    const int64_t first = group * group_channels;
    const Moments moments = group_moments(norm, image, first, first + group_channels);
    for (int64_t c = first; c < first + group_channels; ++c) {
      const float factor = moments.inv_deviation * (args.weight ? args.weight[c] : 1.0f);
      norm.row(image, kFactor)[c] = factor;
      norm.row(image, kOffset)[c] = std::fma(-moments.mean, factor, args.bias ? args.bias[c] : 0.0f);
    }
  }
  if (args.modulation == nullptr) return;
  const float* modulation = args.modulation + (norm.first_image + image) * 2 * args.channels;
  for (int64_t c = 0; c < args.channels; ++c) {
    norm.row(image, kGain)[c] = 1.0f + modulation[c];
    norm.row(image, kShift)[c] = modulation[args.channels + c];
  }
}

// Sums of all images of the round, then their coefficients.
void prepare_round(const GroupNorm& norm, int64_t images) {
  const auto channel_sums = ADPDM_SELECT_ISA(channel_sums);
  const int64_t chunk_elements = norm.chunk_pixels * norm.args.channels;
  for (int64_t image = 0; image < images; ++image) set_origin(norm, image);
  parallel_for(0, images * norm.chunks, ceil_div(kMinSummed, chunk_elements),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t image = i / norm.chunks, chunk = i % norm.chunks;
                   double* sums = norm.sums(image, chunk);
                   const auto add = [&](int, int64_t channel, const NormBlock& block) {
                     channel_sums(block, norm.row(image, kOrigin) + channel, sums + channel,
                                  sums + norm.args.channels + channel);
                   };
                   for_each_source(norm, image, chunk, add);
                 }
               });
  for (int64_t image = 0; image < images; ++image) {
    add_chunks(norm, image);
    set_coefficients(norm, image);
  }
}

void write_round(const GroupNorm& norm, int64_t images) {
  const GroupNormQuantizeArgs& args = norm.args;
  const auto normalize_block = ADPDM_SELECT_ISA(normalize_block);
  const int64_t chunk_elements = norm.chunk_pixels * args.channels;
  parallel_for(
      0, images * norm.chunks, ceil_div(kMinNormalized, chunk_elements), [&](int64_t begin, int64_t end) {
        std::vector<float> room(static_cast<size_t>(args.hadamard ? norm_room(args.channels) : 0));
        for (int64_t i = begin; i < end; ++i) {
          const int64_t image = i / norm.chunks, chunk = i % norm.chunks;
          const int64_t pixel = (norm.first_image + image) * args.pixels + chunk * norm.chunk_pixels;
          const auto write = [&](int source, int64_t channel, const NormBlock& block) {
            const Target& target = norm.targets[source];
            const NormCoefficients coefficients{norm.row(image, kFactor) + channel,
                                                norm.row(image, kOffset) + channel,
                                                args.modulation ? norm.row(image, kGain) + channel : nullptr,
                                                norm.row(image, kShift) + channel};
            normalize_block(block, coefficients, args.activation == Activation::kSilu,
                            {target.quantizer, args.hadamard, room.data()},
                            target.codes + pixel * target.step, target.step);
          };
          for_each_source(norm, image, chunk, write);
        }
      });
}

// [C + kPadding]: source [C], or `missing` everywhere.
std::vector<float> padded_row(const float* source, int64_t channels, float missing) {
  std::vector<float> row(static_cast<size_t>(channels + kPadding), missing);
  if (source) std::copy(source, source + channels, row.begin());
  return row;
}

void normalize_rounds(const GroupNormQuantizeArgs& args, const Target* targets) {
  if (args.batch * args.pixels * args.channels == 0) return;
  thread_local NormTables tables;
  GroupNorm norm = make_group_norm(args, targets, tables);
  const int64_t round = std::clamp<int64_t>(kRoundElements / (args.pixels * args.channels), 1, args.batch);
  const auto grow = [](auto& table, int64_t size) {
    if (static_cast<int64_t>(table.size()) < size) table.resize(static_cast<size_t>(size));
  };
  grow(tables.sums, round * norm.chunks * 2 * args.channels);
  grow(tables.rows, round * kRows * (args.channels + kPadding));
  for (; norm.first_image < args.batch; norm.first_image += round) {
    const int64_t images = std::min(round, args.batch - norm.first_image);
    prepare_round(norm, images);
    write_round(norm, images);
  }
}

}  // namespace

void group_norm_quantize(const GroupNormQuantizeArgs& args) {
  const Quantizer quantizer = current_quantizer("group_norm_quantize", args.qparams, args.num_bits);
  Target targets[kMaxSegments];
  int8_t* codes = args.codes;
  for (int s = 0; s < args.num_sources; ++s) {
    targets[s] = {quantizer, codes, args.channels};
    codes += args.sources[s].channels;
  }
  normalize_rounds(args, targets);
}

void group_norm_quantize_each(const GroupNormQuantizeArgs& args, const NormTarget* targets) {
  Target each[kMaxSegments];
  for (int s = 0; s < args.num_sources; ++s) {
    const NormTarget& target = targets[s];
    each[s] = {current_quantizer("group_norm_quantize_each", target.qparams, target.num_bits), target.codes,
               args.sources[s].channels};
  }
  normalize_rounds(args, each);
}

void layer_norm_quantize(const LayerNormQuantizeArgs& args) {
  const Quantizer quantizer = current_quantizer("layer_norm_quantize", args.qparams, args.num_bits);
  if (args.rows * args.channels == 0) return;
  const auto layer_norm_rows = ADPDM_SELECT_ISA(layer_norm_rows);
  const std::vector<float> weight = padded_row(args.weight, args.channels, 1.0f);
  const std::vector<float> bias = padded_row(args.bias, args.channels, 0.0f);
  parallel_for(0, args.rows, ceil_div(kMinNormalized, args.channels), [&](int64_t begin, int64_t end) {
    std::vector<float> gain = padded_row(nullptr, args.channels, 0.0f), shift = gain;
    std::vector<float> rows(kNormRows * gain.size());
    std::vector<float> room(static_cast<size_t>(args.hadamard ? norm_room(args.channels) : 0));
    const NormEnd norm_end{quantizer, args.hadamard, room.data()};
    for (int64_t first = begin; first < end;) {
      const int64_t image = first / args.rows_per_image;
      const int64_t last = std::min(end, (image + 1) * args.rows_per_image);
      NormCoefficients coefficients{weight.data(), bias.data(), nullptr, nullptr};
      if (args.modulation) {
        const float* modulation = args.modulation + image * 2 * args.channels;
        for (int64_t c = 0; c < args.channels; ++c) gain[c] = 1.0f + modulation[c];
        std::copy(modulation + args.channels, modulation + 2 * args.channels, shift.begin());
        coefficients.gain = gain.data();
        coefficients.shift = shift.data();
      }
      const char* data = static_cast<const char*>(args.x) + first * args.channels * float_size(args.type);
      layer_norm_rows({data, args.type, last - first, args.channels}, coefficients, args.eps, norm_end,
                      rows.data(), args.codes + first * args.channels);
      first = last;
    }
  });
}

}  // namespace adpdm::cpu
