// What linear borrows of conv2d on CUDA.
#pragma once

#include <optional>

#include "core/conv2d.h"
#include "core/stream.h"
#include "cuda/planner.h"

namespace adpdm::cuda {

// plan_conv2d and conv2d (igemm.h) under the name of another op.
IgemmPlan plan_as_igemm(const char* op, const Conv2dArgs& args, const std::optional<TileChoice>& choice);
void run_as_igemm(const char* op, const Conv2dArgs& args, const IgemmPlan& plan, void* workspace,
                  Stream stream);

}  // namespace adpdm::cuda
