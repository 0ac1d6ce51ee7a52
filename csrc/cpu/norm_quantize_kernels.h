// The per-instruction-set part of normalisation: sums over pixels, and what follows them.
#pragma once

#include "core/types.h"
#include "cpu/hadamard_kernels.h"
#include "cpu/isa.h"
#include "cpu/quantize_kernels.h"

namespace adpdm::cpu {

// Successive pixels of one source.
struct NormBlock {
  const void* data;  // [pixels, channels] type
  FloatType type;
  int64_t pixels;
  int64_t channels;
};

// y = x * factor + offset, then y * gain + shift where there is modulation; each readable up to the next
// multiple of 16 channels behind the last.
struct NormCoefficients {
  const float* factor;  // [channels] f32
  const float* offset;  // [channels] f32
  const float* gain;    // [channels] f32 or nullptr
  const float* shift;   // [channels] f32
};

// Sums over the pixels of x - origin and of its square, per channel. origin is readable like coefficients.
ADPDM_DECLARE_PER_ISA(void channel_sums(const NormBlock& block,
                                        const float* origin,  // [channels] f32
                                        double* sums,         // [channels] f64
                                        double* squares))     // [channels] f64

// What makes codes of normalised rows.
struct NormEnd {
  Quantizer quantizer;
  int64_t hadamard;  // channels of a row rotated together first, 0: none
  float* room;       // [norm_room(channels)] where they are
};

constexpr int64_t norm_room(int64_t channels) { return 2 * hadamard_room(channels); }

// block -> codes [pixels, code_step], its channels from the first on.
ADPDM_DECLARE_PER_ISA(void normalize_block(const NormBlock& block, const NormCoefficients& coefficients,
                                           bool apply_silu, const NormEnd& end, int8_t* codes,
                                           int64_t code_step))

// Rows whose moments are computed side by side.
constexpr int kNormRows = 4;

// Normalises every row of block by its own mean and variance; factor and offset are the learned weight and
// bias. rows is scratch for kNormRows times the channels, rounded up to a multiple of 16.
ADPDM_DECLARE_PER_ISA(void layer_norm_rows(const NormBlock& block, const NormCoefficients& coefficients,
                                           double eps, const NormEnd& end, float* rows, int8_t* codes))

}  // namespace adpdm::cpu
