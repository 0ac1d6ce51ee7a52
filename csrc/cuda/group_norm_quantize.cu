// Group normalisation that ends in codes on CUDA: one kernel sums, without atomics; the other adds those sums
// up by itself, normalises and quantizes, or rotates in between. How the work is cut depends on the shape of
// one image only, and so do the bits.
#include <string>

#include "core/norm_quantize.h"
#include "cuda/hadamard.cuh"
#include "cuda/launch.cuh"
#include "cuda/norm_quantize.cuh"
#include "cuda/reduce.cuh"

namespace adpdm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxTileVectors = 32;        // 512 bytes of a pixel side by side
constexpr int kUnroll = 4;                 // loads of a thread under way at once
constexpr int64_t kSumElements = 8192;     // of a block that sums: 32 a thread
constexpr int64_t kApplyElements = 16384;  // of one that applies: more than the sums it has to read
constexpr int64_t kMaxSplits = 128;

// How an image is cut: into tiles of channels, and for the sums into splits of pixels.
struct Tiling {
  int vectors;       // of a pixel
  int tile_vectors;  // of a pixel in one tile; the last tile may have fewer
  int rows;          // pixels that a block reads at once
  int tiles;
  int splits;
  int stretches;  // blocks that apply, for an image and tile
  int64_t split_pixels;
  int64_t stretch_pixels;
  int group_channels;
};

Tiling make_tiling(const GroupNormQuantizeArgs& args, int vector) {
  if (args.channels > INT32_MAX) {
    throw CudaError("group_norm_quantize: wanted at most 2147483647 channels, got " +
                    std::to_string(args.channels));
  }
  Tiling t{};
  t.vectors = static_cast<int>(args.channels) / vector;
  t.tiles = static_cast<int>(ceil_div(t.vectors, kMaxTileVectors));
  t.tile_vectors = static_cast<int>(ceil_div(t.vectors, t.tiles));
  t.rows = kThreads / t.tile_vectors;
  const int64_t tile_channels = int64_t{t.tile_vectors} * vector;
  const int64_t wanted = ceil_div(args.pixels * tile_channels, kSumElements);
  t.split_pixels = ceil_div(args.pixels, wanted < kMaxSplits ? wanted : kMaxSplits);
  t.splits = static_cast<int>(ceil_div(args.pixels, t.split_pixels));
  t.stretch_pixels = ceil_div(kApplyElements, tile_channels);
  t.stretches = static_cast<int>(ceil_div(args.pixels, t.stretch_pixels));
  t.group_channels = static_cast<int>(args.channels / args.norm_groups);
  return t;
}

// Sums of the channels of one group in one tile over the pixels of one split: the mean, as distance from the
// first value of the group, and the sum of squared distances from it. That of group g and tile t is entry g +
// t of its split: a tile border cuts one group at most, so no two share an entry.
struct alignas(8) Partial {
  float mean;
  float squares;
};

ADPDM_DEVICE int64_t partial_index(const GroupNormQuantizeArgs& args, const Tiling& t, int64_t image,
                                   int split, int group, int tile) {
  return (image * t.splits + split) * (args.norm_groups + t.tiles) + group + tile;
}

template <typename T>
ADPDM_DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
ADPDM_DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}

// The channels of a tile, and the groups that have some of them.
template <int kSize>
struct TileChannels {
  int begin, end, first_group, last_group;

  ADPDM_DEVICE TileChannels(const Tiling& t, int tile)
      : begin(tile * t.tile_vectors * kSize),
        end(smaller(begin + t.tile_vectors * kSize, t.vectors * kSize)),
        first_group(begin / t.group_channels),
        last_group((end - 1) / t.group_channels) {}
};

// Which part of the work a block has: one of `parts` of an image and tile.
struct BlockPlace {
  int tile, part;
  int64_t image;

  ADPDM_DEVICE BlockPlace(const Tiling& t, int parts) {
    const int block = static_cast<int>(block_x());
    tile = block % t.tiles;
    part = block / t.tiles % parts;
    image = block / t.tiles / parts;
  }
};

// Where a channel of the concatenation lies: pixel p of an image is at offset + p * step of data.
struct ChannelPlace {
  const void* data;
  int64_t offset, step;
};

ADPDM_DEVICE ChannelPlace place_of(const GroupNormQuantizeArgs& args, int64_t image, int64_t channel) {
  const bool second = channel >= args.sources[0].channels;
  const NormSource& source = args.sources[second ? 1 : 0];
  const int64_t local = second ? channel - args.sources[0].channels : channel;
  return {source.data, image * args.pixels * source.channels + local, source.channels};
}

// The value from which the mean of a group is told: its first channel in the first pixel.
template <FloatType kType>
ADPDM_DEVICE double group_origin(const GroupNormQuantizeArgs& args, const Tiling& t, int64_t image,
                                 int group) {
  const ChannelPlace place = place_of(args, image, group * t.group_channels);
  return static_cast<double>(load_float(place.data, place.offset, kType));
}

// What a block that sums has in shared memory, of every channel of its tile.
struct SharedSums {
  float* sums;     // [rows][tile channels], of distances from the origin
  float* squares;  // [rows][tile channels]
  float* origins;  // [tile channels]: the value of the first pixel of the image
  int stride;      // tile channels

  ADPDM_DEVICE SharedSums(const Tiling& t, int size) : stride(t.tile_vectors * size) {
    sums = reinterpret_cast<float*>(shared_memory());
    squares = sums + t.rows * stride;
    origins = squares + t.rows * stride;
  }
};

int64_t shared_sums_bytes(const Tiling& t, int size) {
  return int64_t{2 * t.rows + 1} * t.tile_vectors * size * 4;
}

template <int kSize>
ADPDM_DEVICE void store_shared(float* target, const float (&values)[kSize]) {
  if constexpr (kSize == 1) {
    shared_store(target, values[0]);
  } else {
    ADPDM_UNROLL
    for (int i = 0; i < kSize; i += 4) {
      shared_store(reinterpret_cast<Bytes16*>(target + i), pack_vector<FloatType::kFloat32>(values + i));
    }
  }
}

// Sums of one thread: a vector of channels over every rows-th pixel of the split.
template <FloatType kType, int kSize>
ADPDM_DEVICE void sum_pixels(const ChannelPlace& place, const Tiling& t, int64_t first, int64_t end,
                             const float (&origin)[kSize], float (&sums)[kSize], float (&squares)[kSize]) {
  const auto add = [&](const RawVector<kType, kSize>& raw) {
    float x[kSize];
    raw.unpack(x);
    ADPDM_UNROLL
    for (int i = 0; i < kSize; ++i) {
      const float distance = x[i] - origin[i];
      sums[i] = sums[i] + distance;
      squares[i] = fused_multiply_add(distance, distance, squares[i]);
    }
  };
  RawVector<kType, kSize> raw[kUnroll];
  int64_t pixel = first;
  for (; pixel + (kUnroll - 1) * t.rows < end; pixel += kUnroll * t.rows) {
    ADPDM_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      raw[u].load_from(place.data, place.offset + (pixel + u * t.rows) * place.step);
    }
    ADPDM_UNROLL
    for (int u = 0; u < kUnroll; ++u) add(raw[u]);
  }
  for (; pixel < end; pixel += t.rows) {
    raw[0].load_from(place.data, place.offset + pixel * place.step);
    add(raw[0]);
  }
}

// A warp combines channels [begin, end) of a group, all of `pixels` pixels, in float64.
ADPDM_DEVICE Partial combine_channels(const SharedSums& shared, int begin, int end, double pixels,
                                      double origin) {
  const double inv_pixels = 1.0 / pixels;
  const auto mean_of = [&](int c) {  // from the group's origin on
    return static_cast<double>(shared_load(shared.origins + c)) - origin +
           static_cast<double>(shared_load(shared.sums + c)) * inv_pixels;
  };
  double total = 0;
  for (int c = begin + lane_index(); c < end; c += kWarpSize) total += mean_of(c);
  const double mean = warp_reduce(total, Sum()) / (end - begin);
  double squares = 0;
  for (int c = begin + lane_index(); c < end; c += kWarpSize) {
    const double sum = shared_load(shared.sums + c), distance = mean_of(c) - mean;
    squares += static_cast<double>(shared_load(shared.squares + c)) - sum * sum * inv_pixels +
               pixels * distance * distance;
  }
  return {static_cast<float>(mean), static_cast<float>(warp_reduce(squares, Sum()))};
}

// A block for an image, a split and a tile.
template <FloatType kType, int kSize>
ADPDM_KERNEL(kThreads, 2)
group_norm_sums_kernel(GroupNormQuantizeArgs args, Tiling t, Partial* partials) {
  const BlockPlace block(t, t.splits);
  const TileChannels<kSize> channels(t, block.tile);
  const SharedSums shared(t, kSize);
  const int row = thread_index() / t.tile_vectors, first = thread_index() % t.tile_vectors * kSize;
  const int64_t begin = block.part * t.split_pixels, end = smaller(begin + t.split_pixels, args.pixels);
  if (row < t.rows && channels.begin + first < channels.end) {
    const ChannelPlace place = place_of(args, block.image, channels.begin + first);
    float origin[kSize], sums[kSize] = {}, squares[kSize] = {};
    RawVector<kType, kSize> raw;
    raw.load_from(place.data, place.offset);
    raw.unpack(origin);
    sum_pixels<kType>(place, t, begin + row, end, origin, sums, squares);
    store_shared(shared.sums + row * shared.stride + first, sums);
    store_shared(shared.squares + row * shared.stride + first, squares);
    if (row == 0) store_shared(shared.origins + first, origin);
  }
  block_barrier();
  for (int c = thread_index(); c < channels.end - channels.begin; c += kThreads) {  // rows into the first
    float sum = 0.0f, square = 0.0f;
    for (int r = 0; r < t.rows; ++r) {
      sum = sum + shared_load(shared.sums + r * shared.stride + c);
      square = square + shared_load(shared.squares + r * shared.stride + c);
    }
    shared_store(shared.sums + c, sum);
    shared_store(shared.squares + c, square);
  }
  block_barrier();
  for (int g = channels.first_group + warp_index(); g <= channels.last_group; g += kWarps) {
    const int from = larger(g * t.group_channels, channels.begin) - channels.begin;
    const int to = smaller((g + 1) * t.group_channels, channels.end) - channels.begin;
    const double origin = group_origin<kType>(args, t, block.image, g);
    const Partial partial = combine_channels(shared, from, to, static_cast<double>(end - begin), origin);
    if (lane_index() == 0) {
      store(partials + partial_index(args, t, block.image, block.part, g, block.tile), partial);
    }
  }
}

// ---- the second kernel ----

struct alignas(8) Moments {
  float mean;
  float inv_deviation;
};

// A warp combines all partial sums of a group, in float64.
template <int kSize>
ADPDM_DEVICE Moments combine_partials(const GroupNormQuantizeArgs& args, const Tiling& t,
                                      const Partial* partials, int64_t image, int group, double origin) {
  const int begin = group * t.group_channels, end = begin + t.group_channels;
  const int tile_channels = t.tile_vectors * kSize;
  const int first_tile = begin / tile_channels, tiles = (end - 1) / tile_channels - first_tile + 1;
  const auto each = [&](auto&& body) {
    for (int i = lane_index(); i < t.splits * tiles; i += kWarpSize) {
      const int split = i / tiles, tile = first_tile + i % tiles;
      const int64_t pixels = smaller(t.split_pixels, args.pixels - split * t.split_pixels);
      const int channels = smaller(end, (tile + 1) * tile_channels) - larger(begin, tile * tile_channels);
      body(load(partials + partial_index(args, t, image, split, group, tile)),
           static_cast<double>(pixels * channels));
    }
  };
  const double size = static_cast<double>(args.pixels * t.group_channels);
  double total = 0;
  each([&](const Partial& partial, double count) { total += count * static_cast<double>(partial.mean); });
  const double mean = warp_reduce(total, Sum()) / size;
  double squares = 0;
  each([&](const Partial& partial, double count) {
    const double distance = static_cast<double>(partial.mean) - mean;
    squares += static_cast<double>(partial.squares) + count * distance * distance;
  });
  const double variance = warp_reduce(squares, Sum()) / size;
  const double inv_deviation = 1.0 / sqrt((variance < 0.0 ? 0.0 : variance) + static_cast<double>(args.eps));
  return {static_cast<float>(origin + mean), static_cast<float>(inv_deviation)};
}

// Of channels [channel, channel + kSize); moments [groups from first_group on].
template <int kSize>
ADPDM_DEVICE NormCoefficients<kSize> coefficients_of(const GroupNormQuantizeArgs& args, const Tiling& t,
                                                     int64_t image, int channel, int first_group,
                                                     const Moments* moments) {
  NormCoefficients<kSize> k;
  int group = channel / t.group_channels;
  int next = (group + 1) * t.group_channels;  // first channel of the next group
  ADPDM_UNROLL
  for (int i = 0; i < kSize; ++i) {
    const int c = channel + i;
    if (c == next) {
      ++group;
      next += t.group_channels;
    }
    const Moments m = shared_load(moments + (group - first_group));
    k.factor[i] = m.inv_deviation * (args.weight != nullptr ? load(args.weight + c) : 1.0f);
    k.offset[i] = fused_multiply_add(-m.mean, k.factor[i], args.bias != nullptr ? load(args.bias + c) : 0.0f);
    const float* modulation = args.modulation + image * 2 * args.channels + c;
    k.gain[i] = args.modulation != nullptr ? 1.0f + load(modulation) : 1.0f;
    k.shift[i] = args.modulation != nullptr ? load(modulation + args.channels) : 0.0f;
  }
  return k;
}

// A block for an image, a stretch of pixels and a tile.
template <FloatType kType, int kSize>
ADPDM_KERNEL(kThreads, 2)
group_norm_apply_kernel(GroupNormQuantizeArgs args, Tiling t, const Partial* partials) {
  const BlockPlace block(t, t.stretches);
  const TileChannels<kSize> channels(t, block.tile);
  auto* moments = reinterpret_cast<Moments*>(shared_memory());  // [groups of the tile]
  for (int g = channels.first_group + warp_index(); g <= channels.last_group; g += kWarps) {
    const double origin = group_origin<kType>(args, t, block.image, g);
    const Moments m = combine_partials<kSize>(args, t, partials, block.image, g, origin);
    if (lane_index() == 0) shared_store(moments + (g - channels.first_group), m);
  }
  block_barrier();
  const int row = thread_index() / t.tile_vectors;
  const int channel = channels.begin + thread_index() % t.tile_vectors * kSize;
  if (row >= t.rows || channel >= channels.end) return;
  const Quantizer q = current_quantizer(args.qparams, signed_range(args.num_bits));
  const ChannelPlace place = place_of(args, block.image, channel);
  const NormCoefficients<kSize> k =
      coefficients_of<kSize>(args, t, block.image, channel, channels.first_group, moments);
  const int64_t begin = block.part * t.stretch_pixels, end = smaller(begin + t.stretch_pixels, args.pixels);
  const auto finish = [&](const RawVector<kType, kSize>& raw, int64_t pixel) {
    float x[kSize];
    raw.unpack(x);
    normalize(x, k, args.modulation != nullptr, args.activation == Activation::kSilu);
    store_codes(args.codes + (block.image * args.pixels + pixel) * args.channels + channel, x, q);
  };
  RawVector<kType, kSize> raw[kUnroll];
  int64_t pixel = begin + row;
  for (; pixel + (kUnroll - 1) * t.rows < end; pixel += kUnroll * t.rows) {
    ADPDM_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      raw[u].load_from(place.data, place.offset + (pixel + u * t.rows) * place.step);
    }
    ADPDM_UNROLL
    for (int u = 0; u < kUnroll; ++u) finish(raw[u], pixel + u * t.rows);
  }
  for (; pixel < end; pixel += t.rows) {
    raw[0].load_from(place.data, place.offset + pixel * place.step);
    finish(raw[0], pixel);
  }
}

// The same where channels are rotated: a block of threads for an image and a stretch of pixels, all channels;
// a thread for a block of channels of a pixel. Shared memory: moments [norm_groups].
template <FloatType kType, int kSize, int kBlock>
ADPDM_KERNEL(kThreads, 2)
group_norm_rotate_kernel(GroupNormQuantizeArgs args, Tiling t, const Partial* partials) {
  auto* moments = reinterpret_cast<Moments*>(shared_memory());
  const int64_t image = block_x() / t.stretches, part = block_x() % t.stretches;
  for (int g = warp_index(); g < args.norm_groups; g += kWarps) {
    const double origin = group_origin<kType>(args, t, image, g);
    const Moments m = combine_partials<kSize>(args, t, partials, image, g, origin);
    if (lane_index() == 0) shared_store(moments + g, m);
  }
  block_barrier();
  const Quantizer q = current_quantizer(args.qparams, signed_range(args.num_bits));
  const int64_t begin = part * t.stretch_pixels, end = smaller(begin + t.stretch_pixels, args.pixels);
  for (int64_t i = thread_index(); i < (end - begin) * (args.channels / kBlock); i += kThreads) {
    const RotatedPlace place(i, args.channels, kBlock);
    const int64_t first = (image * args.pixels + begin + place.row) * args.channels + place.channel;
    float values[kBlock];
    load_block<kType>(args.sources[0].data, first, place.stride, values);
    ADPDM_UNROLL
    for (int j = 0; j < kBlock; ++j) {
      const auto channel = static_cast<int>(place.channel + j * place.stride);
      float value[1] = {values[j]};
      normalize(value, coefficients_of<1>(args, t, image, channel, 0, moments), args.modulation != nullptr,
                args.activation == Activation::kSilu);
      values[j] = value[0];
    }
    store_rotated(values, q, args.codes + first, place.stride);
  }
}

// Whether all vectors of 16 bytes lie within a source and a pixel, at a multiple of 16, and so do their
// codes.
bool has_vectors(const GroupNormQuantizeArgs& args) {
  const int64_t vector = 16 / float_size(args.type);
  bool vectors = is_aligned(args.codes, vector);
  for (int s = 0; s < args.num_sources; ++s) {
    vectors = vectors && is_aligned(args.sources[s].data, 16) && args.sources[s].channels % vector == 0;
  }
  return vectors;
}

bool is_empty(const GroupNormQuantizeArgs& args) { return args.batch * args.pixels * args.channels == 0; }

}  // namespace

int64_t group_norm_quantize_workspace(const GroupNormQuantizeArgs& args) {
  if (is_empty(args)) return 0;
  const Tiling t = make_tiling(args, has_vectors(args) ? static_cast<int>(16 / float_size(args.type)) : 1);
  return args.batch * t.splits * (args.norm_groups + t.tiles) * static_cast<int64_t>(sizeof(Partial));
}

void group_norm_quantize(const GroupNormQuantizeArgs& args, void* workspace, Stream stream) {
  if (is_empty(args)) return;
  const char* op = "group_norm_quantize";
  with_vectors(args.type, has_vectors(args), [&](auto type, auto size) {
    constexpr FloatType kType = decltype(type)::value;
    constexpr int kSize = decltype(size)::value;
    Tiling t = make_tiling(args, kSize);
    auto* partials = static_cast<Partial*>(workspace);
    constexpr auto kMomentsBytes = static_cast<int64_t>(sizeof(Moments));
    launch(group_norm_sums_kernel<kType, kSize>,
           {args.batch * t.splits * t.tiles, 1, 1, kThreads, shared_sums_bytes(t, kSize), stream, op}, args,
           t, partials);
    if (args.hadamard == 0) {
      const int64_t moments_bytes = int64_t{t.tile_vectors} * kSize * kMomentsBytes;
      return launch(group_norm_apply_kernel<kType, kSize>,
                    {args.batch * t.stretches * t.tiles, 1, 1, kThreads, moments_bytes, stream, op}, args, t,
                    partials);
    }
    t.stretch_pixels = ceil_div(kApplyElements, args.channels);
    t.stretches = static_cast<int>(ceil_div(args.pixels, t.stretch_pixels));
    with_hadamard_block(args.hadamard, [&](auto block) {
      launch(group_norm_rotate_kernel<kType, kSize, block()>,
             {args.batch * t.stretches, 1, 1, kThreads, args.norm_groups * kMomentsBytes, stream, op}, args,
             t, partials);
    });
  });
}

}  // namespace adpdm::cuda
