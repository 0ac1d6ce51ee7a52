// conv2d on CUDA against its definition, bit for bit: shapes, modes, tiles, split reductions, epilogues.
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/igemm_cases.h"

namespace adpdm::testing {
namespace {

using cuda::TileChoice;
using Choices = std::vector<std::optional<TileChoice>>;

// Activation and weight bits of the modes.
constexpr int kModes[][2] = {{8, 8}, {8, 4}, {4, 4}};

Layer with_mode(Layer layer, const int (&mode)[2]) {
  layer.activation_bits = mode[0];
  layer.weight_bits = mode[1];
  return layer;
}

Choices every_tile(int splits) {
  return {TileChoice{{64, 64}, splits}, TileChoice{{128, 64}, splits}, TileChoice{{128, 128}, splits}};
}

TEST(CudaConv2d, MatchesDefinitionForEveryModeAndTile) {
  ADPDM_REQUIRE_GPU();
  Layer layer;
  layer.batch = 2;
  layer.channels = {32};
  layer.input = {9, 8};  // 144 rows: more than one tile of 128, none of them whole
  layer.out_channels = 136;
  on_devices([&] {
    for (const auto& mode : kModes) {
      on_schedules(1, [&] { expect_conv2d(with_mode(layer, mode), {}, 1, every_tile(1)); });
    }
  });
}

TEST(CudaConv2d, DoesNotDependOnTheOrderOfWarps) {
  ADPDM_REQUIRE_GPU();
  Layer layer;
  layer.channels = {96};
  layer.input = {5, 6};
  layer.out_channels = 40;
  for (const auto& mode : kModes) {
    on_schedules(4, [&] { expect_conv2d(with_mode(layer, mode), {}, 2, {TileChoice{{64, 64}, 1}}); });
  }
}

}  // namespace
}  // namespace adpdm::testing
