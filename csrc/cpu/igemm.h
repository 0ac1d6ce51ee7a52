// The integer GEMM under linear and conv2d: tiles of output pixels x output channels, one tile kernel per
// instruction set.
#pragma once

#include <cstdint>

#include "core/igemm.h"
#include "cpu/isa.h"
#include "cpu/quantize_kernels.h"

namespace adpdm::cpu {

constexpr int kMaxTilePixels = 24;
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

// Where the results of pixels go and what happens to them on the way: IgemmOutput with pointers of its own.
struct TileOutput {
  const float* bias;       // [num_outputs] f32 or nullptr
  const float* row_scale;  // [images, outputs] f32, at image 0; or nullptr
  const float* row_bias;   // the same
  const char* residual;    // [pixels, outputs] residual_type or nullptr
  char* data;              // [pixels, step] type, or i8 where quantized
  int64_t outputs;         // from pixel to pixel of residual, from image to image of row_*
  int64_t step;            // from pixel to pixel of data
  int64_t image_pixels;    // pixels that share a row of row_scale and row_bias
  FloatType type;
  FloatType residual_type;
  Activation activation;
  float scale;
  bool quantized;
  bool plain;  // float32 as it comes: nothing but the bias
  Quantizer quantizer;
};

struct Tile {
  TileSegment segments[kMaxSegments];
  int num_segments;
  int num_pixels;       // 1..max_pixels[num_blocks] of the kernel
  int num_blocks;       // 1..max_blocks of the kernel
  int64_t num_outputs;  // 16 * (num_blocks - 1) < num_outputs <= 16 * num_blocks
  int64_t first_pixel;  // of all pixels
  int64_t tap_rows;
  int64_t tap_columns;
  TileOutput output;  // at the tile's first output and pixel; pixels follow one another
  bool nibbles;       // weights are 4-bit
  int weight_bits;    // codes are within the range of so many
};

struct IgemmKernel {
  void (*run)(const Tile& tile);
  int max_blocks;                      // blocks of 16 outputs in one tile
  int max_pixels[kMaxTileBlocks + 1];  // by number of blocks
};

ADPDM_DECLARE_PER_ISA_AND_VNNI(extern const IgemmKernel igemm_kernel)

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
  Tile tile;        // what all tiles share; its output at output 0, pixel 0
};

// Hidden, so that -fPIC lets the compiler inline them where they are defined, once per tile.
#define ADPDM_HIDDEN __attribute__((visibility("hidden")))

// Points the tile at the blocks [first, last) of one group's outputs, at pixel 0.
ADPDM_HIDDEN void select_outputs(const Igemm& problem, int64_t group, int64_t first, int64_t last,
                                 Tile& tile);

// Move to a later output (one that pairs of geglu do not straddle: a multiple of 16) or pixel.
ADPDM_HIDDEN void skip_outputs(int64_t outputs, TileOutput& output);
ADPDM_HIDDEN void skip_pixels(int64_t pixels, TileOutput& output);

#undef ADPDM_HIDDEN

// Computes all tiles, in parallel; the result does not depend on the number of threads.
void run_igemm(const Igemm& problem);

}  // namespace adpdm::cpu
