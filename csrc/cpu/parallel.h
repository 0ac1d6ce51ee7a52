// Threads for the CPU kernels without depending on a thread pool: serial until a host installs its own.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace adpdm::cpu {

// Runs over [begin, end); context is whatever parallel_for was given.
using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);

// Calls body on ranges that cover [begin, end) exactly once, returns when all are done, rethrows the first
// exception.
using ParallelBackend = void (*)(int64_t begin, int64_t end, int64_t grain, void* context, ParallelBody body);

// Installs the backend for the whole process (the torch binding: at::parallel_for); nullptr restores the
// serial one. Returns the previous one, nullptr for serial.
ParallelBackend set_parallel_backend(ParallelBackend backend);

// parallel_for without the type of the callable.
void run_parallel(int64_t begin, int64_t end, int64_t grain, void* context, ParallelBody body);

// Calls function(int64_t begin, int64_t end) on ranges that cover [begin, end) once: one for each `grain`
// elements begun, but no more than there are threads, all about equally long, so of `grain` / 2 and more. A
// result must not depend on where they are cut: a sum is kept per fixed chunk (parallel over chunk indices)
// and added up in order, never per range.
template <typename Function>
void parallel_for(int64_t begin, int64_t end, int64_t grain, Function&& function) {
  using Callable = std::remove_reference_t<Function>;
  void* context = const_cast<void*>(static_cast<const void*>(std::addressof(function)));
  run_parallel(begin, end, grain, context, [](void* callable, int64_t range_begin, int64_t range_end) {
    (*static_cast<Callable*>(callable))(range_begin, range_end);
  });
}

}  // namespace adpdm::cpu
