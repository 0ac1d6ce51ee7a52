// From the integer sums of a tile to its output, for kernels of 256 bits. Per instruction set, like vec.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/igemm.h"
#include "cpu/igemm_epilogue.h"
#include "cpu/multiply_avx2.h"

namespace adpdm::cpu::ADPDM_ISA_NAMESPACE {
namespace {

// What turns the integer sums of 16 outputs into floats; 0 for outputs beyond num_outputs, whose sums are 0.
class BlockParams {
 public:
  // first: the block's first output within the tile. code_shift was added to the codes.
  BlockParams(const TileSegment& segment, int64_t first, int64_t num_outputs, int32_t code_shift) {
    for (int v = 0; v < kOutputVectors; ++v) {
      const int64_t left = num_outputs - first - 8 * v;
      const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(left)), lanes);
      const int64_t at = left > 0 ? first + 8 * v : 0;
      const __m256i sum = _mm256_maskload_epi32(segment.weight_sum + at, mask);
      const __m256 scale = _mm256_maskload_ps(segment.weight_scale + at, mask);
      correction_[v] = _mm256_mullo_epi32(_mm256_set1_epi32(segment.zero_point + code_shift), sum);
      factor_[v] = _mm256_mul_ps(_mm256_set1_ps(segment.scale), scale);
    }
  }

  // after [8 outputs from 8 * v on] = before + factor * (sums - correction).
  void add(int v, __m256i sums, const float* before, float* after) const {
    const __m256 centred = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, correction_[v]));
    _mm256_storeu_ps(after + 8 * v, _mm256_fmadd_ps(centred, factor_[v], _mm256_loadu_ps(before + 8 * v)));
  }

 private:
  __m256i correction_[kOutputVectors];
  __m256 factor_[kOutputVectors];
};

// Float values of a tile's pixels, [num_pixels][step].
struct Rows {
  float* data;
  int64_t step;
};

// after = before + one segment: sums [num_pixels][blocks][16 outputs] of the blocks from first_block on.
inline void add_sums(const Tile& tile, const TileSegment& segment, int first_block, int blocks,
                     int32_t code_shift, const int32_t (*sums)[kBlockOutputs], const Rows& before,
                     const Rows& after) {
  for (int b = 0; b < blocks; ++b) {
    const int64_t output = (first_block + b) * kBlockOutputs;
    const BlockParams params(segment, output, tile.num_outputs, code_shift);
    for (int p = 0; p < tile.num_pixels; ++p) {
      const float* from = before.data + p * before.step + output;
      float* to = after.data + p * after.step + output;
      for (int v = 0; v < kOutputVectors; ++v)
        params.add(v, load_vector(sums[p * blocks + b] + 8 * v), from, to);
    }
  }
}

// A tile, segment by segment: add(segment, before, after) adds one; the last goes into the output where
// nothing is to be done with its floats and all blocks are whole.
template <typename Add>
void run_segments(const Tile& tile, Add&& add) {
  alignas(64) float bias[kMaxTileBlocks * kBlockOutputs] = {};
  alignas(64) float values[kMaxTilePixels * kMaxTileBlocks * kBlockOutputs];
  if (tile.output.bias) {
    std::memcpy(bias, tile.output.bias, static_cast<size_t>(tile.num_outputs) * sizeof(float));
  }
  const int64_t width = tile.num_blocks * kBlockOutputs;
  const Rows carried{values, width};
  const bool direct = tile.output.plain && tile.num_outputs == width;
  const Rows last = direct ? Rows{reinterpret_cast<float*>(tile.output.data), tile.output.step} : carried;
  for (int s = 0; s < tile.num_segments; ++s) {
    const Rows before = s == 0 ? Rows{bias, 0} : carried;
    add(tile.segments[s], before, s + 1 == tile.num_segments ? last : carried);
  }
  if (!direct) finish_tile(tile, values);
}

}  // namespace
}  // namespace adpdm::cpu::ADPDM_ISA_NAMESPACE
