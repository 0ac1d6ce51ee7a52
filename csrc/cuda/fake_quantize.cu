// Fake quantization, its mixture and the pass that makes the gradient of x on CUDA: element-wise kernels of
// 16 bytes a lane. The sums of the gradients are in fake_quantize_sums.cu.
#include "core/fake_quantize.h"
#include "cuda/elementwise.cuh"
#include "cuda/fake_quantizer.cuh"
#include "cuda/launch.cuh"
#include "cuda/nvtx.h"

namespace adpdm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // of a thread, all loaded before the first is used

template <FloatType kType>
constexpr int64_t kWarpElements = int64_t{kWarpSize} * kVectors* kVector<kType>;

// A warp's share of a tensor: whole vectors, or single elements at the end and where the address is odd.
template <FloatType kType, typename Vector, typename Element>
ADPDM_DEVICE void for_warp_share(int64_t size, bool vectors, Vector&& vector, Element&& element) {
  const int64_t warp = block_x() * (kThreads / kWarpSize) + warp_index();
  const int64_t first = warp * kWarpElements<kType>;
  if (first >= size) return;
  if (vectors && size - first >= kWarpElements<kType>) return vector(first);
  const int64_t end = first + kWarpElements<kType> < size ? first + kWarpElements<kType> : size;
  for (int64_t i = first + lane_index(); i < end; i += kWarpSize) element(i);
}

// The quantizer of element `index`.
ADPDM_DEVICE FakeQuantizer quantizer_at(const FakeQuantizeArgs& args, int64_t index) {
  const ChannelView& shape = args.shape;
  const int64_t channel = shape.channels == 1 ? 0 : index / shape.inner % shape.channels;
  const int64_t group = clamped_index(args.group_index, args.num_groups);
  return load_fake_quantizer(args.scale, args.zero_point, nullptr, group * shape.channels + channel,
                             args.range);
}

ADPDM_DEVICE float fake_quantized(float x, const FakeQuantizer& q) {
  return quantized_steps(x, q.inv_scale, q.low, q.high) * q.scale;
}

// `vectors`: all elements of a vector share their channel.
template <FloatType kType>
ADPDM_KERNEL(kThreads, 4)
fake_quantize_kernel(FakeQuantizeArgs args, int64_t size, void* y, bool vectors) {
  const RowView x = {args.x, kType, 1, size, size};
  const auto vector = [&](int64_t first) {
    Bytes16 raw[kVectors];
    load_chunks<kType>(x, first, raw);
    FakeQuantizer q;
    ADPDM_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      const int64_t index = first + (c * kWarpSize + lane_index()) * kVector<kType>;
      if (c == 0 || args.shape.channels != 1) q = quantizer_at(args, index);
      float values[kVector<kType>];
      unpack_vector<kType>(raw[c], values);
      ADPDM_UNROLL
      for (float& value : values) value = fake_quantized(value, q);
      store_vector<kType>(y, index, values);
    }
  };
  for_warp_share<kType>(size, vectors, vector, [&](int64_t i) {
    store_float(y, i, kType, fake_quantized(load_float(args.x, i, kType), quantizer_at(args, i)));
  });
}

// ---- mixture ----

// Puts the quantizers of all groups into shared memory: a division each, done once.
ADPDM_DEVICE const FakeQuantizer* share_quantizers(const MixtureArgs& args) {
  auto* shared = reinterpret_cast<FakeQuantizer*>(shared_memory());
  for (int64_t g = thread_index(); g < args.num_groups; g += num_threads()) {
    store_shared_quantizer(shared + g,
                           load_fake_quantizer(args.scale, args.zero_point, args.importance, g, args.range));
  }
  block_barrier();
  return shared;
}

// values [n] = sum of importance * value over the groups, ascending.
template <int kSize>
ADPDM_DEVICE void mix(const FakeQuantizer* quantizers, int64_t num_groups, float (&values)[kSize]) {
  float mixture[kSize] = {};
  for (int64_t g = 0; g < num_groups; ++g) {
    const FakeQuantizer q = load_shared_quantizer(quantizers + g);
    ADPDM_UNROLL
    for (int i = 0; i < kSize; ++i) mixture[i] = mixture[i] + q.importance * fake_quantized(values[i], q);
  }
  ADPDM_UNROLL
  for (int i = 0; i < kSize; ++i) values[i] = mixture[i];
}

template <FloatType kType>
ADPDM_KERNEL(kThreads, 4)
mixture_kernel(MixtureArgs args, void* y, bool vectors) {
  const FakeQuantizer* quantizers = share_quantizers(args);
  const RowView x = {args.x, kType, 1, args.size, args.size};
  const auto vector = [&](int64_t first) {
    Bytes16 raw[kVectors];
    load_chunks<kType>(x, first, raw);
    ADPDM_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      float values[kVector<kType>];
      unpack_vector<kType>(raw[c], values);
      mix(quantizers, args.num_groups, values);
      store_vector<kType>(y, first + (c * kWarpSize + lane_index()) * kVector<kType>, values);
    }
  };
  for_warp_share<kType>(args.size, vectors, vector, [&](int64_t i) {
    float value[1] = {load_float(args.x, i, kType)};
    mix(quantizers, args.num_groups, value);
    store_float(y, i, kType, value[0]);
  });
}

// values [n] = importance of the groups within whose range x is, ascending.
template <int kSize>
ADPDM_DEVICE void mix_masks(const FakeQuantizer* quantizers, int64_t num_groups, float (&values)[kSize]) {
  float mask[kSize] = {};
  for (int64_t g = 0; g < num_groups; ++g) {
    const FakeQuantizer q = load_shared_quantizer(quantizers + g);
    ADPDM_UNROLL
    for (int i = 0; i < kSize; ++i) {
      const bool inside = fake_quantize_terms(values[i], q.inv_scale, q.low, q.high).inside;
      mask[i] = inside ? mask[i] + q.importance : mask[i];
    }
  }
  ADPDM_UNROLL
  for (int i = 0; i < kSize; ++i) values[i] = mask[i];
}

template <FloatType kType>
ADPDM_KERNEL(kThreads, 4)
mixture_grad_x_kernel(MixtureArgs args, const void* grad, void* grad_x, bool vectors) {
  const FakeQuantizer* quantizers = share_quantizers(args);
  const auto vector = [&](int64_t first) {
    Bytes16 raw_x[kVectors], raw_grad[kVectors];
    load_chunks<kType>({args.x, kType, 1, args.size, args.size}, first, raw_x);
    load_chunks<kType>({grad, kType, 1, args.size, args.size}, first, raw_grad);
    ADPDM_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      float mask[kVector<kType>], grads[kVector<kType>];
      unpack_vector<kType>(raw_x[c], mask);
      unpack_vector<kType>(raw_grad[c], grads);
      mix_masks(quantizers, args.num_groups, mask);
      ADPDM_UNROLL
      for (int i = 0; i < kVector<kType>; ++i) grads[i] = grads[i] * mask[i];
      store_vector<kType>(grad_x, first + (c * kWarpSize + lane_index()) * kVector<kType>, grads);
    }
  };
  for_warp_share<kType>(args.size, vectors, vector, [&](int64_t i) {
    float mask[1] = {load_float(args.x, i, kType)};
    mix_masks(quantizers, args.num_groups, mask);
    store_float(grad_x, i, kType, load_float(grad, i, kType) * mask[0]);
  });
}

template <FloatType kType>
LaunchShape shape_for(const char* op, int64_t size, int64_t shared_bytes, Stream stream) {
  const int64_t block = kWarpElements<kType> * (kThreads / kWarpSize);
  return {(size + block - 1) / block, 1, 1, kThreads, shared_bytes, stream, op};
}

int64_t quantizer_bytes(int64_t num_groups) {
  return num_groups * static_cast<int64_t>(sizeof(FakeQuantizer));
}

}  // namespace

void fake_quantize(const FakeQuantizeArgs& args, void* y, Stream stream) {
  const ChannelView& shape = args.shape;
  const Range range([&] {
    return range_text("fake_quantize", {shape.outer, shape.channels, shape.inner}, args.type);
  });
  const int64_t size = shape.outer * shape.channels * shape.inner;
  with_float_type(args.type, [&](auto type) {
    constexpr FloatType kType = decltype(type)::value;
    const bool vectors = is_aligned(args.x, 16) && is_aligned(y, 16) &&
                         (shape.channels == 1 || shape.inner % kVector<kType> == 0);
    launch(fake_quantize_kernel<kType>, shape_for<kType>("fake_quantize", size, 0, stream), args, size, y,
           vectors);
  });
}

void fake_quantize_mixture(const MixtureArgs& args, void* y, Stream stream) {
  const Range range([&] {
    return range_text("fake_quantize_mixture", {args.num_groups, args.size}, args.type);
  });
  with_float_type(args.type, [&](auto type) {
    constexpr FloatType kType = decltype(type)::value;
    const LaunchShape shape =
        shape_for<kType>("fake_quantize_mixture", args.size, quantizer_bytes(args.num_groups), stream);
    launch(mixture_kernel<kType>, shape, args, y, is_aligned(args.x, 16) && is_aligned(y, 16));
  });
}

void mixture_grad_x(const MixtureArgs& args, const void* grad, void* grad_x, Stream stream) {
  with_float_type(args.type, [&](auto type) {
    constexpr FloatType kType = decltype(type)::value;
    const bool vectors = is_aligned(args.x, 16) && is_aligned(grad, 16) && is_aligned(grad_x, 16);
    const LaunchShape shape = shape_for<kType>("fake_quantize_mixture_backward", args.size,
                                               quantizer_bytes(args.num_groups), stream);
    launch(mixture_grad_x_kernel<kType>, shape, args, grad, grad_x, vectors);
  });
}

}  // namespace adpdm::cuda
