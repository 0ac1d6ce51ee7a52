// One launch of the implicit GEMM under conv2d and linear, as host and kernels describe it: [rows, reduction]
// codes gathered from an image times [outputs, reduction] weight codes.
#pragma once

#include <cstdint>

#include "core/igemm.h"
#include "core/quant_math.h"

namespace adpdm::cuda {

// How codes are stored, and as what they are multiplied.
enum class IgemmMode : uint8_t {
  kA8W8,
  kA8W4,          // weights become int8 in registers
  kA4W4,          // 4-bit tensor cores: compute capability 8.x
  kA4W4Unpacked,  // both become int8 in registers: all other devices
};
constexpr int kNumIgemmModes = 4;

constexpr int activation_bits(IgemmMode mode) {
  return mode == IgemmMode::kA8W8 || mode == IgemmMode::kA8W4 ? 8 : 4;
}
constexpr int weight_bits(IgemmMode mode) { return mode == IgemmMode::kA8W8 ? 8 : 4; }

// A 4-bit code is unpacked into the upper half of a byte, where it counts 16 times: sums come out shifted.
constexpr int sum_shift(IgemmMode mode) {
  return mode == IgemmMode::kA8W4 ? 4 : mode == IgemmMode::kA4W4Unpacked ? 8 : 0;
}

// Output pixels and output channels that one block computes.
struct IgemmTile {
  int rows;
  int outputs;
};

constexpr bool operator==(const IgemmTile& a, const IgemmTile& b) {
  return a.rows == b.rows && a.outputs == b.outputs;
}

// Kernels copy 16 bytes of a row at a time: 16 int8 codes or 32 of 4 bits.
constexpr int kChunkBytes = 16;
constexpr int codes_in(int bytes, int bits) { return bytes * 8 / bits; }

// A row of the weight blob is one output's codes by (tap, channel), channels fastest, filled with 0 to whole
// blocks of this many: every tile of every kernel steps through it without a tail.
constexpr int64_t kWeightBlock = 128;
constexpr int64_t weight_row_bytes(int64_t reduction, int weight_bits) {
  return ceil_div(reduction, kWeightBlock) *
         (stored_in_nibbles(weight_bits) ? kWeightBlock / 2 : kWeightBlock);
}

// Behind the rows, the blob holds every byte 16 times: what a chunk of the halo is copied from.
constexpr int64_t kFillBytes = 256 * kChunkBytes;

// One segment of the reduction.
struct IgemmSource {
  const uint8_t* codes;       // [N, H, W, all channels] i8, or two to a byte in the order of quantize_int4
  const uint8_t* weight;      // [groups, outputs, weight_row] blob
  const uint8_t* fill;        // [256, 16] behind it
  const float* weight_scale;  // [groups * outputs] f32
  const int32_t* weight_sum;  // [groups * outputs] i32
  GroupedQParams qparams;
  int64_t weight_row;   // bytes
  int64_t pixel_bytes;  // from pixel to pixel: the channels of all groups
  int32_t channels;     // of one group
  int32_t num_k_tiles;  // of the tile in use, in taps * channels
};

// From output pixels to input pixels. Coordinates are those of the image after nearest upsampling by 2^shift.
struct IgemmGeometry {
  int32_t height, width;  // of the input
  int32_t upsample_shift;
  int32_t out_height, out_width;
  int32_t kernel_height, kernel_width;
  int32_t stride_height, stride_width;
  int32_t padding_top, padding_left;
  int32_t dilation_height, dilation_width;
};

struct IgemmProblem {
  IgemmSource sources[kMaxSegments];
  int32_t num_sources;
  IgemmGeometry geometry;
  IgemmOutput output;
  int32_t rows;            // output pixels of all images
  int32_t rows_per_image;  // of output.row_scale and row_bias
  int32_t outputs;         // of one group
  int32_t groups;
  bool wide;  // outputs is a multiple of 8 and every pointer of the epilogue one of 16: no tails, vectors
  int32_t row_tiles, output_tiles;
  // Split reduction: block z writes the sums of its share as slice z, a second kernel adds the slices.
  int32_t splits;
  int32_t splits_of_first;  // shares of source 0; the rest are shares of source 1
  int32_t* slices;          // [splits, row_tiles * tile rows, groups, output_tiles * tile outputs] i32
  int64_t slice_row;        // elements from row to row
  int64_t slice_size;       // elements from slice to slice
};

// The part of one source's reduction that a block sums up, in k tiles.
struct KRange {
  int32_t begin;
  int32_t end;
};

// Which sources block z works on: all of them, or one where the reduction is split.
ADPDM_HD int first_source(const IgemmProblem& problem, int z) {
  return problem.splits > 1 && z >= problem.splits_of_first ? 1 : 0;
}
ADPDM_HD int end_source(const IgemmProblem& problem, int z) {
  return problem.splits > 1 ? first_source(problem, z) + 1 : problem.num_sources;
}

// First slice of a source, and with source + 1 the one behind its last.
ADPDM_HD int first_slice(const IgemmProblem& problem, int source) {
  return source == 0 ? 0 : source == 1 ? problem.splits_of_first : problem.splits;
}

ADPDM_HD KRange k_range(const IgemmProblem& problem, int source, int z) {
  const int32_t tiles = problem.sources[source].num_k_tiles;
  if (problem.splits == 1) return {0, tiles};
  const int first = first_slice(problem, source);
  const int shares = first_slice(problem, source + 1) - first;
  return {tiles * (z - first) / shares, tiles * (z - first + 1) / shares};
}

}  // namespace adpdm::cuda
