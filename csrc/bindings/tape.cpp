// Implements tape.h.
#include "bindings/tape.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/stack.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <c10/util/hash.h>

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
  return {storage, tensor.storage_offset(), static_cast<int>(tensor.scalar_type()), tensor.sizes().vec(),
          tensor.strides().vec()};
}

Tape::Slot Tape::slot_of(const at::Tensor& tensor) const {
  if (!tensor.defined()) return kNone;
  const auto found = slots_.find(memory_of(tensor));
  return found == slots_.end() ? kNone : found->second;
}

void Tape::patch_list(size_t argument, const c10::IValue& list, Call& call) {
  const c10::ArrayRef<c10::IValue> elements = list.toListRef();
  for (size_t i = 0; i < elements.size(); ++i) {
    if (!elements[i].isTensor()) continue;
    const Slot slot = slot_of(elements[i].toTensor());
    if (slot != kNone) call.patches.push_back({argument, static_cast<int64_t>(i), slot});
    alive_.push_back(elements[i].toTensor());
  }
}

void Tape::add(const c10::OperatorHandle& op, std::vector<c10::IValue> arguments,
               const std::vector<at::Tensor>& results) {
  TORCH_CHECK(results_.empty(), "Tape.add: the recording is finished");
  Call call{op, std::move(arguments), {}, {}, {}};
  for (size_t a = 0; a < call.arguments.size(); ++a) {
    c10::IValue& argument = call.arguments[a];
    if (argument.isTensor()) {
      const Slot slot = slot_of(argument.toTensor());
      alive_.push_back(argument.toTensor());
      if (slot == kNone) continue;
      call.patches.push_back({a, -1, slot});
      argument = c10::IValue();
    } else if (argument.isList()) {
      patch_list(a, argument, call);
    }
  }
  for (const at::Tensor& result : results) {
    Slot slot = slot_of(result);
    const bool is_written = op.schema().is_mutable();  // the result is an argument, or a tensor from outside
    if (result.defined() && slot == kNone && !is_written) {
      slot = static_cast<Slot>(values_.size());
      values_.emplace_back();
      slots_.emplace(memory_of(result), slot);
      alive_.push_back(result);
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
    results_.emplace_back(result, slot);
  }
  drop_unused_calls();
  note_last_uses();
  slots_.clear();
  alive_.clear();
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
    values_[static_cast<size_t>(slot)].reset();
  }
}

}  // namespace adpdm::bindings
