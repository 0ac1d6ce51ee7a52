// Quantize-dequantize with learnable quantizers, for one group, per channel, or as the mixture of all groups.
#pragma once

#include "core/stream.h"
#include "core/types.h"

namespace adpdm {

// A dense tensor seen as [outer, channels, inner]; per tensor is channels = 1.
struct ChannelView {
  int64_t outer;
  int64_t channels;
  int64_t inner;
};

struct FakeQuantizeArgs {
  const void* x;  // [outer, channels, inner] of type
  FloatType type;
  ChannelView shape;
  const float* scale;          // [num_groups, channels] step size, > 0
  const float* zero_point;     // [num_groups, channels] acts as its nearest code
  const int32_t* group_index;  // [1] current group
  int64_t num_groups;
  CodeRange range;
};

struct MixtureArgs {
  const void* x;  // [size] of type
  FloatType type;
  int64_t size;
  const float* scale;       // [num_groups] step size, > 0
  const float* zero_point;  // [num_groups] acts as its nearest code
  const float* importance;  // [num_groups] weight of the group's quantizer
  int64_t num_groups;
  CodeRange range;
};

struct MixtureGrads {
  void* x;            // [size] of type
  float* scale;       // [num_groups]
  float* zero_point;  // [num_groups]
  float* importance;  // [num_groups]
};

namespace cpu {

// y = Q_g(x) for the current group g. Throws std::out_of_range for a group index outside [0, num_groups).
void fake_quantize(const FakeQuantizeArgs& args,
                   void* y);  // [outer, channels, inner] of type

void fake_quantize_backward(const FakeQuantizeArgs& args,
                            const void* grad,         // [outer, channels, inner] of type: d loss / d y
                            void* grad_x,             // [outer, channels, inner] of type
                            float* grad_scale,        // [num_groups, channels]; 0 for the other groups
                            float* grad_zero_point);  // [num_groups, channels]; 0 for the other groups

// y = sum_g importance[g] * Q_g(x), groups in ascending order.
void fake_quantize_mixture(const MixtureArgs& args,
                           void* y);  // [size] of type

void fake_quantize_mixture_backward(const MixtureArgs& args,
                                    const void* grad,  // [size] of type: d loss / d y
                                    const MixtureGrads& grads);

}  // namespace cpu

// The same on the stream, gradients included bit for bit. An index outside [0, num_groups) acts as the
// nearest inside: a kernel cannot raise. All throw CudaError where a launch fails.
namespace cuda {

void fake_quantize(const FakeQuantizeArgs& args,
                   void* y,  // [outer, channels, inner] of type
                   Stream stream);

// Bytes of device memory, 8-byte aligned, that the backward pass works in; what it holds before does not
// matter.
int64_t fake_quantize_backward_workspace(const FakeQuantizeArgs& args);

void fake_quantize_backward(const FakeQuantizeArgs& args,
                            const void* grad,        // [outer, channels, inner] of type: d loss / d y
                            void* grad_x,            // [outer, channels, inner] of type
                            float* grad_scale,       // [num_groups, channels]; 0 for the other groups
                            float* grad_zero_point,  // [num_groups, channels]; 0 for the other groups
                            void* workspace, Stream stream);

void fake_quantize_mixture(const MixtureArgs& args,
                           void* y,  // [size] of type
                           Stream stream);

int64_t fake_quantize_mixture_backward_workspace(const MixtureArgs& args);

void fake_quantize_mixture_backward(const MixtureArgs& args,
                                    const void* grad,  // [size] of type: d loss / d y
                                    const MixtureGrads& grads, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace adpdm
