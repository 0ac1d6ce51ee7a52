// Cuts an integer GEMM into tiles and runs them in parallel.
#include "cpu/igemm.h"

#include <algorithm>

#include "core/row_view.h"
#include "cpu/igemm_strips.h"
#include "cpu/parallel.h"

namespace adpdm::cpu {
namespace {

// Below this many multiply steps (16 outputs x 4 channels, about a clock cycle each) a second thread costs
// more than it saves: waking one takes some microseconds.
constexpr int64_t kMinStepsPerThread = 20000;

int64_t result_bytes(const TileOutput& output) { return output.quantized ? 1 : float_size(output.type); }

// Codes that stay in a cache of 512 KiB beside the weights of a slab.
constexpr int64_t kPanelBytes = 192 * 1024;

// A slab is up to max_blocks blocks of outputs of one group: its weights stay in the cache. A panel is tiles
// of neighbouring pixels that all slabs pass over before the next: their codes stay in the cache.
struct Partition {
  int64_t blocks;  // per group
  int64_t slabs;   // per group, their blocks differ by at most one
  int64_t pixels;
  int64_t tiles;        // per slab, their pixels differ by at most one
  int64_t panel_tiles;  // the last panel may have fewer
};

// All tiles, unless reading the weights again for each panel takes less than reading all codes for each slab.
int64_t choose_panel_tiles(const Igemm& problem, const Partition& part) {
  int64_t pixel_bytes = 0, slab_bytes = 0;
  for (int s = 0; s < problem.tile.num_segments; ++s) {
    const IgemmInput& input = problem.inputs[s];
    pixel_bytes += problem.groups == 1 ? input.column_step : input.tile.quads * kQuadChannels;
    slab_bytes += input.tile.block_bytes * ceil_div(part.blocks, part.slabs);
  }
  const int64_t tile_bytes = std::max<int64_t>(1, pixel_bytes * ceil_div(part.pixels, part.tiles));
  const int64_t panel_tiles = std::max<int64_t>(1, kPanelBytes / tile_bytes);
  const int64_t weights_again = slab_bytes * part.slabs * (ceil_div(part.tiles, panel_tiles) - 1);
  const int64_t codes_again = pixel_bytes * part.pixels * (part.slabs - 1);
  return weights_again < codes_again ? panel_tiles : part.tiles;
}

Partition make_partition(const Igemm& problem, const IgemmKernel& kernel) {
  Partition part{};
  part.blocks = ceil_div(problem.outputs / problem.groups, kBlockOutputs);
  part.slabs = ceil_div(part.blocks, kernel.max_blocks);
  part.pixels = problem.images * problem.rows * problem.columns;
  part.tiles = ceil_div(part.pixels, kernel.max_pixels[ceil_div(part.blocks, part.slabs)]);
  part.panel_tiles = std::min(part.tiles, choose_panel_tiles(problem, part));
  return part;
}

// A tile of a slab; slabs are counted over all groups.
struct Item {
  int64_t slab;
  int64_t tile;
};

// The order: groups, panels, slabs, tiles.
Item item_at(const Partition& part, int64_t index) {
  const int64_t group_items = part.slabs * part.tiles;
  const int64_t group = index / group_items;
  const int64_t rest = index % group_items;
  const int64_t first_tile = rest / (part.slabs * part.panel_tiles) * part.panel_tiles;
  const int64_t tiles = std::min(part.panel_tiles, part.tiles - first_tile);
  const int64_t in_panel = rest - first_tile * part.slabs;
  return {group * part.slabs + in_panel / tiles, first_tile + in_panel % tiles};
}

// Points the tile at the outputs of one slab.
void select_slab(const Igemm& problem, const Partition& part, int64_t slab, Tile& tile) {
  const int64_t first = part.blocks * (slab % part.slabs) / part.slabs;
  const int64_t last = part.blocks * (slab % part.slabs + 1) / part.slabs;
  select_outputs(problem, slab / part.slabs, first, last, tile);
}

// Points the tile at the output pixels [first, last).
void select_pixels(const Igemm& problem, int64_t group, int64_t first, int64_t last, Tile& tile) {
  tile.num_pixels = static_cast<int>(last - first);
  tile.first_pixel = first;
  const int64_t first_column = first % problem.columns;
  const int64_t first_row = first / problem.columns % problem.rows;
  const int64_t first_image = first / problem.columns / problem.rows;
  for (int s = 0; s < tile.num_segments; ++s) {
    const IgemmInput& input = problem.inputs[s];
    int64_t column = first_column;
    int64_t row = first_row;
    int64_t image = first_image;
    for (int p = 0; p < tile.num_pixels; ++p) {
      tile.segments[s].pixels[p] = input.codes + image * input.image_step + row * input.row_step +
                                   column * input.column_step + group * input.group_step;
      if (++column < problem.columns) continue;
      column = 0;
      if (++row < problem.rows) continue;
      row = 0;
      ++image;
    }
  }
}

int64_t steps_per_tile(const Igemm& problem, const Partition& part) {
  int64_t quads = 0;
  for (int s = 0; s < problem.tile.num_segments; ++s) quads += problem.inputs[s].tile.quads;
  const int64_t steps = problem.tile.tap_rows * problem.tile.tap_columns * quads * part.blocks * part.pixels;
  return std::max<int64_t>(1, steps / (part.slabs * part.tiles));
}

}  // namespace

void skip_outputs(int64_t outputs, TileOutput& output) {
  const int64_t results = output.activation == Activation::kGeglu ? outputs / 2 : outputs;
  if (output.bias) output.bias += outputs;
  if (output.row_scale) output.row_scale += outputs;
  if (output.row_bias) output.row_bias += outputs;
  if (output.residual) output.residual += outputs * float_size(output.residual_type);
  output.data += results * result_bytes(output);
}

void select_outputs(const Igemm& problem, int64_t group, int64_t first, int64_t last, Tile& tile) {
  // A division per tile shows in linear layers of one row.
  const int64_t group_outputs = problem.groups == 1 ? problem.outputs : problem.outputs / problem.groups;
  const int64_t blocks = ceil_div(group_outputs, kBlockOutputs);
  const int64_t output = group * group_outputs + first * kBlockOutputs;
  tile.num_blocks = static_cast<int>(last - first);
  tile.num_outputs = std::min(last * kBlockOutputs, group_outputs) - first * kBlockOutputs;
  tile.output = problem.tile.output;
  skip_outputs(output, tile.output);
  for (int s = 0; s < tile.num_segments; ++s) {
    const TileSegment& whole = problem.inputs[s].tile;
    TileSegment& segment = tile.segments[s];
    segment.weight = whole.weight + (group * blocks + first) * whole.block_bytes;
    segment.weight_scale = whole.weight_scale + output;
    segment.weight_sum = whole.weight_sum + output;
  }
}

void skip_pixels(int64_t pixels, TileOutput& output) {
  if (output.residual) output.residual += pixels * output.outputs * float_size(output.residual_type);
  output.data += pixels * output.step * result_bytes(output);
}

void run_igemm(const Igemm& problem) {
  const int64_t pixels = problem.images * problem.rows * problem.columns;
  if (const StripKernel* strips = select_strip_kernel(pixels)) return run_strips(problem, *strips);
  const IgemmKernel& kernel = ADPDM_SELECT_ISA_OR_VNNI(igemm_kernel);
  const Partition part = make_partition(problem, kernel);
  const int64_t grain = ceil_div(kMinStepsPerThread, steps_per_tile(problem, part));
  const int64_t items = problem.groups * part.slabs * part.tiles;
  parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    Tile tile = problem.tile;
    for (int s = 0; s < tile.num_segments; ++s) tile.segments[s] = problem.inputs[s].tile;
    TileOutput slab_output{};
    int64_t selected = -1;
    for (int64_t index = begin; index < end; ++index) {
      const Item item = item_at(part, index);
      if (item.slab != selected) {
        selected = item.slab;
        select_slab(problem, part, selected, tile);
        slab_output = tile.output;
      }
      const int64_t first = part.pixels * item.tile / part.tiles;
      select_pixels(problem, selected / part.slabs, first, part.pixels * (item.tile + 1) / part.tiles, tile);
      tile.output = slab_output;
      skip_pixels(first, tile.output);
      kernel.run(tile);
    }
  });
}

}  // namespace adpdm::cpu
