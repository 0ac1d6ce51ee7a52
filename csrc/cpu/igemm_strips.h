// The integer GEMM by strips: kernels that take a slab of outputs over many pixels in one call, for matrix
// units whose set-up is worth more than one tile.
#pragma once

#include <cstdint>

#include "cpu/igemm.h"

namespace adpdm::cpu {

constexpr int kMaxStripBlocks = 2;

// One slab of outputs over the output pixels [first_pixel, last_pixel).
struct Strip {
  const Igemm* problem;
  Tile tile;  // the slab's operands; num_blocks up to kMaxStripBlocks; its output at pixel 0
  int64_t group;
  int64_t first_pixel;
  int64_t last_pixel;
  uint8_t* scratch;  // [scratch_bytes], at a multiple of 64; what it holds is lost after the call
};

// What the thread's matrix unit is set up for; each kernel has its own numbering, 0 is nothing.
struct UnitState {
  uint32_t setup = 0;
};

struct StripKernel {
  void (*run)(Strip& strip, UnitState& state);
  void (*release)(UnitState& state);  // leaves the unit as it was before the first run
  int64_t (*scratch_bytes)(const Igemm& problem);
  int64_t min_pixels;  // with fewer, tiles are quicker
  int64_t speed;       // steps of 16 outputs x 4 channels in the time in which a vector unit does one
};

// That of a level; nullptr where it has none.
const StripKernel* strip_kernel_of(Isa isa);

// The kernel for a problem of that many pixels at active_isa(); nullptr: run tiles.
const StripKernel* select_strip_kernel(int64_t pixels);

void run_strips(const Igemm& problem, const StripKernel& kernel);

// Forces a kernel for its lifetime, in all threads and for any number of pixels, as ScopedIsa does a level:
// so tests run a kernel on emulated instructions.
class ScopedStripKernel {
 public:
  explicit ScopedStripKernel(const StripKernel* kernel);
  ~ScopedStripKernel();
  ScopedStripKernel(const ScopedStripKernel&) = delete;
  ScopedStripKernel& operator=(const ScopedStripKernel&) = delete;

 private:
  const StripKernel* previous_;
};

}  // namespace adpdm::cpu
