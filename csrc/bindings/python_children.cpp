// The class adpdm._C.Children: whether modules still have the children that they had.
#include "bindings/python_children.h"

#include <cstddef>
#include <utility>
#include <vector>

namespace adpdm::bindings {
namespace {

namespace py = pybind11;

// Compares addresses alone, so that it reads no child: between two steps of sampling the weights have pushed
// all of Python's objects out of the caches, and a loop in Python that touches them takes a tenth of a
// millisecond.
class Children {
 public:
  explicit Children(const py::list& owners) {
    for (const py::handle& owner : owners) {
      auto dict = py::cast<py::dict>(owner);
      std::vector<py::object> children;
      for (const auto& item : dict) children.push_back(py::reinterpret_borrow<py::object>(item.second));
      owners_.emplace_back(std::move(dict), std::move(children));
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
    return true;
  }

 private:
  std::vector<std::pair<py::dict, std::vector<py::object>>>
      owners_;  // with the children held, none is reused
};

}  // namespace

void register_children(py::module_& module) {
  py::class_<Children>(module, "Children", "The values of dicts, `_modules` of modules, as they are now.")
      .def(py::init<const py::list&>(), py::arg("owners"))
      .def("unchanged", &Children::unchanged, "Whether each dict holds the same objects in the same order.");
}

}  // namespace adpdm::bindings
