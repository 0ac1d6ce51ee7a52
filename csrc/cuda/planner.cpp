// Implements the choice of planner.h: candidates from tile_table.inc, costs from a small model.
#include "cuda/planner.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "cuda/igemm_mma.h"
#include "cuda/igemm_wgmma.h"

namespace adpdm::cuda {
namespace {

// The time of a k tile and of a block, in cycles of a multiprocessor.
struct TileCost {
  int arch;  // this and later devices, up to the next architecture of the table
  IgemmCore core;
  IgemmMode mode;
  IgemmTile tile;
  int blocks_per_sm;  // at work at once
  int tile_cycles;    // a k tile's share of a multiprocessor that is full of blocks
  int lone_cycles;    // a k tile of a block, however empty the multiprocessor is
  int block_cycles;   // start and epilogue
};

constexpr TileCost kTileCosts[] = {
#include "cuda/tile_table.inc"
};

// Of the second kernel: its launch, and each multiprocessor's bytes per cycle from the second-level cache.
// Estimates, not measured.
constexpr double kFinishCycles = 4000;
constexpr double kSliceBytesPerCycle = 32;

std::string text(IgemmTile tile) { return std::to_string(tile.rows) + "x" + std::to_string(tile.outputs); }

bool is_mma_tile(IgemmTile tile) {
  return std::any_of(std::begin(kMmaTiles), std::end(kMmaTiles),
                     [&](IgemmTile other) { return other == tile; });
}

bool exists(IgemmTile tile) {
  return is_mma_tile(tile) || std::any_of(std::begin(kWgmmaTiles), std::end(kWgmmaTiles),
                                          [&](IgemmTile other) { return other == tile; });
}

std::string mma_tiles() {
  std::string tiles;
  for (const IgemmTile& tile : kMmaTiles) tiles += (tiles.empty() ? "" : ", ") + text(tile);
  return tiles;
}

// Those that no mma.sync kernel has.
std::string wgmma_tiles() {
  std::string tiles;
  for (const IgemmTile& tile : kWgmmaTiles) {
    if (!is_mma_tile(tile)) tiles += (tiles.empty() ? "" : ", ") + text(tile);
  }
  return tiles;
}

std::string existing_tiles() { return mma_tiles() + ", " + wgmma_tiles(); }

IgemmMode choose_mode(const IgemmRequest& request, const DeviceInfo& device) {
  if (request.activation_bits == 8) return request.weight_bits == 8 ? IgemmMode::kA8W8 : IgemmMode::kA8W4;
  const std::string needs = std::string(request.op) + ": packed 4-bit input needs ";
  if (request.weight_bits != 4) {
    throw std::invalid_argument(needs + "weights of at most 4 bits, got wider ones; unpack the input first");
  }
  if (!request.whole_chunks) {
    throw std::invalid_argument(
        needs + "channels per group in multiples of 32 and aligned to 16 bytes; unpack the input first");
  }
  return device.arch < 90 ? IgemmMode::kA4W4 : IgemmMode::kA4W4Unpacked;
}

int64_t k_tiles(const IgemmRequest& request, int codes) {
  int64_t tiles = 0;
  for (int64_t reduction : request.reductions) tiles += ceil_div(reduction, codes);
  return tiles;
}

int64_t tiles_of(const IgemmRequest& request, IgemmTile tile) {
  return ceil_div(request.rows, tile.rows) * ceil_div(request.outputs, tile.outputs) * request.groups;
}

// A block of an undivided reduction works on all sources, one of a divided reduction on one.
int shared_bytes(const IgemmRequest& request, const TileCost& cost, int splits) {
  const int sources = splits == 1 ? static_cast<int>(request.reductions.size()) : 1;
  return cost.core == IgemmCore::kWgmma ? wgmma_shared_bytes(cost.tile, sources)
                                        : mma_shared_bytes(cost.mode, cost.tile, sources);
}

double cycles(const IgemmRequest& request, const TileCost& cost, int splits, const DeviceInfo& device) {
  const int64_t tiles = tiles_of(request, cost.tile);
  const int64_t blocks = tiles * splits;
  const int64_t per_sm = ceil_div(blocks, device.num_sms);
  const int64_t waves = ceil_div(per_sm, cost.blocks_per_sm);
  const auto steps =
      static_cast<double>(ceil_div(k_tiles(request, codes_per_tile(cost.core, cost.mode)), splits));
  const double busy = static_cast<double>(per_sm) * cost.tile_cycles;
  const double alone = static_cast<double>(waves) * cost.lone_cycles;
  double total = steps * std::max(busy, alone) + static_cast<double>(waves) * cost.block_cycles;
  if (splits > 1) {
    // Slices are written and read once.
    const double slice_bytes = 2.0 * static_cast<double>(blocks) * cost.tile.rows * cost.tile.outputs * 4;
    total += kFinishCycles + slice_bytes / (kSliceBytesPerCycle * device.num_sms);
  }
  return total;
}

int table_arch(int device_arch) {
  int arch = kTileCosts[0].arch;
  for (const TileCost& cost : kTileCosts) {
    if (cost.arch <= device_arch) arch = std::max(arch, cost.arch);
  }
  return arch;
}

// The number of shares that are not empty, at least one per source where the reduction is split at all.
int valid_splits(const IgemmRequest& request, int codes, int splits) {
  const auto sources = static_cast<int>(request.reductions.size());
  if (splits > 1) splits = std::max(splits, sources);
  return static_cast<int>(std::min<int64_t>(splits, k_tiles(request, codes)));
}

// Whether there is a kernel for the request on the device, and it is not another one that was chosen.
bool is_usable(const IgemmRequest& request, const TileCost& cost, const DeviceInfo& device,
               const std::optional<TileChoice>& choice) {
  if (!request.whole_chunks) return cost.core == IgemmCore::kMma && cost.tile == kMmaTiles[0];
  if (cost.core == IgemmCore::kWgmma && !(request.wgmma && device.arch == 90)) return false;
  return !choice || (cost.tile == choice->tile && (!choice->core || cost.core == *choice->core));
}

// Whether the choice, the kernels and the device admit a candidate.
bool is_admitted(const IgemmRequest& request, const TileCost& cost, int splits, const DeviceInfo& device,
                 const std::optional<TileChoice>& choice) {
  if (!is_usable(request, cost, device, choice)) return false;
  const bool splits_are_chosen = choice && choice->splits != 0;
  // With a block for every multiprocessor, slices would cost memory and gain little.
  if (splits > 1 && !splits_are_chosen && tiles_of(request, cost.tile) >= device.num_sms) return false;
  return shared_bytes(request, cost, splits) <= device.max_shared_bytes;
}

struct Candidate {
  IgemmCore core;
  IgemmTile tile;
  int splits;  // 0: there is none
};

// The candidate of least cost among the tiles and numbers of splits that `choice` leaves open.
Candidate cheapest(const IgemmRequest& request, IgemmMode mode, const DeviceInfo& device,
                   const std::optional<TileChoice>& choice) {
  const int arch = table_arch(device.arch);
  const bool splits_are_chosen = choice && choice->splits != 0;
  const int least = splits_are_chosen ? choice->splits : 1;
  const int most = splits_are_chosen ? choice->splits : kMaxSplits;
  Candidate best = {IgemmCore::kMma, kMmaTiles[0], 0};
  double best_cycles = 0;
  for (const TileCost& cost : kTileCosts) {
    if (cost.arch != arch || cost.mode != mode) continue;
    for (int wanted = least; wanted <= most; ++wanted) {
      const int splits = valid_splits(request, codes_per_tile(cost.core, mode), wanted);
      if (!is_admitted(request, cost, splits, device, choice)) continue;
      const double total = cycles(request, cost, splits, device);
      if (best.splits != 0 && total >= best_cycles) continue;
      best = {cost.core, cost.tile, splits};
      best_cycles = total;
    }
  }
  return best;
}

// In proportion to the k tiles, at least one for each of two sources.
int shares_of_first(const IgemmRequest& request, int codes, int splits) {
  if (request.reductions.size() == 1) return splits;
  const int64_t first = ceil_div(request.reductions[0], codes);
  const int64_t all = k_tiles(request, codes);
  const int64_t shares = (2 * splits * first + all) / (2 * all);  // to nearest
  return static_cast<int>(std::clamp<int64_t>(shares, 1, std::max(1, splits - 1)));
}

void check_choice(const IgemmRequest& request, const TileChoice& choice) {
  if (exists(choice.tile) && choice.splits >= 0 && choice.splits <= kMaxSplits) return;
  throw std::invalid_argument(std::string(request.op) + ": wanted a tile of " + existing_tiles() +
                              " and 0.." + std::to_string(kMaxSplits) + " splits, got " + text(choice.tile) +
                              " and " + std::to_string(choice.splits));
}

// For a tile that exists: whether there is a kernel of it for this request and device.
void check_usable(const IgemmRequest& request, IgemmMode mode, const DeviceInfo& device,
                  const TileChoice& choice) {
  const auto fits = [&](const TileCost& cost) {
    return cost.arch == table_arch(device.arch) && cost.mode == mode &&
           is_usable(request, cost, device, choice);
  };
  if (std::any_of(std::begin(kTileCosts), std::end(kTileCosts), fits)) return;
  throw std::invalid_argument(
      std::string(request.op) + ": wanted a tile of " + mma_tiles() + " (" + wgmma_tiles() +
      " are for int8 codes and weights on compute capability 9.0), got " + text(choice.tile));
}

}  // namespace

int codes_per_tile(IgemmCore core, IgemmMode mode) {
  return core == IgemmCore::kWgmma ? kWgmmaRowBytes : mma_codes_per_tile(mode);
}

bool wgmma_allowed() {
  const char* value = std::getenv("ADPDM_FORCE_MMA_SYNC");
  const std::string forced = value == nullptr || *value == '\0' ? "0" : value;
  if (forced != "0" && forced != "1") {
    throw std::invalid_argument("ADPDM_FORCE_MMA_SYNC: wanted 0 or 1, got '" + forced + "'");
  }
  return forced == "0" && built_for("90a");
}

IgemmPlan plan_igemm(const IgemmRequest& request, const DeviceInfo& device,
                     const std::optional<TileChoice>& choice) {
  if (device.arch < 80) {
    throw std::invalid_argument(std::string(request.op) +
                                ": wanted a device of compute capability 8.0 or later, got " +
                                std::to_string(device.arch / 10) + "." + std::to_string(device.arch % 10));
  }
  if (choice) check_choice(request, *choice);
  const IgemmMode mode = choose_mode(request, device);
  const Candidate best = cheapest(request, mode, device, choice);
  if (best.splits == 0 && choice) check_usable(request, mode, device, *choice);
  if (best.splits == 0) {
    const std::string wanted = choice ? "tile " + text(choice->tile) : "any tile";
    throw std::invalid_argument(
        std::string(request.op) + ": " + wanted + " for this layer needs more than the " +
        std::to_string(device.max_shared_bytes) + " bytes of shared memory that a block of the device has");
  }
  IgemmPlan plan{};
  plan.core = best.core;
  plan.mode = mode;
  plan.tile = best.tile;
  plan.gather = !request.whole_chunks;
  plan.splits = best.splits;
  plan.splits_of_first = shares_of_first(request, codes_per_tile(best.core, mode), best.splits);
  plan.workspace_bytes =
      best.splits > 1 ? tiles_of(request, best.tile) * best.splits * best.tile.rows * best.tile.outputs * 4
                      : 0;
  return plan;
}

std::optional<TileChoice> tile_from_environment() {
  const char* value = std::getenv("ADPDM_CUDA_TILE");
  if (value == nullptr || *value == '\0') return std::nullopt;
  TileChoice choice{};
  int end = 0;
  const std::string given = value;
  std::string rest = given;
  for (const auto& [name, core] :
       {std::pair("mma:", IgemmCore::kMma), std::pair("wgmma:", IgemmCore::kWgmma)}) {
    if (given.rfind(name, 0) != 0) continue;
    choice.core = core;
    rest = given.substr(std::string(name).size());
  }
  const auto whole = [&](int fields, int wanted) {
    return fields == wanted && end == static_cast<int>(rest.size());
  };
  const bool valid =
      whole(std::sscanf(rest.c_str(), "%4dx%4d%n", &choice.tile.rows, &choice.tile.outputs, &end), 2) ||
      whole(std::sscanf(rest.c_str(), "%4dx%4d/%2d%n", &choice.tile.rows, &choice.tile.outputs,
                        &choice.splits, &end),
            3);
  if (valid && exists(choice.tile) && choice.splits >= 0 && choice.splits <= kMaxSplits) return choice;
  throw std::invalid_argument(
      "ADPDM_CUDA_TILE: wanted ROWSxOUTPUTS or ROWSxOUTPUTS/SPLITS, with mma: or wgmma: before it or "
      "without, "
      "a tile of " +
      existing_tiles() + " and at most " + std::to_string(kMaxSplits) + " splits, got '" + given + "'");
}

std::string describe(const IgemmPlan& plan) {
  constexpr const char* kCores[] = {"mma", "wgmma", "depthwise"};
  constexpr const char* kModes[kNumIgemmModes] = {"a8w8", "a8w4", "a4w4", "a4w4-unpacked"};
  std::string words = kCores[static_cast<int>(plan.core)];
  words += std::string(" ") + kModes[static_cast<int>(plan.mode)];
  if (plan.core == IgemmCore::kDepthwise) return words;  // which has no tile
  words += " " + text(plan.tile);
  if (plan.splits > 1) words += " splits=" + std::to_string(plan.splits);
  if (plan.gather) words += " gather";
  return words;
}

}  // namespace adpdm::cuda
