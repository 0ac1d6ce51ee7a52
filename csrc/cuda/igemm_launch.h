// Starts the kernels of a planned implicit GEMM.
#pragma once

#include "core/stream.h"
#include "cuda/igemm_problem.h"
#include "cuda/planner.h"

namespace adpdm::cuda {

// `problem` without what the plan decides; workspace has plan.workspace_bytes. Throws CudaError.
void launch_igemm(const char* op, IgemmProblem problem, const IgemmPlan& plan, void* workspace,
                  Stream stream);

}  // namespace adpdm::cuda
