// Winograd's transforms and products for AVX2.
#define ADPDM_ISA_NAMESPACE avx2
#include "cpu/igemm_epilogue.h"
#include "cpu/multiply_avx2.h"
#include "cpu/winograd.h"

namespace adpdm::cpu::avx2 {
namespace {

constexpr int kSide = 4;  // points of a tile in one direction

// Two columns of 4 codes of 16 channels each, already transformed downwards: B^T d.
struct ColumnPair {
  __m256i v[2][kSide];
};

inline __m256i load_codes(const int8_t* codes) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

inline void transform_codes(const __m256i (&d)[kSide], __m256i (&t)[kSide]) {
  t[0] = _mm256_sub_epi16(d[0], d[2]);
  t[1] = _mm256_add_epi16(d[1], d[2]);
  t[2] = _mm256_sub_epi16(d[2], d[1]);
  t[3] = _mm256_sub_epi16(d[1], d[3]);
}

inline ColumnPair load_columns(const WinogradRow& row, const int8_t* codes) {
  ColumnPair pair;
#pragma GCC unroll 2
  for (int x = 0; x < 2; ++x) {
    __m256i d[kSide];
#pragma GCC unroll 4
    for (int y = 0; y < kSide; ++y) d[y] = load_codes(codes + y * row.row_step + x * row.column_step);
    transform_codes(d, pair.v[x]);
  }
  return pair;
}

// g [3] -> G g, 4 points.
inline void transform_weights(const __m256i (&g)[3], __m256i (&t)[kSide]) {
  const __m256i outer = _mm256_add_epi16(g[0], g[2]);
  t[0] = _mm256_add_epi16(g[0], g[0]);
  t[1] = _mm256_add_epi16(outer, g[1]);
  t[2] = _mm256_sub_epi16(outer, g[1]);
  t[3] = _mm256_add_epi16(g[2], g[2]);
}

// One vector of weights of all 9 taps -> 16 points, kept point_step elements apart.
inline void store_weight_points(const __m256i (&taps)[9][2 * kOutputVectors], int v, int16_t* points,
                                int64_t point_step) {
  __m256i columns[3][kSide];
#pragma GCC unroll 3
  for (int x = 0; x < 3; ++x) {
    const __m256i g[3] = {taps[x][v], taps[3 + x][v], taps[6 + x][v]};
    transform_weights(g, columns[x]);
  }
#pragma GCC unroll 4
  for (int y = 0; y < kSide; ++y) {
    const __m256i g[3] = {columns[0][y], columns[1][y], columns[2][y]};
    __m256i t[kSide];
    transform_weights(g, t);
#pragma GCC unroll 4
    for (int x = 0; x < kSide; ++x) store_vector(points + (y * kSide + x) * point_step, t[x]);
  }
}

using Sums = int32_t[kBlockOutputs];

// d [4] -> A^T d, 2 values.
inline void transform_sums(const __m256i (&d)[kSide], __m256i (&t)[2]) {
  t[0] = _mm256_add_epi32(_mm256_add_epi32(d[0], d[1]), d[2]);
  t[1] = _mm256_sub_epi32(_mm256_sub_epi32(d[1], d[2]), d[3]);
}

// 8 outputs of a tile's 16 points -> its 2x2 sums.
inline void finish_sums(const Sums* points, int64_t point_step, int v, __m256i (&sums)[2][2]) {
  __m256i columns[kSide][2];
#pragma GCC unroll 4
  for (int x = 0; x < kSide; ++x) {
    __m256i d[kSide];
#pragma GCC unroll 4
    for (int y = 0; y < kSide; ++y) d[y] = load_vector(points[(y * kSide + x) * point_step] + 8 * v);
    transform_sums(d, columns[x]);
  }
#pragma GCC unroll 2
  for (int y = 0; y < 2; ++y) {
    const __m256i d[kSide] = {columns[0][y], columns[1][y], columns[2][y], columns[3][y]};
    transform_sums(d, sums[y]);
    for (int x = 0; x < 2; ++x) sums[y][x] = _mm256_srai_epi32(sums[y][x], 2);  // the 4 of both G
  }
}

// Values of two rows of pixels, two for each tile.
using Values = float[2 * kMaxWinogradTiles][kBlockOutputs];

void add_segment(const WinogradTiles& tiles, int segment, Values (&values)[2]) {
  alignas(64) Sums sums[kWinogradPoints * kMaxWinogradTiles];
  const int64_t channels = tiles.channels[segment];
  for (int64_t point = 0; point < kWinogradPoints; ++point) {
    const int16_t* codes = tiles.codes[segment] + point * tiles.point_step[segment];
    const int16_t* weights = tiles.weights[segment] + point * winograd_weight_step(channels);
    for (int t = 0; t < tiles.num_tiles; t += kPairPixels) {
      multiply_group<false>(tiles.num_tiles - t, codes + t * channels, channels, weights, channels / 2,
                            sums + point * kMaxWinogradTiles + t);
    }
  }
  const BlockParams params(tiles.block.segments[segment], 0, tiles.block.num_outputs, 0);
  for (int t = 0; t < tiles.num_tiles; ++t) {
    for (int v = 0; v < kOutputVectors; ++v) {
      __m256i outputs[2][2];
      finish_sums(sums + t, kMaxWinogradTiles, v, outputs);
      for (int y = 0; y < 2; ++y) {
        for (int x = 0; x < 2; ++x) params.add(v, outputs[y][x], values[y][2 * t + x]);
      }
    }
  }
}

}  // namespace

void winograd_codes(const WinogradRow& row, int16_t* points, int64_t point_step) {
  for (int64_t c = 0; c < row.channels; c += kWinogradChannels) {
    const int8_t* codes = row.codes + c;
    int16_t* tile = points + c;
    ColumnPair left = load_columns(row, codes);
    for (int64_t i = 0; i < row.tiles; ++i, tile += row.channels) {
      codes += 2 * row.column_step;
      const ColumnPair right = load_columns(row, codes);
#pragma GCC unroll 4
      for (int y = 0; y < kSide; ++y) {
        const __m256i d[kSide] = {left.v[0][y], left.v[1][y], right.v[0][y], right.v[1][y]};
        __m256i t[kSide];
        transform_codes(d, t);
#pragma GCC unroll 4
        for (int x = 0; x < kSide; ++x) store_vector(tile + (y * kSide + x) * point_step, t[x]);
      }
      left = right;
    }
  }
}

void winograd_weights(const uint8_t* packed, int64_t quads, bool nibbles, int16_t* points) {
  const int64_t tap_bytes = quads * kQuadBytes / (nibbles ? 2 : 1);
  const int64_t point_step = winograd_weight_step(quads * kQuadChannels);
  for (int64_t q = 0; q < quads; ++q) {
    const uint8_t* quad = packed + (nibbles ? q / 2 : q) * kQuadBytes;
    __m256i taps[9][2 * kOutputVectors];
    for (int tap = 0; tap < 9; ++tap, quad += tap_bytes) {
      __m256i halves[2] = {load_vector(quad), load_vector(quad + kQuadBytes / 2)};
      if (nibbles) {
        for (__m256i& half : halves) half = unpack_nibbles(half, q % 2 == 1);
      }
      const WidePairs wide = widen_pairs(halves[0], halves[1]);
      for (int v = 0; v < 2 * kOutputVectors; ++v) taps[tap][v] = wide.v[v];
    }
    for (int v = 0; v < 2 * kOutputVectors; ++v) {
      store_weight_points(taps, v, points + q * kQuadBytes + 16 * v, point_step);
    }
  }
}

void winograd_tiles(const WinogradTiles& tiles) {
  alignas(64) Values values[2];
  for (auto& row : values) start_values(tiles.block, 2 * tiles.num_tiles, row[0]);
  for (int s = 0; s < tiles.block.num_segments; ++s) add_segment(tiles, s, values);
  for (int64_t t = 0; t < tiles.num_tiles;) {  // tiles of one row at a time
    const int64_t row = (tiles.first + t) / tiles.row_tiles;
    const int64_t column = (tiles.first + t) % tiles.row_tiles;
    const int64_t run = std::min<int64_t>(tiles.num_tiles - t, tiles.row_tiles - column);
    for (int64_t y = 0; y < 2; ++y) {
      Tile tile = tiles.block;
      tile.num_pixels = static_cast<int>(2 * run);
      tile.first_pixel = (2 * row + y) * 2 * tiles.row_tiles + 2 * column;
      skip_pixels(tile.first_pixel, tile.output);
      finish_tile(tile, values[y][2 * t]);
    }
    t += run;
  }
}

}  // namespace adpdm::cpu::avx2
