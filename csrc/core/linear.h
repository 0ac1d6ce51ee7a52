// linear: y[m, o] = sum_s scale_s * weight_scale_s[o] * (acc_s[m, o] - zero_point_s * weight_sum_s[o]) +
// bias[o].
#pragma once

#include <cstdint>

#include "core/igemm.h"

namespace adpdm {

struct LinearArgs {
  IgemmSegment segments[kMaxSegments];
  int num_segments;
  IgemmOutput output;      // [M, O]; an image is rows_per_image rows
  int64_t rows;            // M
  int64_t rows_per_image;  // of row_scale and row_bias; M where there is none
  int64_t out_features;    // O
  int weight_bits;
};

namespace cpu {
void linear(const LinearArgs& args);
}

}  // namespace adpdm
