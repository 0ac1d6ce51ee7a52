// Integer layers on the device, shared by the CUDA tests of conv2d and linear.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "core/quantize.h"
#include "cuda/device_memory.h"
#include "cuda/igemm.h"
#include "igemm_case.h"

namespace adpdm::testing {

// Runs body as the executor's schedules differ: late and eager copies, several orders of warps. Once on a
// GPU.
inline void on_schedules(int num_seeds, const std::function<void()>& body) {
#ifdef ADPDM_SIMT
  for (int seed = 1; seed <= num_seeds; ++seed) {
    for (bool late : {true, false}) {
      if (!late && seed > 1) continue;
      const simt::ScopedOptions scope({static_cast<uint64_t>(seed), late});
      body();
    }
  }
#else
  (void)num_seeds;
  body();
#endif
}

// Devices whose code paths differ; the current one on a GPU.
inline void on_devices(const std::function<void()>& body) {
#ifdef ADPDM_SIMT
  for (int arch : {80, 90}) {
    cuda::set_emulated_device({arch, 108, 163 * 1024});
    body();
  }
  cuda::set_emulated_device(cuda::kEmulatedA100);
#else
  body();
#endif
}

// The tensors of a segment on the device.
struct DeviceSegment {
  DeviceSegment(const HostCase& host, const SegmentData& data)
      : codes(stored_codes(host, data)),
        plain_weight(data.weight_codes),
        weight(cuda::packed_weight_bytes(host.layer.out_channels, data.channels / host.layer.groups,
                                         host.taps(), host.layer.weight_bits)),
        weight_scale(data.weight_scale),
        weight_sum(data.weight_sum),
        scale(data.scale),
        zero_point(data.zero_point),
        group_index(std::vector<int32_t>{data.group_index}) {
    cuda::pack_weight(
        {plain_weight.data(), weight.data(), host.layer.out_channels, data.channels / host.layer.groups,
         host.taps(), host.layer.groups, host.layer.weight_bits},
        nullptr);
  }

  // int8, or packed by pixel.
  static std::vector<uint8_t> stored_codes(const HostCase& host, const SegmentData& data) {
    if (host.layer.activation_bits == 8) return {data.codes.begin(), data.codes.end()};
    const int64_t pixels = static_cast<int64_t>(data.codes.size()) / data.channels;
    std::vector<uint8_t> packed(static_cast<size_t>(pixels * int4_row_bytes(data.channels)));
    cpu::pack_int4(data.codes.data(), pixels, data.channels, packed.data());
    return packed;
  }

  DeviceBuffer<uint8_t> codes;
  DeviceBuffer<int8_t> plain_weight;
  DeviceBuffer<uint8_t> weight;
  DeviceBuffer<float> weight_scale;
  DeviceBuffer<int32_t> weight_sum;
  DeviceBuffer<float> scale;
  DeviceBuffer<int32_t> zero_point;
  DeviceBuffer<int32_t> group_index;
};

// A case on the device; the result is poisoned before every run.
class DeviceCase {
 public:
  explicit DeviceCase(const HostCase& host)
      : host_(host),
        bias_(host.bias),
        row_scale_(host.row_scale),
        row_bias_(host.row_bias),
        residual_(stored_as(host.residual, host.epilogue.residual.value_or(FloatType::kFloat32))),
        next_scale_(host.next_scale),
        next_zero_(host.next_zero),
        next_group_(std::vector<int32_t>{host.next_group}),
        result_(host.rows() * host.result_columns() * element_bytes()) {
    for (const SegmentData& data : host.segments) {
      segments_.push_back(std::make_unique<DeviceSegment>(host, data));
    }
  }

  Conv2dArgs args() {
    Conv2dArgs args = host_.args();
    for (size_t s = 0; s < segments_.size(); ++s) {
      DeviceSegment& data = *segments_[s];
      const bool packed = host_.layer.activation_bits == 4;
      const int64_t channels = host_.segments[s].channels;
      args.segments[s] = {
          reinterpret_cast<const int8_t*>(data.codes.data()),
          packed && host_.layer.groups == 1 ? 2 * int4_row_bytes(channels) : channels,
          data.weight.data(),
          data.weight_scale.data(),
          data.weight_sum.data(),
          {data.scale.data(), data.zero_point.data(), data.group_index.data(), data.scale.size()},
          packed};
    }
    IgemmOutput& output = args.output;
    output.bias = bias_.size() == 0 ? nullptr : bias_.data();
    output.row_scale = row_scale_.size() == 0 ? nullptr : row_scale_.data();
    output.row_bias = row_bias_.size() == 0 ? nullptr : row_bias_.data();
    output.residual = residual_.size() == 0 ? nullptr : residual_.data();
    output.qparams = {next_scale_.data(), next_zero_.data(), next_group_.data(), next_scale_.size()};
    output.data = result_.data();
    return args;
  }

  // The result of conv2d, as bits.
  std::vector<uint32_t> conv2d(const std::optional<cuda::TileChoice>& choice = std::nullopt) {
    const cuda::IgemmPlan plan = cuda::plan_conv2d(args(), choice);
    return run(plan, [&](void* workspace) { cuda::conv2d(args(), plan, workspace, nullptr); });
  }

  // The result of linear, for a layer of {1, rows per image} pixels and a 1x1 kernel.
  std::vector<uint32_t> linear(const std::optional<cuda::TileChoice>& choice = std::nullopt) {
    const Conv2dArgs conv = args();
    LinearArgs linear{};
    std::copy(conv.segments, conv.segments + kMaxSegments, linear.segments);
    linear.num_segments = conv.num_segments;
    linear.output = conv.output;
    linear.rows = host_.rows();
    linear.rows_per_image = conv.out.width;
    linear.out_features = conv.out_channels;
    linear.weight_bits = conv.weight_bits;
    const cuda::IgemmPlan plan = cuda::plan_linear(linear, choice);
    return run(plan, [&](void* workspace) { cuda::linear(linear, plan, workspace, nullptr); });
  }

 private:
  int64_t element_bytes() const {
    return host_.epilogue.num_bits > 0 ? 1 : host_.epilogue.type == FloatType::kFloat32 ? 4 : 2;
  }

  std::vector<uint32_t> run(const cuda::IgemmPlan& plan, const std::function<void(void*)>& op) {
    result_.fill_poison();
    DeviceBuffer<uint8_t> workspace(plan.workspace_bytes);
    op(workspace.data());
    const std::vector<uint8_t> bytes = result_.host();
    const auto size = static_cast<size_t>(element_bytes());
    std::vector<uint32_t> bits(bytes.size() / size);
    for (size_t i = 0; i < bits.size(); ++i) std::memcpy(&bits[i], bytes.data() + i * size, size);
    return bits;
  }

  const HostCase& host_;
  std::vector<std::unique_ptr<DeviceSegment>> segments_;
  DeviceBuffer<float> bias_, row_scale_, row_bias_;
  DeviceBuffer<uint8_t> residual_;
  DeviceBuffer<float> next_scale_;
  DeviceBuffer<int32_t> next_zero_, next_group_;
  DeviceBuffer<uint8_t> result_;
};

// conv2d gives the defined results, bit for bit, under every given choice.
inline void expect_conv2d(const Layer& layer, const Epilogue& epilogue, uint32_t seed,
                          const std::vector<std::optional<cuda::TileChoice>>& choices = {std::nullopt}) {
  const HostCase host = random_case(layer, epilogue, seed);
  const std::vector<uint32_t> expected = expected_results(host);
  DeviceCase device(host);
  for (const std::optional<cuda::TileChoice>& choice : choices) {
    const cuda::IgemmPlan plan = cuda::plan_conv2d(device.args(), choice);
    EXPECT_EQ(device.conv2d(choice), expected) << cuda::describe(plan) << ", seed " << seed;
  }
}

}  // namespace adpdm::testing
