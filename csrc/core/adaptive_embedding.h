// What the timestep and the class of an image make of a transformer block (adaLN-Zero of DiT), in float32: an
// embedding, and the rows that scale, shift and gate. CPU only; elsewhere torch's own operators do.
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

struct ClassEmbeddingArgs {
  const float* waves;  // [wave_rows, first.columns] f32: sinusoids of the timesteps
  int64_t wave_rows;   // 1 or rows
  DenseLayer first;
  DenseLayer second;      // second.columns == first.outputs
  const float* table;     // [classes, second.outputs] f32
  const int64_t* labels;  // [rows] i64
  int64_t classes;
  int64_t rows;
  float* result;  // [rows, second.outputs] f32
};

// Shift, scale and gate of a block's attention, then of its feed-forward net, each of outputs / 6 channels.
constexpr int64_t kAdaptiveParts = 6;

struct AdaptiveRowsArgs {
  const float* embedding;  // [rows, layer.columns] f32
  int64_t rows;
  DenseLayer layer;      // outputs: a multiple of kAdaptiveParts
  float* modulation[2];  // [rows, 2 * channels] f32, scale beside shift as layer_norm_quantize wants it
  float* gate[2];        // [rows, channels] f32
};

namespace cpu {

// second(silu(first(waves))) + table[labels]. Waves that are the same in all rows are multiplied once. Throws
// std::out_of_range for a label outside [0, classes) before anything is written.
void class_embedding(const ClassEmbeddingArgs& args);

// layer(silu(embedding)) in parts. Results of both do not depend on the number of threads, nor on the
// instruction set.
void adaptive_rows(const AdaptiveRowsArgs& args);

}  // namespace cpu
}  // namespace adpdm
