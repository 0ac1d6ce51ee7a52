// What the timestep and the class of an image make of a denoiser's blocks, in float32: an embedding, and rows
// of it that are added to maps, or scale, shift and gate (adaLN-Zero of DiT). CPU only; elsewhere torch's own
// operators do.
#pragma once

#include <cstdint>

namespace adpdm {

// A float layer as torch keeps it, read where it lies.
struct DenseLayer {
  const float* weight;  // [outputs, columns] f32
  const float* bias;    // [outputs] f32 or nullptr
  int64_t outputs;
  int64_t columns;
};

struct TimestepEmbeddingArgs {
  const float* waves;  // [wave_rows, first.columns] f32: sinusoids of the timesteps
  int64_t wave_rows;   // rows, or 1
  DenseLayer first;
  DenseLayer second;      // second.columns == first.outputs
  const float* table;     // [classes, second.outputs] f32, nullptr for none
  const int64_t* labels;  // [rows] i64 where there is a table
  int64_t classes;
  int64_t rows;
  float* result;  // [rows, second.outputs] f32
};

// Shift, scale and gate of a block's attention, then of its feed-forward net, each of outputs / 6 channels.
constexpr int64_t kAdaptiveParts = 6;

struct SiluLinearArgs {
  const float* x;  // [rows, layer.columns] f32
  int64_t rows;
  DenseLayer layer;
  float* result;  // [rows, layer.outputs] f32
};

struct AdaptiveRowsArgs {
  const float* embedding;  // [rows, layer.columns] f32
  int64_t rows;
  DenseLayer layer;      // outputs: a multiple of kAdaptiveParts
  float* modulation[2];  // [rows, 2 * channels] f32, scale beside shift as layer_norm_quantize wants it
  float* gate[2];        // [rows, channels] f32
};

namespace cpu {

// Results of all three do not depend on the number of threads, nor on the instruction set. Rows that are all
// the same, as they are within one step of sampling, are multiplied once.

// second(silu(first(waves))) + table[labels]. Throws std::out_of_range for a label outside [0, classes)
// before anything is written.
void timestep_embedding(const TimestepEmbeddingArgs& args);

// layer(silu(x)).
void silu_linear(const SiluLinearArgs& args);

// layer(silu(embedding)) in parts.
void adaptive_rows(const AdaptiveRowsArgs& args);

}  // namespace cpu
}  // namespace adpdm
