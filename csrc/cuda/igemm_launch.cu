// Fills in what a plan decides, starts the GEMM kernel and, for a split reduction, the one that adds its
// slices.
#include <stdexcept>

#include "cuda/depthwise.h"
#include "cuda/igemm_epilogue.cuh"
#include "cuda/igemm_launch.h"
#include "cuda/igemm_mma.h"
#include "cuda/igemm_wgmma.h"
#include "cuda/launch.cuh"

namespace adpdm::cuda {
namespace {

constexpr int kFinishThreads = 128;

ADPDM_DEVICE void read_slice_run(const int32_t* slice, int32_t (&run)[kRun]) {
  ADPDM_UNROLL
  for (int half = 0; half < 2; ++half) {
    const Bytes16 bytes = load(reinterpret_cast<const Bytes16*>(slice) + half);
    ADPDM_UNROLL
    for (int i = 0; i < 4; ++i) run[4 * half + i] = static_cast<int32_t>(bytes.word[i]);
  }
}

// A thread adds the slices of one run, in order, and finishes it.
ADPDM_KERNEL(kFinishThreads, 1)
igemm_finish(const ADPDM_GRID_CONSTANT IgemmProblem problem) {
  const int64_t group_runs = ceil_div(problem.outputs, kRun);
  const int64_t index = block_x() * kFinishThreads + thread_index();
  const int64_t row = index / (group_runs * problem.groups);
  if (row >= problem.rows) return;
  const auto group = static_cast<int32_t>(index / group_runs % problem.groups);
  const auto output = static_cast<int32_t>(index % group_runs) * kRun;
  const Run run = run_at(problem, group, output);
  const RunTerms terms = load_terms(problem, run);
  float residual[kRun] = {};
  load_residual(problem, run, row, residual);
  float y[kRun];
  ADPDM_UNROLL
  for (int i = 0; i < kRun; ++i) y[i] = terms.bias[i];
  const int32_t* slices =
      problem.slices + row * problem.slice_row + group * (problem.slice_row / problem.groups) + output;
  ADPDM_UNROLL
  for (int s = 0; s < kMaxSegments; ++s) {
    if (s >= problem.num_sources) continue;
    int32_t sums[kRun] = {};
    for (int z = first_slice(problem, s); z < first_slice(problem, s + 1); ++z) {
      int32_t share[kRun];
      read_slice_run(slices + z * problem.slice_size, share);
      ADPDM_UNROLL
      for (int i = 0; i < kRun; ++i) sums[i] += share[i];
    }
    add_source(terms, s, sums, y);
  }
  finish_run(problem, next_quantizer(problem.output), run, row, residual, y);
}

void fill_in(IgemmProblem& problem, const IgemmPlan& plan, void* workspace) {
  problem.row_tiles = static_cast<int32_t>(ceil_div(problem.rows, plan.tile.rows));
  problem.output_tiles = static_cast<int32_t>(ceil_div(problem.outputs, plan.tile.outputs));
  problem.splits = plan.splits;
  problem.splits_of_first = plan.splits_of_first;
  problem.slices = static_cast<int32_t*>(workspace);
  problem.slice_row = int64_t{problem.groups} * problem.output_tiles * plan.tile.outputs;
  problem.slice_size = problem.slice_row * problem.row_tiles * plan.tile.rows;
}

// A block per tile, group and share of the reduction.
LaunchShape tile_grid(const char* op, const IgemmProblem& problem, Stream stream) {
  LaunchShape shape{};
  shape.grid_x = int64_t{problem.row_tiles} * problem.output_tiles;
  shape.grid_y = problem.groups;
  shape.grid_z = problem.splits;
  shape.stream = stream;
  shape.op = op;
  return shape;
}

int sources_per_block(const IgemmProblem& problem) { return problem.splits == 1 ? problem.num_sources : 1; }

void launch_mma(const char* op, const IgemmProblem& problem, const IgemmPlan& plan, Stream stream) {
  const MmaKernel& kernel = find_mma_kernel(plan.mode, plan.tile, plan.gather);
  LaunchShape shape = tile_grid(op, problem, stream);
  shape.threads = kernel.threads;
  shape.shared_bytes = mma_shared_bytes(plan.mode, plan.tile, sources_per_block(problem));
  launch(kernel.function, shape, problem);
}

#ifdef ADPDM_WGMMA
void launch_wgmma(const char* op, const IgemmProblem& problem, const IgemmPlan& plan, Stream stream) {
  const WgmmaKernel& kernel = find_wgmma_kernel(plan.tile);
  LaunchShape shape = tile_grid(op, problem, stream);
  shape.threads = kernel.threads;
  shape.shared_bytes = wgmma_shared_bytes(plan.tile, sources_per_block(problem));
  launch(kernel.function, shape, problem);
}
#else
void launch_wgmma(const char*, const IgemmProblem&, const IgemmPlan&, Stream) {
  throw std::logic_error("igemm: the planner chose wgmma, which is not built");
}
#endif

}  // namespace

const MmaKernel& find_mma_kernel(IgemmMode mode, IgemmTile tile, bool gather) {
  for (const MmaKernelList& list :
       {mma_kernels_a8w8(), mma_kernels_a8w4(), mma_kernels_a4w4(), mma_kernels_a4w4_unpacked()}) {
    for (const MmaKernel* kernel = list.begin; kernel != list.end; ++kernel) {
      if (kernel->mode == mode && kernel->tile == tile && kernel->gather == gather) return *kernel;
    }
  }
  throw std::logic_error("igemm: the planner chose a kernel that does not exist");
}

void launch_igemm(const char* op, IgemmProblem problem, const IgemmPlan& plan, void* workspace,
                  Stream stream) {
  if (int64_t{problem.rows} * problem.outputs == 0) return;
  if (plan.core == IgemmCore::kDepthwise) return launch_depthwise(op, problem, plan.mode, stream);
  fill_in(problem, plan, workspace);
  (plan.core == IgemmCore::kWgmma ? launch_wgmma : launch_mma)(op, problem, plan, stream);
  if (plan.splits == 1) return;
  const int64_t runs = int64_t{problem.rows} * problem.groups * ceil_div(problem.outputs, kRun);
  launch(igemm_finish, {ceil_div(runs, kFinishThreads), 1, 1, kFinishThreads, 0, stream, op}, problem);
}

}  // namespace adpdm::cuda
