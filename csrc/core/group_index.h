// The current group on the CPU: reading and checking the index that lives in a tensor.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace adpdm {

// group_index[0] if it is in [0, num_groups), else std::out_of_range. A CUDA kernel cannot raise; the CPU can
// and does.
inline int64_t current_group(const char* op, const int32_t* group_index, int64_t num_groups) {
  const int64_t group = *group_index;
  if (group < 0 || group >= num_groups) {
    throw std::out_of_range(std::string(op) + ": group_index must be in [0, num_groups=" +
                            std::to_string(num_groups) + "), got " + std::to_string(group));
  }
  return group;
}

}  // namespace adpdm
