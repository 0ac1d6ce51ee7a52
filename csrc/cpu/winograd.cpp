// Cuts a 3x3 convolution into Winograd tiles:
//   pass   as many rows of tiles as the cache holds when transformed; its codes are transformed first
//   slab   one or two blocks of 16 outputs, as many as the kernel multiplies together
//   unit   kUnitTiles tiles of a pass and one slab, what threads are given
//   item   neighbouring units of a thread and slab, which share transformed weights
// and, within an item, slices of channels and batches of tiles (winograd.inc).
#include "cpu/winograd.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/row_view.h"
#include "cpu/parallel.h"
#include "cpu/thread_memory.h"

namespace adpdm::cpu {
namespace {

std::atomic<WinogradUse> winograd_use{WinogradUse::kWhereQuicker};

}  // namespace

ScopedWinograd::ScopedWinograd(WinogradUse use) : previous_(winograd_use.exchange(use)) {}

ScopedWinograd::~ScopedWinograd() { winograd_use.store(previous_); }

#if defined(__x86_64__)
namespace {

// Transformed codes of a pass, which are read once for each slab: what the L2 cache holds, but enough tiles
// for an item. 4 MiB took 1.1 to 1.3 times as long for 128 channels and 512 tiles (Zen 4, 2026-11).
constexpr int64_t kPointBytes = 1 << 20;

// Channels of a slice beyond those that have to be apart: its transformed weights, 2 blocks of 36 points,
// take 720 KiB.
constexpr int64_t kMaxSlice = 320;

// Few, so that a small map keeps many threads busy: those of a unit cost what the direct kernel costs, their
// transform of weights included.
constexpr int64_t kUnitTiles = 4;

// Multiply-add steps below which another thread costs more than it saves, as in igemm.cpp.
constexpr int64_t kMinStepsPerThread = 20000;

// Below this many pixels, products of bytes with 4-bit weights beat 2x2 tiles and their transform: 0.7 of the
// time for 256 -> 256 channels at 4x4, 0.97 to 1.02 at 8x8, 1.02 to 1.27 at 16x16 on one thread of a busy Zen
// 3, 2026-11.
constexpr int64_t kMinPixelsWithNibbles = 128;

struct Pass {
  const Igemm& problem;
  const WinogradKernel& kernel;
  int64_t row_tiles;   // tiles in a row
  int64_t image_rows;  // rows of tiles in an image
  int64_t rows;        // rows of tiles of a full pass
  int64_t first_row;   // of all rows of tiles
  int64_t tiles;       // of this pass
  int16_t* points[kMaxSegments];

  int64_t channels(int s) const { return problem.inputs[s].tile.quads * kQuadChannels; }
  int64_t all_channels() const {
    int64_t sum = 0;
    for (int s = 0; s < problem.tile.num_segments; ++s) sum += channels(s);
    return sum;
  }
  int64_t point_step(int s) const { return tiles * channels(s) + kWinogradPadding; }
  int64_t slice(int s) const;
  int64_t largest_slice() const {
    int64_t largest = 0;
    for (int s = 0; s < problem.tile.num_segments; ++s) largest = std::max(largest, slice(s));
    return largest;
  }
};

// Slices of one segment, as equal as they can be. Most layers are exact with all channels in one: the bound
// on codes alone allows 224 for 4x4 tiles.
int64_t Pass::slice(int s) const {
  const TileSegment& segment = problem.inputs[s].tile;
  int32_t magnitude;
  std::memcpy(&magnitude, segment.weight + ceil_div(problem.outputs, kBlockOutputs) * segment.block_bytes,
              sizeof magnitude);
  const bool is_exact = int64_t{128} * magnitude <= kernel.max_sum;
  const int64_t most = is_exact ? std::max(kernel.slice, kMaxSlice) : kernel.slice;
  const int64_t slices = ceil_div(channels(s), most);
  return ceil_div(ceil_div(channels(s), slices), kernel.lanes) * kernel.lanes;
}

void transform_codes(const Pass& pass, int64_t row) {
  const int64_t image = (pass.first_row + row) / pass.image_rows;
  const int64_t y = (pass.first_row + row) % pass.image_rows * pass.kernel.side;
  for (int s = 0; s < pass.problem.tile.num_segments; ++s) {
    const IgemmInput& input = pass.problem.inputs[s];
    const int64_t channels = pass.channels(s);
    const WinogradRow tiles{input.codes + image * input.image_step + y * input.row_step, input.row_step,
                            input.column_step, channels, pass.row_tiles};
    pass.kernel.transform_codes(tiles, pass.points[s] + row * pass.row_tiles * channels, pass.point_step(s));
  }
}

int16_t* thread_points(int64_t count) {
  thread_local ThreadMemory memory;
  return reinterpret_cast<int16_t*>(memory.take(count * static_cast<int64_t>(sizeof(int16_t))));
}

WinogradScratch thread_scratch(const WinogradKernel& kernel, int64_t slice) {
  thread_local ThreadMemory memory;
  const int64_t width = kernel.blocks * kBlockOutputs;  // 64 bytes and more: what follows stays aligned
  const int64_t weights = kernel.blocks * kernel.points() * winograd_weight_step(slice);
  const int64_t points = kernel.points() * kMaxWinogradBatch * width;
  const int64_t pixels = kernel.side * kernel.side * kMaxWinogradTiles * width;
  char* const begin = memory.take(2 * weights + 4 * points + 8 * pixels);
  WinogradScratch result{};
  result.weights = reinterpret_cast<int16_t*>(begin);
  result.points = reinterpret_cast<int32_t*>(begin + 2 * weights);
  result.sums = result.points + points;
  result.values = reinterpret_cast<float*>(result.sums + pixels);
  return result;
}

// Tiles [first, first + count) of the pass times one slab of outputs.
void run_item(const Pass& pass, int64_t slab, int64_t first, int64_t count) {
  const Igemm& problem = pass.problem;
  WinogradItem item{};
  item.block = problem.tile;
  for (int s = 0; s < problem.tile.num_segments; ++s) item.block.segments[s] = problem.inputs[s].tile;
  const int64_t blocks = ceil_div(problem.outputs, kBlockOutputs);
  const int64_t first_block = slab * pass.kernel.blocks;
  select_outputs(problem, 0, first_block, std::min(blocks, first_block + pass.kernel.blocks), item.block);
  for (int s = 0; s < problem.tile.num_segments; ++s) {
    const int64_t channels = pass.channels(s);
    item.segments[s] = {pass.points[s] + first * channels, pass.point_step(s), channels, pass.slice(s)};
  }
  item.tiles = count;
  item.first = pass.first_row * pass.row_tiles + first;
  item.row_tiles = pass.row_tiles;
  item.scratch = thread_scratch(pass.kernel, pass.largest_slice());
  pass.kernel.run(item);
}

// Units [first, last) of the pass, numbered slab by slab.
void run_units(const Pass& pass, int64_t first, int64_t last) {
  const int64_t units = ceil_div(pass.tiles, kUnitTiles);  // of a slab
  while (first < last) {
    const int64_t unit = first % units;
    const int64_t left = std::min(last - first, units - unit);
    const int64_t count = ceil_div(left, ceil_div(left * kUnitTiles, kMaxWinogradTiles));
    const int64_t tile = unit * kUnitTiles;
    run_item(pass, first / units, tile, std::min(count * kUnitTiles, pass.tiles - tile));
    first += count;
  }
}

void run_pass(const Pass& pass) {
  const int64_t rows = pass.tiles / pass.row_tiles;
  const int64_t steps = pass.all_channels() / kQuadChannels * pass.kernel.points();  // of a tile and block
  parallel_for(0, rows, ceil_div(kMinStepsPerThread, steps * pass.row_tiles),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) transform_codes(pass, row);
               });
  const int64_t blocks = ceil_div(pass.problem.outputs, kBlockOutputs);
  const int64_t slabs = ceil_div(blocks, pass.kernel.blocks);
  const int64_t units = ceil_div(pass.tiles, kUnitTiles);
  const int64_t unit_steps = steps * pass.tiles * blocks / (slabs * units);
  parallel_for(0, slabs * units, ceil_div(kMinStepsPerThread, unit_steps),
               [&](int64_t begin, int64_t end) { run_units(pass, begin, end); });
}

const WinogradKernel* large_kernel(Isa isa) {
  if (isa == Isa::kAvx512) return &avx512::winograd_4x4;
#if defined(ADPDM_AVX_VNNI)
  if (isa == Isa::kAvxVnni) return has_avx_vnni() ? &avx_vnni::winograd_4x4 : &avx_vnni_evex::winograd_4x4;
#endif
  return isa == Isa::kAvx2 ? &avx2::winograd_4x4 : nullptr;
}

bool applies(const Igemm& problem, const WinogradKernel& kernel, WinogradUse use) {
  if (problem.rows % kernel.side > 0 || problem.columns % kernel.side > 0) return false;
  const int64_t tiles = problem.images * problem.rows * problem.columns / (kernel.side * kernel.side);
  if (tiles < kernel.min_tiles && use != WinogradUse::kForAnyTiles) return false;
  for (int s = 0; s < problem.tile.num_segments; ++s) {
    const IgemmInput& input = problem.inputs[s];
    if (input.tile.quads == 0 || input.tile.quads * kQuadChannels % kernel.lanes > 0) return false;
    if (input.row_step != input.tile.tap_row_step) return false;  // stride and dilation are the same
    if (input.column_step != input.tile.tap_column_step) return false;
  }
  return true;
}

}  // namespace

const WinogradKernel* select_winograd(const Igemm& problem) {
  const WinogradUse use = winograd_use.load(std::memory_order_relaxed);
  const Isa isa = active_isa();
  const WinogradKernel* large = large_kernel(isa);
  if (!large || use == WinogradUse::kNever) return nullptr;
  if (problem.groups > 1 || problem.tile.tap_rows != 3 || problem.tile.tap_columns != 3) return nullptr;
  if (applies(problem, *large, use)) return large;
  if (isa != Isa::kAvx2 || !applies(problem, avx2::winograd_2x2, use)) return nullptr;
  const int64_t pixels = problem.images * problem.rows * problem.columns;
  const bool few = problem.tile.nibbles && pixels < kMinPixelsWithNibbles;
  return few && use != WinogradUse::kForAnyTiles ? nullptr : &avx2::winograd_2x2;
}

void run_winograd(const Igemm& problem, const WinogradKernel& kernel) {
  Pass pass{problem, kernel, problem.columns / kernel.side, problem.rows / kernel.side, 0, 0, 0, {}};
  const int64_t row_points = pass.row_tiles * pass.all_channels() * kernel.points();
  const int64_t all_rows = problem.images * pass.image_rows;
  const auto fitting = kPointBytes / static_cast<int64_t>(row_points * sizeof(int16_t));
  const int64_t most = std::max(fitting, ceil_div(kMaxWinogradTiles, pass.row_tiles));
  pass.rows = ceil_div(all_rows, ceil_div(all_rows, most));
  int16_t* const points =
      thread_points(pass.rows * row_points + kMaxSegments * kernel.points() * kWinogradPadding);
  for (; pass.first_row < all_rows; pass.first_row += pass.rows) {
    pass.tiles = std::min(pass.rows, all_rows - pass.first_row) * pass.row_tiles;
    int16_t* next = points;
    for (int s = 0; s < problem.tile.num_segments; ++s) {
      pass.points[s] = next;
      next += kernel.points() * pass.point_step(s);
    }
    run_pass(pass);
  }
}

#else

const WinogradKernel* select_winograd(const Igemm&) { return nullptr; }
void run_winograd(const Igemm&, const WinogradKernel&) {}

#endif

}  // namespace adpdm::cpu
