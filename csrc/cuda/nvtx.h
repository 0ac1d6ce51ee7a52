// Names the work of an op in a profiler's timeline: NVTX ranges in the domain "adpdm".
#pragma once

#include <initializer_list>
#include <string>

#include "core/types.h"

#ifdef ADPDM_SIMT
#include <vector>
#elif __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define ADPDM_NVTX
#else
#pragma message( \
    "adpdm: nvtx3/nvToolsExt.h was not found (Debian: nvidia-cuda-toolkit; conda: cuda-nvtx): no NVTX ranges")
#endif

namespace adpdm::cuda {

// For example "quantize [4096, 320] bf16 8 bits"; without bits where they are 0.
inline std::string range_text(const char* op, std::initializer_list<int64_t> shape, FloatType type,
                              int bits = 0) {
  constexpr const char* kTypes[] = {"f32", "bf16", "f16"};
  std::string text = std::string(op) + " [";
  for (const int64_t size : shape) text += (text.back() == '[' ? "" : ", ") + std::to_string(size);
  text += std::string("] ") + kTypes[static_cast<int>(type)];
  return bits == 0 ? text : text + " " + std::to_string(bits) + " bits";
}

#ifdef ADPDM_SIMT

// The emulation keeps the messages instead, for the tests to read.
inline std::vector<std::string>& recorded_ranges() {
  thread_local std::vector<std::string> messages;
  return messages;
}

class Range {
 public:
  template <typename Describe>
  explicit Range(Describe&& describe) {
    recorded_ranges().push_back(describe());
  }
};

#elif defined(ADPDM_NVTX)

// Null unless a profiler is attached.
inline nvtxDomainHandle_t nvtx_domain() {
  static const nvtxDomainHandle_t domain = nvtxDomainCreateA("adpdm");
  return domain;
}

// One range from construction to destruction. The message is only composed when somebody listens; under a
// CUDA graph ranges are seen at capture, not at replay.
class Range {
 public:
  template <typename Describe>  // () -> std::string
  explicit Range(Describe&& describe) {
    if (nvtx_domain() == nullptr) return;
    const std::string message = describe();
    nvtxEventAttributes_t attributes{};
    attributes.version = NVTX_VERSION;
    attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
    attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
    attributes.message.ascii = message.c_str();
    nvtxDomainRangePushEx(nvtx_domain(), &attributes);
    is_open_ = true;
  }
  ~Range() {
    if (is_open_) nvtxDomainRangePop(nvtx_domain());
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  bool is_open_ = false;
};

#else

class Range {
 public:
  template <typename Describe>
  explicit Range(Describe&&) {}
};

#endif

}  // namespace adpdm::cuda
