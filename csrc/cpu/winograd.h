// 3x3 convolutions of stride 1 in exact integers by Winograd's F(2x2, 3x3): 16 multiplications instead of 36
// for 2x2 outputs, which pays where a multiplication of 16-bit numbers costs what one of bytes does: AVX2.
#pragma once

#include <cstdint>

#include "cpu/igemm.h"

namespace adpdm::cpu {

// With codes d (4x4 pixels) and weights g (3x3 taps) of one channel:
//   B = [[1,0,0,0],[0,1,-1,1],[-1,1,1,0],[0,0,0,-1]]   |B^T d B| <= 4 * 128
//   G = [[2,0,0],[1,1,1],[1,-1,1],[0,0,2]]             |G g G^T| <= 9 * 128; G is twice the usual one
//   A = [[1,0],[1,1],[1,-1],[0,-1]]                    A^T (sum over channels of products) A = 4 * the sums
// Both operands fit 16 bits, and 4 times the sums fit 32 bits up to kMaxWinogradChannels. Sums on the way
// there may wrap: the result is right modulo 2^32.
constexpr int64_t kMaxWinogradChannels = INT32_MAX / (4 * 9 * 128 * 128);
constexpr int64_t kWinogradPoints = 16;    // of a tile: 4x4 codes in, 2x2 sums out
constexpr int64_t kWinogradChannels = 16;  // taken together; channels are a multiple
// Elements from the end of one point to the next: a power of two from point to point would put all 16 into
// the same sets of the L1 cache.
constexpr int64_t kWinogradPadding = 32;
constexpr int kMaxWinogradTiles = 16;  // multiplied together: their sums take 16 KiB

// A row of tiles of one image: two rows of output pixels.
struct WinogradRow {
  const int8_t* codes;  // first code under the first tap
  int64_t row_step;     // bytes between rows of pixels
  int64_t column_step;  // bytes between pixels
  int64_t channels;
  int64_t tiles;
};

// Successive tiles, perhaps of several rows, times one block of 16 outputs.
struct WinogradTiles {
  const int16_t*
      codes[kMaxSegments];  // [16 points][point_step], of each [tiles][channels] i16, at the first tile
  int64_t point_step[kMaxSegments];
  const int16_t* weights[kMaxSegments];  // [16 points][channels / 2][16 outputs][2] i16, then padding
  int64_t channels[kMaxSegments];
  int num_tiles;      // up to kMaxWinogradTiles
  int64_t first;      // of all tiles
  int64_t row_tiles;  // tiles in a row
  Tile block;         // the block's outputs and segments, output at pixel 0; one block of 16 outputs
};

// Elements of a point of weights.
constexpr int64_t winograd_weight_step(int64_t channels) {
  return channels * kBlockOutputs + kWinogradPadding;
}

#if defined(__x86_64__)
namespace avx2 {

// One row of tiles -> points [16][point_step], of each the first tiles * channels.
void winograd_codes(const WinogradRow& row, int16_t* points, int64_t point_step);

// Weights of a block of 16 outputs as the blob holds them, 9 taps of `quads` -> points.
void winograd_weights(const uint8_t* packed, int64_t quads, bool nibbles, int16_t* points);

void winograd_tiles(const WinogradTiles& tiles);

}  // namespace avx2
#endif

// Whether run_winograd() takes the problem, and is quicker on the instruction set in use.
bool winograd_applies(const Igemm& problem);

// As run_igemm().
void run_winograd(const Igemm& problem);

}  // namespace adpdm::cpu
