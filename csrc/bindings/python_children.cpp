// The class adpdm._C.Children: whether modules still have the children, and entries of dicts the values, that
// they had.
#include "bindings/python_children.h"

#include <cstddef>
#include <utility>
#include <vector>

namespace adpdm::bindings {
namespace {

namespace py = pybind11;

// Compares addresses alone, so that it reads no child: between two steps of sampling the weights have pushed
// all of Python's objects out of the caches, and a loop in Python that touches them takes a tenth of a
// millisecond. What was there is held, so that no address is used again, nor memory that a CUDA graph reads.
class Children {
 public:
  Children(const py::list& owners, const py::list& entries) {
    for (const py::handle& owner : owners) {
      auto dict = py::cast<py::dict>(owner);
      std::vector<py::object> children;
      for (const auto& item : dict) children.push_back(py::reinterpret_borrow<py::object>(item.second));
      owners_.emplace_back(std::move(dict), std::move(children));
    }
    for (const py::handle& pair : entries) {
      const auto [dict, name] = py::cast<std::pair<py::dict, py::str>>(pair);
      entries_.push_back({dict, name, py::reinterpret_borrow<py::object>(value_of(dict, name))});
    }
  }

  bool unchanged() const {
    for (const auto& [dict, children] : owners_) {
      if (dict.size() != children.size()) return false;
      size_t i = 0;
      for (const auto& item : dict) {
        if (item.second.ptr() != children[i++].ptr()) return false;
      }
    }
    for (const Entry& entry : entries_) {
      if (value_of(entry.dict, entry.name) != entry.value.ptr()) return false;
    }
    return true;
  }

 private:
  struct Entry {
    py::dict dict;
    py::str name;
    py::object value;  // nullptr where there was none
  };

  static PyObject* value_of(const py::dict& dict, const py::str& name) {
    return PyDict_GetItemWithError(dict.ptr(), name.ptr());  // borrowed; a str is hashable
  }

  std::vector<std::pair<py::dict, std::vector<py::object>>> owners_;
  std::vector<Entry> entries_;
};

}  // namespace

void register_children(py::module_& module) {
  py::class_<Children>(
      module, "Children",
      "The values of dicts, `_modules` of modules, and of entries (dict, name), as they are now.")
      .def(py::init<const py::list&, const py::list&>(), py::arg("owners"), py::arg("entries"))
      .def("unchanged", &Children::unchanged,
           "Whether each dict holds the same objects in the same order, and each entry the same one.");
}

}  // namespace adpdm::bindings
