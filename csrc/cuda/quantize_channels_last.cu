// Quantization of channels-first tensors to channels-last codes on CUDA: the transposition happens between
// registers and shared memory, on bytes, so it costs no pass of its own.
#include "core/quantize.h"
#include "cuda/elementwise.cuh"
#include "cuda/launch.cuh"
#include "cuda/nvtx.h"
#include "cuda/quantizer.cuh"

namespace adpdm::cuda {
namespace {

// A block turns 64 channels by 16 vectors of pixels; a thread 4 channels by one vector.
constexpr int kThreads = 256;
constexpr int kTileChannels = 64;
constexpr int kPixelGroups = 16;
constexpr int kQuad = 4;    // channels in a word
constexpr int kChunk = 16;  // channels in a store

template <FloatType kType>
constexpr int kTilePixels = kPixelGroups* kVector<kType>;

// Where the tile holds a word of four channels of a pixel, in bytes. 128 bytes are two pixels of 64 channels;
// their 16-byte chunks are permuted by the pixel's vector, so that the words a warp writes at once lie in 32
// banks.
template <FloatType kType>
ADPDM_DEVICE int tile_offset(int pixel, int quad) {
  const int chunk = (pixel % 2 * (kTileChannels / kChunk) + quad / kQuad) ^ (pixel / kVector<kType> % 8);
  return pixel / 2 * (2 * kTileChannels) + chunk * kChunk + quad % kQuad * kQuad;
}

// Values of one channel from `pixel` on, 0 behind the last pixel.
template <FloatType kType>
ADPDM_DEVICE void load_pixels(const PlanesView& x, int64_t image, int64_t channel, int64_t pixel,
                              bool vectors, float* values) {
  const int64_t first = image * x.stride + channel * x.pixels + pixel;
  if (vectors && pixel + kVector<kType> <= x.pixels) return load_vector<kType>(x.data, first, values);
  ADPDM_UNROLL
  for (int i = 0; i < kVector<kType>; ++i) {
    values[i] = pixel + i < x.pixels ? load_float(x.data, first + i, kType) : 0.0f;
  }
}

// Quantizes the thread's 4 channels by one vector of pixels into the tile.
template <FloatType kType>
ADPDM_DEVICE void fill_tile(const PlanesView& x, int64_t image, int64_t first_channel, int64_t first_pixel,
                            const Quantizer& q, bool vectors, unsigned char* tile) {
  constexpr int kSize = kVector<kType>;
  // 8 lanes side by side read 128 bytes of a channel.
  const int group = warp_index() / 4 * 8 + lane_index() % 8;
  const int quad = warp_index() % 4 * 4 + lane_index() / 8;
  float values[kQuad][kSize];
  ADPDM_UNROLL
  for (int c = 0; c < kQuad; ++c) {
    const int64_t channel = first_channel + quad * kQuad + c;
    if (channel < x.channels) {
      load_pixels<kType>(x, image, channel, first_pixel + group * kSize, vectors, values[c]);
    } else {
      ADPDM_UNROLL
      for (int i = 0; i < kSize; ++i) values[c][i] = 0.0f;
    }
  }
  ADPDM_UNROLL
  for (int i = 0; i < kSize; ++i) {
    const float pixel[kQuad] = {values[0][i], values[1][i], values[2][i], values[3][i]};
    shared_store(reinterpret_cast<uint32_t*>(tile + tile_offset<kType>(group * kSize + i, quad)),
                 code_word(pixel, q));
  }
}

template <FloatType kType>
ADPDM_DEVICE void write_tile(const PlanesView& x, int64_t image, int64_t first_channel, int64_t first_pixel,
                             const unsigned char* tile, bool chunks, int8_t* codes) {
  constexpr int kTileChunks = kTileChannels / kChunk;
  for (int i = thread_index(); i < kTilePixels<kType> * kTileChunks; i += kThreads) {
    const int64_t pixel = first_pixel + i / kTileChunks;
    const int64_t channel = first_channel + i % kTileChunks * kChunk;
    if (pixel >= x.pixels || channel >= x.channels) continue;
    const int offset = tile_offset<kType>(i / kTileChunks, i % kTileChunks * (kChunk / kQuad));
    const Bytes16 bytes = shared_load(reinterpret_cast<const Bytes16*>(tile + offset));
    int8_t* target = codes + (image * x.pixels + pixel) * x.channels + channel;
    if (chunks) {
      store(reinterpret_cast<Bytes16*>(target), bytes);
      continue;
    }
    ADPDM_UNROLL
    for (int b = 0; b < kChunk; ++b) {
      if (channel + b < x.channels) store(target + b, static_cast<int8_t>(bytes.word[b / 4] >> (b % 4 * 8)));
    }
  }
}

// `vectors`: x can be read by 16 bytes along pixels; `chunks`: codes can be written by 16 along channels.
template <FloatType kType>
ADPDM_KERNEL(kThreads, 4)
quantize_channels_last_kernel(PlanesView x, GroupedQParams qparams, CodeRange range, int8_t* codes,
                              bool vectors, bool chunks) {
  const int64_t tiles = (x.pixels + kTilePixels<kType> - 1) / kTilePixels<kType>;
  const int64_t image = block_x() / tiles, first_pixel = block_x() % tiles * kTilePixels<kType>;
  const int64_t first_channel = block_y() * kTileChannels;
  const Quantizer q = current_quantizer(qparams, range);
  fill_tile<kType>(x, image, first_channel, first_pixel, q, vectors, shared_memory());
  block_barrier();
  write_tile<kType>(x, image, first_channel, first_pixel, shared_memory(), chunks, codes);
}

}  // namespace

void quantize_channels_last(const PlanesView& x, const GroupedQParams& qparams, int num_bits, int8_t* codes,
                            Stream stream) {
  const Range range([&] {
    return range_text("quantize_channels_last", {x.batch, x.channels, x.pixels}, x.type, num_bits);
  });
  const int64_t size = float_size(x.type);
  const bool vectors =
      is_aligned(x.data, 16) && x.pixels * size % 16 == 0 && (x.batch <= 1 || x.stride * size % 16 == 0);
  const bool chunks = is_aligned(codes, kChunk) && x.channels % kChunk == 0;
  with_float_type(x.type, [&](auto type) {
    constexpr FloatType kType = decltype(type)::value;
    const int64_t pixel_tiles = (x.pixels + kTilePixels<kType> - 1) / kTilePixels<kType>;
    const int64_t channel_tiles = (x.channels + kTileChannels - 1) / kTileChannels;
    const LaunchShape shape = {
        x.batch * pixel_tiles,   channel_tiles, 1, kThreads, kTilePixels<kType> * kTileChannels, stream,
        "quantize_channels_last"};
    launch(quantize_channels_last_kernel<kType>, shape, x, qparams, signed_range(num_bits), codes, vectors,
           chunks);
  });
}

}  // namespace adpdm::cuda
