// Registers the element-wise operators for CPU tensors.
#include <c10/util/Exception.h>

#include <stdexcept>

#include "bindings/elementwise_ops.h"

namespace adpdm::bindings {
namespace {

struct CpuBackend {
  static constexpr auto quantize = cpu::quantize;
  static constexpr auto quantize_channels_last = cpu::quantize_channels_last;
  static constexpr auto quantize_int4 = cpu::quantize_int4;
  static constexpr auto dequantize = cpu::dequantize;
  static constexpr auto dequantize_int4 = cpu::dequantize_int4;
  static constexpr auto pack_int4 = cpu::pack_int4;
  static constexpr auto unpack_int4 = cpu::unpack_int4;
  static constexpr auto fake_quantize = cpu::fake_quantize;
  static constexpr auto fake_quantize_backward = cpu::fake_quantize_backward;
  static constexpr auto fake_quantize_mixture = cpu::fake_quantize_mixture;
  static constexpr auto fake_quantize_mixture_backward = cpu::fake_quantize_mixture_backward;
  static constexpr auto observe = cpu::observe;

  explicit CpuBackend(const at::Tensor&) {}

  // The core reports a group or step index out of range as std::out_of_range; Python gets an IndexError.
  template <typename... P, typename... A>
  void run(void (*function)(P...), const A&... args) const {
    try {
      function(args...);
    } catch (const std::out_of_range& error) {
      TORCH_CHECK_INDEX(false, error.what());
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(adpdm, CPU, m) { register_elementwise<CpuBackend>(m); }

}  // namespace adpdm::bindings
