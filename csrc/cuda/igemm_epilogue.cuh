// From int32 sums to results: the tile passes through shared memory, so that a thread then holds 8 successive
// outputs of a row and does the arithmetic of IgemmOutput (core/igemm.h) on them. Used by every GEMM kernel.
#pragma once

#include "core/activation_math.h"
#include "cuda/igemm_load.cuh"

namespace adpdm::cuda {

// Successive outputs that one thread finishes: 16 bytes of a 16-bit type.
constexpr int kRun = 8;

// ---- the tile of sums in shared memory: [rows, kTileOutputs] i32 ----

// Index of sum (row, output) for a multiple of 2. Chunks of 4 sums change places such that both the pairs of
// an mma fragment (8 rows at once) and the runs of 8 (one row at once) are free of bank conflicts.
template <int kTileOutputs>
ADPDM_DEVICE int sum_index(int row, int output) {
  static_assert(kTileOutputs % 32 == 0, "the exchange stays within 8 chunks");
  const int chunk = output / 4 ^ (row & 3) * 2 ^ (output / 32 & 1);
  return row * kTileOutputs + chunk * 4 + output % 4;
}

// Writes the 16 x 8 accumulators of one mma at (row, output), without the shift of unpacked codes.
template <int kTileOutputs, int kShift>
ADPDM_DEVICE void stage_fragment(int32_t* sums, int row, int output, const int32_t (&c)[4]) {
  const int lane = lane_index();
  ADPDM_UNROLL
  for (int half = 0; half < 2; ++half) {
    const Bytes8 pair = {
        {static_cast<uint32_t>(c[2 * half] >> kShift), static_cast<uint32_t>(c[2 * half + 1] >> kShift)}};
    const int index = sum_index<kTileOutputs>(row + lane / 4 + 8 * half, output + lane % 4 * 2);
    shared_store(reinterpret_cast<Bytes8*>(sums + index), pair);
  }
}

template <int kTileOutputs>
ADPDM_DEVICE void read_staged_run(const int32_t* sums, int row, int output, int32_t (&run)[kRun]) {
  ADPDM_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int32_t* chunk = sums + sum_index<kTileOutputs>(row, output + 4 * half);
    const Bytes16 bytes = shared_load(reinterpret_cast<const Bytes16*>(chunk));
    ADPDM_UNROLL
    for (int i = 0; i < 4; ++i) run[4 * half + i] = static_cast<int32_t>(bytes.word[i]);
  }
}

// ---- loading and storing runs ----

// Where a run lies among the outputs of its group.
struct Run {
  int32_t output;  // first, within all groups
  int32_t count;   // 1..kRun of them exist
  bool wide;       // IgemmProblem::wide
};

ADPDM_DEVICE Run run_at(const IgemmProblem& problem, int32_t group, int32_t output) {
  const int32_t left = problem.outputs - output;
  return {group * problem.outputs + output, left < kRun ? left : kRun, problem.wide};
}

// Writes words with the widest store that their number allows.
template <int kWords>
ADPDM_DEVICE void store_words(void* address, const uint32_t (&words)[kWords]) {
  if constexpr (kWords == 1) {
    store(static_cast<uint32_t*>(address), words[0]);
  } else if constexpr (kWords == 2) {
    store(static_cast<Bytes8*>(address), Bytes8{{words[0], words[1]}});
  } else {
    ADPDM_UNROLL
    for (int i = 0; i < kWords / 4; ++i) {
      store(static_cast<Bytes16*>(address) + i,
            Bytes16{{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]}});
    }
  }
}

// Elements packed into words: vector accesses where the run is wide, else the first `count` of them one by
// one.
template <typename Element, int kWords>
ADPDM_DEVICE void load_elements(const Element* elements, int count, bool wide, uint32_t (&words)[kWords]) {
  constexpr int kPerWord = 4 / sizeof(Element);
  if (wide) {
    ADPDM_UNROLL
    for (int v = 0; v < kWords / 4; ++v) {
      const Bytes16 bytes = load(reinterpret_cast<const Bytes16*>(elements) + v);
      ADPDM_UNROLL
      for (int i = 0; i < 4; ++i) words[4 * v + i] = bytes.word[i];
    }
    return;
  }
  ADPDM_UNROLL
  for (int w = 0; w < kWords; ++w) words[w] = 0;
  ADPDM_UNROLL
  for (int i = 0; i < kWords * kPerWord; ++i) {
    if (i < count)
      words[i / kPerWord] |= uint32_t{load(elements + i)} << (i % kPerWord * 8 * sizeof(Element));
  }
}

template <typename Element, int kWords>
ADPDM_DEVICE void store_elements(Element* elements, int count, bool wide, const uint32_t (&words)[kWords]) {
  constexpr int kPerWord = 4 / sizeof(Element);
  if (wide) return store_words(elements, words);
  ADPDM_UNROLL
  for (int i = 0; i < kWords * kPerWord; ++i) {
    const uint32_t element = words[i / kPerWord] >> (i % kPerWord * 8 * sizeof(Element));
    if (i < count) store(elements + i, static_cast<Element>(element));
  }
}

// kRun elements of a float tensor from `index`; those that do not exist are 0.
ADPDM_DEVICE void load_run(const void* base, int64_t index, FloatType type, const Run& run,
                           float (&x)[kRun]) {
  if (type == FloatType::kFloat32) {
    uint32_t words[kRun];
    load_elements(static_cast<const uint32_t*>(base) + index, run.count, run.wide, words);
    ADPDM_UNROLL
    for (int i = 0; i < kRun; ++i) x[i] = bits_to_float(words[i]);
    return;
  }
  uint32_t words[kRun / 2];
  load_elements(static_cast<const uint16_t*>(base) + index, run.count, run.wide, words);
  ADPDM_UNROLL
  for (int i = 0; i < kRun; ++i) {
    x[i] = half_bits_to_float(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)), type);
  }
}

template <int kCount>
ADPDM_DEVICE void store_floats(const IgemmOutput& output, int64_t index, int count, bool wide,
                               const float (&y)[kCount]) {
  if (output.type == FloatType::kFloat32) {
    uint32_t words[kCount];
    ADPDM_UNROLL
    for (int i = 0; i < kCount; ++i) words[i] = float_to_bits(y[i]);
    return store_elements(static_cast<uint32_t*>(output.data) + index, count, wide, words);
  }
  uint32_t words[kCount / 2] = {};
  ADPDM_UNROLL
  for (int i = 0; i < kCount; ++i) {
    words[i / 2] |= uint32_t{float_to_half_bits(y[i], output.type)} << (i % 2 * 16);
  }
  store_elements(static_cast<uint16_t*>(output.data) + index, count, wide, words);
}

template <int kCount>
ADPDM_DEVICE void store_codes(const Quantizer& quantizer, void* data, int64_t index, int count, bool wide,
                              const float (&y)[kCount]) {
  uint32_t words[kCount / 4];
  ADPDM_UNROLL
  for (int w = 0; w < kCount / 4; ++w) words[w] = code_word(y + 4 * w, quantizer);
  store_elements(static_cast<uint8_t*>(data) + index, count, wide, words);
}

template <int kCount>
ADPDM_DEVICE void store_results(const IgemmOutput& output, const Quantizer& next, int64_t index, int count,
                                bool wide, const float (&y)[kCount]) {
  if (output.num_bits == 0) return store_floats(output, index, count, wide, y);
  store_codes(next, output.data, index, count, wide, y);
}

// The quantizer of the results, where they become codes.
ADPDM_DEVICE Quantizer next_quantizer(const IgemmOutput& output) {
  return output.num_bits == 0 ? Quantizer{}
                              : current_quantizer(output.qparams, signed_range(output.num_bits));
}

// ---- arithmetic ----

// What is the same in all rows of a run: y = fma(sum - offset, factor, y) per source, from the bias on.
struct RunTerms {
  float bias[kRun];
  float factor[kMaxSegments][kRun];
  int32_t offset[kMaxSegments][kRun];  // zero_point * weight_sum
};

ADPDM_DEVICE RunTerms load_terms(const IgemmProblem& problem, const Run& run) {
  RunTerms terms{};
  if (problem.output.bias != nullptr) {
    load_run(problem.output.bias, run.output, FloatType::kFloat32, run, terms.bias);
  }
  ADPDM_UNROLL
  for (int s = 0; s < kMaxSegments; ++s) {
    if (s >= problem.num_sources) continue;
    const IgemmSource& source = problem.sources[s];
    const int64_t group = clamped_index(source.qparams.group_index, source.qparams.num_groups);
    const float scale = load(source.qparams.scale + group);
    const int32_t zero_point = load(source.qparams.zero_point + group);
    float weight_scale[kRun];
    uint32_t weight_sum[kRun];
    load_run(source.weight_scale, run.output, FloatType::kFloat32, run, weight_scale);
    load_elements(reinterpret_cast<const uint32_t*>(source.weight_sum) + run.output, run.count, run.wide,
                  weight_sum);
    ADPDM_UNROLL
    for (int i = 0; i < kRun; ++i) {
      terms.factor[s][i] = scale * weight_scale[i];
      terms.offset[s][i] = zero_point * static_cast<int32_t>(weight_sum[i]);
    }
  }
  return terms;
}

ADPDM_DEVICE void add_source(const RunTerms& terms, int s, const int32_t (&sums)[kRun], float (&y)[kRun]) {
  ADPDM_UNROLL
  for (int i = 0; i < kRun; ++i) {
    y[i] = fused_multiply_add(static_cast<float>(sums[i] - terms.offset[s][i]), terms.factor[s][i], y[i]);
  }
}

// Everything behind the sum over sources, and the store.
ADPDM_DEVICE void finish_run(const IgemmProblem& problem, const Quantizer& next, const Run& run, int64_t row,
                             const float (&residual)[kRun], float (&y)[kRun]) {
  const IgemmOutput& output = problem.output;
  const int64_t all_outputs = int64_t{problem.groups} * problem.outputs;
  const auto of_image = [&](const float* rows, float(&values)[kRun]) {
    load_run(rows, row / problem.rows_per_image * all_outputs + run.output, FloatType::kFloat32, run, values);
  };
  if (output.row_scale != nullptr) {
    float row_scale[kRun];
    of_image(output.row_scale, row_scale);
    ADPDM_UNROLL
    for (int i = 0; i < kRun; ++i) y[i] = y[i] * row_scale[i];
  }
  if (output.row_bias != nullptr) {
    float row_bias[kRun];
    of_image(output.row_bias, row_bias);
    ADPDM_UNROLL
    for (int i = 0; i < kRun; ++i) y[i] = y[i] + row_bias[i];
  }
  ADPDM_UNROLL
  for (int i = 0; i < kRun; ++i) {
    if (output.residual != nullptr) y[i] = y[i] + residual[i];
    y[i] = y[i] * output.output_scale;
    if (output.activation == Activation::kSilu) y[i] = silu(y[i]);
    if (output.activation == Activation::kGelu) y[i] = gelu(y[i]);
    if (output.activation == Activation::kGeluTanh) y[i] = gelu_tanh(y[i]);
  }
  const int64_t index = row * all_outputs + run.output;
  if (output.activation != Activation::kGeglu) {
    return store_results(output, next, index, run.count, run.wide, y);
  }
  float gated[kRun / 2];
  ADPDM_UNROLL
  for (int i = 0; i < kRun / 2; ++i) gated[i] = y[2 * i] * gelu(y[2 * i + 1]);
  store_results(output, next, index / 2, run.count / 2, run.wide, gated);
}

ADPDM_DEVICE void load_residual(const IgemmProblem& problem, const Run& run, int64_t row,
                                float (&residual)[kRun]) {
  if (problem.output.residual == nullptr) return;
  const int64_t index = row * problem.groups * problem.outputs + run.output;
  load_run(problem.output.residual, index, problem.output.residual_type, run, residual);
}

// ---- a whole tile ----

// The threads' share of a tile: a run each, over rows first, first + step, ...; none where first >=
// kTileRows.
template <int kTileOutputs, int kThreads>
struct TileShare {
  static constexpr int kRunsPerRow = kTileOutputs / kRun;
  static constexpr int kStep = kThreads / kRunsPerRow;

  ADPDM_DEVICE static int output() { return thread_index() % kRunsPerRow * kRun; }
  ADPDM_DEVICE static int first_row(int tile_rows) {
    const int row = thread_index() / kRunsPerRow;
    return row < kStep ? row : tile_rows;
  }
};

// Finishes the staged sums of all sources; sums[s] is the tile of source s. The residual of a row is loaded
// while the row before it is worked on.
template <int kTileRows, int kTileOutputs, int kThreads>
ADPDM_DEVICE void finish_tile(const IgemmProblem& problem, const TilePosition& tile,
                              int32_t* const (&sums)[kMaxSegments]) {
  using Share = TileShare<kTileOutputs, kThreads>;
  if (tile.output + Share::output() >= problem.outputs) return;
  const Run run = run_at(problem, tile.group, tile.output + Share::output());
  const RunTerms terms = load_terms(problem, run);
  const Quantizer next = next_quantizer(problem.output);
  const int rows = problem.rows - tile.row < kTileRows ? problem.rows - tile.row : kTileRows;
  int row = Share::first_row(kTileRows);
  if (row >= rows) return;
  float residual[kRun] = {};
  load_residual(problem, run, int64_t{tile.row} + row, residual);
  ADPDM_NO_UNROLL
  for (; row < rows; row += Share::kStep) {
    float next_residual[kRun] = {};
    if (row + Share::kStep < rows)
      load_residual(problem, run, int64_t{tile.row} + row + Share::kStep, next_residual);
    float y[kRun];
    ADPDM_UNROLL
    for (int i = 0; i < kRun; ++i) y[i] = terms.bias[i];
    ADPDM_UNROLL
    for (int s = 0; s < kMaxSegments; ++s) {
      if (s >= problem.num_sources) continue;
      int32_t source_sums[kRun];
      read_staged_run<kTileOutputs>(sums[s], row, Share::output(), source_sums);
      add_source(terms, s, source_sums, y);
    }
    finish_run(problem, next, run, int64_t{tile.row} + row, residual, y);
    ADPDM_UNROLL
    for (int i = 0; i < kRun; ++i) residual[i] = next_residual[i];
  }
}

// Copies the staged sums to the slice of this block; rows and outputs that do not exist have their place
// there.
template <int kTileRows, int kTileOutputs, int kThreads>
ADPDM_DEVICE void store_slice(const IgemmProblem& problem, const TilePosition& tile, const int32_t* sums) {
  using Share = TileShare<kTileOutputs, kThreads>;
  const int64_t group_outputs = int64_t{problem.output_tiles} * kTileOutputs;
  int32_t* corner = problem.slices + block_z() * problem.slice_size + tile.row * problem.slice_row +
                    tile.group * group_outputs + tile.output;
  ADPDM_NO_UNROLL
  for (int row = Share::first_row(kTileRows); row < kTileRows; row += Share::kStep) {
    int32_t run[kRun];
    read_staged_run<kTileOutputs>(sums, row, Share::output(), run);
    uint32_t words[kRun];
    ADPDM_UNROLL
    for (int i = 0; i < kRun; ++i) words[i] = static_cast<uint32_t>(run[i]);
    store_words(corner + row * problem.slice_row + Share::output(), words);
  }
}

}  // namespace adpdm::cuda
