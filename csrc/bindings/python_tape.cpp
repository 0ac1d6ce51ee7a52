// The class adpdm._C.Tape: operator calls as Python saw them, turned into what a Tape keeps.
#include "bindings/python_tape.h"

#include <ATen/ScalarOps.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/tape.h"

namespace adpdm::bindings {
namespace {

namespace py = pybind11;

// Torch shows numbers in place of tensors as numbers again: `x * 2` calls mul.Tensor with a tensor of no
// dimensions, marked as wrapped, so that it does not decide on the dtype of the result.
c10::IValue to_value(const py::handle& given, const c10::Argument& argument) {
  const bool is_number = PyFloat_Check(given.ptr()) || PyLong_Check(given.ptr());  // bool is a PyLong
  if (!is_number || argument.type()->kind() != c10::TypeKind::TensorType) {
    return torch::jit::toIValue(given, argument.type());
  }
  at::Tensor wrapped = c10::scalar_to_tensor(torch::jit::toIValue(given, c10::NumberType::get()).toScalar());
  wrapped.unsafeGetTensorImpl()->set_wrapped_number(true);
  return wrapped;
}

// One value per argument of the schema: given by position, by name, or its default.
std::vector<c10::IValue> complete_arguments(const c10::FunctionSchema& schema, const py::tuple& args,
                                            const py::dict& kwargs) {
  std::vector<c10::IValue> values;
  for (const c10::Argument& argument : schema.arguments()) {
    if (values.size() < args.size()) {
      values.push_back(to_value(args[values.size()], argument));
    } else if (kwargs.contains(argument.name())) {
      values.push_back(to_value(kwargs[argument.name().c_str()], argument));
    } else {
      TORCH_CHECK_VALUE(argument.default_value().has_value(), "Tape.add: ", schema.name(), " wants ",
                        argument.name(), ", got none");
      values.push_back(*argument.default_value());
    }
  }
  return values;
}

void append_tensors(const py::handle& result, std::vector<at::Tensor>& tensors) {
  if (THPVariable_Check(result.ptr())) {
    tensors.push_back(THPVariable_Unpack(result.ptr()));
  } else if (py::isinstance<py::tuple>(result) || py::isinstance<py::list>(result)) {
    for (const py::handle& element : result) append_tensors(element, tensors);
  } else if (result.is_none()) {
    tensors.emplace_back();
  }
}

void add(Tape& tape, const std::string& name, const std::string& overload, const py::tuple& args,
         const py::dict& kwargs, const py::object& result) {
  const c10::OperatorHandle op =
      c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  std::vector<at::Tensor> results;
  if (!op.schema().returns().empty()) append_tensors(result, results);
  tape.add(op, complete_arguments(op.schema(), args, kwargs), results);
}

}  // namespace

void register_tape(py::module_& module) {
  py::class_<Tape>(module, "Tape", "Operator calls, recorded once and repeated without Python.")
      .def(py::init<>())
      .def("add", &add, py::arg("name"), py::arg("overload"), py::arg("args"), py::arg("kwargs"),
           py::arg("result"), "Append a call that was just made.")
      .def("finish", &Tape::finish, py::arg("results"), "End the recording; replays refresh these tensors.")
      .def("replay", &Tape::replay, py::call_guard<py::gil_scoped_release>(), "Make the calls again.")
      .def("__len__", &Tape::num_calls);
}

}  // namespace adpdm::bindings
