// 3x3 convolutions of stride 1 in exact integers by Winograd's F(2x2, 3x3) and F(4x4, 3x3): 16
// multiplications instead of 36 for 2x2 outputs, 36 instead of 144 for 4x4. They are of 16-bit numbers, which
// cost what products of bytes do on AVX2 and twice that with VNNI.
#pragma once

#include <cstdint>

#include "cpu/igemm.h"

namespace adpdm::cpu {

constexpr int kMaxWinogradSide = 4;    // outputs of a tile in one direction
constexpr int kMaxWinogradBlocks = 2;  // blocks of 16 outputs multiplied together

// Elements from the end of one point to the next: a power of two from point to point would put all of them
// into the same sets of the L1 cache.
constexpr int64_t kWinogradPadding = 32;

// Tiles whose points are summed before any is transformed back: up to 72 KiB of sums.
constexpr int64_t kMaxWinogradBatch = 16;

// Tiles of an item, which share its transformed weights; their sums take 128 KiB, and their values as much
// where they wait for a second segment.
constexpr int64_t kMaxWinogradTiles = 64;

// A row of tiles of one image: as many rows of output pixels as a tile has.
struct WinogradRow {
  const int8_t* codes;  // first code under the first tap
  int64_t row_step;     // bytes between rows of pixels
  int64_t column_step;  // bytes between pixels
  int64_t channels;
  int64_t tiles;
};

// The four channels of a quad lie in the order 0, 2, 1, 3: weights then become the pairs that are multiplied,
// of channels 0 and 2 and of 1 and 3, by shifts alone.
struct WinogradSegment {
  const int16_t* codes;  // [points][point_step], of each [tiles][channels] i16, at the first tile
  int64_t point_step;
  int64_t channels;
  int64_t slice;  // channels that are multiplied before their points are transformed back
};

// Room for an item, aligned to 64 bytes.
struct WinogradScratch {
  // Of a slice of channels: [blocks][points], of each [channels / 2][16 outputs][2] i16 and kWinogradPadding.
  int16_t* weights;
  int32_t* points;  // [points][batch][blocks][16 outputs]
  int32_t* sums;    // [batches], of each [rows of a tile][its pixels of all tiles][blocks][16 outputs]
  float* values;    // the same; of a single segment one batch at a time, the first's place
};

// Successive tiles, perhaps of several rows, times some blocks of 16 outputs.
struct WinogradItem {
  WinogradSegment segments[kMaxSegments];
  Tile block;         // the blocks' outputs and segments, output at pixel 0
  int64_t tiles;      // up to kMaxWinogradTiles
  int64_t first;      // of all tiles
  int64_t row_tiles;  // tiles in a row
  WinogradScratch scratch;
};

// Pairs of 16-bit channels of some tiles, and the weights they meet at one point.
struct PairOperands {
  const int16_t* codes;  // [tiles][code_step]
  int64_t code_step;
  const int16_t* weights;  // [blocks][block_step], of each [pairs][16 outputs][2]
  int64_t block_step;
  int64_t pairs;
};

struct WinogradKernel {
  int side;           // outputs of a tile in one direction
  int blocks;         // of 16 outputs in an item
  int64_t lanes;      // channels are a multiple
  int64_t slice;      // channels of any codes and weights whose sums are exact
  int64_t max_sum;    // magnitude up to which they are
  int64_t min_tiles;  // of a convolution: for fewer the transform of weights costs more than it saves
  // One row of tiles -> points [(side + 2)^2][point_step], of each the first tiles * channels.
  void (*transform_codes)(const WinogradRow& row, int16_t* points, int64_t point_step);
  void (*run)(const WinogradItem& item);

  int64_t points() const { return (side + 2) * (side + 2); }
};

// Elements of a point of weights of one block.
__attribute__((always_inline)) constexpr int64_t winograd_weight_step(int64_t channels) {
  return channels * kBlockOutputs + kWinogradPadding;
}

namespace avx2 {
extern const WinogradKernel winograd_2x2;
extern const WinogradKernel winograd_4x4;
}  // namespace avx2

// Of both encodings of AVX-VNNI. Times without and with, 64 and 256 channels: 0.73 and 0.79 for 4 tiles, 0.92
// and 1.05 for 9, 1.13 for 16 (Zen 4, 2026-11).
constexpr int64_t kMinTilesAvxVnni = 12;

namespace avx_vnni {
extern const WinogradKernel winograd_4x4;
}
namespace avx_vnni_evex {
extern const WinogradKernel winograd_4x4;
}
namespace avx512 {
extern const WinogradKernel winograd_4x4;
}

// The kernel to use for the problem on the instruction set in use; nullptr where there is none, or none is
// quicker.
const WinogradKernel* select_winograd(const Igemm& problem);

// As run_igemm().
void run_winograd(const Igemm& problem, const WinogradKernel& kernel);

enum class WinogradUse { kWhereQuicker, kNever, kForAnyTiles };

// Forces the choice of select_winograd() for its lifetime, in all threads, as ScopedIsa does a level. With
// kForAnyTiles kernels run for fewer tiles than they are quicker for.
class ScopedWinograd {
 public:
  explicit ScopedWinograd(WinogradUse use);
  ~ScopedWinograd();
  ScopedWinograd(const ScopedWinograd&) = delete;
  ScopedWinograd& operator=(const ScopedWinograd&) = delete;

 private:
  WinogradUse previous_;
};

}  // namespace adpdm::cpu
