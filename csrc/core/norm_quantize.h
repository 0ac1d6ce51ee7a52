// Normalisation and quantization in one pass: the float result between them is never stored.
#pragma once

#include <cstdint>

#include "core/igemm.h"
#include "core/stream.h"
#include "core/types.h"

namespace adpdm {

// One of the tensors whose channels are concatenated before a normalisation.
struct NormSource {
  const void* data;  // [N, pixels, channels] type
  int64_t channels;
};

struct GroupNormQuantizeArgs {
  NormSource sources[kMaxSegments];  // read side by side, never concatenated
  int num_sources;
  FloatType type;
  int64_t batch;            // N
  int64_t pixels;           // H * W
  int64_t channels;         // C, of all sources together
  int64_t norm_groups;      // divides C
  const float* weight;      // [C] f32 or nullptr: 1
  const float* bias;        // [C] f32 or nullptr: 0
  const float* modulation;  // [N, 2 * C] f32 (scale, shift): y * (1 + scale) + shift; or nullptr
  float eps;
  Activation activation;  // kNone or kSilu
  GroupedQParams qparams;
  int num_bits;
  int8_t* codes;         // [N, pixels, C] i8
  int64_t hadamard = 0;  // channels rotated together before they become codes, 0: none; of one source
};

// Where the codes of one source go when each has a quantizer of its own.
struct NormTarget {
  GroupedQParams qparams;
  int num_bits;
  int8_t* codes;  // [N, pixels, channels of the source] i8
};

struct LayerNormQuantizeArgs {
  const void* x;  // [rows, C] type
  FloatType type;
  int64_t rows;
  int64_t channels;         // C
  const float* weight;      // [C] f32 or nullptr: 1
  const float* bias;        // [C] f32 or nullptr: 0
  const float* modulation;  // [images, 2 * C] f32 (scale, shift): y * (1 + scale) + shift; or nullptr
  int64_t rows_per_image;
  float eps;
  GroupedQParams qparams;
  int num_bits;
  int8_t* codes;         // [rows, C] i8
  int64_t hadamard = 0;  // as of GroupNormQuantizeArgs
};

namespace cpu {
// Throw std::out_of_range for a group index outside [0, num_groups) before anything is written.
void group_norm_quantize(const GroupNormQuantizeArgs& args);
void layer_norm_quantize(const LayerNormQuantizeArgs& args);

// group_norm_quantize with a target for each source; qparams, num_bits and codes of args are not read.
void group_norm_quantize_each(const GroupNormQuantizeArgs& args, const NormTarget* targets);  // [num_sources]
}  // namespace cpu

// The same on the stream. An index outside [0, num_groups) acts as the nearest inside: a kernel cannot raise.
// Throw CudaError where a launch fails.
namespace cuda {

// Bytes of device memory, 8-byte aligned, that group_norm_quantize works in; what it holds before does not
// matter.
int64_t group_norm_quantize_workspace(const GroupNormQuantizeArgs& args);

void group_norm_quantize(const GroupNormQuantizeArgs& args, void* workspace, Stream stream);
void layer_norm_quantize(const LayerNormQuantizeArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adpdm
