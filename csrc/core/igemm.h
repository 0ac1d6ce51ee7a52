// What integer linear layers and convolutions share: their operands, the bound on K and the blob of packed
// weights.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace adpdm {

// Segments of the input channels with a quantizer and weight columns of their own (split quantization).
constexpr int kMaxSegments = 2;

// |sum_k (q - zero_point) * w| <= K * 255 * 128 has to fit int32.
constexpr int64_t kMaxReduction = INT32_MAX / (255 * 128);

// Function applied to a result before it is stored.
enum class Activation : uint8_t {
  kNone,
  kSilu,      // y * sigmoid(y)
  kGeglu,     // outputs are pairs (value, gate): value * gelu(gate), half as many results
  kGelu,      // y * Phi(y)
  kGeluTanh,  // its approximation by tanh
};

// What becomes of y = sum_s scale_s * weight_scale_s[o] * (acc_s - zero_point_s * weight_sum_s[o]) + bias[o]:
//   y = (y * row_scale[image, o] + row_bias[image, o] + residual[m, o]) * output_scale;  y = activation(y);
// stored, or quantized.
// Each step rounds to float32; a step whose operand is missing is left out.
struct IgemmOutput {
  const float* bias;       // [O] f32 or nullptr
  const float* row_scale;  // [images, O] f32 or nullptr: gate of an adaptive norm
  const float* row_bias;   // [images, O] f32 or nullptr: time embedding
  const void* residual;    // [M, O] residual_type or nullptr; not with kGeglu
  FloatType residual_type;
  float output_scale;  // 1 / output_scale_factor of a residual block; 1 leaves y as it is
  Activation activation;
  int num_bits;            // 0: stores type; 2..8: stores int8 codes under qparams
  GroupedQParams qparams;  // of the next layer, where num_bits > 0
  void* data;              // [M, O or O / 2] type, or i8 codes
  FloatType type;
};

// A float result that is stored as it is.
inline IgemmOutput plain_output(const float* bias,  // [O] f32 or nullptr
                                void* data,         // [M, O] type
                                FloatType type) {
  IgemmOutput output{};
  output.bias = bias;
  output.residual_type = type;
  output.output_scale = 1.0f;
  output.data = data;
  output.type = type;
  return output;
}

struct IgemmSegment {
  const int8_t* codes;        // conv2d [N, H, W, C] i8, linear [M, C] i8
  int64_t channels;           // C; a multiple of kInt4Block where packed
  const uint8_t* weight;      // blob of pack_weight
  const float* weight_scale;  // [O] f32
  const int32_t* weight_sum;  // [O] i32: sum of the output channel's weight codes
  GroupedQParams qparams;
  bool packed = false;  // codes are two to a byte as quantize_int4 writes them; kernels of CUDA only
};

// The blob: [group][ceil(O/16)][tap][quad][16 outputs][4 channels], where a quad is 4 successive channels of
// one tap and missing outputs and channels are code 0. That is the operand order of vpdpbusd, and of AMX
// tiles as well. Codes of up to 4 bits are stored as code + 8 in nibbles, quads 2j (low nibble) and 2j + 1
// (high) in the same 64 bytes.
constexpr int64_t kBlockOutputs = 16;
constexpr int64_t kQuadChannels = 4;
constexpr int64_t kQuadBytes = kBlockOutputs * kQuadChannels;

constexpr bool stored_in_nibbles(int weight_bits) { return weight_bits <= 4; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Quads of one tap: even where two share their bytes.
constexpr int64_t quads_per_tap(int64_t group_channels, int weight_bits) {
  return stored_in_nibbles(weight_bits) ? 2 * ceil_div(group_channels, 2 * kQuadChannels)
                                        : ceil_div(group_channels, kQuadChannels);
}

// Behind the last block: the largest sum of magnitudes of one output's codes as i32, then zeros. It bounds
// integer sums closer than the number of codes does.
constexpr int64_t kBlobTailBytes = 64;

// Bytes of all taps of one block of 16 outputs.
constexpr int64_t block_bytes(int64_t group_channels, int64_t taps, int weight_bits) {
  return taps * quads_per_tap(group_channels, weight_bits) * kQuadBytes /
         (stored_in_nibbles(weight_bits) ? 2 : 1);
}

}  // namespace adpdm
