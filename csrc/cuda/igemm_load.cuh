// Copies tiles of activations and weights to shared memory for the implicit GEMM: 16-byte chunks, swizzled.
#pragma once

#include "cuda/device.cuh"
#include "cuda/igemm_problem.h"
#include "cuda/quantizer.cuh"

namespace adpdm::cuda {

// Where a block works: tiles run down panels of 8 rows of tiles, so that blocks at work together share both
// activations and weights in the second-level cache.
struct TilePosition {
  int32_t row;     // first output pixel
  int32_t output;  // first output channel within the group
  int32_t group;
};

ADPDM_DEVICE TilePosition tile_position(const IgemmProblem& problem, int tile_rows, int tile_outputs) {
  constexpr int32_t kPanelTiles = 8;
  const auto tile = static_cast<int32_t>(block_x());
  const int32_t panel = tile / (kPanelTiles * problem.output_tiles);
  const int32_t within = tile % (kPanelTiles * problem.output_tiles);
  const int32_t left = problem.row_tiles - panel * kPanelTiles;
  const int32_t height = left < kPanelTiles ? left : kPanelTiles;
  return {(panel * kPanelTiles + within % height) * tile_rows, within / height * tile_outputs,
          static_cast<int32_t>(block_y())};
}

// Byte offset of a chunk in a tile of rows of 32, 64 or 128 bytes. Chunks change places from row to row, so
// that the 8 rows an ldmatrix reads at one chunk lie in different banks. For 128 bytes it is the 128-byte
// swizzle of wgmma.
template <int kRowBytes>
ADPDM_DEVICE int swizzled(int row, int chunk) {
  constexpr int kRowsPerLine = 128 / kRowBytes;
  constexpr int kChunks = kRowBytes / kChunkBytes;
  return row * kRowBytes + ((chunk ^ (row / kRowsPerLine & (kChunks - 1))) * kChunkBytes);
}

// A position in the reduction, and a distance.
struct TapPosition {
  int32_t tap;
  int32_t channel;
};

ADPDM_DEVICE TapPosition tap_at(int32_t k, int32_t channels) { return {k / channels, k % channels}; }

// No branches and no division: this happens between the products.
ADPDM_DEVICE TapPosition advanced(const TapPosition& at, const TapPosition& by, int32_t channels) {
  const int32_t channel = at.channel + by.channel;
  const bool carry = channel >= channels;
  return {at.tap + by.tap + carry, carry ? channel - channels : channel};
}

// Division of taps by the width of the kernel: exact while dividend * divisor < 2^31.
struct TapDivisor {
  int32_t divisor;
  uint32_t reciprocal;  // 2^31 / divisor, rounded up
};

ADPDM_DEVICE TapDivisor tap_divisor(int32_t divisor) {
  return {divisor, (0x80000000u + static_cast<uint32_t>(divisor) - 1) / static_cast<uint32_t>(divisor)};
}

ADPDM_DEVICE int32_t divide(int32_t tap, const TapDivisor& by) {
  return static_cast<int32_t>(uint64_t{static_cast<uint32_t>(tap)} * by.reciprocal >> 31);
}

// Copies [kTileRows, kRowBytes] of the activation matrix per call, one k tile after the other. A thread has
// one column of chunks and every kStep-th row. Channels are whole chunks, or (kGather) any number of int8
// codes.
template <int kBits, int kTileRows, int kRowBytes, int kThreads, bool kGather>
class ActivationLoader {
 public:
  ADPDM_DEVICE ActivationLoader(const IgemmProblem& problem, const IgemmSource& source,
                                const TilePosition& tile, int32_t first_k_tile)
      : channels_(source.channels),
        pixel_bytes_(source.pixel_bytes),
        kernel_width_(tap_divisor(problem.geometry.kernel_width)) {
    const IgemmGeometry& geometry = problem.geometry;
    const uint8_t* codes = source.codes + int64_t{tile.group} * channels_ * kBits / 8;
    const int64_t image_bytes = int64_t{geometry.height >> geometry.upsample_shift} *
                                (geometry.width >> geometry.upsample_shift) * pixel_bytes_;
    ADPDM_UNROLL
    for (int i = 0; i < kRows; ++i) {
      // Rows beyond the last one repeat it: valid addresses, results that nobody stores.
      const int32_t row = tile.row + first_row() + i * kStep;
      const int32_t pixel = row < problem.rows ? row : problem.rows - 1;
      const int32_t line = pixel / geometry.out_width;
      image_[i] = codes + line / geometry.out_height * image_bytes;
      y_[i] = line % geometry.out_height * geometry.stride_height - geometry.padding_top;
      x_[i] = pixel % geometry.out_width * geometry.stride_width - geometry.padding_left;
    }
    at_ = tap_at((first_k_tile * kChunks + chunk()) * kChunkCodes, channels_);
    step_ = tap_at(kChunks * kChunkCodes, channels_);
    // The halo holds real 0, which is the zero-point.
    const int32_t zero_point = load(source.qparams.zero_point +
                                    clamped_index(source.qparams.group_index, source.qparams.num_groups));
    fill_byte_ = kBits == 8 ? zero_point & 0xff : (zero_point & 0xf) * 0x11;
    fill_ = source.fill + fill_byte_ * kChunkBytes;
  }

  // Copies nothing where it is not wanted, which costs no branch.
  ADPDM_DEVICE void load_tile(const IgemmGeometry& geometry, uint8_t* tile, bool wanted = true) {
    const Offset offset = offset_of(geometry, at_.tap);
    ADPDM_UNROLL
    for (int i = 0; i < kRows; ++i) {
      uint8_t* target = tile + swizzled<kRowBytes>(first_row() + i * kStep, chunk());
      if constexpr (kGather) {
        if (wanted) gather(geometry, i, target);
      } else {
        const uint8_t* codes = find_pixel(geometry, i, offset) + int64_t{at_.channel} * kBits / 8;
        copy_async16_if(wanted, target, is_inside(geometry, i, offset) ? codes : fill_);
      }
    }
    at_ = advanced(at_, step_, channels_);
  }

 private:
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  static constexpr int kChunkCodes = codes_in(kChunkBytes, kBits);
  static constexpr int kStep = kThreads / kChunks;
  static constexpr int kRows = kTileRows / kStep;
  static_assert(kThreads % kChunks == 0 && kTileRows % kStep == 0, "a tile is cut evenly");
  static_assert(!kGather || kBits == 8, "4-bit codes are copied in whole chunks");

  // Of a tap, from the pixel under the first one.
  struct Offset {
    int32_t y, x;
  };

  ADPDM_DEVICE static int chunk() { return thread_index() % kChunks; }
  ADPDM_DEVICE static int first_row() { return thread_index() / kChunks; }

  ADPDM_DEVICE Offset offset_of(const IgemmGeometry& geometry, int32_t tap) const {
    const int32_t row = divide(tap, kernel_width_);
    const int32_t column = tap - row * kernel_width_.divisor;
    return {row * geometry.dilation_height, column * geometry.dilation_width};
  }

  // Whether a tap of row i lies on the image, not in the halo. Taps behind the last one meet weights of 0:
  // any pixel, and the halo, will do.
  ADPDM_DEVICE bool is_inside(const IgemmGeometry& geometry, int i, const Offset& offset) const {
    return static_cast<uint32_t>(y_[i] + offset.y) < static_cast<uint32_t>(geometry.height) &&
           static_cast<uint32_t>(x_[i] + offset.x) < static_cast<uint32_t>(geometry.width);
  }

  // The codes of the input pixel under it.
  ADPDM_DEVICE const uint8_t* find_pixel(const IgemmGeometry& geometry, int i, const Offset& offset) const {
    const int shift = geometry.upsample_shift;
    const int32_t y = (y_[i] + offset.y) >> shift;
    const int32_t x = (x_[i] + offset.x) >> shift;
    return image_[i] + int64_t{y * (geometry.width >> shift) + x} * pixel_bytes_;
  }

  // A chunk of codes that may belong to several taps: byte by byte, a word at a time.
  ADPDM_DEVICE void gather(const IgemmGeometry& geometry, int i, uint8_t* target) const {
    TapPosition at = at_;
    const TapPosition one = tap_at(1, channels_);
    ADPDM_NO_UNROLL
    for (int w = 0; w < kChunkBytes / 4; ++w) {
      uint32_t word = 0;
      ADPDM_UNROLL
      for (int b = 0; b < 4; ++b) {
        const Offset offset = offset_of(geometry, at.tap);
        const uint32_t code = is_inside(geometry, i, offset)
                                  ? load(find_pixel(geometry, i, offset) + at.channel)
                                  : static_cast<uint32_t>(fill_byte_);
        word |= code << (b * 8);
        at = advanced(at, one, channels_);
      }
      shared_store(reinterpret_cast<uint32_t*>(target) + w, word);
    }
  }

  int32_t channels_;
  int32_t pixel_bytes_;
  TapDivisor kernel_width_;
  const uint8_t* image_[kRows];
  int32_t y_[kRows], x_[kRows];  // under the kernel's first tap
  TapPosition at_;               // of this thread's chunk in the next tile
  TapPosition step_;             // to the tile after it
  int32_t fill_byte_;
  const uint8_t* fill_;  // [16] of that byte
};

// Copies [kTileOutputs, kRowBytes] of the weight blob per call, one k tile after the other.
template <int kTileOutputs, int kRowBytes, int kThreads>
class WeightLoader {
 public:
  ADPDM_DEVICE WeightLoader(const IgemmProblem& problem, const IgemmSource& source, const TilePosition& tile,
                            int32_t first_k_tile)
      : step_bytes_(static_cast<int32_t>(source.weight_row) * kStep) {
    const int32_t left = problem.outputs - 1 - (tile.output + first_row());
    const int32_t output = left < 0 ? problem.outputs - 1 : tile.output + first_row();
    last_ = left < 0 ? 0 : left / kStep;
    next_ = source.weight + (int64_t{tile.group} * problem.outputs + output) * source.weight_row +
            int64_t{first_k_tile} * kRowBytes + chunk() * kChunkBytes;
  }

  ADPDM_DEVICE void load_tile(uint8_t* tile, bool wanted = true) {
    ADPDM_UNROLL
    for (int i = 0; i < kRows; ++i) {
      // Outputs beyond the last one repeat it: valid addresses, results that nobody stores.
      const int32_t row = i < last_ ? i : last_;
      copy_async16_if(wanted, tile + swizzled<kRowBytes>(first_row() + i * kStep, chunk()),
                      next_ + int64_t{row} * step_bytes_);
    }
    next_ += kRowBytes;
  }

 private:
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  static constexpr int kStep = kThreads / kChunks;
  static constexpr int kRows = kTileOutputs / kStep;
  static_assert(kThreads % kChunks == 0 && kTileOutputs % kStep == 0, "a tile is cut evenly");

  ADPDM_DEVICE static int chunk() { return thread_index() % kChunks; }
  ADPDM_DEVICE static int first_row() { return thread_index() / kChunks; }

  const uint8_t* next_;  // of the first row
  int32_t step_bytes_;   // to the next row of this thread
  int32_t last_;         // row of this thread that exists
};

}  // namespace adpdm::cuda
