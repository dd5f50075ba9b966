// Python face of csrc/cpu/text.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_text, m) { m.doc() = "The tokenizer core."; }
