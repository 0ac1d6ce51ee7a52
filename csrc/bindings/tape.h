// The operators of one forward pass, recorded once and replayed without Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace adpdm::bindings {

// A straight line of operator calls below autograd. Tensors that an earlier call made are passed on by slot;
// all others (weights, the recording's inputs) are read where they lie, so their values may change between
// replays, but neither their memory nor their shapes.
class Tape {
 public:
  // A call that was just made: arguments in the order of the schema, results flattened to tensors.
  void add(const c10::OperatorHandle& op, std::vector<c10::IValue> arguments,
           const std::vector<at::Tensor>& results);

  // Ends the recording. `results` are tensors that the recorded calls made; a replay refreshes them in place.
  void finish(const std::vector<at::Tensor>& results);

  // Makes the calls again. Not from two threads at once: both would write the same results.
  void replay();

  int64_t num_calls() const { return static_cast<int64_t>(calls_.size()); }

 private:
  using Slot = int32_t;
  static constexpr Slot kNone = -1;

  // What a slot holds in every replay: another tensor, the same view of a tensor from outside, or the same
  // values, made of numbers alone.
  enum class Kind : uint8_t { kVaries, kView, kNumbers };

  // Where a slot's tensor goes: an argument, or an element of a list argument.
  struct Patch {
    size_t argument;
    int64_t element;  // of a list; -1: the argument itself
    Slot slot;

    bool operator==(const Patch& other) const {
      return argument == other.argument && element == other.element && slot == other.slot;
    }
  };

  struct Call {
    c10::OperatorHandle op;
    std::vector<c10::IValue> arguments;  // slots' tensors are left out
    std::vector<Patch> patches;
    std::vector<Slot> results;  // kNone: not made by a recorded call, as when a weight is written in place
    std::vector<Slot> last_uses;
  };

  // A tensor by the memory it describes: autograd wraps the same memory in new tensors at will.
  using Memory = std::tuple<const void*, int64_t, int, std::vector<int64_t>, std::vector<int64_t>>;
  struct HashMemory {
    size_t operator()(const Memory& memory) const;
  };

  static bool is_same_number(const at::Tensor& a, const at::Tensor& b);
  static bool is_same_value(const c10::IValue& a, const c10::IValue& b);
  static bool is_same_call(const Call& a, const Call& b);
  static void demand_slots(const c10::OperatorHandle& op);
  static Memory memory_of(const at::Tensor& tensor);
  void keep_address(const at::Tensor& tensor);
  Slot slot_of(const at::Tensor& tensor) const;
  void patch_list(size_t argument, c10::IValue& list, Call& call);
  void push_arguments(const Call& call, std::vector<c10::IValue>& stack) const;
  void simplify();
  void bind_constants(Call& call) const;
  Kind kind_of(const Call& call) const;
  static bool is_number(const at::Tensor& tensor);
  at::Tensor first_equal_number(const at::Tensor& made);
  void drop_unused_calls();
  void note_last_uses();

  std::vector<Call> calls_;
  std::unordered_map<Memory, Slot, HashMemory> slots_;  // of the recording; empty after it
  // While recording, no address may stand for two tensors: a storage's stays taken as long as there is a weak
  // reference, though its memory is given back. What has no storage is kept as it is.
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages_;
  std::vector<at::Tensor> without_storage_;
  std::vector<at::Tensor> values_;   // by slot: constants until finish(), then what a replay makes
  std::vector<Kind> kinds_;          // by slot
  std::vector<at::Tensor> numbers_;  // different results of constant calls, while simplifying
  std::vector<std::pair<at::Tensor, Slot>> results_;
};

}  // namespace adpdm::bindings
