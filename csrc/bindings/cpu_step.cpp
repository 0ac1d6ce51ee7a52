// set_step: finds the calibrated step of a timestep on the CPU, in one call instead of eight before every
// forward.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "bindings/prepare.h"

namespace adpdm::bindings {
namespace {

constexpr OpName kOp = "set_step";
constexpr int64_t kCorrectionTerms = 2;  // weights of prediction and sample

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

template <typename T>
void copy_row(const at::Tensor& table, int64_t row, const at::Tensor& current) {
  const int64_t columns = current.numel();
  std::copy_n(table.const_data_ptr<T>() + row * columns, columns, current.mutable_data_ptr<T>());
}

void set_step(const at::Tensor& timestep,                   // [1] of any type
              const at::Tensor& timesteps,                  // [T] f32
              const at::Tensor& table,                      // [T, S] i32
              const std::optional<at::Tensor>& correction,  // [T, 2] f32
              const at::Tensor& step_index,                 // [1] i32, written
              const at::Tensor& group_index,                // [S] i32, written
              const at::Tensor& current_correction) {       // [2] f32, written where there is a correction
  TORCH_CHECK_VALUE(timestep.numel() == 1, kOp, ": timestep must hold 1 value, got ", timestep.numel());
  check_device(kOp, "timestep", timestep, timesteps);
  const int64_t steps = timesteps.numel();
  TORCH_CHECK_VALUE(steps >= 1, kOp, ": timesteps must have at least 1 element, got 0");
  check_vector(kOp, "timesteps", timesteps, at::kFloat, steps, timesteps);
  check_vector(kOp, "step_index", step_index, at::kInt, 1, timesteps);
  check_vector(kOp, "group_index", group_index, at::kInt, group_index.numel(), timesteps);
  check_matrix(kOp, "table", table, at::kInt, steps, group_index.numel(), timesteps);
  check_vector(kOp, "current_correction", current_correction, at::kFloat, kCorrectionTerms, timesteps);
  if (correction.has_value()) {
    check_matrix(kOp, "correction", *correction, at::kFloat, steps, kCorrectionTerms, timesteps);
  }
  const auto value = timestep.item().toFloat();
  const int64_t step = nearest(value, timesteps.const_data_ptr<float>(), steps);
  *step_index.mutable_data_ptr<int32_t>() = static_cast<int32_t>(step);
  copy_row<int32_t>(table, step, group_index);
  if (correction) copy_row<float>(*correction, step, current_correction);
}

}  // namespace

TORCH_LIBRARY_IMPL(adpdm, CPU, m) { m.impl("set_step", &set_step); }

}  // namespace adpdm::bindings
