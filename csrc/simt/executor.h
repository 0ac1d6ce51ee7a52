// Runs CUDA kernels on the host: a fiber per thread, warps in random order, checks of every access made
// through the wrappers of cuda/device.cuh. What it cannot show: races on plain shared accesses, memory
// ordering, speed.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace adpdm::simt {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr unsigned char kSharedPoison = 0xEE;  // shared memory of a block that has just begun
constexpr unsigned char kCopyPoison = 0xCD;    // destination of an asynchronous copy until it is waited for

struct Dim3 {
  int64_t x = 1;
  int64_t y = 1;
  int64_t z = 1;
};

struct Options {
  uint64_t seed = 1;       // of the order in which warps run
  bool late_async = true;  // asynchronous operations happen when waited for; else as soon as they are issued
};

struct LaunchConfig {
  const char* op;  // opens every error message
  Dim3 grid;
  int threads;           // a multiple of 32
  int64_t shared_bytes;  // dynamic shared memory
};

// The kinds of operations that complete behind a thread's back, each with groups of its own.
enum class Async { kCopy, kMatrix };  // cp.async, wgmma
constexpr int kAsyncKinds = 2;

// What an access to global memory does. The read-only path (ld.global.nc) may return stale bytes where the
// same launch writes.
enum class GlobalAccess : unsigned char { kRead = 0, kReadOnly = 1, kWrite = 2 };

// Pending operations of one kind and one thread, in groups that complete in order.
class AsyncQueue {
 public:
  void add(std::function<void()> complete) { open_.push_back(std::move(complete)); }
  void commit();
  // Completes groups, oldest first, until at most `keep` are pending. Operations not committed stay.
  void wait(int keep);
  bool has_operations() const;
  void clear();

 private:
  using Group = std::vector<std::function<void()>>;
  Group open_;
  std::deque<Group> groups_;
};

// What one lane says in an exchange.
struct alignas(16) Message {
  unsigned char bytes[64];
};
using Messages = std::array<Message, kWarpSize>;

using JumpBuffer = void* [5];  // of __builtin_setjmp

// A device thread: a stack to run on and what the thread is waiting for.
struct Fiber {
  enum class State { kReady, kInWarp, kAtBarrier, kDone };

  int index = 0;  // thread in its block
  State state = State::kDone;
  bool created = false;  // whether `context` can be jumped to
  JumpBuffer context;
  std::unique_ptr<unsigned char[]> stack;
  void* asan_stack = nullptr;  // AddressSanitizer's handle while the fiber is switched out
  const char* waits_for = "";  // name of the collective
  uint64_t num_exchanges = 0;  // of this block
  AsyncQueue async[kAsyncKinds];
};

struct WgmmaState;

class Executor {
 public:
  Options options;
  std::shared_ptr<WgmmaState> wgmma_state;  // of the running block: simt/wgmma.cpp

  // ---- for the host ----

  // Runs body as every thread of every block, one block after the other. Throws std::runtime_error with op,
  // block, thread and a sentence on the first fault, and whatever else body throws.
  void launch(const LaunchConfig& config, const std::function<void()>& body);

  // Kernels may access the global memory that is registered, nothing else. `begin` must not be registered.
  void register_buffer(const void* begin, int64_t bytes);
  void unregister_buffer(const void* begin);

  // Throws std::runtime_error unless [p, p + bytes) is registered: for what a stream does without a kernel.
  void check_host_access(const void* p, int64_t bytes, const char* op) const;

  // ---- for a running kernel ----

  int thread_index() const { return running().index; }
  int num_threads() const { return config_.threads; }
  int64_t shared_bytes() const { return config_.shared_bytes; }
  const Dim3& block() const { return block_; }
  const Dim3& grid() const { return config_.grid; }

  // The block's dynamic shared memory, 1024-byte aligned.
  unsigned char* shared_memory() const { return shared_; }

  // Fails unless [p, p + bytes) is registered and p a multiple of bytes, and where one launch both writes a
  // byte and reads it by the read-only path. `name` is that of the access in the message.
  void check_global(const void* p, int bytes, const char* name, GlobalAccess access) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    const auto size = static_cast<uintptr_t>(bytes);
    for (Buffer& buffer : buffers_) {
      const uintptr_t offset = address - buffer.begin;
      if (offset >= buffer.bytes || buffer.bytes - offset < size) continue;
      if (address % size != 0) fail_misaligned(p, bytes, name);
      if (access != GlobalAccess::kRead) mark(buffer, offset, size, name, access);
      return;
    }
    fail_global(p, bytes, name);
  }

  // Fails unless [p, p + bytes) is the block's shared memory and p a multiple of bytes.
  void check_shared(const void* p, int bytes, const char* name) {
    const auto offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(shared_);
    const auto size = static_cast<uintptr_t>(config_.shared_bytes);
    if (offset >= size || size - offset < uintptr_t(bytes)) fail_shared(p, bytes, name);
    if (offset % unsigned(bytes) != 0) fail_misaligned(p, bytes, name);
  }

  // Waits for all threads of the block.
  void block_barrier();

  // Gives message to the warp and returns those of all 32 lanes, valid until the next exchange. All lanes
  // must meet in an exchange of the same name.
  const Messages& exchange(const char* name, const void* message, int bytes);

  // Does `complete` later (or at once, by options.late_async), after commit_async() and wait_async().
  void add_async(Async kind, std::function<void()> complete);
  void commit_async(Async kind);
  void wait_async(Async kind, int keep);

  // Ends the launch with an error about the running thread.
  [[noreturn]] void fail(const std::string& sentence);

 private:
  struct Buffer {
    uintptr_t begin;
    uintptr_t bytes;
    std::vector<unsigned char> accesses;  // [bytes] GlobalAccess values of this launch, or-ed
    bool accessed;                        // whether any is not 0
  };

  struct Mailbox {
    uint64_t arrived = 0;  // lanes, over all exchanges of the block
    const char* name = "";
    Messages messages;
  };

  // An exchange is read while the next one is being filled; the one after that needs both to be over.
  struct Warp {
    Mailbox boxes[2];
  };

  Fiber& running() const;
  void check(const LaunchConfig& config) const;
  void run_grid();
  void begin_block();
  void end_block();
  void run_block();
  bool run_warp(int warp, bool one_round);
  void wait(Fiber::State state, const char* name);
  void cancel();
  void create(Fiber& fiber);
  void resume(Fiber& fiber);
  void suspend();
  static void fiber_main();
  void run_body();
  std::string deadlock() const;
  void mark(Buffer& buffer, uintptr_t offset, uintptr_t bytes, const char* name, GlobalAccess access);
  [[noreturn]] void fail_global(const void* p, int bytes, const char* name);
  [[noreturn]] void fail_shared(const void* p, int bytes, const char* name);
  [[noreturn]] void fail_misaligned(const void* p, int bytes, const char* name);

  LaunchConfig config_{};
  const std::function<void()>* body_ = nullptr;  // null: no launch is running
  Dim3 block_;
  std::deque<Fiber> fibers_;  // kept for later launches; a deque because fibers must not move
  Fiber* running_ = nullptr;
  std::vector<Warp> warps_;
  int num_at_barrier_ = 0;
  std::mt19937_64 engine_;
  std::vector<Buffer> buffers_;

  std::vector<unsigned char> shared_storage_;
  unsigned char* shared_ = nullptr;

  bool cancelled_ = false;  // every suspended thread unwinds when resumed
  std::exception_ptr error_;

  JumpBuffer scheduler_;
  void* scheduler_asan_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

// The executor of this host thread.
Executor& executor();

// Sets the options of this host thread's executor for its lifetime.
class ScopedOptions {
 public:
  explicit ScopedOptions(const Options& options) : previous_(executor().options) {
    executor().options = options;
  }
  ~ScopedOptions() { executor().options = previous_; }
  ScopedOptions(const ScopedOptions&) = delete;
  ScopedOptions& operator=(const ScopedOptions&) = delete;

 private:
  Options previous_;
};

}  // namespace adpdm::simt
