// Switching between the scheduler and the stacks of the emulated threads.

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "simt/executor.h"

#if defined(__SANITIZE_ADDRESS__)
#define ADPDM_SIMT_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ADPDM_SIMT_ASAN
#endif
#endif
#ifdef ADPDM_SIMT_ASAN
#include <sanitizer/common_interface_defs.h>
// For who leaves a stack by a jump: before calls that never return, AddressSanitizer otherwise clears what it
// knows of the whole stack and makes two system calls, which were two fifths of the time of the tests.
#define ADPDM_SIMT_LEAVES_STACK __attribute__((no_sanitize("address")))
#else
#define ADPDM_SIMT_LEAVES_STACK
#endif

namespace adpdm::simt {
namespace {

// A kernel keeps at most a few KiB of accumulators per thread; sanitizers multiply that.
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kCanaryBytes = 256;  // at the end a stack grows towards
constexpr unsigned char kCanary = 0xC5;

// AddressSanitizer has to know which stack it is on.
void start_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack,
                  [[maybe_unused]] size_t bytes) {
#ifdef ADPDM_SIMT_ASAN
  __sanitizer_start_switch_fiber(save, stack, bytes);
#endif
}

void finish_switch([[maybe_unused]] void* save, [[maybe_unused]] const void** previous_stack,
                   [[maybe_unused]] size_t* previous_bytes) {
#ifdef ADPDM_SIMT_ASAN
  __sanitizer_finish_switch_fiber(save, previous_stack, previous_bytes);
#endif
}

// The compiler's own jump: no library between that checks stacks or keeps account of them for a sanitizer. A
// function may not jump to where it is itself, so this one stays apart.
[[noreturn]] ADPDM_SIMT_LEAVES_STACK __attribute__((noinline)) void jump(JumpBuffer& to) {
  __builtin_longjmp(to, 1);
}

// The first visit of a stack goes through ucontext; later ones jump, because swapcontext makes two system
// calls.
[[noreturn]] void enter(unsigned char* stack, void (*entry)()) {
  thread_local ucontext_t context;  // not on this stack frame, which is never left in order
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  setcontext(&context);
  std::terminate();  // setcontext returns only when it fails
}

}  // namespace

void Executor::create(Fiber& fiber) {
  fiber.stack.reset(new unsigned char[kStackBytes]);  // not zeroed: pages are touched as they are used
  std::fill_n(fiber.stack.get(), kCanaryBytes, kCanary);
}

ADPDM_SIMT_LEAVES_STACK void Executor::resume(Fiber& fiber) {
  if (!fiber.created) create(fiber);
  running_ = &fiber;
  start_switch(&scheduler_asan_stack_, fiber.stack.get(), kStackBytes);
  if (__builtin_setjmp(scheduler_) == 0) {
    if (running_->created) jump(running_->context);
    running_->created = true;
    enter(running_->stack.get(), &Executor::fiber_main);
  }
  finish_switch(scheduler_asan_stack_, nullptr, nullptr);
  const bool done = running_->state == Fiber::State::kDone;
  const unsigned char* stack = running_->stack.get();
  running_ = nullptr;
  if (done && std::any_of(stack, stack + kCanaryBytes, [](unsigned char byte) { return byte != kCanary; })) {
    std::fputs("simt: a thread of a kernel has overflowed its stack\n", stderr);
    std::abort();  // memory outside of the stack may be overwritten: no way to go on
  }
}

ADPDM_SIMT_LEAVES_STACK void Executor::suspend() {
  start_switch(&running_->asan_stack, scheduler_stack_, scheduler_stack_bytes_);
  if (__builtin_setjmp(running_->context) == 0) jump(scheduler_);
  finish_switch(running_->asan_stack, nullptr, nullptr);
}

// Runs the kernel of one block after the other on this stack.
void Executor::fiber_main() {
  Executor& self = executor();
  finish_switch(nullptr, &self.scheduler_stack_, &self.scheduler_stack_bytes_);
  for (;;) {
    self.run_body();
    self.suspend();
  }
}

}  // namespace adpdm::simt
