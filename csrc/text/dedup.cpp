// Lines, repeated passages, Bloom filters and MinHash for cs336.data.dedup.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cerrno>
#include <optional>
#include <system_error>

#include "cpu/text/bloom.h"
#include "cpu/text/lines.h"
#include "cpu/text/minhash.h"
#include "cpu/text/packing.h"
#include "cpu/text/repeats.h"
#include "cpu/text/shingles.h"
#include "text/bindings.h"
#include "text/strings.h"

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

template <class T>
py::array_t<T> array_of(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple packed(const py::array_t<uint32_t, py::array::c_style>& lengths, uint32_t capacity) {
  const std::span all(lengths.data(), static_cast<size_t>(lengths.size()));
  Packing packing;
  {
    const Unlocked unlocked;
    packing = best_fit(all, capacity);
  }
  return py::make_tuple(array_of(packing.items), array_of(packing.ends));
}

void write_all(int file, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(file, bytes.data(), bytes.size());
    if (written < 0 && errno != EINTR) throw std::system_error(errno, std::generic_category());
    bytes.remove_prefix(static_cast<size_t>(std::max<ssize_t>(written, 0)));
  }
}

// (lines, how many were dropped). drop: one flag a line, or None. file: a descriptor that gets what stays, or None.
py::tuple drop_repeated(LineDedup& dedup, const py::buffer& buffer, bool first, std::optional<Flags> drop,
                        std::optional<int> file) {
  const py::buffer_info info = buffer.request();
  const std::string_view text = view_of(info);
  if (drop && static_cast<size_t>(drop->size()) != count_lines(text)) throw py::value_error("expected one flag a line");
  uint8_t* flags = drop ? drop->mutable_data() : nullptr;
  LineDedup::Write write;
  if (file) write = [&](std::string_view kept) { write_all(*file, kept); };
  LineDedup::Report report;
  try {
    const Unlocked unlocked;
    report = dedup.drop_repeated(text, first, flags, write);
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
  return py::make_tuple(report.lines, report.dropped);
}

// (K, 2) int64: where stretches begin and end. corpus: bytes, or 4-byte tokens.
py::array_t<int64_t> repeats(const py::buffer& buffer, const py::array_t<int64_t, py::array::c_style>& ends,
                             const RepeatSearch& search) {
  const py::buffer_info info = buffer.request();
  const auto size = static_cast<size_t>(info.size);
  const std::span all(ends.data(), static_cast<size_t>(ends.size()));
  std::vector<Stretch> found;
  {
    const Unlocked unlocked;
    found = info.itemsize == 1 ? find_repeats(std::span(static_cast<const uint8_t*>(info.ptr), size), all, search)
                               : find_repeats(std::span(static_cast<const uint32_t*>(info.ptr), size), all, search);
  }
  py::array_t<int64_t> stretches({static_cast<py::ssize_t>(found.size()), py::ssize_t{2}});
  int64_t* out = stretches.mutable_data();
  for (const Stretch& stretch : found) {
    *out++ = stretch.begin;
    *out++ = stretch.end;
  }
  return stretches;
}

}  // namespace

void bind_dedup(py::module_& m) {
  py::class_<MinHash>(m, "MinHash")
      .def(py::init<size_t, uint64_t>(), py::arg("num_hashes"), py::arg("seed"))
      .def("sign", &sign_all, py::arg("texts"), py::arg("ngram"), py::arg("unit"));
  m.def("shingles", &shingle_array, py::arg("text"), py::arg("ngram"), py::arg("unit"));
  m.def("jaccard", &jaccard_of, py::arg("a"), py::arg("b"));
  m.def("normalize", &normalized, py::arg("text"));

  py::class_<LineDedup>(m, "LineDedup")
      .def(py::init<uint64_t, uint64_t, size_t>(), py::arg("part"), py::arg("parts"), py::arg("num_threads"))
      .def(
          "count",
          [](LineDedup& dedup, const py::buffer& buffer) {
            const py::buffer_info info = buffer.request();
            const Unlocked unlocked;
            dedup.count(view_of(info));
          },
          py::arg("text"))
      .def("drop_repeated", &drop_repeated, py::arg("text"), py::arg("first"), py::arg("drop").noconvert(),
           py::arg("file"));
  m.def("count_lines", [](const py::buffer& buffer) { return with_bytes(buffer, count_lines); }, py::arg("text"));
  m.def(
      "repeats",
      [](const py::buffer& corpus, const py::array_t<int64_t, py::array::c_style>& ends, size_t length,
         size_t max_memory, size_t num_threads) { return repeats(corpus, ends, {length, max_memory, num_threads}); },
      py::arg("corpus"), py::arg("ends"), py::arg("length"), py::arg("max_memory"), py::arg("num_threads"));
  m.def("best_fit", &packed, py::arg("lengths"), py::arg("capacity"),
        "(items in the order of the bins, where each bin ends).");

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
