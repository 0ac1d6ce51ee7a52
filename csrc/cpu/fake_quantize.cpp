// Fake quantization on the CPU: unpacks the quantizers, cuts tensors into pieces and adds up the gradients in
// fixed order.
#include "core/fake_quantize.h"

#include <algorithm>
#include <vector>

#include "core/group_index.h"
#include "core/quant_math.h"
#include "core/row_view.h"
#include "cpu/chunks.h"
#include "cpu/fake_quantize_kernels.h"

namespace adpdm::cpu {
namespace {

FakeQuantizer make_quantizer(float scale, float zero_point, float importance, CodeRange range) {
  const float quant_min = static_cast<float>(range.quant_min);
  const float quant_max = static_cast<float>(range.quant_max);
  const float code = effective_zero_point(zero_point, quant_min, quant_max);
  return {scale, 1.0f / scale, quant_min - code, quant_max - code, importance};
}

// The quantizers of the current group's channels.
std::vector<FakeQuantizer> current_quantizers(const char* op, const FakeQuantizeArgs& args) {
  const int64_t row = current_group(op, args.group_index, args.num_groups) * args.shape.channels;
  std::vector<FakeQuantizer> quantizers;
  quantizers.reserve(static_cast<size_t>(args.shape.channels));
  for (int64_t c = 0; c < args.shape.channels; ++c) {
    quantizers.push_back(make_quantizer(args.scale[row + c], args.zero_point[row + c], 1.0f, args.range));
  }
  return quantizers;
}

std::vector<FakeQuantizer> mixture_quantizers(const MixtureArgs& args) {
  std::vector<FakeQuantizer> quantizers;
  quantizers.reserve(static_cast<size_t>(args.num_groups));
  for (int64_t g = 0; g < args.num_groups; ++g) {
    quantizers.push_back(make_quantizer(args.scale[g], args.zero_point[g], args.importance[g], args.range));
  }
  return quantizers;
}

const void* offset(const void* data, FloatType type, int64_t index) {
  return static_cast<const char*>(data) + index * float_size(type);
}

void* offset(void* data, FloatType type, int64_t index) {
  return static_cast<char*>(data) + index * float_size(type);
}

GradRow make_row(const void* x, const void* grad, void* grad_x, FloatType type, int64_t begin, int64_t size) {
  return {offset(x, type, begin), offset(grad, type, begin), offset(grad_x, type, begin), type, size};
}

// Gradients of G quantizers over one dense tensor [size]: the sums of fixed chunks, added in order.
std::vector<FakeQuantizeSums> sum_chunks(const GradRow& whole, const std::vector<FakeQuantizer>& quantizers) {
  const auto backward_row = ADPDM_SELECT_ISA(mixture_backward_row);
  const size_t num_groups = quantizers.size();
  const int64_t chunks = num_chunks(whole.size);
  std::vector<FakeQuantizeSums> partial(static_cast<size_t>(chunks) * num_groups);
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk;
      const int64_t size = std::min(kChunk, whole.size - first);
      backward_row(make_row(whole.x, whole.grad, whole.grad_x, whole.type, first, size), quantizers.data(),
                   static_cast<int64_t>(num_groups), &partial[static_cast<size_t>(chunk) * num_groups]);
    }
  });
  std::vector<FakeQuantizeSums> sums(num_groups);
  for (size_t i = 0; i < partial.size(); ++i) {
    FakeQuantizeSums& sum = sums[i % num_groups];
    sum.scale_grad += partial[i].scale_grad;
    sum.outside += partial[i].outside;
    sum.steps += partial[i].steps;
  }
  return sums;
}

// Gradients per channel: one thread adds up a channel's rows in order.
std::vector<FakeQuantizeSums> sum_channels(const FakeQuantizeArgs& args, const void* grad, void* grad_x,
                                           const std::vector<FakeQuantizer>& quantizers) {
  const auto backward_row = ADPDM_SELECT_ISA(mixture_backward_row);
  const ChannelView& shape = args.shape;
  std::vector<FakeQuantizeSums> sums(quantizers.size());
  const int64_t per_channel = std::max<int64_t>(1, shape.outer * shape.inner);
  const int64_t grain = std::max<int64_t>(1, kChunk / per_channel);
  parallel_for(0, shape.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t outer = 0; outer < shape.outer; ++outer) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t first = (outer * shape.channels + c) * shape.inner;
        backward_row(make_row(args.x, grad, grad_x, args.type, first, shape.inner),
                     &quantizers[static_cast<size_t>(c)], 1, &sums[static_cast<size_t>(c)]);
      }
    }
  });
  return sums;
}

}  // namespace

void fake_quantize(const FakeQuantizeArgs& args, void* y) {
  const std::vector<FakeQuantizer> quantizers = current_quantizers("fake_quantize", args);
  const auto fake_quantize_row = ADPDM_SELECT_ISA(fake_quantize_row);
  const ChannelView& shape = args.shape;
  for_each_piece(shape.outer * shape.channels, shape.inner, [&](const Piece& piece) {
    const int64_t first = piece.row * shape.inner + piece.column;
    fake_quantize_row(offset(args.x, args.type, first), args.type, piece.columns,
                      quantizers[static_cast<size_t>(piece.row % shape.channels)],
                      offset(y, args.type, first));
  });
}

void fake_quantize_backward(const FakeQuantizeArgs& args, const void* grad, void* grad_x, float* grad_scale,
                            float* grad_zero_point) {
  const std::vector<FakeQuantizer> quantizers = current_quantizers("fake_quantize_backward", args);
  const int64_t channels = args.shape.channels;
  std::fill_n(grad_scale, args.num_groups * channels, 0.0f);
  std::fill_n(grad_zero_point, args.num_groups * channels, 0.0f);
  const std::vector<FakeQuantizeSums> sums =
      channels == 1
          ? sum_chunks({args.x, grad, grad_x, args.type, args.shape.outer * args.shape.inner}, quantizers)
          : sum_channels(args, grad, grad_x, quantizers);
  const int64_t row = *args.group_index * channels;
  for (int64_t c = 0; c < channels; ++c) {
    const FakeQuantizeSums& sum = sums[static_cast<size_t>(c)];
    grad_scale[row + c] = static_cast<float>(sum.scale_grad);
    grad_zero_point[row + c] =
        static_cast<float>(-static_cast<double>(quantizers[static_cast<size_t>(c)].scale) * sum.outside);
  }
}

void fake_quantize_mixture(const MixtureArgs& args, void* y) {
  const std::vector<FakeQuantizer> quantizers = mixture_quantizers(args);
  const auto mixture_row = ADPDM_SELECT_ISA(mixture_row);
  parallel_for(0, num_chunks(args.size), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kChunk;
    const int64_t size = std::min(end * kChunk, args.size) - first;
    mixture_row(offset(args.x, args.type, first), args.type, size, quantizers.data(), args.num_groups,
                offset(y, args.type, first));
  });
}

void fake_quantize_mixture_backward(const MixtureArgs& args, const void* grad, const MixtureGrads& grads) {
  const std::vector<FakeQuantizer> quantizers = mixture_quantizers(args);
  const std::vector<FakeQuantizeSums> sums =
      sum_chunks({args.x, grad, grads.x, args.type, args.size}, quantizers);
  for (size_t g = 0; g < sums.size(); ++g) {
    const double scale = quantizers[g].scale;
    const double importance = quantizers[g].importance;
    grads.scale[g] = static_cast<float>(importance * sums[g].scale_grad);
    grads.zero_point[g] = static_cast<float>(-importance * scale * sums[g].outside);
    grads.importance[g] = static_cast<float>(scale * sums[g].steps);
  }
}

}  // namespace adpdm::cpu
