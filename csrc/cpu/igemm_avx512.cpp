// The integer GEMM tile for AVX-512 VNNI: up to 24 accumulators of 16 outputs, one vpdpbusd per 4 channels.
#define ADPDM_ISA_NAMESPACE avx512
#include <immintrin.h>

#include <utility>

#include "cpu/igemm.h"
#include "cpu/igemm_epilogue.h"

namespace adpdm::cpu::avx512 {
namespace {

constexpr int kBlocks = kMaxTileBlocks;
// Pixels by blocks: 24 accumulators, 4 weight vectors, the shifted codes and 2 constants fit the 32
// registers. One core of a Zen 4 server ran 3100 (12 x 2) to 3600 (6 x 4) vpdpbusd per microsecond in 3x3
// convolutions, 2026-11.
constexpr int kPixels[kBlocks + 1] = {0, 12, 12, 8, 6};

// vpdpbusd wants unsigned codes: flipping the sign bit adds 128, which the zero-point correction takes back.
constexpr int32_t kCodeShift = 128;

template <int P, int B>
using Accumulators = __m512i[P][B];

__m512i shifted_codes(const int8_t* codes) {
  int32_t quad;
  __builtin_memcpy(&quad, codes, sizeof quad);
  return _mm512_xor_si512(_mm512_set1_epi8(static_cast<char>(kCodeShift)), _mm512_set1_epi32(quad));
}

template <int P, int B>
inline __attribute__((always_inline)) void multiply(const int8_t* const (&pixels)[P], int64_t offset,
                                                    const __m512i (&weights)[B], Accumulators<P, B>& sums) {
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    const __m512i codes = shifted_codes(pixels[p] + offset);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sums[p][b] = _mm512_dpbusd_epi32(sums[p][b], codes, weights[b]);
  }
}

// One tap with 8-bit weights; returns the next tap's weights.
template <int P, int B>
inline __attribute__((always_inline)) const uint8_t* multiply_tap_bytes(const int8_t* const (&pixels)[P],
                                                                        int64_t tap,
                                                                        const TileSegment& segment,
                                                                        const uint8_t* weight,
                                                                        Accumulators<P, B>& sums) {
  const int64_t end = tap + segment.quads * kQuadChannels;
  const int64_t block_bytes = segment.block_bytes;
  for (int64_t offset = tap; offset < end; offset += kQuadChannels, weight += kQuadBytes) {
    __m512i weights[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) weights[b] = _mm512_loadu_si512(weight + b * block_bytes);
    multiply<P, B>(pixels, offset, weights, sums);
  }
  return weight;
}

// One tap with 4-bit weights, two quads per 64 bytes: codes are nibbles minus 8.
template <int P, int B>
inline __attribute__((always_inline)) const uint8_t* multiply_tap_nibbles(const int8_t* const (&pixels)[P],
                                                                          int64_t tap,
                                                                          const TileSegment& segment,
                                                                          const uint8_t* weight,
                                                                          Accumulators<P, B>& sums) {
  const __m512i mask = _mm512_set1_epi8(0xf);
  const __m512i eight = _mm512_set1_epi8(8);
  const int64_t end = tap + segment.quads * kQuadChannels;
  const int64_t block_bytes = segment.block_bytes;
  for (int64_t offset = tap; offset < end; offset += 2 * kQuadChannels, weight += kQuadBytes) {
    __m512i weights[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const __m512i both = _mm512_loadu_si512(weight + b * block_bytes);
      weights[b] = _mm512_sub_epi8(_mm512_and_si512(both, mask), eight);
    }
    multiply<P, B>(pixels, offset, weights, sums);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const __m512i both = _mm512_loadu_si512(weight + b * block_bytes);
      weights[b] = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), mask), eight);
    }
    multiply<P, B>(pixels, offset + kQuadChannels, weights, sums);
  }
  return weight;
}

template <int P, int B, bool kNibbles>
inline __attribute__((always_inline)) void accumulate(const Tile& tile, const TileSegment& segment,
                                                      Accumulators<P, B>& sums) {
  const int8_t* pixels[P];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) pixels[p] = segment.pixels[p];
  const uint8_t* weight = segment.weight;
  for (int64_t y = 0; y < tile.tap_rows; ++y) {
    for (int64_t x = 0; x < tile.tap_columns; ++x) {
      const int64_t tap = y * segment.tap_row_step + x * segment.tap_column_step;
      weight = kNibbles ? multiply_tap_nibbles<P, B>(pixels, tap, segment, weight, sums)
                        : multiply_tap_bytes<P, B>(pixels, tap, segment, weight, sums);
    }
  }
}

__mmask16 block_mask(const Tile& tile, int64_t block) {
  const int64_t left = tile.num_outputs - block * kBlockOutputs;
  return static_cast<__mmask16>(left >= kBlockOutputs ? 0xffff : (1 << left) - 1);
}

// Float values of a tile between segments, and before finish_tile: [pixels][blocks][16 outputs].
using Carry = float[kBlockOutputs];

// What is taken from the integer sums of a block of outputs from `first` on, and what they are multiplied by.
// Not in a struct: GCC 12 then keeps twice as many sums on the stack.
inline __attribute__((always_inline)) __m512i correction_of(const TileSegment& segment, int64_t first,
                                                            __mmask16 mask) {
  const __m512i shift = _mm512_set1_epi32(segment.zero_point + kCodeShift);
  return _mm512_mullo_epi32(shift, _mm512_maskz_loadu_epi32(mask, segment.weight_sum + first));
}
inline __attribute__((always_inline)) __m512 factor_of(const TileSegment& segment, int64_t first,
                                                       __mmask16 mask) {
  return _mm512_mul_ps(_mm512_set1_ps(segment.scale),
                       _mm512_maskz_loadu_ps(mask, segment.weight_scale + first));
}
inline __attribute__((always_inline)) __m512 bias_of(const Tile& tile, int64_t first, __mmask16 mask) {
  const float* row = tile.output.bias;
  return row ? _mm512_maskz_loadu_ps(mask, row + first) : _mm512_setzero_ps();
}

// Adds segment s to the bias or to the sum of the segments before; `to_output`: not to be carried further.
template <int P, int B>
inline __attribute__((always_inline)) void finish(const Tile& tile, int s, const Accumulators<P, B>& sums,
                                                  bool to_output, Carry* carry) {
  auto* output = reinterpret_cast<float*>(tile.output.data);
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) {
    const int64_t first = b * kBlockOutputs;
    const __mmask16 mask = block_mask(tile, b);
    const __m512i correction = correction_of(tile.segments[s], first, mask);
    const __m512 factor = factor_of(tile.segments[s], first, mask);
    const __m512 bias = bias_of(tile, first, mask);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const __m512 before = s == 0 ? bias : _mm512_load_ps(carry[p * B + b]);
      const __m512 centred = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[p][b], correction));
      const __m512 sum = _mm512_fmadd_ps(centred, factor, before);
      if (to_output) {
        _mm512_mask_storeu_ps(output + p * tile.output.step + first, mask, sum);
      } else {
        _mm512_store_ps(carry[p * B + b], sum);
      }
    }
  }
}

// The last segment, s: results of one image without a way through memory.
template <FloatType kType, int P, int B>
inline __attribute__((always_inline)) void finish_floats(const Tile& tile, int s,
                                                         const Accumulators<P, B>& sums, const Carry* carry) {
  const int64_t image = image_of(tile.output, tile.first_pixel);
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) {
    const int64_t first = b * kBlockOutputs;
    const __m512i correction = correction_of(tile.segments[s], first, 0xffff);
    const __m512 factor = factor_of(tile.segments[s], first, 0xffff);
    const __m512 bias = bias_of(tile, first, 0xffff);
    Vec values[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const __m512 before = s == 0 ? bias : _mm512_load_ps(carry[p * B + b]);
      const __m512 centred = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[p][b], correction));
      values[p] = Vec(_mm512_fmadd_ps(centred, factor, before));
    }
    store_results<kType>(tile.output, image, first, [&](auto&& body) {
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) body(values[p], p);
    });
  }
}

template <int P, int B, bool kNibbles>
inline __attribute__((always_inline)) void multiply_segment(const Tile& tile, int s,
                                                            Accumulators<P, B>& sums) {
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sums[p][b] = _mm512_setzero_si512();
  }
  accumulate<P, B, kNibbles>(tile, tile.segments[s], sums);
}

template <int P, int B, bool kNibbles>
void run_shape(const Tile& tile) {
  alignas(64) Carry carry[P * B];
  for (int s = 0; s < tile.num_segments; ++s) {
    Accumulators<P, B> sums;
    multiply_segment<P, B, kNibbles>(tile, s, sums);
    finish<P, B>(tile, s, sums, s + 1 == tile.num_segments && tile.output.plain, carry);
  }
  if (!tile.output.plain) finish_tile(tile, carry[0]);
}

// The largest tile of B blocks, where is_stored_at_once. Apart from run_shape, of which there is one for
// every number of pixels: this one is three times as long.
template <int B, bool kNibbles>
void run_floats(const Tile& tile) {
  constexpr int P = kPixels[B];
  alignas(64) Carry carry[P * B];
  const int last = tile.num_segments - 1;
  Accumulators<P, B> sums;
  for (int s = 0; s < last; ++s) {
    multiply_segment<P, B, kNibbles>(tile, s, sums);
    finish<P, B>(tile, s, sums, false, carry);
  }
  multiply_segment<P, B, kNibbles>(tile, last, sums);
  if (tile.output.type == FloatType::kFloat32) {
    finish_floats<FloatType::kFloat32, P, B>(tile, last, sums, carry);
  } else {
    finish_floats<FloatType::kBFloat16, P, B>(tile, last, sums, carry);
  }
}

// Whether run_floats may have the tile: linear layers of 128 to 512 channels were 1.08 to 1.17 times as fast
// as through memory in several passes (Zen 4, 2026-11).
bool is_stored_at_once(const Tile& tile) {
  if (tile.output.plain || tile.num_pixels != kPixels[tile.num_blocks]) return false;
  const bool floats = ends_in_floats(tile, FloatType::kFloat32) || ends_in_floats(tile, FloatType::kBFloat16);
  return floats && image_of(tile.output, tile.first_pixel) ==
                       image_of(tile.output, tile.first_pixel + tile.num_pixels - 1);
}

using Run = void (*)(const Tile& tile);

struct RunByPixels {
  Run run[kPixels[1]];
};

template <bool kNibbles, int B, int P>
constexpr Run shape() {
  if constexpr (P <= kPixels[B]) return run_shape<P, B, kNibbles>;
  return nullptr;
}

template <bool kNibbles, int B, int... I>
constexpr RunByPixels by_pixels(std::integer_sequence<int, I...>) {
  return {{shape<kNibbles, B, I + 1>()...}};
}

template <bool kNibbles, int B>
constexpr RunByPixels kByPixels = by_pixels<kNibbles, B>(std::make_integer_sequence<int, kPixels[1]>());

// [8 or 4 bits][blocks - 1][pixels - 1]
constexpr RunByPixels kShapes[2][kBlocks] = {
    {kByPixels<false, 1>, kByPixels<false, 2>, kByPixels<false, 3>, kByPixels<false, 4>},
    {kByPixels<true, 1>, kByPixels<true, 2>, kByPixels<true, 3>, kByPixels<true, 4>}};

constexpr Run kFloats[2][kBlocks] = {
    {run_floats<1, false>, run_floats<2, false>, run_floats<3, false>, run_floats<4, false>},
    {run_floats<1, true>, run_floats<2, true>, run_floats<3, true>, run_floats<4, true>}};

void run(const Tile& tile) {
  if (is_stored_at_once(tile)) return kFloats[tile.nibbles][tile.num_blocks - 1](tile);
  kShapes[tile.nibbles][tile.num_blocks - 1].run[tile.num_pixels - 1](tile);
}

}  // namespace

extern const IgemmKernel igemm_kernel = {run, kBlocks, {0, kPixels[1], kPixels[2], kPixels[3], kPixels[4]}};

}  // namespace adpdm::cpu::avx512
