// Cuts a 3x3 convolution into Winograd tiles: codes are transformed for as many rows of tiles as stay in the
// cache, weights by whoever multiplies with them.
#include "cpu/winograd.h"

#include <algorithm>
#include <vector>

#include "core/row_view.h"
#include "cpu/parallel.h"

namespace adpdm::cpu {

#if defined(__x86_64__)
namespace {

// Transformed codes of one pass over the outputs: they come from the L2 or L3 cache once for each block of
// 16 outputs.
constexpr int64_t kMaxPointBytes = 1 << 20;

// Tiles of a pass for which a thread transforms the weights of a block: their transform costs as much as the
// products of about 3 tiles.
constexpr int64_t kMinTilesPerItem = 64;

// Multiply-add steps below which another thread costs more than it saves, as in igemm.cpp.
constexpr int64_t kMinStepsPerThread = 20000;

// Below this many pixels, products of bytes with 4-bit weights beat the transform of those: 0.7 of the time
// for 256 -> 256 channels at 4x4, 0.97 to 1.02 at 8x8, 1.02 to 1.27 at 16x16 on one thread of a busy Zen 3,
// 2026-11.
constexpr int64_t kMinPixelsWithNibbles = 128;

struct Pass {
  const Igemm& problem;
  int64_t row_tiles;   // tiles in a row
  int64_t image_rows;  // rows of tiles in an image
  int64_t rows;        // rows of tiles of a full pass
  int64_t first_row;   // of all rows of tiles
  int64_t tiles;       // of this pass
  int16_t* points[kMaxSegments];

  int64_t channels(int s) const { return problem.inputs[s].tile.quads * kQuadChannels; }
  int64_t point_step(int s) const { return tiles * channels(s) + kWinogradPadding; }
};

void transform_codes(const Pass& pass, int64_t row) {
  const int64_t image = (pass.first_row + row) / pass.image_rows;
  const int64_t y = (pass.first_row + row) % pass.image_rows * 2;
  for (int s = 0; s < pass.problem.tile.num_segments; ++s) {
    const IgemmInput& input = pass.problem.inputs[s];
    const int64_t channels = pass.channels(s);
    const WinogradRow tiles{input.codes + image * input.image_step + y * input.row_step, input.row_step,
                            input.column_step, channels, pass.row_tiles};
    avx2::winograd_codes(tiles, pass.points[s] + row * pass.row_tiles * channels, pass.point_step(s));
  }
}

// The block's weights as 16 points, and everything else of WinogradTiles that all its tiles share.
void select_block(const Pass& pass, int64_t block, std::vector<int16_t>& weights, WinogradTiles& tiles) {
  const Igemm& problem = pass.problem;
  tiles.row_tiles = pass.row_tiles;
  tiles.block = problem.tile;
  tiles.block.num_blocks = 1;
  tiles.block.num_outputs = std::min(kBlockOutputs, problem.outputs - block * kBlockOutputs);
  skip_outputs(block * kBlockOutputs, tiles.block.output);
  int64_t size = 0;
  for (int s = 0; s < problem.tile.num_segments; ++s) size += winograd_weight_step(pass.channels(s));
  weights.resize(static_cast<size_t>(size * kWinogradPoints));
  int16_t* points = weights.data();
  for (int s = 0; s < problem.tile.num_segments; ++s) {
    TileSegment segment = problem.inputs[s].tile;
    avx2::winograd_weights(segment.weight + block * segment.block_bytes, segment.quads, problem.tile.nibbles,
                           points);
    segment.weight_scale += block * kBlockOutputs;
    segment.weight_sum += block * kBlockOutputs;
    tiles.block.segments[s] = segment;
    tiles.channels[s] = pass.channels(s);
    tiles.point_step[s] = pass.point_step(s);
    tiles.weights[s] = points;
    points += kWinogradPoints * winograd_weight_step(pass.channels(s));
  }
}

// Tiles [first, last) of the pass.
void multiply_tiles(const Pass& pass, int64_t first, int64_t last, WinogradTiles& tiles) {
  for (int64_t begin = first; begin < last; begin += kMaxWinogradTiles) {
    tiles.num_tiles = static_cast<int>(std::min<int64_t>(kMaxWinogradTiles, last - begin));
    tiles.first = pass.first_row * pass.row_tiles + begin;
    for (int s = 0; s < pass.problem.tile.num_segments; ++s) {
      tiles.codes[s] = pass.points[s] + begin * tiles.channels[s];
    }
    avx2::winograd_tiles(tiles);
  }
}

void run_pass(const Pass& pass) {
  const int64_t rows = pass.tiles / pass.row_tiles;
  const int64_t blocks = ceil_div(pass.problem.outputs, kBlockOutputs);
  const int64_t parts = ceil_div(pass.tiles, kMinTilesPerItem);
  int64_t quads = 0;
  for (int s = 0; s < pass.problem.tile.num_segments; ++s) quads += pass.problem.inputs[s].tile.quads;
  const int64_t row_grain = ceil_div(kMinStepsPerThread, quads * pass.row_tiles * kWinogradPoints);
  parallel_for(0, rows, row_grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) transform_codes(pass, row);
  });
  const int64_t steps = quads * kWinogradPoints * pass.tiles / parts;
  parallel_for(0, blocks * parts, ceil_div(kMinStepsPerThread, steps), [&](int64_t begin, int64_t end) {
    thread_local std::vector<int16_t> weights;
    WinogradTiles tiles{};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item % parts;
      if (item == begin || part == 0) select_block(pass, item / parts, weights, tiles);
      multiply_tiles(pass, pass.tiles * part / parts, pass.tiles * (part + 1) / parts, tiles);
    }
  });
}

}  // namespace

bool winograd_applies(const Igemm& problem) {
  if (active_isa() != Isa::kAvx2 || problem.groups > 1) return false;
  if (problem.tile.tap_rows != 3 || problem.tile.tap_columns != 3) return false;
  if (problem.rows % 2 == 1 || problem.columns % 2 == 1) return false;
  if (problem.tile.nibbles && problem.images * problem.rows * problem.columns < kMinPixelsWithNibbles) {
    return false;
  }
  for (int s = 0; s < problem.tile.num_segments; ++s) {
    const IgemmInput& input = problem.inputs[s];
    const int64_t channels = input.tile.quads * kQuadChannels;
    if (channels % kWinogradChannels > 0 || channels > kMaxWinogradChannels) return false;
    if (input.row_step != input.tile.tap_row_step) return false;  // stride 1, dilation 1
    if (input.column_step != input.tile.tap_column_step) return false;
  }
  return true;
}

void run_winograd(const Igemm& problem) {
  Pass pass{problem, problem.columns / 2, problem.rows / 2, 0, 0, 0, {}};
  int64_t channels = 0;
  for (int s = 0; s < problem.tile.num_segments; ++s) channels += pass.channels(s);
  const int64_t row_points = pass.row_tiles * channels * kWinogradPoints;
  const int64_t all_rows = problem.images * pass.image_rows;
  const auto fitting = kMaxPointBytes / static_cast<int64_t>(row_points * sizeof(int16_t));
  pass.rows = std::clamp<int64_t>(fitting, 1, all_rows);
  thread_local std::vector<int16_t> points;  // fresh pages cost more than filling them
  const int64_t size = pass.rows * row_points + kMaxSegments * kWinogradPoints * kWinogradPadding;
  if (static_cast<int64_t>(points.size()) < size) points.resize(static_cast<size_t>(size));
  for (; pass.first_row < all_rows; pass.first_row += pass.rows) {
    pass.tiles = std::min(pass.rows, all_rows - pass.first_row) * pass.row_tiles;
    int16_t* next = points.data();
    for (int s = 0; s < problem.tile.num_segments; ++s) {
      pass.points[s] = next;
      next += kWinogradPoints * pass.point_step(s);
    }
    run_pass(pass);
  }
}

#else

bool winograd_applies(const Igemm&) { return false; }
void run_winograd(const Igemm&) {}

#endif

}  // namespace adpdm::cpu
