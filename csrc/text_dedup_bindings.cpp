// Lines, Bloom filters and MinHash for cs336.data.dedup.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "cpu/text/bloom.h"
#include "cpu/text/lines.h"
#include "cpu/text/minhash.h"
#include "cpu/text/shingles.h"
#include "text_data_bindings.h"
#include "text_strings.h"

namespace cs336::text {
namespace {

using Flags = py::array_t<uint8_t>;

Unit unit_of(const std::string& name) {
  if (name == "word") return Unit::kWord;
  if (name == "char") return Unit::kChar;
  throw py::value_error("n-grams are of \"word\" or \"char\", got \"" + name + "\"");
}

// Signatures of texts, one after the other: memory for one text at a time.
py::array_t<uint32_t> sign_all(const MinHash& minhash, const py::list& texts, size_t ngram,
                               const std::string& unit_name) {
  const Unit unit = unit_of(unit_name);
  const Texts all(texts);
  py::array_t<uint32_t> signatures({all.raws().size(), minhash.num_hashes()});
  uint32_t* row = signatures.mutable_data();
  const py::gil_scoped_release release;
  std::string scratch;
  std::vector<uint64_t> hashes;
  Utf8 utf8;
  for (const RawText& raw : all.raws()) {
    shingles_into(utf8.assign({&raw, 1})[0], ngram, unit, scratch, hashes);
    minhash.sign(hashes, row);
    row += minhash.num_hashes();
  }
  return signatures;
}

py::array_t<uint64_t> shingle_array(py::handle object, size_t ngram, const std::string& unit) {
  const Text text(object);
  const std::vector<uint64_t> hashes = shingles(text.view(), ngram, unit_of(unit));
  return py::array_t<uint64_t>(static_cast<py::ssize_t>(hashes.size()), hashes.data());
}

// Sorted and distinct, as shingles() gives them.
using Shingles = py::array_t<uint64_t, py::array::c_style>;
double jaccard_of(const Shingles& a, const Shingles& b) {
  return jaccard({a.data(), static_cast<size_t>(a.size())}, {b.data(), static_cast<size_t>(b.size())});
}

std::string normalized(py::handle object) {
  const Text text(object);
  std::string out;
  normalize(text.view(), out);
  return out;
}

std::string_view view_of(const py::buffer_info& info) {
  return {static_cast<const char*>(info.ptr), static_cast<size_t>(info.size * info.itemsize)};
}

template <class Work>
auto with_bytes(const py::buffer& buffer, Work&& work) {
  const py::buffer_info info = buffer.request();
  const py::gil_scoped_release release;
  return work(view_of(info));
}

// One flag a line.
uint8_t* flags_for(Flags& flags, std::string_view text) {
  const size_t lines = count_lines(text);
  if (static_cast<size_t>(flags.size()) == lines) return flags.mutable_data();
  throw std::invalid_argument("expected " + std::to_string(lines) + " flags, one a line, got " +
                              std::to_string(flags.size()));
}

}  // namespace

void bind_dedup(py::module_& m) {
  py::class_<MinHash>(m, "MinHash")
      .def(py::init<size_t, uint64_t>(), py::arg("num_hashes"), py::arg("seed"))
      .def("sign", &sign_all, py::arg("texts"), py::arg("ngram"), py::arg("unit"));
  m.def("shingles", &shingle_array, py::arg("text"), py::arg("ngram"), py::arg("unit"));
  m.def("jaccard", &jaccard_of, py::arg("a"), py::arg("b"));
  m.def("normalize", &normalized, py::arg("text"));

  py::class_<LineCounts>(m, "LineCounts")
      .def(py::init<uint64_t, uint64_t>(), py::arg("part"), py::arg("parts"))
      .def(
          "add", [](LineCounts& c, const py::buffer& b) { with_bytes(b, [&](auto text) { c.add(text); }); },
          py::arg("text"))
      .def("distinct", &LineCounts::distinct)
      .def(
          "mark_repeated",
          [](const LineCounts& counts, const py::buffer& buffer, Flags flags) {
            const py::buffer_info info = buffer.request();
            counts.mark_repeated(view_of(info), flags_for(flags, view_of(info)));
          },
          py::arg("text"), py::arg("drop").noconvert())
      .def(
          "mark_seen",
          [](LineCounts& counts, const py::buffer& buffer, Flags flags) {
            const py::buffer_info info = buffer.request();
            counts.mark_seen(view_of(info), flags_for(flags, view_of(info)));
          },
          py::arg("text"), py::arg("drop").noconvert());
  m.def("count_lines", [](const py::buffer& buffer) { return with_bytes(buffer, count_lines); }, py::arg("text"));
  m.def(
      "keep_lines",
      [](const py::buffer& buffer, Flags drop) {
        const py::buffer_info info = buffer.request();
        return py::bytes(keep_lines(view_of(info), flags_for(drop, view_of(info))));
      },
      py::arg("text"), py::arg("drop"));

  py::class_<BloomFilter>(m, "BloomFilter")
      .def(py::init<uint64_t, double>(), py::arg("capacity"), py::arg("error"))
      .def(py::init([](const py::bytes& saved) { return BloomFilter(std::string_view(saved)); }), py::arg("saved"))
      .def(
          "add", [](BloomFilter& f, py::handle key) { return f.add(Text(key).view()); }, py::arg("key"))
      .def(
          "contains", [](const BloomFilter& f, py::handle key) { return f.contains(Text(key).view()); }, py::arg("key"))
      .def(
          "add_many",
          [](BloomFilter& filter, const py::list& keys) {
            const Texts texts(keys);
            py::array_t<bool> seen(static_cast<py::ssize_t>(texts.raws().size()));
            bool* out = seen.mutable_data();
            const py::gil_scoped_release release;
            Utf8 utf8;
            for (const RawText& raw : texts.raws()) *out++ = filter.add(utf8.assign({&raw, 1})[0]);
            return seen;
          },
          py::arg("keys"))
      .def("num_bits", &BloomFilter::num_bits)
      .def("num_probes", &BloomFilter::num_probes)
      .def("bytes", [](const BloomFilter& filter) { return py::bytes(filter.bytes()); });
}

}  // namespace cs336::text
