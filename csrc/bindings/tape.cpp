// Implements tape.h.
#include "bindings/tape.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/stack.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <c10/util/hash.h>

#include <algorithm>
#include <cstring>
#include <unordered_set>
#include <utility>

namespace adpdm::bindings {
namespace {

// Visits the tensors of results on a stack in order, undefined ones included.
template <typename Visit>
void for_each_tensor(const torch::jit::Stack& results, Visit&& visit) {
  for (const c10::IValue& result : results) {
    if (result.isTensor()) {
      visit(result.toTensor());
    } else if (result.isTensorList()) {
      for (const at::Tensor& tensor : result.toTensorVector()) visit(tensor);
    }
  }
}

}  // namespace

size_t Tape::HashMemory::operator()(const Memory& memory) const {
  const auto& [storage, offset, type, sizes, strides] = memory;
  return c10::get_hash(storage, offset, type, sizes, strides);
}

Tape::Memory Tape::memory_of(const at::Tensor& tensor) {
  const void* storage = tensor.unsafeGetTensorImpl();
  if (tensor.has_storage()) storage = tensor.storage().unsafeGetStorageImpl();
  const int meaning = (tensor.is_conj() ? 1 : 0) | (tensor.is_neg() ? 2 : 0);  // views that only say so
  return {storage, tensor.storage_offset(), static_cast<int>(tensor.scalar_type()) << 2 | meaning,
          tensor.sizes().vec(), tensor.strides().vec()};
}

void Tape::keep_address(const at::Tensor& tensor) {
  if (!tensor.defined()) return;
  if (tensor.has_storage()) {
    storages_.emplace_back(tensor.storage().getWeakStorageImpl());
  } else {
    without_storage_.push_back(tensor);
  }
}

Tape::Slot Tape::slot_of(const at::Tensor& tensor) const {
  if (!tensor.defined()) return kNone;
  const auto found = slots_.find(memory_of(tensor));
  return found == slots_.end() ? kNone : found->second;
}

// Leaves the tensors of slots out of the list, as add() does with other arguments: they would live as long as
// the tape, and make equal calls differ.
void Tape::patch_list(size_t argument, c10::IValue& list, Call& call) {
  const c10::IValue nothing = list.isTensorList() ? c10::IValue(at::Tensor()) : c10::IValue();
  c10::List<c10::IValue> kept = list.toList().copy();
  for (size_t i = 0; i < kept.size(); ++i) {
    const c10::IValue element = kept.get(i);
    if (!element.isTensor()) continue;
    keep_address(element.toTensor());
    const Slot slot = slot_of(element.toTensor());
    if (slot == kNone) continue;
    call.patches.push_back({argument, static_cast<int64_t>(i), slot});
    kept.set(i, nothing);
  }
  list = kept;
}

// Slots are found by the memory that tensors describe when they are arguments. Two kinds of calls would keep
// a tensor of the recording without a word: what changes the shape of its argument, and what writes into an
// argument and makes another tensor besides.
void Tape::demand_slots(const c10::OperatorHandle& op) {
  TORCH_CHECK(!op.hasTag(at::Tag::inplace_view), "adpdm.graph: the forward calls ", op.operator_name(),
              ", which changes the shape of a tensor in place; call it without the underscore");
  if (!op.schema().is_mutable()) return;
  for (const c10::Argument& returned : op.schema().returns()) {
    TORCH_CHECK(returned.alias_info() != nullptr, "adpdm.graph: the forward calls ", op.operator_name(),
                ", which writes into an argument and returns a new tensor; a recording cannot repeat both");
  }
}

void Tape::add(const c10::OperatorHandle& op, std::vector<c10::IValue> arguments,
               const std::vector<at::Tensor>& results) {
  TORCH_CHECK(results_.empty(), "Tape.add: the recording is finished");
  demand_slots(op);
  Call call{op, std::move(arguments), {}, {}, {}};
  for (size_t a = 0; a < call.arguments.size(); ++a) {
    c10::IValue& argument = call.arguments[a];
    if (argument.isTensor()) {
      const Slot slot = slot_of(argument.toTensor());
      keep_address(argument.toTensor());
      if (slot == kNone) continue;
      call.patches.push_back({a, -1, slot});
      argument = c10::IValue();
    } else if (argument.isList()) {
      patch_list(a, argument, call);
    }
  }
  const Kind kind = kind_of(call);
  for (const at::Tensor& result : results) {
    Slot slot = slot_of(result);
    const bool is_written = op.schema().is_mutable();  // the result is an argument, or a tensor from outside
    if (result.defined() && slot == kNone && !is_written) {
      slot = static_cast<Slot>(values_.size());
      kinds_.push_back(kind);
      values_.push_back(kind == Kind::kVaries ? at::Tensor() : result);
      slots_.emplace(memory_of(result), slot);
      keep_address(result);
    }
    call.results.push_back(slot);
  }
  calls_.push_back(std::move(call));
}

void Tape::finish(const std::vector<at::Tensor>& results) {
  for (const at::Tensor& result : results) {
    const Slot slot = slot_of(result);
    TORCH_CHECK_VALUE(slot != kNone, "Tape.finish: a result of shape ", result.sizes(),
                      " was not made by a recorded call");
    TORCH_CHECK_VALUE(at::has_internal_overlap(result) != at::MemOverlap::Yes,
                      "Tape.finish: a result of shape ", result.sizes(),
                      " repeats its elements (`expand`), so it cannot be written; return a clone");
    results_.emplace_back(result, slot);
  }
  const bool writes = std::any_of(calls_.begin(), calls_.end(),
                                  [](const Call& call) { return call.op.schema().is_mutable(); });
  if (!writes) simplify();
  drop_unused_calls();
  note_last_uses();
  slots_.clear();
  storages_.clear();
  without_storage_.clear();
  values_.assign(values_.size(), at::Tensor());
}

// Makes calls that always give the same now, and equal calls once: projections of one time embedding each
// begin with its activation and with a view of their weight, and each block of a transformer may make the
// frequencies of the timestep anew. Only where no call writes into a tensor.
void Tape::simplify() {
  std::vector<Slot> same(values_.size());
  for (size_t i = 0; i < same.size(); ++i) same[i] = static_cast<Slot>(i);
  for (size_t i = 0; i < calls_.size(); ++i) {
    Call& call = calls_[i];
    for (Patch& patch : call.patches) patch.slot = same[static_cast<size_t>(patch.slot)];
    bind_constants(call);
    bool varies = false;
    for (const Slot slot : call.results) {
      if (slot == kNone) continue;
      at::Tensor& value = values_[static_cast<size_t>(slot)];
      const Kind kind = kinds_[static_cast<size_t>(slot)];
      if (kind == Kind::kNumbers) value = first_equal_number(value);
      varies = varies || kind == Kind::kVaries;
    }
    if (!varies || call.op.hasTag(at::Tag::nondeterministic_seeded)) continue;
    const auto equal = std::find_if(calls_.begin(), calls_.begin() + static_cast<std::ptrdiff_t>(i),
                                    [&](const Call& earlier) { return is_same_call(earlier, call); });
    if (equal == calls_.begin() + static_cast<std::ptrdiff_t>(i)) continue;
    for (size_t r = 0; r < call.results.size(); ++r) {
      if (call.results[r] != kNone) same[static_cast<size_t>(call.results[r])] = equal->results[r];
    }
  }
  for (auto& result : results_) result.second = same[static_cast<size_t>(result.second)];
  numbers_.clear();
}

// The first constant of the same elements, so that calls on one are calls on the other.
at::Tensor Tape::first_equal_number(const at::Tensor& made) {
  if (!made.is_cpu() || !made.is_contiguous()) return made;
  const auto is_equal = [&](const at::Tensor& number) {
    return number.scalar_type() == made.scalar_type() && number.sizes() == made.sizes() &&
           std::memcmp(number.const_data_ptr(), made.const_data_ptr(), made.nbytes()) == 0;
  };
  const auto found = std::find_if(numbers_.begin(), numbers_.end(), is_equal);
  if (found != numbers_.end()) return *found;
  numbers_.push_back(made);
  return made;
}

// Puts the tensors of constant slots in place of the slots.
void Tape::bind_constants(Call& call) const {
  std::vector<Patch> left;
  for (const Patch& patch : call.patches) {
    if (kinds_[static_cast<size_t>(patch.slot)] == Kind::kVaries) {
      left.push_back(patch);
      continue;
    }
    c10::IValue& argument = call.arguments[patch.argument];
    const at::Tensor& value = values_[static_cast<size_t>(patch.slot)];
    if (patch.element < 0) {
      argument = value;
    } else {
      argument.toList().set(static_cast<size_t>(patch.element), value);
    }
  }
  call.patches = std::move(left);
}

// Of the results of a call that is being recorded.
Tape::Kind Tape::kind_of(const Call& call) const {
  if (call.op.hasTag(at::Tag::nondeterministic_seeded)) return Kind::kVaries;
  const auto is_of = [&](Kind kind) {
    return [this, kind](const Patch& patch) { return kinds_[static_cast<size_t>(patch.slot)] == kind; };
  };
  const std::vector<Patch>& patches = call.patches;
  if (std::any_of(patches.begin(), patches.end(), is_of(Kind::kVaries))) return Kind::kVaries;
  const auto is_free = [](const c10::IValue& argument) {
    if (argument.isTensorList() || argument.isOptionalTensorList()) return false;
    return !argument.isTensor() || is_number(argument.toTensor());
  };
  if (std::all_of(patches.begin(), patches.end(), is_of(Kind::kNumbers)) &&
      std::all_of(call.arguments.begin(), call.arguments.end(), is_free)) {
    return Kind::kNumbers;
  }
  const std::vector<c10::Argument>& returns = call.op.schema().returns();
  const auto is_view = [](const c10::Argument& returned) { return returned.alias_info() != nullptr; };
  return std::all_of(returns.begin(), returns.end(), is_view) ? Kind::kView : Kind::kVaries;
}

// Whether a tensor that no call made is a number in the guise of a tensor.
bool Tape::is_number(const at::Tensor& tensor) {
  return !tensor.defined() || tensor.unsafeGetTensorImpl()->is_wrapped_number();
}

// Each call wraps the numbers in its arguments into tensors of its own.
bool Tape::is_same_number(const at::Tensor& a, const at::Tensor& b) {
  const bool wrapped =
      a.unsafeGetTensorImpl()->is_wrapped_number() && b.unsafeGetTensorImpl()->is_wrapped_number();
  return wrapped && a.scalar_type() == b.scalar_type() &&
         std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
}

bool Tape::is_same_value(const c10::IValue& a, const c10::IValue& b) {
  if (a.isTensor() && b.isTensor()) {
    const at::Tensor &x = a.toTensor(), &y = b.toTensor();
    if (!x.defined() || !y.defined()) return !x.defined() && !y.defined();
    return memory_of(x) == memory_of(y) || is_same_number(x, y);
  }
  if (a.isList() && b.isList()) {
    const auto x = a.toListRef(), y = b.toListRef();
    return std::equal(x.begin(), x.end(), y.begin(), y.end(), is_same_value);
  }
  if (a.isNone() || b.isNone()) return a.isNone() && b.isNone();
  const bool is_plain = (a.isInt() && b.isInt()) || (a.isDouble() && b.isDouble()) ||
                        (a.isBool() && b.isBool()) || (a.isString() && b.isString());
  return is_plain && a == b;
}

bool Tape::is_same_call(const Call& a, const Call& b) {
  return a.op.operator_name() == b.op.operator_name() && a.patches == b.patches &&
         std::equal(a.arguments.begin(), a.arguments.end(), b.arguments.begin(), b.arguments.end(),
                    is_same_value);
}

// Keeps what writes into memory and what somebody reads.
void Tape::drop_unused_calls() {
  std::unordered_set<Slot> needed;
  for (const auto& result : results_) needed.insert(result.second);
  std::vector<Call> kept;
  for (auto call = calls_.rbegin(); call != calls_.rend(); ++call) {
    bool is_needed = call->op.schema().is_mutable();
    for (const Slot slot : call->results) is_needed = is_needed || needed.count(slot) > 0;
    if (!is_needed) continue;
    for (const Patch& patch : call->patches) needed.insert(patch.slot);
    kept.push_back(std::move(*call));
  }
  calls_.assign(std::make_move_iterator(kept.rbegin()), std::make_move_iterator(kept.rend()));
}

// Frees each tensor after its last use, so that a replay needs no more memory than the forward did.
void Tape::note_last_uses() {
  std::unordered_set<Slot> seen;
  for (const auto& result : results_) seen.insert(result.second);
  for (auto call = calls_.rbegin(); call != calls_.rend(); ++call) {
    const auto note = [&](Slot slot) {
      if (slot != kNone && seen.insert(slot).second) call->last_uses.push_back(slot);
    };
    for (const Patch& patch : call->patches) note(patch.slot);
    for (const Slot slot : call->results) note(slot);
  }
}

// The arguments of a call with the tensors of its slots. A list is copied before a slot is put into it.
void Tape::push_arguments(const Call& call, std::vector<c10::IValue>& stack) const {
  stack.assign(call.arguments.begin(), call.arguments.end());
  constexpr size_t kNoList = static_cast<size_t>(-1);
  size_t copied = kNoList;
  for (const Patch& patch : call.patches) {
    c10::IValue& argument = stack[patch.argument];
    const at::Tensor& value = values_[static_cast<size_t>(patch.slot)];
    if (patch.element < 0) {
      argument = value;
      continue;
    }
    if (copied != patch.argument) argument = argument.toList().copy();
    copied = patch.argument;
    argument.toList().set(static_cast<size_t>(patch.element), value);
  }
}

void Tape::replay() {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  torch::jit::Stack stack;
  for (const Call& call : calls_) {
    push_arguments(call, stack);
    call.op.callBoxed(stack);
    size_t r = 0;
    for_each_tensor(stack, [&](const at::Tensor& tensor) {
      const Slot slot = call.results[r++];
      if (slot != kNone) values_[static_cast<size_t>(slot)] = tensor;
    });
    for (const Slot slot : call.last_uses) values_[static_cast<size_t>(slot)].reset();
  }
  for (auto& [result, slot] : results_) {
    result.copy_(values_[static_cast<size_t>(slot)]);
  }
  for (auto& [result, slot] : results_) values_[static_cast<size_t>(slot)].reset();  // several may share one
}

}  // namespace adpdm::bindings
