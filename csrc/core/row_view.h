// A floating-point matrix of contiguous rows: how the ops take x, a channel slice of a larger tensor
// included.
#pragma once

#include "core/types.h"

namespace adpdm {

struct RowView {
  const void* data;  // [rows, columns] of `type`, rows `stride` elements apart
  FloatType type;
  int64_t rows;
  int64_t columns;
  int64_t stride;  // >= columns
};

// Bytes of one element.
constexpr int64_t float_size(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// A view without gaps is one long row.
inline RowView collapse(const RowView& x) {
  if (x.stride != x.columns) return x;
  return {x.data, x.type, 1, x.rows * x.columns, x.rows * x.columns};
}

}  // namespace adpdm
