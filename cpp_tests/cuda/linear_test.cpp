// linear on CUDA against the definition, bit for bit.
#include <gtest/gtest.h>

#include <vector>

#include "cuda/igemm_cases.h"

namespace adpdm::testing {
namespace {

using cuda::TileChoice;

Layer make_layer(int64_t images, int64_t rows_per_image, std::vector<int64_t> features, int64_t outputs,
                 int activation_bits, int weight_bits) {
  Layer layer;
  layer.batch = images;
  layer.input = {1, rows_per_image};
  layer.channels = std::move(features);
  layer.out_channels = outputs;
  layer.kernel = {1, 1};
  layer.padding = layer.padding_end = {0, 0};
  layer.activation_bits = activation_bits;
  layer.weight_bits = weight_bits;
  return layer;
}

void expect_linear(const Layer& layer, const Epilogue& epilogue, uint32_t seed,
                   const std::optional<TileChoice>& choice = std::nullopt) {
  const HostCase host = random_case(layer, epilogue, seed);
  EXPECT_EQ(DeviceCase(host).linear(choice), expected_results(host)) << "seed " << seed;
}

TEST(CudaLinear, MatchesDefinitionForEveryMode) {
  ADPDM_REQUIRE_GPU();
  const int64_t shapes[][3] = {{1, 1, 1},    {1, 256, 64},   {7, 33, 10},
                               {64, 64, 64}, {29, 130, 100}, {3, 4, 257}};
  uint32_t seed = 1;
  on_devices([&] {
    for (const auto& [rows, features, outputs] : shapes) {
      for (const auto& [activation_bits, weight_bits] : {std::pair(8, 8), std::pair(8, 4), std::pair(4, 3)}) {
        expect_linear(make_layer(1, rows, {features}, outputs, activation_bits, weight_bits), {}, ++seed);
      }
    }
  });
}

TEST(CudaLinear, TwoSegmentsAndSplitReductions) {
  ADPDM_REQUIRE_GPU();
  for (const auto& [activation_bits, weight_bits] : {std::pair(8, 8), std::pair(8, 4), std::pair(4, 4)}) {
    const Layer layer = make_layer(1, 20, {160, 96}, 72, activation_bits, weight_bits);
    for (int splits : {1, 2, 3, 4}) expect_linear(layer, {}, 40, TileChoice{{64, 64}, splits});
  }
}

TEST(CudaLinear, RowBiasBelongsToAnImage) {
  ADPDM_REQUIRE_GPU();
  Epilogue epilogue;
  epilogue.row_bias = true;
  epilogue.residual = FloatType::kBFloat16;
  epilogue.type = FloatType::kBFloat16;
  expect_linear(make_layer(3, 25, {64}, 48, 8, 8), epilogue, 50);
  expect_linear(make_layer(5, 1, {64}, 48, 8, 8), epilogue, 51);
}

TEST(CudaLinear, GegluHalvesTheOutputs) {
  ADPDM_REQUIRE_GPU();
  for (int num_bits : {0, 8}) {
    Epilogue epilogue;
    epilogue.activation = Activation::kGeglu;
    epilogue.num_bits = num_bits;
    epilogue.type = FloatType::kFloat16;
    for (int64_t outputs : {64, 70}) expect_linear(make_layer(1, 30, {64}, outputs, 8, 8), epilogue, 60);
  }
}

TEST(CudaLinear, NoRowsDoesNothing) {
  ADPDM_REQUIRE_GPU();
  const HostCase host = random_case(make_layer(0, 4, {32}, 8, 8, 8), {}, 70);
  EXPECT_TRUE(DeviceCase(host).linear().empty());
}

}  // namespace
}  // namespace adpdm::testing
