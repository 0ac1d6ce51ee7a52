// The scheduler of the emulated threads: blocks, warps, barriers, exchanges, and what ends a launch early.
#include "simt/executor.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace adpdm::simt {
namespace {

// Unwinds the stack of a thread whose launch has failed.
struct Unwind {};

// Written behind the shared memory and checked when the block ends, for accesses past the wrappers.
constexpr size_t kSharedAlignment = 1024;
constexpr size_t kRedZone = 1024;

std::string to_string(const Dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

}  // namespace

Executor& executor() {
  thread_local Executor instance;
  return instance;
}

void AsyncQueue::commit() {
  groups_.push_back(std::move(open_));
  open_.clear();
}

void AsyncQueue::wait(int keep) {
  while (static_cast<int>(groups_.size()) > keep) {
    const Group group = std::move(groups_.front());
    groups_.pop_front();
    for (const auto& complete : group) complete();
  }
}

bool AsyncQueue::has_operations() const {
  return !open_.empty() ||
         std::any_of(groups_.begin(), groups_.end(), [](const Group& group) { return !group.empty(); });
}

void AsyncQueue::clear() {
  open_.clear();
  groups_.clear();
}

// ---- launch ----

void Executor::check(const LaunchConfig& config) const {
  const std::string op = config.op;
  if (body_ != nullptr) throw std::runtime_error(op + ": a kernel is launched from within a kernel");
  if (config.threads < kWarpSize || config.threads > kMaxThreads || config.threads % kWarpSize != 0) {
    throw std::runtime_error(op + ": wanted a multiple of 32 threads from 32 to 1024, got " +
                             std::to_string(config.threads));
  }
  if (config.grid.x < 0 || config.grid.y < 0 || config.grid.z < 0 || config.shared_bytes < 0) {
    throw std::runtime_error(op + ": wanted a grid and shared memory of no negative size, got " +
                             to_string(config.grid) + " and " + std::to_string(config.shared_bytes));
  }
}

void Executor::launch(const LaunchConfig& config, const std::function<void()>& body) {
  check(config);
  config_ = config;
  body_ = &body;
  engine_.seed(options.seed);
  for (int i = static_cast<int>(fibers_.size()); i < config.threads; ++i) fibers_.emplace_back().index = i;
  const size_t shared_bytes = static_cast<size_t>(config.shared_bytes);
  shared_storage_.resize(shared_bytes + kSharedAlignment + kRedZone);
  const auto address = reinterpret_cast<uintptr_t>(shared_storage_.data());
  shared_ = shared_storage_.data() + (kSharedAlignment - address % kSharedAlignment);
  for (Buffer& buffer : buffers_) {
    if (buffer.accessed) std::fill(buffer.accesses.begin(), buffer.accesses.end(), 0);
    buffer.accessed = false;
  }
  run_grid();
  body_ = nullptr;
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Executor::run_grid() {
  for (block_.z = 0; block_.z < config_.grid.z; ++block_.z) {
    for (block_.y = 0; block_.y < config_.grid.y; ++block_.y) {
      for (block_.x = 0; block_.x < config_.grid.x; ++block_.x) {
        begin_block();
        run_block();
        end_block();
        if (error_) return;
      }
    }
  }
}

void Executor::begin_block() {
  std::memset(shared_, kSharedPoison, static_cast<size_t>(config_.shared_bytes) + kRedZone);
  warps_.resize(static_cast<size_t>(config_.threads / kWarpSize));
  for (Warp& warp : warps_) warp.boxes[0].arrived = warp.boxes[1].arrived = 0;
  num_at_barrier_ = 0;
  cancelled_ = false;
  wgmma_state = nullptr;
  for (int i = 0; i < config_.threads; ++i) {
    Fiber& fiber = fibers_[static_cast<size_t>(i)];
    fiber.state = Fiber::State::kReady;
    fiber.num_exchanges = 0;
    for (AsyncQueue& queue : fiber.async) queue.clear();
  }
}

void Executor::end_block() {
  if (error_) return;
  const unsigned char* red_zone = shared_ + config_.shared_bytes;
  if (std::any_of(red_zone, red_zone + kRedZone, [](unsigned char byte) { return byte != kSharedPoison; })) {
    error_ = std::make_exception_ptr(
        std::runtime_error(std::string(config_.op) + ": block " + to_string(block_) + " wrote behind its " +
                           std::to_string(config_.shared_bytes) + " bytes of shared memory"));
  }
}

void Executor::run_block() {
  std::vector<int> order(warps_.size());
  std::iota(order.begin(), order.end(), 0);
  bool progress = true;
  while (progress) {
    // A warp that runs ahead and one that falls behind find different mistakes.
    const bool one_round = engine_() % 2 == 0;
    std::shuffle(order.begin(), order.end(), engine_);
    progress = false;
    for (int warp : order) {
      progress |= run_warp(warp, one_round);
      if (error_) return cancel();
    }
  }
  const auto done = [](const Fiber& fiber) { return fiber.state == Fiber::State::kDone; };
  if (std::all_of(fibers_.begin(), fibers_.begin() + config_.threads, done)) return;
  error_ = std::make_exception_ptr(std::runtime_error(deadlock()));
  cancel();
}

// Runs the ready lanes of a warp, once each or until all of them wait; whether any was ready.
bool Executor::run_warp(int warp, bool one_round) {
  bool progress = false;
  bool ready = true;
  while (ready) {
    ready = false;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      Fiber& fiber = fibers_[static_cast<size_t>(warp * kWarpSize + lane)];
      if (fiber.state != Fiber::State::kReady) continue;
      resume(fiber);
      if (error_) return true;
      ready = progress = true;
    }
    if (one_round) break;
  }
  return progress;
}

// Unwinds the stacks of all threads that are in the middle of the kernel.
void Executor::cancel() {
  cancelled_ = true;
  for (int i = 0; i < config_.threads; ++i) {
    Fiber& fiber = fibers_[static_cast<size_t>(i)];
    const bool begun = fiber.waits_for[0] != '\0';
    if (fiber.state != Fiber::State::kDone && begun) resume(fiber);
    fiber.state = Fiber::State::kDone;
    fiber.waits_for = "";
  }
}

std::string Executor::deadlock() const {
  std::string message = std::string(config_.op) + ": block " + to_string(block_) + " is stuck:";
  // One thread of each kind of wait tells the story.
  std::vector<std::string> kinds;
  for (int i = 0; i < config_.threads; ++i) {
    const Fiber& fiber = fibers_[static_cast<size_t>(i)];
    const bool done = fiber.state == Fiber::State::kDone;
    const std::string kind = done ? "has left the kernel" : std::string("waits at ") + fiber.waits_for;
    if (std::find(kinds.begin(), kinds.end(), kind) != kinds.end()) continue;
    message += (kinds.empty() ? " thread " : ", thread ") + std::to_string(i) + " " + kind;
    kinds.push_back(kind);
  }
  return message;
}

// ---- what a thread waits for ----

void Executor::wait(Fiber::State state, const char* name) {
  Fiber& fiber = running();
  fiber.state = state;
  fiber.waits_for = name;
  suspend();
  if (cancelled_) throw Unwind{};
  fiber.waits_for = "";
}

void Executor::block_barrier() {
  if (++num_at_barrier_ < config_.threads) return wait(Fiber::State::kAtBarrier, "block_barrier");
  num_at_barrier_ = 0;
  for (int i = 0; i < config_.threads; ++i) {
    Fiber& fiber = fibers_[static_cast<size_t>(i)];
    if (fiber.state == Fiber::State::kAtBarrier) fiber.state = Fiber::State::kReady;
  }
}

const Messages& Executor::exchange(const char* name, const void* message, int bytes) {
  Fiber& fiber = running();
  const int lane = fiber.index % kWarpSize;
  const int first = fiber.index - lane;
  Mailbox& box = warps_[static_cast<size_t>(first / kWarpSize)].boxes[fiber.num_exchanges++ % 2];
  if (box.arrived % kWarpSize == 0) {
    box.name = name;
  } else if (std::strcmp(box.name, name) != 0) {
    fail(std::string("the warp diverges: this lane is at ") + name + ", another one at " + box.name);
  }
  if (bytes != 0)
    std::memcpy(box.messages[static_cast<size_t>(lane)].bytes, message, static_cast<size_t>(bytes));
  if (++box.arrived % kWarpSize != 0) {
    wait(Fiber::State::kInWarp, name);
  } else {
    for (int i = first; i < first + kWarpSize; ++i) {
      Fiber& other = fibers_[static_cast<size_t>(i)];
      if (other.state == Fiber::State::kInWarp) other.state = Fiber::State::kReady;
    }
  }
  return box.messages;
}

void Executor::add_async(Async kind, std::function<void()> complete) {
  if (!options.late_async) return complete();
  running().async[static_cast<size_t>(kind)].add(std::move(complete));
}

void Executor::commit_async(Async kind) { running().async[static_cast<size_t>(kind)].commit(); }

void Executor::wait_async(Async kind, int keep) { running().async[static_cast<size_t>(kind)].wait(keep); }

// ---- faults ----

void Executor::fail(const std::string& sentence) {
  const std::string where =
      ": block " + to_string(block_) + ", thread " + std::to_string(running().index) + ": ";
  error_ = std::make_exception_ptr(std::runtime_error(config_.op + where + sentence));
  throw Unwind{};
}

void Executor::mark(Buffer& buffer, uintptr_t offset, uintptr_t bytes, const char* name,
                    GlobalAccess access) {
  const auto mine = static_cast<unsigned char>(access);
  unsigned char seen = 0;
  for (uintptr_t i = offset; i < offset + bytes; ++i) seen |= buffer.accesses[i] |= mine;
  buffer.accessed = true;
  if (seen == mine) return;
  fail(std::string(name) + " of " + std::to_string(bytes) +
       " bytes: this launch both writes them and reads them by load(), whose data must not change; use "
       "load_coherent()");
}

void Executor::fail_global(const void* p, int bytes, const char* name) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  std::string nearest = "no global memory is registered";
  uintptr_t best = UINTPTR_MAX;
  for (const Buffer& buffer : buffers_) {
    const bool before = address < buffer.begin;
    const uintptr_t distance = before ? buffer.begin - address : address - buffer.begin;
    if (distance >= best) continue;
    best = distance;
    nearest = "it begins " + std::to_string(distance) + (before ? " bytes before" : " bytes into") +
              " a buffer of " + std::to_string(buffer.bytes);
  }
  fail(std::string(name) + " of " + std::to_string(bytes) +
       " bytes is out of bounds of global memory: " + nearest);
}

void Executor::fail_shared(const void* p, int bytes, const char* name) {
  const auto offset = static_cast<const unsigned char*>(p) - shared_;
  fail(std::string(name) + " of " + std::to_string(bytes) +
       " bytes is out of bounds of shared memory: offset " + std::to_string(offset) + " of " +
       std::to_string(config_.shared_bytes));
}

void Executor::fail_misaligned(const void* p, int bytes, const char* name) {
  fail(std::string(name) + " of " + std::to_string(bytes) + " bytes is misaligned: its address is " +
       std::to_string(reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(bytes)) + " modulo " +
       std::to_string(bytes));
}

Fiber& Executor::running() const {
  if (running_ == nullptr) throw std::logic_error("a device function is called outside of a kernel");
  return *running_;
}

// ---- registered memory ----

void Executor::register_buffer(const void* begin, int64_t bytes) {
  buffers_.push_back({reinterpret_cast<uintptr_t>(begin), static_cast<uintptr_t>(bytes),
                      std::vector<unsigned char>(static_cast<size_t>(bytes)), false});
}

void Executor::unregister_buffer(const void* begin) {
  const auto same = [&](const Buffer& buffer) { return buffer.begin == reinterpret_cast<uintptr_t>(begin); };
  const auto found = std::find_if(buffers_.begin(), buffers_.end(), same);
  if (found == buffers_.end()) throw std::logic_error("this global memory is not registered");
  buffers_.erase(found);
}

void Executor::check_host_access(const void* p, int64_t bytes, const char* op) const {
  const auto address = reinterpret_cast<uintptr_t>(p);
  const auto size = static_cast<uintptr_t>(bytes);
  const auto holds = [&](const Buffer& buffer) {
    return address - buffer.begin < buffer.bytes && buffer.bytes - (address - buffer.begin) >= size;
  };
  if (std::any_of(buffers_.begin(), buffers_.end(), holds)) return;
  throw std::runtime_error(std::string(op) + ": access of " + std::to_string(bytes) +
                           " bytes is out of bounds of global memory");
}

// ---- a thread from begin to end ----

void Executor::run_body() {
  Fiber& fiber = *running_;
  try {
    (*body_)();
    for (const AsyncQueue& queue : fiber.async) {
      if (queue.has_operations()) fail("it leaves the kernel with asynchronous operations not waited for");
    }
  } catch (const Unwind&) {
  } catch (...) {
    error_ = std::current_exception();
  }
  fiber.state = Fiber::State::kDone;
}

}  // namespace adpdm::simt
