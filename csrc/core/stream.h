// What the host side of a GPU backend shares with its callers without a CUDA header: streams and errors.
#pragma once

#include <stdexcept>

namespace adpdm {

// A cudaStream_t; null is the legacy default stream.
using Stream = void*;

// A CUDA call has failed, or the device cannot run what was built.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace adpdm
