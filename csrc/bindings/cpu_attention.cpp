// Checks attention_quantize and registers it for CPU tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "bindings/cpu_values.h"
#include "bindings/prepare.h"
#include "core/attention_quantize.h"
#include "core/igemm.h"

namespace adpdm::bindings {
namespace {

constexpr OpName kOp = "attention_quantize";

// x [N, tokens, C] of query's type; a copy only where its channels are not dense. `owner` keeps the data
// alive.
TokenView token_view(OpName name, const at::Tensor& x, const at::Tensor& query, at::Tensor& owner) {
  check_device(kOp, name, x, query);
  check_dtype(kOp, name, x, query.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 3, kOp, ": ", name, " must have 3 dimensions [N, tokens, C], got ", x.sizes());
  TORCH_CHECK_VALUE(x.size(0) == query.size(0) && x.size(2) == query.size(2), kOp, ": ", name,
                    " must have the batch and channels of query, ", query.size(0), " and ", query.size(2),
                    ", got shape ", x.sizes());
  owner = x.stride(2) == 1 || x.size(2) <= 1 ? x : x.contiguous();
  return {owner.const_data_ptr(), owner.stride(0), owner.stride(1)};
}

at::Tensor attention_quantize(const at::Tensor& query,        // [N, L, heads * D] f32|bf16|f16
                              const at::Tensor& key,          // [N, M, heads * D] of query's type
                              const at::Tensor& value,        // [N, M, heads * D] of query's type
                              const at::Tensor& scale,        // [G] f32
                              const at::Tensor& zero_point,   // [G] i32
                              const at::Tensor& group_index,  // [1] i32
                              int64_t heads, int64_t num_bits, bool int8, int64_t hadamard) {
  check_num_bits(kOp, num_bits);
  if (hadamard != 0) check_hadamard(kOp, "hadamard", hadamard, query.size(-1));
  AttentionQuantizeArgs args{};
  args.type = float_type(kOp, "query", query.scalar_type());
  at::Tensor owners[3];
  args.query = token_view("query", query, query, owners[0]);
  args.key = token_view("key", key, query, owners[1]);
  args.value = token_view("value", value, query, owners[2]);
  TORCH_CHECK_VALUE(key.size(1) >= 1, kOp, ": key must have at least 1 token, got 0");
  TORCH_CHECK_VALUE(value.size(1) == key.size(1), kOp, ": value must have the ", key.size(1),
                    " tokens of key, got ", value.size(1));
  TORCH_CHECK_VALUE(heads >= 1 && query.size(2) % heads == 0, kOp, ": heads must divide the ", query.size(2),
                    " channels, got ", heads);
  TORCH_CHECK_VALUE(!int8 || query.size(2) / heads <= kMaxReduction, kOp,
                    ": channels of a head must be at most ", kMaxReduction, " for exact int32 sums, got ",
                    query.size(2) / heads);
  args.batch = query.size(0);
  args.heads = heads;
  args.head_size = query.size(2) / heads;
  args.queries = query.size(1);
  args.keys = key.size(1);
  args.qparams = grouped_qparams(kOp, query, scale, zero_point, group_index);
  args.num_bits = static_cast<int>(num_bits);
  args.int8 = int8;
  args.hadamard = hadamard;
  check_current_group(kOp, "group_index", "zero_point", args.qparams);
  at::Tensor codes = at::empty(query.sizes(), query.options().dtype(at::kChar));
  args.codes = codes.mutable_data_ptr<int8_t>();
  cpu::attention_quantize(args);
  return codes;
}

}  // namespace

TORCH_LIBRARY_IMPL(adpdm, CPU, m) { m.impl("attention_quantize", &attention_quantize); }

}  // namespace adpdm::bindings
