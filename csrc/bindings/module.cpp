// The Python module adpdm._C: loading it registers the operators and lends torch's thread pool to the core.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <atomic>

#include "bindings/python_children.h"
#include "bindings/python_tape.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define ADPDM_HAS_FORK
#endif

namespace {

namespace py = pybind11;

// GNU's OpenMP does not survive a fork: a child whose parent had started threads would wait for them for
// ever. Where kernels had started them, kernels run on one thread there; whether torch's operators had,
// nobody tells.
std::atomic<bool> pool_started{false};
std::atomic<bool> pool_lost{false};

void run_on_torch_threads(int64_t begin, int64_t end, int64_t grain, void* context,
                          adpdm::cpu::ParallelBody body) {
  if (pool_lost.load(std::memory_order_relaxed)) return body(context, begin, end);
  if (at::get_num_threads() > 1) pool_started.store(true, std::memory_order_relaxed);
  at::parallel_for(begin, end, grain, [=](int64_t first, int64_t last) { body(context, first, last); });
}

// Threads a large enough parallel_for is spread over: torch.get_num_threads(), or 1 if this module lacks
// OpenMP or its pool was lost by a fork.
int64_t worker_threads() {
  std::atomic<int64_t> ranges{0};
  adpdm::cpu::parallel_for(0, int64_t{1} << 20, 1, [&](int64_t, int64_t) { ++ranges; });
  return ranges;
}

// Why levels of CPU kernels cannot run, by their names, where something else than the CPU's features is in
// the way.
py::dict isa_obstacles() {
  py::dict obstacles;
  for (adpdm::cpu::Isa isa : {adpdm::cpu::Isa::kAvxVnni, adpdm::cpu::Isa::kAmx}) {
    obstacles[adpdm::cpu::isa_name(isa)] = adpdm::cpu::isa_obstacle(isa);
  }
  return obstacles;
}

py::dict build_info() {
  py::dict info;
  info["version"] = ADPDM_VERSION;
  info["isa"] = adpdm::cpu::isa_name(adpdm::cpu::active_isa());
  info["cpu_features"] = adpdm::cpu::cpu_features();
  info["isa_obstacles"] = isa_obstacles();
#ifdef ADPDM_WITH_CUDA
  info["cuda_built"] = true;
  info["cuda_archs"] = ADPDM_CUDA_ARCHS;
#else
  info["cuda_built"] = false;
  info["cuda_archs"] = "";
#endif
#ifdef __clang__
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["torch_version_built"] = TORCH_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  adpdm::cpu::set_parallel_backend(run_on_torch_threads);
#ifdef ADPDM_HAS_FORK
  pthread_atfork(nullptr, nullptr, [] { pool_lost = pool_lost || pool_started; });
#endif
  module.def("build_info", &build_info, "Facts about this build and this CPU.");
  module.def("worker_threads", &worker_threads,
             "Threads the CPU kernels are spread over; starts torch's pool.");
  adpdm::bindings::register_children(module);
  adpdm::bindings::register_tape(module);
}
