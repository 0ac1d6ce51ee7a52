// The process-wide choice of thread pool.
#include "cpu/parallel.h"

#include <atomic>

namespace adpdm::cpu {
namespace {

std::atomic<ParallelBackend> installed_backend{nullptr};

}  // namespace

ParallelBackend set_parallel_backend(ParallelBackend backend) { return installed_backend.exchange(backend); }

void run_parallel(int64_t begin, int64_t end, int64_t grain, void* context, ParallelBody body) {
  if (begin >= end) return;
  const ParallelBackend backend = installed_backend.load(std::memory_order_acquire);
  if (backend == nullptr || end - begin <= grain) {
    body(context, begin, end);
  } else {
    backend(begin, end, grain, context, body);
  }
}

}  // namespace adpdm::cpu
