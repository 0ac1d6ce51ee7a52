// Room to work in that a thread keeps between calls, because fresh pages cost more than what is written
// there.
#pragma once

#include <cstdint>
#include <vector>

namespace adpdm::cpu {

// A cache line.
constexpr int64_t kMemoryAlignment = 64;

// To be declared thread_local, so that calls of other threads do not interfere.
class ThreadMemory {
 public:
  // At least so many bytes, aligned to kMemoryAlignment, of unknown content; what was taken before is void.
  char* take(int64_t bytes) {
    if (static_cast<int64_t>(buffer_.size()) < bytes + kMemoryAlignment) {
      buffer_ = {};  // nothing has to be copied, and the old room goes before the new comes
      buffer_.resize(static_cast<size_t>(bytes + kMemoryAlignment));
    }
    return buffer_.data() + (-reinterpret_cast<uintptr_t>(buffer_.data()) & (kMemoryAlignment - 1));
  }

 private:
  std::vector<char> buffer_;
};

}  // namespace adpdm::cpu
