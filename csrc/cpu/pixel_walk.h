// Output pixels as rows of one matrix: covered by runs of evenly spaced addresses, which is all that a load
// of a tile can read.
#pragma once

#include <cstdint>

#include "cpu/igemm.h"

namespace adpdm::cpu {
namespace {

// Rows of one tile: positions of the grid on which neighbouring output pixels are one apart. Those between
// two image rows (the halo) are computed and thrown away.
template <int kMaxRows>
struct PixelRun {
  int64_t image;  // where the first pixel is
  int64_t row;
  int64_t column;
  int rows;          // positions up to the last pixel; reading them reads nothing beyond its taps
  int num_pixels;    // they follow one another
  int at[kMaxRows];  // [num_pixels] row of the tile
};

// Goes through the output pixels of a problem.
class PixelWalk {
 public:
  inline __attribute__((always_inline)) PixelWalk(const Igemm& problem, int64_t first_pixel)
      : columns_(problem.columns),
        rows_(problem.rows),
        column_(first_pixel % problem.columns),
        row_(first_pixel / problem.columns % problem.rows),
        image_(first_pixel / problem.columns / problem.rows) {
    row_gap_ = common_gap(problem, [](const IgemmInput& input, int64_t) { return input.row_step; });
    image_gap_ = common_gap(problem, [](const IgemmInput& input, int64_t rows) {
      return input.image_step - (rows - 1) * input.row_step;
    });
  }

  // The next run, of at most `pixels` pixels (at least 1).
  template <int kMaxRows>
  inline __attribute__((always_inline)) void next(int64_t pixels, PixelRun<kMaxRows>& run) {
    run.image = image_;
    run.row = row_;
    run.column = column_;
    run.num_pixels = 0;
    int64_t position = 0;
    while (true) {
      int64_t n = columns_ - column_;
      if (n > kMaxRows - position) n = kMaxRows - position;
      if (n > pixels) n = pixels;
      for (int64_t i = 0; i < n; ++i) run.at[run.num_pixels++] = static_cast<int>(position + i);
      position += n;
      pixels -= n;
      run.rows = static_cast<int>(position);
      const int64_t gap = advance(n);
      if (pixels == 0 || gap < 0 || position + gap >= kMaxRows) return;
      position += gap;
    }
  }

 private:
  static constexpr int64_t kOffGrid = -1;

  // Positions between the last pixel of a row and the first of the next, if that is on the grid.
  template <typename Distance>
  static inline __attribute__((always_inline)) int64_t common_gap(const Igemm& problem, Distance distance) {
    int64_t common = kOffGrid;
    for (int s = 0; s < problem.tile.num_segments; ++s) {
      const IgemmInput& input = problem.inputs[s];
      const int64_t bytes = distance(input, problem.rows);
      const int64_t gap = bytes / input.column_step - problem.columns;
      if (bytes % input.column_step != 0 || gap < 0 || (s > 0 && gap != common)) return kOffGrid;
      common = gap;
    }
    return common;
  }

  // Moves n pixels on within the row; returns the positions passed over, kOffGrid where the run must end.
  inline __attribute__((always_inline)) int64_t advance(int64_t n) {
    column_ += n;
    if (column_ < columns_) return 0;
    column_ = 0;
    if (++row_ < rows_) return row_gap_;
    row_ = 0;
    ++image_;
    return image_gap_;
  }

  int64_t columns_;
  int64_t rows_;
  int64_t column_;
  int64_t row_;
  int64_t image_;
  int64_t row_gap_;
  int64_t image_gap_;
};

}  // namespace
}  // namespace adpdm::cpu
