// Tests of the activation histograms on CUDA against the CPU.
#include "core/observe.h"

#include <cmath>
#include <numeric>

#include "core/quant_math.h"
#include "cuda/elementwise_memory.h"

namespace adpdm::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kSteps = 3;

// Empty tables of the CPU and of the device, and the same calls on both.
struct Tables {
  std::vector<int64_t> counts = std::vector<int64_t>(kSteps * kHistogramBins);
  std::vector<float> extrema = {kInf, -kInf, kInf, -kInf, kInf, -kInf};
  DeviceBuffer<int64_t> device_counts{counts};
  DeviceBuffer<float> device_extrema{extrema};

  void observe_on_device(const RowView& x, int32_t step) {
    const DeviceBuffer<int32_t> index(std::vector<int32_t>{step});
    cuda::observe(x, {device_counts.data(), device_extrema.data(), index.data(), kSteps}, nullptr);
  }

  void observe(const FloatBuffer& x, FloatType type, int64_t rows, int64_t columns, int64_t stride,
               int32_t step) {
    cpu::observe({x.input().data(), type, rows, columns, stride},
                 {counts.data(), extrema.data(), &step, kSteps});
    observe_on_device({x.data(), type, rows, columns, stride}, step);
  }

  void observe(const std::vector<float>& values, int32_t step) {
    const FloatBuffer x(values, FloatType::kFloat32);
    const auto size = static_cast<int64_t>(values.size());
    observe(x, FloatType::kFloat32, 1, size, size, step);
  }

  void expect_equal() const {
    EXPECT_EQ(device_counts.host(), counts);
    const std::vector<float> found = device_extrema.host();
    for (size_t i = 0; i < extrema.size(); ++i) {
      // == : the sign of a zero is open.
      EXPECT_TRUE(found[i] == extrema[i] || (std::isnan(found[i]) && std::isnan(extrema[i])))
          << i << ": " << found[i] << " " << extrema[i];
    }
  }
};

struct Shape {
  int64_t rows, columns, stride, offset;
};

const Shape kShapes[] = {{1, 0, 0, 0},       {1, 1, 1, 0},       {1, 1023, 1023, 0},
                         {1, 1024, 1024, 0}, {3, 5000, 5000, 0}, {1, 2500, 2500, 1},
                         {7, 13, 20, 0},     {100, 24, 40, 0},   {5, 24, 41, 3}};

TEST(CudaObserve, CountsAndExtremaOfAllShapesEqualTheCpus) {
  ADPDM_REQUIRE_GPU();
  unsigned seed = 0;
  for (const Shape& shape : kShapes) {
    for (FloatType type : kFloatTypes) {
      const int64_t size = shape.columns == 0 ? 0 : (shape.rows - 1) * shape.stride + shape.columns;
      std::vector<float> values = special_values(size, ++seed, 0.1f);
      for (float& value : values) value = std::isnan(value) ? 0.0f : value;
      const FloatBuffer x(values, type, shape.offset);
      for_each_schedule([&] {
        Tables tables;
        tables.observe(x, type, shape.rows, shape.columns, shape.stride, static_cast<int32_t>(seed % kSteps));
        tables.expect_equal();
      });
    }
  }
}

// More work than one round of the resident blocks.
TEST(CudaObserve, BlocksTakeSeveralShares) {
  ADPDM_REQUIRE_GPU();
#ifdef ADPDM_SIMT
  cuda::set_emulated_device({80, 1, 64 * 1024});
#endif
  Tables tables;
  tables.observe(random_normal(50000, 4), 1);
#ifdef ADPDM_SIMT
  cuda::set_emulated_device(cuda::kEmulatedA100);
#endif
  tables.expect_equal();
}

TEST(CudaObserve, AddsUpAndWidensOverCalls) {
  ADPDM_REQUIRE_GPU();
  Tables tables;
  for (const std::vector<float>& x : std::vector<std::vector<float>>{
           {-5.0f}, {3.0f, -7.0f}, {-6.0f, 4.0f}, {0.0f, -0.0f}, {2.0f}, {-1.0f}, {-kInf}, {kInf}}) {
    tables.observe(x, 0);
    tables.expect_equal();
  }
  tables.observe({-3.0f}, 1);
  tables.observe({-2.0f}, 1);
  tables.observe({-4.0f}, 1);
  tables.expect_equal();
}

TEST(CudaObserve, NanSticksWhateverItsSignAndWhoeverWroteIt) {
  ADPDM_REQUIRE_GPU();
  for (float nan : {kNan, -kNan}) {
    Tables tables;
    tables.observe({1.0f, nan, -2.0f}, 0);  // from an element
    tables.observe({-3.0f}, 0);
    tables.observe({3.0f}, 0);
    tables.expect_equal();
    EXPECT_TRUE(std::isnan(tables.extrema[0]) && std::isnan(tables.extrema[1]));
    Tables loaded;  // from the table
    loaded.extrema[2] = loaded.extrema[3] = nan;
    loaded.device_extrema.set(loaded.extrema);
    loaded.observe({-3.0f, 5.0f}, 1);
    loaded.expect_equal();
  }
}

// A warp of NaN alone, in a block with numbers.
TEST(CudaObserve, NanOfAWholeWarpIsSeen) {
  ADPDM_REQUIRE_GPU();
  std::vector<float> x(2048, 1.0f);
  std::fill(x.begin(), x.begin() + 512, kNan);
  Tables tables;
  tables.observe(x, 2);
  tables.expect_equal();
}

TEST(CudaObserve, StepOutOfRangeActsAsTheNearest) {
  ADPDM_REQUIRE_GPU();
  for (int32_t step : {-4, 3}) {
    Tables tables;
    const FloatBuffer x({1.0f, 2.0f}, FloatType::kFloat32);
    tables.observe_on_device({x.data(), FloatType::kFloat32, 1, 2, 2}, step);
    const std::vector<int64_t> counts = tables.device_counts.host();
    const auto first = counts.begin() + (step < 0 ? 0 : kSteps - 1) * kHistogramBins;
    EXPECT_EQ(std::accumulate(first, first + kHistogramBins, int64_t{0}), 2);
    EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), int64_t{0}), 2);
  }
}

}  // namespace
}  // namespace adpdm::testing
