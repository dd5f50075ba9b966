// Python's strings as UTF-8, and back; work without the GIL.
#pragma once
#include <pybind11/pybind11.h>

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/text/huge_pages.h"
#include "cpu/text/interrupt.h"
#include "cpu/text/utf8.h"

namespace cs336::text {

namespace py = pybind11;

// Without the GIL, and asking for signals all the same: Python acts on them in the main thread alone.
class Unlocked {
  py::gil_scoped_release release_;
  Interrupt interrupt_{[] {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }};
};

// A str or bytes of Python's that somebody keeps: what is needed to read it without the GIL.
struct RawText {
  explicit RawText(PyObject* text) {
    if (PyBytes_Check(text)) {
      data = PyBytes_AS_STRING(text);
      size = static_cast<size_t>(PyBytes_GET_SIZE(text));
    } else if (PyUnicode_Check(text)) {
      data = PyUnicode_DATA(text);
      size = static_cast<size_t>(PyUnicode_GET_LENGTH(text));
      if (!PyUnicode_IS_ASCII(text)) unit = PyUnicode_KIND(text);
    } else {
      throw py::type_error("expected str or bytes, got " + std::string(Py_TYPE(text)->tp_name));
    }
  }
  const void* data;
  size_t size;   // units
  int unit = 0;  // bytes of a unit, which is a code point; 0 for UTF-8
};

// The texts of a list, which are kept with it.
class Texts {
 public:
  explicit Texts(const py::list& objects) {
    for (const py::handle object : objects) {
      raws_.emplace_back(object.ptr());
      owners_.push_back(py::reinterpret_borrow<py::object>(object));
      size_ += raws_.back().size;
    }
  }
  std::span<const RawText> raws() const { return raws_; }
  size_t size() const { return size_; }  // units of all

  // Where groups of neighbours end that have at most `most` units, or are one text.
  std::vector<size_t> groups(size_t most) const {
    std::vector<size_t> ends;
    size_t size = 0;
    for (size_t i = 0; i < raws_.size(); ++i) {
      if (i > 0 && size + raws_[i].size > most) {
        ends.push_back(i);
        size = 0;
      }
      size += raws_[i].size;
    }
    if (!raws_.empty()) ends.push_back(raws_.size());
    return ends;
  }

 private:
  std::vector<py::object> owners_;
  std::vector<RawText> raws_;
  size_t size_ = 0;
};

// The UTF-8 of texts. Unlike PyUnicode_AsUTF8 it leaves no copy with a str.
class Utf8 {
 public:
  Utf8() = default;
  explicit Utf8(std::span<const RawText> texts) { assign(texts); }

  // Instead of that of the last texts.
  std::span<const std::string_view> assign(std::span<const RawText> texts) {
    made_.clear();
    views_.clear();
    size_t units = 0;
    for (const RawText& text : texts) units += text.unit == 0 ? 0 : text.size;
    made_.room(units + units / 16);
    for (const RawText& text : texts) {
      const size_t before = made_.size();
      if (text.unit == 1) to_utf8(static_cast<const uint8_t*>(text.data), text.size, made_);
      if (text.unit == 2) to_utf8(static_cast<const uint16_t*>(text.data), text.size, made_);
      if (text.unit == 4) to_utf8(static_cast<const uint32_t*>(text.data), text.size, made_);
      if (text.unit == 0) {
        views_.emplace_back(static_cast<const char*>(text.data), text.size);
      } else {
        views_.emplace_back(nullptr, made_.size() - before);  // it may still move
      }
    }
    const char* next = made_.data();
    for (size_t i = 0; i < views_.size(); ++i) {
      if (texts[i].unit == 0) continue;
      views_[i] = {next, views_[i].size()};
      next += views_[i].size();
    }
    return views_;
  }
  std::span<const std::string_view> views() const { return views_; }

 private:
  Buffer<char> made_;
  std::vector<std::string_view> views_;
};

// One of them, which the caller keeps.
class Text {
 public:
  explicit Text(py::handle object) : raw_(object.ptr()), utf8_({&raw_, 1}) {}
  std::string_view view() const { return utf8_.views()[0]; }

 private:
  RawText raw_;
  Utf8 utf8_;
};

// The str that UTF-8 stands for; bytes that are not valid become U+FFFD.
inline py::str str_of(std::string_view utf8) {
  const Extent extent = extent_of(utf8);
  auto text = py::reinterpret_steal<py::str>(PyUnicode_New(static_cast<Py_ssize_t>(extent.size), extent.bound));
  if (!text) throw py::error_already_set();
  const auto fill = [&]<class Unit>(Unit* out) {
    advise_huge(out, extent.size * sizeof(Unit));
    return from_utf8(utf8, extent, out);
  };
  const int kind = PyUnicode_KIND(text.ptr());
  const bool valid = kind == PyUnicode_1BYTE_KIND   ? fill(PyUnicode_1BYTE_DATA(text.ptr()))
                     : kind == PyUnicode_2BYTE_KIND ? fill(PyUnicode_2BYTE_DATA(text.ptr()))
                                                    : fill(PyUnicode_4BYTE_DATA(text.ptr()));
  if (valid) return text;
  text = py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(utf8.data(), static_cast<Py_ssize_t>(utf8.size()), "replace"));
  if (!text) throw py::error_already_set();
  return text;
}

}  // namespace cs336::text
