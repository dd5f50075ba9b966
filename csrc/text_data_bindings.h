// The part of cs336._text that cs336.data is the documented face of.
#pragma once
#include <pybind11/pybind11.h>

namespace cs336::text {

void bind_data(pybind11::module_& m);

}  // namespace cs336::text
