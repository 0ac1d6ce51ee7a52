// The integer GEMM on AMX tiles: 32 pixels x 32 outputs at a time, 64 channels per step.
//
// Compiled a second time with ADPDM_AMX_EMULATED, for any CPU, by the tests.
#if defined(ADPDM_AMX_EMULATED)
#define ADPDM_ISA_NAMESPACE amx_emulated
#else
#define ADPDM_ISA_NAMESPACE amx
#endif
#include "cpu/amx_tile.h"
#include "cpu/igemm.h"
#include "cpu/igemm_epilogue.h"
#include "cpu/igemm_strips.h"
#include "cpu/pixel_walk.h"

namespace adpdm::cpu::ADPDM_ISA_NAMESPACE {
namespace {

// Tiles: sums of pixels (0, 1) x outputs (0, 1), then the codes of two runs of pixels, then the weights of
// two blocks of outputs. A load then serves two products.
constexpr int kRuns = 2;
constexpr int kCodes = 4;
constexpr int kWeights = 6;

constexpr int kStepQuads = kTileRowBytes / kQuadChannels;
constexpr int kWidth = kMaxStripBlocks * kBlockOutputs;

// Below this the AVX-512 tiles run, which read weights as fast and set up nothing. Estimated, to be measured:
// docs/cpu_backlog.md.
constexpr int64_t kMinPixels = 8;

// A tile product makes 256 sums of 64 products in 16 cycles, a vector unit 16 sums of 4. Half of that, as in
// the prototype on Sapphire Rapids.
constexpr int64_t kSpeed = 8;

using Run = PixelRun<kTileRows>;

// How the channels of a tap are cut into steps of equally many quads. Where a tap of more than 16 quads is
// not a multiple, the last step lies over the end of the one before it, where its weights are 0: it reads no
// code beyond the tap, and one tile configuration serves all steps.
struct Steps {
  int64_t quads;      // of one step
  int64_t count;      // per tap
  int64_t last_byte;  // of the last step's codes in the tap
  int64_t taps;
  int64_t tap_bytes;    // of one block's weights
  int64_t block_bytes;  // from block to block
  bool copied;          // weights are read from scratch: bytes of nibbles, or zeros in the last step
};

ADPDM_VEC Steps steps_of(const Tile& tile, const TileSegment& segment) {
  Steps steps{};
  steps.quads = segment.quads < kStepQuads ? segment.quads : kStepQuads;
  steps.count = ceil_div(segment.quads, steps.quads);
  steps.last_byte = (segment.quads - steps.quads) * kQuadChannels;
  steps.taps = tile.tap_rows * tile.tap_columns;
  steps.tap_bytes = steps.count * steps.quads * kQuadBytes;
  steps.copied = tile.nibbles || segment.quads % steps.quads != 0;
  steps.block_bytes = steps.copied ? steps.taps * steps.tap_bytes : segment.block_bytes;
  return steps;
}

int64_t scratch_bytes(const Igemm& problem) {
  int64_t bytes = 0;
  for (int s = 0; s < problem.tile.num_segments; ++s) {
    const Steps steps = steps_of(problem.tile, problem.inputs[s].tile);
    if (steps.copied) bytes += kMaxStripBlocks * steps.block_bytes;
  }
  return bytes;
}

// Weights of quads -> bytes; `quads` and `first` are even where they are nibbles.
void expand_quads(const uint8_t* packed, int64_t first, int64_t quads, bool nibbles, uint8_t* bytes) {
  if (!nibbles) {
    std::memcpy(bytes, packed + first * kQuadBytes, static_cast<size_t>(quads * kQuadBytes));
    return;
  }
  packed += first / 2 * kQuadBytes;
  for (int64_t q = 0; q < quads; q += 2, packed += kQuadBytes, bytes += 2 * kQuadBytes) {
    for (int64_t i = 0; i < kQuadBytes; ++i) {
      bytes[i] = static_cast<uint8_t>((packed[i] & 0xf) - 8);
      bytes[i + kQuadBytes] = static_cast<uint8_t>((packed[i] >> 4) - 8);
    }
  }
}

// One tap of all blocks into scratch, with zeros where the last step lies over the one before it.
void copy_tap(const Tile& tile, const TileSegment& segment, const Steps& steps, int64_t tap,
              uint8_t* scratch) {
  const int64_t packed_tap = segment.block_bytes / steps.taps;
  const int64_t before_last = (steps.count - 1) * steps.quads;
  const int64_t overlap = steps.count * steps.quads - segment.quads;
  for (int b = 0; b < tile.num_blocks; ++b) {
    const uint8_t* packed = segment.weight + b * segment.block_bytes + tap * packed_tap;
    uint8_t* target = scratch + b * steps.block_bytes + tap * steps.tap_bytes;
    expand_quads(packed, 0, before_last, tile.nibbles, target);
    target += before_last * kQuadBytes;
    std::memset(target, 0, static_cast<size_t>(overlap * kQuadBytes));
    expand_quads(packed, before_last, segment.quads - before_last, tile.nibbles,
                 target + overlap * kQuadBytes);
  }
}

// What the products of one segment read.
struct Operands {
  const int8_t* codes[kRuns];
  int64_t code_step;  // from row to row of a run
  const uint8_t* weight;
};

// sums += the channels of one tap.
template <int R, int B>
ADPDM_VEC void multiply_tap(const int8_t* const (&codes)[R], int64_t code_step, const uint8_t* weight,
                            const Steps& steps) {
  const int64_t step_bytes = steps.quads * kQuadBytes;
  const int64_t block_bytes = steps.block_bytes;
  const int64_t last = steps.last_byte;
  int64_t offset = 0;
  for (const uint8_t* end = weight + steps.tap_bytes; weight != end; weight += step_bytes) {
    tile_load<kWeights>(weight, kQuadBytes);
    tile_load<kCodes>(codes[0] + offset, code_step);
    tile_dot_s8s8<0, kCodes, kWeights>();
    if constexpr (B == 2) {
      tile_load<kWeights + 1>(weight + block_bytes, kQuadBytes);
      tile_dot_s8s8<1, kCodes, kWeights + 1>();
    }
    if constexpr (R == 2) {
      tile_load<kCodes + 1>(codes[1] + offset, code_step);
      tile_dot_s8s8<2, kCodes + 1, kWeights>();
      if constexpr (B == 2) tile_dot_s8s8<3, kCodes + 1, kWeights + 1>();
    }
    offset = offset + kTileRowBytes < last ? offset + kTileRowBytes : last;
  }
}

// sums [R * 16][B * 16 outputs] of one segment. With `scratch` every tap is copied there just before it is
// read, while it is in the L1 cache. Not inlined, so that its registers are its own.
template <int R, int B>
__attribute__((noinline)) void multiply(const Tile& tile, const TileSegment& segment, const Steps& steps,
                                        const Operands& operands, uint8_t* scratch, int32_t* sums) {
  tile_zero<0>();
  if constexpr (B == 2) tile_zero<1>();
  if constexpr (R == 2) tile_zero<2>();
  if constexpr (R == 2 && B == 2) tile_zero<3>();
  int64_t tap = 0;
  for (int64_t y = 0; y < tile.tap_rows; ++y) {
    for (int64_t x = 0; x < tile.tap_columns; ++x, ++tap) {
      if (scratch) copy_tap(tile, segment, steps, tap, scratch);
      const int64_t at = y * segment.tap_row_step + x * segment.tap_column_step;
      const int8_t* codes[R];
      for (int r = 0; r < R; ++r) codes[r] = operands.codes[r] + at;
      multiply_tap<R, B>(codes, operands.code_step, operands.weight + tap * steps.tap_bytes, steps);
    }
  }
  constexpr int64_t kStride = B * kBlockOutputs;
  constexpr int64_t kStrideBytes = kStride * sizeof(int32_t);
  tile_store<0>(sums, kStrideBytes);
  if constexpr (B == 2) tile_store<1>(sums + kBlockOutputs, kStrideBytes);
  if constexpr (R == 2) tile_store<2>(sums + kTileRows * kStride, kStrideBytes);
  if constexpr (R == 2 && B == 2) tile_store<3>(sums + kTileRows * kStride + kBlockOutputs, kStrideBytes);
}

using Multiply = void (*)(const Tile&, const TileSegment&, const Steps&, const Operands&, uint8_t*, int32_t*);

// [runs - 1][blocks - 1]
constexpr Multiply kMultiply[kRuns][kMaxStripBlocks] = {{multiply<1, 1>, multiply<1, 2>},
                                                        {multiply<2, 1>, multiply<2, 2>}};

// Shapes the tiles for runs of these rows and steps of these quads, unless they are so already.
void configure(int64_t rows0, int64_t rows1, int64_t quads, UnitState& state) {
  const auto setup = static_cast<uint32_t>(rows0 | rows1 << 8 | quads << 16);
  if (state.setup == setup) return;
  TileConfig config{};
  config.palette = 1;
  const auto shape = [&](int tile, int64_t rows, int64_t row_bytes) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = static_cast<uint16_t>(rows == 0 ? 0 : row_bytes);
  };
  for (int r = 0; r < kRuns; ++r) {
    const int64_t rows = r == 0 ? rows0 : rows1;
    for (int b = 0; b < kMaxStripBlocks; ++b) shape(r * kMaxStripBlocks + b, rows, kTileRowBytes);
    shape(kCodes + r, rows, quads * kQuadChannels);
  }
  for (int b = 0; b < kMaxStripBlocks; ++b) shape(kWeights + b, quads, kTileRowBytes);
  tile_configure(config);
  state.setup = setup;
}

void release(UnitState& state) {
  if (state.setup != 0) tile_release();
  state.setup = 0;
}

// Parameters of the slab's outputs; 0 for those beyond num_outputs, whose sums are 0 as well.
struct Params {
  alignas(64) float factor[kWidth];
  alignas(64) int32_t correction[kWidth];
};

void load_params(const Tile& tile, const TileSegment& segment, Params& params) {
  params = {};
  for (int64_t n = 0; n < tile.num_outputs; ++n) {
    params.factor[n] = segment.scale * segment.weight_scale[n];
    params.correction[n] = segment.zero_point * segment.weight_sum[n];
  }
}

// result [width] = factor * (sums - correction) + before [width].
ADPDM_VEC void add_segment(const int32_t* sums, const Params& params, const float* before, int64_t width,
                           float* result) {
  for (int64_t first = 0; first < width; first += kBlockOutputs) {
    alignas(64) float centred[kBlockOutputs];
    for (int64_t n = 0; n < kBlockOutputs; ++n) {
      centred[n] = static_cast<float>(sums[first + n] - params.correction[first + n]);
    }
    for (int64_t n = 0; n < kBlockOutputs; n += Vec::kSize) {
      const int64_t i = first + n;
      store(result + i, fused_multiply_add(load(centred + n), load(params.factor + i), load(before + i)));
    }
  }
}

// One strip: its constants, then two runs of pixels at a time.
class StripRun {
 public:
  ADPDM_VEC StripRun(const Strip& strip, UnitState& state)
      : strip_(strip), tile_(strip.tile), state_(state), width_(tile_.num_blocks * kBlockOutputs) {
    uint8_t* scratch = strip.scratch;
    for (int s = 0; s < tile_.num_segments; ++s) {
      const TileSegment& segment = tile_.segments[s];
      load_params(tile_, segment, params_[s]);
      steps_[s] = steps_of(tile_, segment);
      scratch_[s] = steps_[s].copied ? scratch : nullptr;
      if (steps_[s].copied) scratch += kMaxStripBlocks * steps_[s].block_bytes;
    }
    if (tile_.output.bias) {
      std::memcpy(bias_, tile_.output.bias, static_cast<size_t>(tile_.num_outputs) * sizeof(float));
    }
  }

  void run() {
    PixelWalk walk(*strip_.problem, strip_.first_pixel);
    for (int64_t pixel = strip_.first_pixel; pixel < strip_.last_pixel;) {
      Run runs[kRuns];
      int num_runs = 0;
      int64_t next = pixel;
      for (; num_runs < kRuns && next < strip_.last_pixel; ++num_runs) {
        walk.next(strip_.last_pixel - next, runs[num_runs]);
        next += runs[num_runs].num_pixels;
      }
      run_pixels(pixel, next, runs, num_runs);
      pixel = next;
    }
  }

 private:
  // The pixels [first, last) of those runs.
  void run_pixels(int64_t first, int64_t last, const Run* runs, int num_runs) {
    alignas(64) float values[kRuns * kTileRows * kWidth];
    alignas(64) int32_t sums[kRuns * kTileRows * kWidth];
    Tile tile = tile_;
    tile.first_pixel = first;
    tile.num_pixels = static_cast<int>(last - first);
    skip_pixels(first, tile.output);
    const bool direct = tile.output.plain && tile.num_outputs == width_;
    for (int s = 0; s < tile.num_segments; ++s) {
      multiply_segment(s, first, runs, num_runs, sums);
      const bool to_output = direct && s + 1 == tile.num_segments;
      auto* target = to_output ? reinterpret_cast<float*>(tile.output.data) : values;
      const int64_t target_step = to_output ? tile.output.step : width_;
      int64_t p = 0;
      for (int r = 0; r < num_runs; ++r) {
        for (int i = 0; i < runs[r].num_pixels; ++i, ++p) {
          const int32_t* row = sums + (r * kTileRows + runs[r].at[i]) * width_;
          add_segment(row, params_[s], s == 0 ? bias_ : values + p * width_, width_,
                      target + p * target_step);
        }
      }
    }
    if (!direct) finish_tile(tile, values);
  }

  ADPDM_VEC void multiply_segment(int s, int64_t first, const Run* runs, int num_runs, int32_t* sums) {
    const IgemmInput& input = strip_.problem->inputs[s];
    Operands operands{};
    operands.code_step = input.column_step;
    operands.weight = scratch_[s] ? scratch_[s] : tile_.segments[s].weight;
    for (int r = 0; r < num_runs; ++r) {
      operands.codes[r] = input.codes + strip_.group * input.group_step + runs[r].image * input.image_step +
                          runs[r].row * input.row_step + runs[r].column * input.column_step;
    }
    configure(runs[0].rows, num_runs == kRuns ? runs[1].rows : 0, steps_[s].quads, state_);
    uint8_t* copy_to = first == strip_.first_pixel ? scratch_[s] : nullptr;
    kMultiply[num_runs - 1][tile_.num_blocks - 1](tile_, tile_.segments[s], steps_[s], operands, copy_to,
                                                  sums);
  }

  const Strip& strip_;
  const Tile& tile_;
  UnitState& state_;
  int64_t width_;
  Steps steps_[kMaxSegments];
  uint8_t* scratch_[kMaxSegments];  // where the weights are copied on the way; nullptr: read in place
  Params params_[kMaxSegments];
  alignas(64) float bias_[kWidth] = {};
};

void run(Strip& strip, UnitState& state) { StripRun(strip, state).run(); }

}  // namespace

extern const StripKernel strip_kernel = {run, release, scratch_bytes, kMinPixels, kSpeed};

}  // namespace adpdm::cpu::ADPDM_ISA_NAMESPACE
