// Python face of csrc/cpu/text: strings and bytes in, ids out. The work is done without the GIL.
#include <pybind11/critical_section.h>
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <span>
#include <variant>

#include "cpu/text/bpe_encode.h"
#include "cpu/text/bpe_train.h"
#include "cpu/text/pretokenize.h"
#include "cpu/text/special.h"
#include "cpu/text/utf8.h"
#include "cpu/text/word_count.h"

namespace py = pybind11;
using namespace cs336::text;

namespace {

// Text of Python's: the UTF-8 of each str, or bytes as they are. Unlike PyUnicode_AsUTF8 it leaves no copy with the
// str.
class Texts {
 public:
  explicit Texts(const py::list& objects) : Texts(objects, 0, SIZE_MAX) {}
  // As many from `begin` on, one at least, as are not larger than `most` together.
  Texts(const py::list& objects, size_t begin, size_t most) {
    size_t size = 0, converted = 0;
    for (; begin < objects.size(); ++begin) {
      const auto text = py::reinterpret_borrow<py::object>(objects[begin]);
      size += size_of(text);
      if (size > most && !owners_.empty()) break;
      if (!is_utf8(text)) converted += size_of(text);
      owners_.push_back(text);
    }
    utf8_.room(converted + converted / 16);
    for (const py::object& text : owners_) add(text.ptr());
    const char* next = utf8_.data();
    for (std::string_view& view : views_) {
      if (view.data() != nullptr) continue;
      view = {next, view.size()};
      next += view.size();
    }
  }
  std::span<const std::string_view> views() const { return views_; }

  // Characters of a str, or bytes.
  static size_t size_of(py::handle text) {
    if (PyUnicode_Check(text.ptr())) return static_cast<size_t>(PyUnicode_GET_LENGTH(text.ptr()));
    if (PyBytes_Check(text.ptr())) return static_cast<size_t>(PyBytes_GET_SIZE(text.ptr()));
    throw py::type_error("expected str or bytes, got " + std::string(Py_TYPE(text.ptr())->tp_name));
  }

 private:
  static bool is_utf8(py::handle text) { return PyBytes_Check(text.ptr()) || PyUnicode_IS_ASCII(text.ptr()); }
  void add(PyObject* text) {
    if (PyBytes_Check(text)) {
      views_.emplace_back(PyBytes_AS_STRING(text), static_cast<size_t>(PyBytes_GET_SIZE(text)));
      return;
    }
    const auto size = static_cast<size_t>(PyUnicode_GET_LENGTH(text));
    if (PyUnicode_IS_ASCII(text)) {
      views_.emplace_back(reinterpret_cast<const char*>(PyUnicode_1BYTE_DATA(text)), size);
      return;
    }
    const size_t before = utf8_.size();
    switch (PyUnicode_KIND(text)) {
      case PyUnicode_1BYTE_KIND:
        to_utf8(PyUnicode_1BYTE_DATA(text), size, utf8_);
        break;
      case PyUnicode_2BYTE_KIND:
        to_utf8(PyUnicode_2BYTE_DATA(text), size, utf8_);
        break;
      default:
        to_utf8(PyUnicode_4BYTE_DATA(text), size, utf8_);
    }
    views_.emplace_back(nullptr, utf8_.size() - before);
  }

  std::vector<py::object> owners_;
  Buffer<char> utf8_;
  std::vector<std::string_view> views_;
};

class Text {
 public:
  explicit Text(py::handle object) : texts_(list_of(object)) {}
  std::string_view view() const { return texts_.views()[0]; }

 private:
  static py::list list_of(py::handle object) {
    py::list list;
    list.append(object);
    return list;
  }
  Texts texts_;
};

// The str that UTF-8 stands for; bytes that are not valid become U+FFFD.
py::str str_of(std::string_view utf8) {
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

TokenSet token_set(std::vector<bool> has) {
  const bool empty = std::find(has.begin(), has.end(), true) == has.end();
  return {std::move(has), empty};
}

// Which special tokens are recognised, and which must not occur.
struct Policy {
  Policy(std::vector<bool> allowed, std::vector<bool> forbidden)
      : allowed(token_set(std::move(allowed))), forbidden(token_set(std::move(forbidden))) {}

  void check(const SpecialTokens& specials, std::string_view text) const {
    const SpecialMatch match = specials.find(text, 0, forbidden);
    if (match.begin == kNotFound) return;
    throw std::invalid_argument("the text contains the special token " + specials.texts()[match.index] +
                                ", which is not allowed here: pass allowed_special={...} or \"all\" to encode it as "
                                "that token, or disallowed_special=() to encode it as ordinary text");
  }
  TokenSet allowed, forbidden;
};

// "gpt2", "cl100k", "o200k", or a function from bytes to the list of the ends of its pieces.
Splitter make_splitter(const std::variant<std::string, py::function>& pattern) {
  if (const auto* name = std::get_if<std::string>(&pattern)) {
    if (*name == "gpt2") return Splitter(Pattern::kGpt2);
    if (*name == "cl100k") return Splitter(Pattern::kCl100k);
    if (*name == "o200k") return Splitter(Pattern::kO200k);
    throw std::invalid_argument("there is no scanner for the pattern " + *name);
  }
  // Shared, so that copies of the splitter need no GIL; the last one goes with it held.
  std::shared_ptr<py::function> function(new py::function(std::get<py::function>(pattern)), [](py::function* f) {
    const py::gil_scoped_acquire gil;
    delete f;
  });
  return Splitter([function](std::string_view text) {
    const py::gil_scoped_acquire gil;
    return (*function)(py::bytes(text.data(), text.size())).cast<std::vector<size_t>>();
  });
}

// A list to be filled with PyList_SET_ITEM.
py::list list_of(size_t size) {
  py::list list(size);
  advise_huge(PySequence_Fast_ITEMS(list.ptr()), size * sizeof(PyObject*));
  return list;
}

// The ids of many texts, one after the other.
template <class Id>
struct Encoded {
  std::vector<Buffer<Id>> parts;
  std::vector<size_t> counts;  // of each text
  size_t num_bytes = 0;        // of all texts

  py::array_t<Id> ids() {
    if (parts.size() == 1) {  // hand its memory over
      parts[0].shrink();
      auto owned = std::make_unique<Buffer<Id>>(std::move(parts[0]));
      const Buffer<Id>& all = *owned;
      const py::capsule owner(owned.get(), [](void* p) { delete static_cast<Buffer<Id>*>(p); });
      owned.release();
      return py::array_t<Id>(static_cast<py::ssize_t>(all.size()), all.data(), owner);
    }
    size_t size = 0;
    for (const Buffer<Id>& part : parts) size += part.size();
    py::array_t<Id> array(static_cast<py::ssize_t>(size));
    Id* out = array.mutable_data();
    for (Buffer<Id>& part : parts) {
      out = std::copy_n(part.data(), part.size(), out);
      part = Buffer<Id>();
    }
    return array;
  }

  // Where each text begins and the last ends.
  py::array_t<int64_t> offsets() const {
    py::array_t<int64_t> offsets(static_cast<py::ssize_t>(counts.size() + 1));
    int64_t* offset = offsets.mutable_data();
    offset[0] = 0;
    for (size_t i = 0; i < counts.size(); ++i) offset[i + 1] = offset[i] + static_cast<int64_t>(counts[i]);
    return offsets;
  }
};

class PyEncoder {
 public:
  PyEncoder(const std::vector<std::pair<uint32_t, py::bytes>>& tokens,
            const std::vector<std::array<uint32_t, 4>>& merges, bool any_split,
            const std::array<uint32_t, 256>& byte_ids, const std::vector<std::pair<py::bytes, uint32_t>>& specials,
            const std::variant<std::string, py::function>& pattern) {
    std::vector<std::pair<uint32_t, std::string>> token_bytes;
    for (const auto& [id, bytes] : tokens) token_bytes.emplace_back(id, bytes);
    std::vector<std::string> special_texts;
    std::vector<uint32_t> special_ids;
    for (const auto& [bytes, id] : specials) {
      special_texts.emplace_back(bytes);
      special_ids.push_back(id);
    }
    std::vector<Merge> merge_list;
    for (const auto& [left, right, result, rank] : merges) merge_list.push_back({left, right, result, rank});
    const Splitter splitter = make_splitter(pattern);
    {
      const py::gil_scoped_release release;
      core_ = std::make_unique<Encoder>(token_bytes, byte_ids, merge_list, any_split, std::move(special_texts),
                                        std::move(special_ids), splitter);
    }
    ints_.resize(core_->tokens().size());
    for (const auto& [id, bytes] : tokens) ints_[id] = py::int_(id);
  }

  const Encoder& core() const { return *core_; }

  py::list encode_batch(const py::list& objects, const Policy& policy, size_t num_threads) const {
    return with_id_type<py::list>([&]<class Id>(Id) {
      const Encoded<Id> encoded = encode_texts<Id>(objects, policy, num_threads);
      py::list result(encoded.counts.size());
      size_t part = 0, at = 0;
      for (size_t i = 0; i < encoded.counts.size(); ++i) {
        py::list list = list_of(encoded.counts[i]);
        for (size_t k = 0; k < encoded.counts[i]; ++k, ++at) {
          while (at == encoded.parts[part].size()) ++part, at = 0;
          PyList_SET_ITEM(list.ptr(), k, to_int(encoded.parts[part].data()[at]));
        }
        PyList_SET_ITEM(result.ptr(), i, list.release().ptr());
      }
      return result;
    });
  }

  py::tuple encode_batch_numpy(const py::list& objects, const Policy& policy, size_t num_threads) const {
    return with_id_type<py::tuple>([&]<class Id>(Id) {
      Encoded<Id> encoded = encode_texts<Id>(objects, policy, num_threads);
      const py::array_t<int64_t> offsets = encoded.offsets();
      return py::make_tuple(encoded.ids(), offsets);
    });
  }

  // The ids of texts with the special token `after` behind each, and the bytes of the texts.
  py::tuple encode_documents(const py::list& objects, const Policy& policy, size_t after, size_t num_threads) const {
    return with_id_type<py::tuple>([&]<class Id>(Id) {
      Encoded<Id> encoded = encode_texts<Id>(objects, policy, num_threads, after);
      return py::make_tuple(encoded.ids(), encoded.num_bytes);
    });
  }

  py::bytes decode(const py::object& ids) const {
    const Buffer<char> bytes = decoded(ids);
    return py::bytes(bytes.data(), bytes.size());
  }
  py::str decode_text(const py::object& ids) const {
    const Buffer<char> bytes = decoded(ids);
    return str_of({bytes.data(), bytes.size()});
  }

  std::vector<uint32_t> merge_piece(const py::bytes& piece, uint32_t below) const {
    const std::string_view view = piece;
    std::vector<uint32_t> ids(view.size());
    ids.resize(core_->merger().has_bytes(view) ? core_->merger().merge(view, below, ids.data()) : 0);
    return ids;
  }

  py::list to_list(const Buffer<uint32_t>& ids) const {
    py::list list = list_of(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) PyList_SET_ITEM(list.ptr(), i, to_int(ids.data()[i]));
    return list;
  }

 private:
  // A new reference to the one Python int of an id: most of the time of a list would go into making ints. All are made
  // at the start (200,000 in 5 ms), so that threads only read them.
  PyObject* to_int(uint32_t id) const { return ints_[id].inc_ref().ptr(); }

  // With an id of the smallest type that holds all.
  template <class Result, class Work>
  Result with_id_type(Work&& work) const {
    return core_->tokens().size() <= 1 << 16 ? Result(work(uint16_t{})) : Result(work(uint32_t{}));
  }

  template <class Id>
  Encoded<Id> encode_texts(const py::list& objects, const Policy& policy, size_t num_threads,
                           size_t after = kNotFound) const {
    Encoded<Id> encoded;
    encoded.counts.resize(objects.size());
    size_t size = 0;
    for (const py::handle text : objects) size += Texts::size_of(text);
    if (num_threads == 1) encoded.parts.emplace_back().room(size / 2);
    for (size_t done = 0; done < encoded.counts.size();) {
      const Texts texts(objects, done, num_threads == 1 ? kGroup : SIZE_MAX);
      for (const std::string_view text : texts.views()) encoded.num_bytes += text.size();
      const py::gil_scoped_release release;
      for (const std::string_view text : texts.views()) policy.check(core_->specials(), text);
      core_->encode_batch(texts.views(), policy.allowed, after, num_threads, &encoded.counts[done], encoded.parts);
      done += texts.views().size();
    }
    return encoded;
  }

  // The bytes of ids: an array of integers, or any iterable of what is an integer to Python.
  Buffer<char> decoded(const py::object& object) const {
    const py::scoped_critical_section unchanged(object);
    Buffer<char> bytes;
    const auto decode = [&](const auto* ids, size_t count) {
      const py::gil_scoped_release release;
      core_->decode(ids, count, bytes);
    };
    if (PyBytes_Check(object.ptr()) || PyByteArray_Check(object.ptr()))
      throw py::type_error("ids must be integers, got bytes");
    if (!py::isinstance<py::array>(object)) {
      const std::vector<int64_t> ids = ids_of(object);
      decode(ids.data(), ids.size());
      return bytes;
    }
    const auto array = py::reinterpret_borrow<py::array>(object);
    if (array.size() == 0 && array.ndim() == 1) return bytes;  // of no type that counts
    const char kind = array.dtype().kind();
    if ((kind != 'i' && kind != 'u') || array.ndim() != 1) throw py::type_error("ids must be one row of integers");
    const auto decode_as = [&]<class Id>(Id) {
      const auto row = py::array_t<Id, py::array::c_style | py::array::forcecast>::ensure(object);
      if (!row) throw py::error_already_set();
      decode(row.data(), row.size());
    };
    const py::ssize_t size = array.itemsize();
    kind == 'i' ? decode_as(int64_t{})
    : size <= 2 ? decode_as(uint16_t{})
    : size <= 4 ? decode_as(uint32_t{})
                : decode_as(uint64_t{});
    return bytes;
  }

  std::vector<int64_t> ids_of(const py::object& object) const {
    const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(object.ptr(), "ids must be integers"));
    if (!items) throw py::error_already_set();
    std::vector<int64_t> ids;
    ids.reserve(PySequence_Fast_GET_SIZE(items.ptr()));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.ptr()); ++i) {
      const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(items.ptr(), i));
      const auto integer =
          PyLong_CheckExact(item.ptr()) ? item : py::reinterpret_steal<py::object>(PyNumber_Index(item.ptr()));
      if (!integer) throw py::error_already_set();
      int overflow;
      ids.push_back(PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow));
      if (overflow != 0) core_->refuse(py::str(integer));
    }
    return ids;
  }

  static constexpr size_t kGroup = 256 << 10;  // characters of text that are UTF-8 at a time, in the processor's cache
  std::unique_ptr<const Encoder> core_;
  std::vector<py::object> ints_;
};

// Text that comes in chunks, from one thread at a time.
class StreamEncoder {
 public:
  // `least`: bytes of text that are worth a call to the encoder.
  StreamEncoder(std::shared_ptr<PyEncoder> encoder, Policy policy, size_t least)
      : encoder_(std::move(encoder)), policy_(std::move(policy)), least_(least), wanted_(least) {}

  // The ids that are certain by now; with `last` all that are left.
  py::list feed(py::handle chunk, bool last) {
    const Text text(chunk);
    Buffer<uint32_t> ids;
    {
      const py::gil_scoped_release release;
      const std::unique_lock alone(mutex_, std::try_to_lock);  // not lock: in a fork nobody may be left to unlock it
      if (!alone) throw std::invalid_argument("another thread is at this text: a stream is one thread's at a time");
      pending_.append(text.view());
      if (last || pending_.size() >= wanted_) encode_pending(last, ids);
    }
    return encoder_->to_list(ids);
  }

 private:
  void encode_pending(bool last, Buffer<uint32_t>& ids) {
    const Encoder& core = encoder_->core();
    policy_.check(core.specials(), before_ + pending_);
    std::vector<Segment> segments;
    const size_t done = cut(pending_, last, kNotFound, core.splitter(), core.specials(), policy_.allowed, segments);
    core.encode_segments(pending_, segments.data(), segments.size(), ids);
    before_.append(pending_, 0, done);
    before_.erase(0, before_.size() - std::min(before_.size(), core.specials().longest()));
    pending_.erase(0, done);
    // What is left was looked at in vain: next time with twice as much.
    wanted_ = std::max(least_, 2 * pending_.size());
  }

  std::shared_ptr<PyEncoder> encoder_;
  Policy policy_;
  std::mutex mutex_;
  std::string pending_;
  std::string before_;  // the last of what is encoded: a token that must not occur may begin in it
  size_t least_, wanted_;
};

std::vector<size_t> split_all(const std::string& pattern, py::handle object) {
  const Text text(object);
  std::vector<size_t> all;
  make_splitter(pattern).for_each_batch(
      text.view(), [&](size_t, const size_t* ends, size_t count) { all.insert(all.end(), ends, ends + count); });
  return all;
}

std::vector<std::pair<uint32_t, uint32_t>> train(WordCounter& counter, size_t num_merges,
                                                 const std::function<void(size_t)>& progress) {
  const py::gil_scoped_release release;
  return train_bpe(counter, num_merges, [&](size_t merges) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    progress(merges);
  });
}

}  // namespace

// Needs no GIL: what threads can share does not change once it is made, but for the encoder's caches, each of which one
// call has to itself, and streams, which refuse a second thread. A WordCounter never leaves Tokenizer.train.
PYBIND11_MODULE(_text, m, py::mod_gil_not_used()) {
  m.doc() = "The tokenizer core. cs336.tokenizer is its documented face.";
  m.attr("NO_ID") = kNoId;

  py::class_<Policy>(m, "Policy")
      .def(py::init<std::vector<bool>, std::vector<bool>>(), py::arg("allowed"), py::arg("forbidden"));

  py::class_<PyEncoder, std::shared_ptr<PyEncoder>>(m, "Encoder")
      .def(py::init<const std::vector<std::pair<uint32_t, py::bytes>>&, const std::vector<std::array<uint32_t, 4>>&,
                    bool, const std::array<uint32_t, 256>&, const std::vector<std::pair<py::bytes, uint32_t>>&,
                    const std::variant<std::string, py::function>&>(),
           py::arg("tokens"), py::arg("merges"), py::arg("any_split"), py::arg("byte_ids"), py::arg("specials"),
           py::arg("pattern"))
      .def("encode_batch", &PyEncoder::encode_batch, py::arg("texts"), py::arg("policy"), py::arg("num_threads"))
      .def("encode_batch_numpy", &PyEncoder::encode_batch_numpy, py::arg("texts"), py::arg("policy"),
           py::arg("num_threads"))
      .def("encode_documents", &PyEncoder::encode_documents, py::arg("texts"), py::arg("policy"), py::arg("after"),
           py::arg("num_threads"))
      .def("decode", &PyEncoder::decode, py::arg("ids"))
      .def("decode_text", &PyEncoder::decode_text, py::arg("ids"))
      .def("merge_piece", &PyEncoder::merge_piece, py::arg("piece"), py::arg("below"));

  py::class_<StreamEncoder>(m, "StreamEncoder")
      .def(py::init<std::shared_ptr<PyEncoder>, Policy, size_t>(), py::arg("encoder"), py::arg("policy"),
           py::arg("least"))
      .def("feed", &StreamEncoder::feed, py::arg("chunk"), py::arg("last"));

  py::class_<WordCounter>(m, "WordCounter")
      .def(py::init([](const std::variant<std::string, py::function>& pattern, std::vector<std::string> specials,
                       size_t num_threads) {
             return std::make_unique<WordCounter>(make_splitter(pattern), std::move(specials), num_threads);
           }),
           py::arg("pattern"), py::arg("specials"), py::arg("num_threads"))
      .def(
          "add_documents",
          [](WordCounter& counter, const py::list& objects) {
            const Texts texts(objects);
            const py::gil_scoped_release release;
            counter.add_documents(texts.views());
          },
          py::arg("documents"))
      .def(
          "add_front",
          [](WordCounter& counter, const py::buffer& buffer) {
            const py::buffer_info info = buffer.request();
            const std::string_view text(static_cast<const char*>(info.ptr),
                                        static_cast<size_t>(info.size * info.itemsize));
            const py::gil_scoped_release release;
            return counter.add_front(text);
          },
          py::arg("text"))
      .def("train", &train, py::arg("num_merges"), py::arg("progress"));

  m.def("split", &split_all, py::arg("pattern"), py::arg("text"), "The ends of the pieces of a text.");
  m.def(
      "stable_prefix",
      [](const std::string& pattern, py::handle text) {
        return make_splitter(pattern).stable_prefix(Text(text).view());
      },
      py::arg("pattern"), py::arg("text"), "Where a text may be cut, whatever follows it.");
}
