// Python face of csrc/cpu/text: strings and bytes in, ids out. The work is done without the GIL.
#include <pybind11/critical_section.h>
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <variant>

#include "cpu/text/bpe_encode.h"
#include "cpu/text/bpe_train.h"
#include "cpu/text/pretokenize.h"
#include "cpu/text/special.h"
#include "cpu/text/word_count.h"

namespace py = pybind11;
using namespace cs336::text;

namespace {

// The UTF-8 of a str, or bytes as they are. A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD.
struct Text {
  explicit Text(py::handle object) : owner(py::reinterpret_borrow<py::object>(object)) {
    if (PyUnicode_Check(object.ptr())) {
      Py_ssize_t size;
      const char* data = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
      if (data == nullptr) {
        if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) throw py::error_already_set();
        PyErr_Clear();
        owner = owner.attr("encode")("utf-16", "surrogatepass").attr("decode")("utf-16", "replace").attr("encode")();
        view = {PyBytes_AS_STRING(owner.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(owner.ptr()))};
        return;
      }
      view = {data, static_cast<size_t>(size)};
    } else if (PyBytes_Check(object.ptr())) {
      view = {PyBytes_AS_STRING(object.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(object.ptr()))};
    } else {
      throw py::type_error("expected str or bytes, got " + std::string(Py_TYPE(object.ptr())->tp_name));
    }
  }
  py::object owner;
  std::string_view view;
};

std::vector<Text> texts_of(const py::list& objects) { return std::vector<Text>(objects.begin(), objects.end()); }

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

// The ids of many texts, one after the other.
struct Encoded {
  std::vector<Ids> parts;
  std::vector<size_t> counts;  // of each text

  template <class Id>
  py::array_t<Id> ids() {
    if constexpr (std::is_same_v<Id, uint32_t>) {
      if (parts.size() == 1) {  // hand its memory over
        auto owned = std::make_unique<Ids>(std::move(parts[0]));
        const Ids& all = *owned;
        const py::capsule owner(owned.get(), [](void* p) { delete static_cast<Ids*>(p); });
        owned.release();
        return py::array_t<uint32_t>(static_cast<py::ssize_t>(all.size()), all.data(), owner);
      }
    }
    size_t size = 0;
    for (const Ids& part : parts) size += part.size();
    py::array_t<Id> array(static_cast<py::ssize_t>(size));
    Id* out = array.mutable_data();
    for (Ids& part : parts) {
      out = std::copy_n(part.data(), part.size(), out);
      part = Ids();
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
    const Encoded encoded = encode_texts(objects, policy, num_threads);
    py::list result(encoded.counts.size());
    size_t part = 0, at = 0;
    for (size_t i = 0; i < encoded.counts.size(); ++i) {
      py::list list(encoded.counts[i]);
      for (size_t k = 0; k < encoded.counts[i]; ++k, ++at) {
        while (at == encoded.parts[part].size()) ++part, at = 0;
        PyList_SET_ITEM(list.ptr(), k, to_int(encoded.parts[part].data()[at]));
      }
      PyList_SET_ITEM(result.ptr(), i, list.release().ptr());
    }
    return result;
  }

  py::tuple encode_batch_numpy(const py::list& objects, const Policy& policy, size_t num_threads) const {
    Encoded encoded = encode_texts(objects, policy, num_threads);
    const py::array_t<int64_t> offsets = encoded.offsets();
    if (core_->tokens().size() <= 1 << 16) return py::make_tuple(encoded.ids<uint16_t>(), offsets);
    return py::make_tuple(encoded.ids<uint32_t>(), offsets);
  }

  py::bytes decode(const py::object& object) const {
    const std::vector<uint32_t> ids = ids_of(object);
    const size_t size = core_->decoded_size(ids.data(), ids.size());
    auto bytes = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
    if (!bytes) throw py::error_already_set();
    char* out = PyBytes_AS_STRING(bytes.ptr());
    const py::gil_scoped_release release;
    core_->decode(ids.data(), ids.size(), out, out + size);
    return bytes;
  }

  std::vector<uint32_t> merge_piece(const py::bytes& piece, uint32_t below) const {
    const std::string_view view = piece;
    std::vector<uint32_t> ids(view.size());
    ids.resize(core_->merger().has_bytes(view) ? core_->merger().merge(view, below, ids.data()) : 0);
    return ids;
  }

  py::list to_list(const Ids& ids) const {
    py::list list(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) PyList_SET_ITEM(list.ptr(), i, to_int(ids.data()[i]));
    return list;
  }

 private:
  // A new reference to the one Python int of an id: most of the time of a list would go into making ints. All are made
  // at the start (200,000 in 5 ms), so that threads only read them.
  PyObject* to_int(uint32_t id) const { return ints_[id].inc_ref().ptr(); }

  Encoded encode_texts(const py::list& objects, const Policy& policy, size_t num_threads) const {
    const std::vector<Text> texts(objects.begin(), objects.end());
    std::vector<std::string_view> views;
    for (const Text& text : texts) views.push_back(text.view);
    const py::gil_scoped_release release;
    for (const std::string_view view : views) policy.check(core_->specials(), view);
    Encoded encoded;
    encoded.counts.resize(views.size());
    encoded.parts = core_->encode_batch(views, policy.allowed, num_threads, encoded.counts.data());
    return encoded;
  }

  // From an array of integers, or any iterable of what is an integer to Python.
  std::vector<uint32_t> ids_of(const py::object& object) const {
    const py::scoped_critical_section unchanged(object);
    std::vector<uint32_t> ids;
    const auto add = [&](int64_t id) {
      if (id < 0 || !core_->tokens().contains(static_cast<uint64_t>(id))) core_->refuse(std::to_string(id));
      ids.push_back(static_cast<uint32_t>(id));
    };
    if (py::isinstance<py::array>(object)) {
      const auto array = py::reinterpret_borrow<py::array>(object);
      const char kind = array.dtype().kind();
      if ((kind != 'i' && kind != 'u') || array.ndim() != 1) throw py::type_error("ids must be one row of integers");
      const auto add_all = [&]<class Id>(Id) {
        const auto row = py::array_t<Id, py::array::c_style | py::array::forcecast>::ensure(object);
        if (!row) throw py::error_already_set();
        ids.resize(row.size());
        for (py::ssize_t i = 0; i < row.size(); ++i) {
          const auto id = static_cast<uint64_t>(row.data()[i]);
          if (id > kMaxId) core_->refuse(std::to_string(row.data()[i]));
          ids[i] = static_cast<uint32_t>(id);
        }
      };
      const py::ssize_t size = array.itemsize();
      kind == 'i' ? add_all(int64_t{})
      : size <= 2 ? add_all(uint16_t{})
      : size <= 4 ? add_all(uint32_t{})
                  : add_all(uint64_t{});
      return ids;
    }
    const auto add_object = [&](PyObject* integer) {
      int overflow;
      const long long id = PyLong_AsLongLongAndOverflow(integer, &overflow);
      if (overflow != 0) core_->refuse(py::str(integer));
      add(id);
    };
    const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(object.ptr(), "ids must be integers"));
    if (!items) throw py::error_already_set();
    ids.reserve(PySequence_Fast_GET_SIZE(items.ptr()));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.ptr()); ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(items.ptr(), i);
      if (PyLong_CheckExact(item)) {
        add_object(item);
        continue;
      }
      const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(item));
      if (!index) throw py::error_already_set();
      add_object(index.ptr());
    }
    return ids;
  }

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
    Ids ids;
    {
      const py::gil_scoped_release release;
      const std::unique_lock alone(mutex_, std::try_to_lock);  // not lock: in a fork nobody may be left to unlock it
      if (!alone) throw std::invalid_argument("another thread is at this text: a stream is one thread's at a time");
      pending_.append(text.view);
      if (last || pending_.size() >= wanted_) encode_pending(last, ids);
    }
    return encoder_->to_list(ids);
  }

 private:
  void encode_pending(bool last, Ids& ids) {
    const Encoder& core = encoder_->core();
    policy_.check(core.specials(), pending_);
    std::vector<Segment> segments;
    const size_t done = cut(pending_, last, kNotFound, core.splitter(), core.specials(), policy_.allowed, segments);
    core.encode_segments(pending_, segments.data(), segments.size(), ids);
    pending_.erase(0, done);
    // What is left was looked at in vain: next time with twice as much.
    wanted_ = std::max(least_, 2 * pending_.size());
  }

  std::shared_ptr<PyEncoder> encoder_;
  Policy policy_;
  std::mutex mutex_;
  std::string pending_;
  size_t least_, wanted_;
};

std::vector<size_t> split_all(const std::string& pattern, py::handle object) {
  const Text text(object);
  std::vector<size_t> all;
  make_splitter(pattern).for_each_batch(
      text.view, [&](size_t, const size_t* ends, size_t count) { all.insert(all.end(), ends, ends + count); });
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
      .def("decode", &PyEncoder::decode, py::arg("ids"))
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
            const std::vector<Text> texts = texts_of(objects);
            std::vector<std::string_view> views;
            for (const Text& text : texts) views.push_back(text.view);
            const py::gil_scoped_release release;
            counter.add_documents(views);
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
      [](const std::string& pattern, py::handle text) { return make_splitter(pattern).stable_prefix(Text(text).view); },
      py::arg("pattern"), py::arg("text"), "Where a text may be cut, whatever follows it.");
}
