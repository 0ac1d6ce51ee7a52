// Which convolutions run by Winograd's method; that they compute what is defined is tested in conv2d_test.cpp
// and igemm_epilogue_test.cpp.
#include "cpu/winograd.h"

#include <gtest/gtest.h>

#include <functional>
#include <vector>

namespace adpdm {
namespace {

using cpu::Isa;
using cpu::WinogradUse;

// 3x3, stride 1, with a halo of one pixel around it.
cpu::Igemm make_problem(int64_t channels, int64_t rows, int64_t columns) {
  cpu::Igemm problem{};
  problem.images = problem.groups = 1;
  problem.rows = rows;
  problem.columns = columns;
  problem.outputs = 16;
  problem.tile.num_segments = 1;
  problem.tile.tap_rows = problem.tile.tap_columns = 3;
  problem.tile.weight_bits = 8;
  cpu::IgemmInput& input = problem.inputs[0];
  input.column_step = input.tile.tap_column_step = channels;
  input.row_step = input.tile.tap_row_step = (columns + 2) * channels;
  input.tile.quads = channels / 4;
  return problem;
}

// Outputs of a tile in one direction at that level; 0 where the method does not run.
int side(const cpu::Igemm& problem, Isa isa) {
  const cpu::ScopedIsa scope(isa);
  const cpu::WinogradKernel* kernel = cpu::select_winograd(problem);
  return kernel ? kernel->side : 0;
}

std::vector<Isa> levels() {
  std::vector<Isa> result;
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512, Isa::kAmx}) {
    if (cpu::cpu_supports(isa)) result.push_back(isa);
  }
  return result;
}

TEST(Winograd, LargeTilesRunWhereThereAreVectors) {
  for (Isa isa : levels()) {
    const bool has_kernel = isa > Isa::kPortable && isa < Isa::kAmx;
    EXPECT_EQ(side(make_problem(32, 16, 16), isa), has_kernel ? 4 : 0) << cpu::isa_name(isa);
  }
}

TEST(Winograd, SmallTilesRunOnAvx2Alone) {
  for (Isa isa : levels()) {
    EXPECT_EQ(side(make_problem(32, 14, 16), isa), isa == Isa::kAvx2 ? 2 : 0) << cpu::isa_name(isa);
    EXPECT_EQ(side(make_problem(32, 4, 4), isa), isa == Isa::kAvx2 ? 2 : 0) << cpu::isa_name(isa);
  }
}

TEST(Winograd, FewTilesAreLeftToTheDirectKernel) {
  for (Isa isa : levels()) {
    const int64_t least = isa == Isa::kAvx2 ? 4 : isa == Isa::kAvxVnni ? 12 : isa == Isa::kAvx512 ? 8 : 0;
    if (least == 0) continue;
    EXPECT_EQ(side(make_problem(32, 4, 4 * least), isa), 4) << cpu::isa_name(isa);
    EXPECT_EQ(side(make_problem(32, 4, 4 * least - 4), isa), isa == Isa::kAvx2 ? 2 : 0) << cpu::isa_name(isa);
  }
}

TEST(Winograd, EverySegmentMustFit) {
  for (Isa isa : levels()) {
    cpu::Igemm problem = make_problem(32, 16, 16);
    problem.tile.num_segments = 2;
    problem.inputs[1] = make_problem(40, 16, 16).inputs[0];
    EXPECT_EQ(side(problem, isa), 0) << cpu::isa_name(isa);
  }
}

TEST(Winograd, ChannelsAreWholeVectors) {
  for (Isa isa : levels()) {
    const int wanted = isa == Isa::kAvx2 || isa == Isa::kAvxVnni ? 4 : 0;
    EXPECT_EQ(side(make_problem(48, 16, 16), isa), wanted) << cpu::isa_name(isa);
  }
}

TEST(Winograd, UseIsForced) {
  for (Isa isa : levels()) {
    if (isa == Isa::kPortable || isa == Isa::kAmx) continue;
    {
      const cpu::ScopedWinograd scope(WinogradUse::kForAnyTiles);
      EXPECT_EQ(side(make_problem(32, 4, 4), isa), 4) << cpu::isa_name(isa);
    }
    const cpu::ScopedWinograd scope(WinogradUse::kNever);
    EXPECT_EQ(side(make_problem(32, 16, 16), isa), 0) << cpu::isa_name(isa);
  }
}

TEST(Winograd, LeavesOtherConvolutionsAlone) {
  const std::function<void(cpu::Igemm&)> changes[] = {
      [](cpu::Igemm& problem) { problem.groups = 2; },
      [](cpu::Igemm& problem) { problem.rows = 15; },
      [](cpu::Igemm& problem) { problem.columns = 17; },
      [](cpu::Igemm& problem) { problem.tile.tap_rows = 1; },
      [](cpu::Igemm& problem) { problem.tile.tap_columns = 5; },
      [](cpu::Igemm& problem) { problem.inputs[0].row_step *= 2; },
      [](cpu::Igemm& problem) { problem.inputs[0].column_step *= 2; },
      [](cpu::Igemm& problem) { problem.inputs[0].tile.quads = 9; },
      [](cpu::Igemm& problem) { problem.inputs[0].tile.quads = 0; },
  };
  const cpu::ScopedWinograd scope(WinogradUse::kForAnyTiles);
  for (const auto& change : changes) {
    cpu::Igemm problem = make_problem(32, 16, 16);
    change(problem);
    for (Isa isa : levels()) {
      EXPECT_EQ(side(problem, isa), 0) << "change " << &change - changes << ", " << cpu::isa_name(isa);
    }
  }
}

TEST(Winograd, FewPixelsMultiplyNibblesAtOnce) {
  if (!cpu::cpu_supports(Isa::kAvx2)) GTEST_SKIP() << "needs AVX2";
  cpu::Igemm problem = make_problem(32, 4, 4);
  problem.tile.nibbles = true;
  EXPECT_EQ(side(problem, Isa::kAvx2), 0);
  problem.rows = 8;
  problem.columns = 14;  // 112 pixels
  EXPECT_EQ(side(problem, Isa::kAvx2), 0);
  problem.columns = 18;  // 144
  EXPECT_EQ(side(problem, Isa::kAvx2), 2);
}

}  // namespace
}  // namespace adpdm
