// Which convolutions run by Winograd's method; that they compute what is defined is tested in conv2d_test.cpp
// and igemm_epilogue_test.cpp.
#include "cpu/winograd.h"

#include <gtest/gtest.h>

#include <functional>

namespace adpdm {
namespace {

// 3x3, stride 1, 16 channels, 4x6 outputs in a 6x8 image of 16 bytes a pixel.
cpu::Igemm small_problem() {
  cpu::Igemm problem{};
  problem.images = problem.groups = 1;
  problem.rows = 4;
  problem.columns = 6;
  problem.outputs = 16;
  problem.tile.num_segments = 1;
  problem.tile.tap_rows = problem.tile.tap_columns = 3;
  problem.tile.weight_bits = 8;
  cpu::IgemmInput& input = problem.inputs[0];
  input.column_step = input.tile.tap_column_step = 16;
  input.row_step = input.tile.tap_row_step = 8 * 16;
  input.tile.quads = 4;
  return problem;
}

TEST(Winograd, AppliesToEvenOutputsOfStride1OnAvx2) {
  for (cpu::Isa isa : {cpu::Isa::kPortable, cpu::Isa::kAvx2, cpu::Isa::kAvxVnni, cpu::Isa::kAvx512}) {
    if (!cpu::cpu_supports(isa)) continue;
    const cpu::ScopedIsa scope(isa);
    EXPECT_EQ(cpu::winograd_applies(small_problem()), isa == cpu::Isa::kAvx2) << cpu::isa_name(isa);
  }
}

TEST(Winograd, LeavesOtherConvolutionsAlone) {
  if (!cpu::cpu_supports(cpu::Isa::kAvx2)) GTEST_SKIP() << "needs AVX2";
  const cpu::ScopedIsa scope(cpu::Isa::kAvx2);
  const std::function<void(cpu::Igemm&)> changes[] = {
      [](cpu::Igemm& problem) { problem.groups = 2; },
      [](cpu::Igemm& problem) { problem.rows = 5; },
      [](cpu::Igemm& problem) { problem.columns = 7; },
      [](cpu::Igemm& problem) { problem.tile.tap_rows = 1; },
      [](cpu::Igemm& problem) { problem.tile.tap_columns = 5; },
      [](cpu::Igemm& problem) { problem.inputs[0].row_step *= 2; },
      [](cpu::Igemm& problem) { problem.inputs[0].column_step *= 2; },
      [](cpu::Igemm& problem) { problem.inputs[0].tile.quads = 5; },
      [](cpu::Igemm& problem) { problem.inputs[0].tile.quads = 3648 / 4; },
      // Few pixels, which 4-bit weights multiply at once more quickly than they are transformed.
      [](cpu::Igemm& problem) { problem.tile.nibbles = true; },
  };
  for (const auto& change : changes) {
    cpu::Igemm problem = small_problem();
    change(problem);
    EXPECT_FALSE(cpu::winograd_applies(problem)) << "change " << &change - changes;
  }
}

}  // namespace
}  // namespace adpdm
