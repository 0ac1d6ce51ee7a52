// The integer GEMM under linear and conv2d: tiles of output pixels x output channels, one tile kernel per
// instruction set.
#pragma once

#include <cstdint>

#include "core/igemm.h"
#include "cpu/isa.h"

namespace adpdm::cpu {

constexpr int kMaxTilePixels = 16;
constexpr int kMaxTileBlocks = 4;

// One segment's operands of a tile. A tap's codes are contiguous; taps form a grid of tap_rows x tap_columns.
struct TileSegment {
  const int8_t* pixels[kMaxTilePixels];  // [num_pixels] first code under the kernel's first tap
  int64_t tap_row_step;                  // bytes between rows of taps
  int64_t tap_column_step;               // bytes between taps of a row
  int64_t quads;                         // 4-byte steps per tap
  const uint8_t* weight;                 // first block of 16 outputs
  int64_t block_bytes;                   // from one block of 16 outputs to the next
  const float* weight_scale;             // [num_outputs] f32
  const int32_t* weight_sum;             // [num_outputs] i32
  float scale;
  int32_t zero_point;
};

struct Tile {
  TileSegment segments[kMaxSegments];
  int num_segments;
  int num_pixels;       // 1..max_pixels[num_blocks] of the kernel
  int num_blocks;       // 1..max_blocks of the kernel
  int64_t num_outputs;  // 16 * (num_blocks - 1) < num_outputs <= 16 * num_blocks
  int64_t tap_rows;
  int64_t tap_columns;
  const float* bias;    // [num_outputs] f32 or nullptr
  char* output;         // first output of the first pixel; pixels follow one another
  int64_t output_step;  // elements from pixel to pixel
  FloatType output_type;
  bool nibbles;  // weights are 4-bit
};

struct IgemmKernel {
  void (*run)(const Tile& tile);
  int max_blocks;                      // blocks of 16 outputs in one tile
  int max_pixels[kMaxTileBlocks + 1];  // by number of blocks
};

ADPDM_DECLARE_PER_ISA(extern const IgemmKernel igemm_kernel)

// Where one segment's codes lie, halo included; steps are bytes between neighbouring output pixels.
struct IgemmInput {
  const int8_t* codes;
  int64_t image_step;
  int64_t row_step;
  int64_t column_step;
  int64_t group_step;  // bytes between the channels of two groups
  TileSegment tile;    // all but pixels, with weight, weight_scale and weight_sum at output 0
};

struct Igemm {
  IgemmInput inputs[kMaxSegments];
  int64_t images;
  int64_t rows;  // output pixels of an image
  int64_t columns;
  int64_t groups;
  int64_t outputs;  // all groups together
  Tile tile;        // what all tiles share; bias and output at output 0
};

// Computes all tiles, in parallel; the result does not depend on the number of threads.
void run_igemm(const Igemm& problem);

}  // namespace adpdm::cpu
