// Cuts an integer GEMM into strips and runs them in parallel.
#include "cpu/igemm_strips.h"

#include <algorithm>
#include <atomic>

#include "cpu/parallel.h"
#include "cpu/thread_memory.h"

namespace adpdm::cpu {

#if defined(ADPDM_AMX)
namespace amx {
extern const StripKernel strip_kernel;
}
#endif

namespace {

std::atomic<const StripKernel*> forced_kernel{nullptr};

// As for tiles: below this many steps of a vector unit a second thread costs more than it saves.
constexpr int64_t kMinStepsPerThread = 20000;

// Activations of a chunk stay in the second-level cache (2 MiB on Sapphire Rapids, half of it for weights and
// results) while all slabs of outputs pass over them.
constexpr int64_t kChunkBytes = 512 * 1024;

// The unit in which pixels are given to threads; neighbouring pieces of one thread run as one strip.
constexpr int64_t kPiecePixels = 32;

// Items are numbered chunk by chunk, slab by slab, piece by piece.
struct Plan {
  int64_t pixels;
  int64_t blocks;  // of 16 outputs, per group
  int64_t slabs;   // of up to kMaxStripBlocks blocks, per group
  int64_t chunk_pixels;
  int64_t chunks;
  int64_t pieces;  // per chunk
};

int64_t input_bytes(const Igemm& problem) {
  int64_t bytes = 0;
  for (int s = 0; s < problem.tile.num_segments; ++s) bytes += problem.inputs[s].image_step;
  return bytes * problem.images;
}

int64_t weight_bytes(const Igemm& problem, int64_t blocks) {
  int64_t bytes = 0;
  for (int s = 0; s < problem.tile.num_segments; ++s) bytes += problem.inputs[s].tile.block_bytes;
  return bytes * blocks * problem.groups;
}

// One chunk reads the input once per slab of outputs, chunks read the weights once each: takes what reads
// less from beyond the cache.
int64_t choose_chunks(int64_t input, int64_t weight, int64_t slabs) {
  const int64_t chunks = ceil_div(input, kChunkBytes);
  return input + weight * chunks < input * slabs + weight ? chunks : 1;
}

Plan make_plan(const Igemm& problem) {
  Plan plan{};
  plan.pixels = problem.images * problem.rows * problem.columns;
  plan.blocks = ceil_div(problem.outputs / problem.groups, kBlockOutputs);
  plan.slabs = ceil_div(plan.blocks, kMaxStripBlocks);
  const int64_t wanted =
      choose_chunks(input_bytes(problem), weight_bytes(problem, plan.blocks), plan.slabs * problem.groups);
  plan.pieces = ceil_div(ceil_div(plan.pixels, wanted), kPiecePixels);
  plan.chunk_pixels = plan.pieces * kPiecePixels;
  plan.chunks = ceil_div(plan.pixels, plan.chunk_pixels);
  return plan;
}

// Points the strip at the items from `item` on that are one slab of one chunk, at most up to `end`; returns
// the first item after them.
int64_t select_strip(const Plan& plan, int64_t item, int64_t end, Strip& strip) {
  const Igemm& problem = *strip.problem;
  const int64_t first_piece = item % plan.pieces;
  const int64_t last_piece = std::min(plan.pieces, first_piece + end - item);
  const int64_t slab = item / plan.pieces % (plan.slabs * problem.groups);
  const int64_t chunk = item / plan.pieces / (plan.slabs * problem.groups);
  const int64_t chunk_end = std::min(plan.pixels, (chunk + 1) * plan.chunk_pixels);
  strip.first_pixel = std::min(chunk_end, chunk * plan.chunk_pixels + first_piece * kPiecePixels);
  strip.last_pixel = std::min(chunk_end, chunk * plan.chunk_pixels + last_piece * kPiecePixels);
  strip.group = slab / plan.slabs;
  const int64_t first_block = slab % plan.slabs * kMaxStripBlocks;
  select_outputs(problem, strip.group, first_block, std::min(plan.blocks, first_block + kMaxStripBlocks),
                 strip.tile);
  return item + last_piece - first_piece;
}

uint8_t* thread_scratch(int64_t bytes) {
  thread_local ThreadMemory memory;
  return reinterpret_cast<uint8_t*>(memory.take(bytes));
}

// The unit's state, given back however the scope ends.
class ScopedUnit {
 public:
  explicit ScopedUnit(const StripKernel& kernel) : kernel_(kernel) {}
  ~ScopedUnit() { kernel_.release(state); }
  ScopedUnit(const ScopedUnit&) = delete;
  ScopedUnit& operator=(const ScopedUnit&) = delete;
  UnitState state;

 private:
  const StripKernel& kernel_;
};

int64_t steps_per_item(const Igemm& problem, const Plan& plan) {
  int64_t quads = 0;
  for (int s = 0; s < problem.tile.num_segments; ++s) quads += problem.inputs[s].tile.quads;
  const int64_t blocks = std::min<int64_t>(plan.blocks, kMaxStripBlocks);
  const int64_t pixels = std::min(plan.pixels, kPiecePixels);
  return problem.tile.tap_rows * problem.tile.tap_columns * quads * blocks * pixels;
}

}  // namespace

const StripKernel* strip_kernel_of([[maybe_unused]] Isa isa) {
#if defined(ADPDM_AMX)
  if (isa == Isa::kAmx) return &amx::strip_kernel;
#endif
  return nullptr;
}

const StripKernel* select_strip_kernel(int64_t pixels) {
  if (const StripKernel* forced = forced_kernel.load(std::memory_order_relaxed)) return forced;
  const StripKernel* kernel = strip_kernel_of(active_isa());
  return kernel && pixels >= kernel->min_pixels ? kernel : nullptr;
}

void run_strips(const Igemm& problem, const StripKernel& kernel) {
  const Plan plan = make_plan(problem);
  const int64_t scratch_bytes = kernel.scratch_bytes(problem);
  const int64_t items = plan.chunks * plan.slabs * problem.groups * plan.pieces;
  const int64_t grain = ceil_div(kMinStepsPerThread * kernel.speed, steps_per_item(problem, plan));
  parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    ScopedUnit unit(kernel);
    Strip strip{};
    strip.problem = &problem;
    strip.tile = problem.tile;
    for (int s = 0; s < strip.tile.num_segments; ++s) strip.tile.segments[s] = problem.inputs[s].tile;
    strip.scratch = thread_scratch(scratch_bytes);
    for (int64_t item = begin; item < end;) {
      item = select_strip(plan, item, end, strip);
      if (strip.first_pixel < strip.last_pixel) kernel.run(strip, unit.state);
    }
  });
}

ScopedStripKernel::ScopedStripKernel(const StripKernel* kernel) : previous_(forced_kernel.exchange(kernel)) {}

ScopedStripKernel::~ScopedStripKernel() { forced_kernel.store(previous_); }

}  // namespace adpdm::cpu
