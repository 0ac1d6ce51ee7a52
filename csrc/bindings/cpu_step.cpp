// set_step: finds the calibrated step of a timestep on the CPU, in one call instead of eight before every
// forward.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "bindings/prepare.h"

namespace adpdm::bindings {
namespace {

// The first of the nearest; NaN is nearest to a NaN, as torch's argmin has it.
int64_t nearest(float timestep, const float* timesteps, int64_t steps) {
  int64_t step = 0;
  float least = std::abs(timesteps[0] - timestep);
  for (int64_t i = 1; i < steps && !std::isnan(least); ++i) {
    const float distance = std::abs(timesteps[i] - timestep);
    if (distance < least || std::isnan(distance)) {
      least = distance;
      step = i;
    }
  }
  return step;
}

void set_step(const at::Tensor& timestep,       // [1] of any type
              const at::Tensor& timesteps,      // [T] f32
              const at::Tensor& table,          // [T, S] i32
              const at::Tensor& step_index,     // [1] i32, written
              const at::Tensor& group_index) {  // [S] i32, written
  constexpr OpName kOp = "set_step";
  TORCH_CHECK_VALUE(timestep.numel() == 1, kOp, ": timestep must hold 1 value, got ", timestep.numel());
  check_device(kOp, "timestep", timestep, timesteps);
  const int64_t steps = timesteps.numel();
  const int64_t slots = group_index.numel();
  TORCH_CHECK_VALUE(steps >= 1, kOp, ": timesteps must have at least 1 element, got 0");
  check_vector(kOp, "timesteps", timesteps, at::kFloat, steps, timesteps);
  check_vector(kOp, "step_index", step_index, at::kInt, 1, timesteps);
  check_vector(kOp, "group_index", group_index, at::kInt, slots, timesteps);
  check_dtype(kOp, "table", table, at::kInt);
  check_device(kOp, "table", table, timesteps);
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(0) == steps && table.size(1) == slots, kOp,
                    ": table must have shape [", steps, ", ", slots, "], got ", table.sizes());
  TORCH_CHECK_VALUE(table.is_contiguous(), kOp, ": table must be contiguous, got strides ", table.strides());
  const auto value = timestep.item().toFloat();
  const int64_t step = nearest(value, timesteps.const_data_ptr<float>(), steps);
  *step_index.mutable_data_ptr<int32_t>() = static_cast<int32_t>(step);
  std::copy_n(table.const_data_ptr<int32_t>() + step * slots, slots, group_index.mutable_data_ptr<int32_t>());
}

}  // namespace

TORCH_LIBRARY_IMPL(adpdm, CPU, m) { m.impl("set_step", &set_step); }

}  // namespace adpdm::bindings
