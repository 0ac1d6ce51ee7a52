// Registers the class Children with the extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace adpdm::bindings {

void register_children(pybind11::module_& module);

}  // namespace adpdm::bindings
