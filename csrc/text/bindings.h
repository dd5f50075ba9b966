// The parts of cs336._text that cs336.data is the documented face of.
#pragma once
#include <pybind11/pybind11.h>

namespace cs336::text {

void bind_extract(pybind11::module_& m);
void bind_filter(pybind11::module_& m);
void bind_dedup(pybind11::module_& m);
void bind_classifier(pybind11::module_& m);

inline void bind_data(pybind11::module_& m) {
  bind_extract(m);
  bind_filter(m);
  bind_dedup(m);
  bind_classifier(m);
}

}  // namespace cs336::text
