// A thread pool for tests, and its life.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace adpdm::testing {

// Pieces of the smallest size, the last ones first, a few of them at a time on threads of their own.
inline void run_scattered(int64_t begin, int64_t end, int64_t grain, void* context, cpu::ParallelBody body) {
  constexpr size_t kAtATime = 3;
  std::vector<std::thread> running;
  const auto join = [&] {
    for (std::thread& thread : running) thread.join();
    running.clear();
  };
  for (int64_t last = end; last > begin; last -= grain) {
    running.emplace_back(body, context, std::max(begin, last - grain), last);
    if (running.size() == kAtATime) join();
  }
  join();
}

// All work of the scope goes to run_scattered().
class ScatteredThreads {
 public:
  ScatteredThreads() : before_(cpu::set_parallel_backend(run_scattered)) {}
  ~ScatteredThreads() { cpu::set_parallel_backend(before_); }
  ScatteredThreads(const ScatteredThreads&) = delete;
  ScatteredThreads& operator=(const ScatteredThreads&) = delete;

 private:
  cpu::ParallelBackend before_;
};

}  // namespace adpdm::testing
