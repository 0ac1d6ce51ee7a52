// What only the host can check: values that lie in tensors.
#pragma once

#include <c10/util/Exception.h>

#include "core/types.h"

namespace adpdm::bindings {

// Codes and zero-points share the range of int8.
inline void check_current_group(const char* op, const char* group_index, const char* zero_point,
                                const GroupedQParams& qparams) {
  const int64_t group = *qparams.group_index;
  TORCH_CHECK_INDEX(group >= 0 && group < qparams.num_groups, op, ": ", group_index,
                    " must be in [0, num_groups=", qparams.num_groups, "), got ", group);
  const int32_t code = qparams.zero_point[group];
  TORCH_CHECK_VALUE(code >= -128 && code <= 127, op, ": ", zero_point, "[", group,
                    "] must be a code in [-128, 127], got ", code);
}

}  // namespace adpdm::bindings
