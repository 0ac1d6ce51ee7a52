// Offers Tape to Python.
#pragma once

#include <pybind11/pybind11.h>

namespace adpdm::bindings {

// Adds the class Tape to the module adpdm._C.
void register_tape(pybind11::module_& module);

}  // namespace adpdm::bindings
