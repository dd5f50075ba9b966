// Python face of csrc/cpu/text: strings and bytes in, ids out. The work is done without the GIL.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <variant>

#include "cpu/text/bpe_encode.h"
#include "cpu/text/bpe_train.h"
#include "cpu/text/parallel.h"
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

py::list to_list(const uint32_t* ids, size_t count) {
  py::list list(count);
  for (size_t i = 0; i < count; ++i) PyList_SET_ITEM(list.ptr(), i, PyLong_FromUnsignedLong(ids[i]));
  return list;
}

py::list encode(const Encoder& encoder, py::handle object, const Policy& policy, size_t num_threads) {
  const Text text(object);
  Ids ids;
  {
    const py::gil_scoped_release release;
    policy.check(encoder.specials(), text.view);
    encoder.encode(text.view, policy.allowed, ids, num_threads);
  }
  return to_list(ids.data(), ids.size());
}

std::vector<Ids> encode_texts(const Encoder& encoder, const std::vector<Text>& texts, const Policy& policy,
                              size_t num_threads) {
  const py::gil_scoped_release release;
  std::vector<Ids> ids(texts.size());
  if (texts.size() < num_threads) {  // a few long ones
    for (size_t i = 0; i < texts.size(); ++i) {
      policy.check(encoder.specials(), texts[i].view);
      encoder.encode(texts[i].view, policy.allowed, ids[i], num_threads);
    }
    return ids;
  }
  parallel_for(texts.size(), num_threads, [&](size_t i, size_t) {
    policy.check(encoder.specials(), texts[i].view);
    encoder.encode(texts[i].view, policy.allowed, ids[i]);
  });
  return ids;
}

py::list encode_batch(const Encoder& encoder, const py::list& objects, const Policy& policy, size_t num_threads) {
  const std::vector<Ids> ids = encode_texts(encoder, texts_of(objects), policy, num_threads);
  py::list result(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    PyList_SET_ITEM(result.ptr(), i, to_list(ids[i].data(), ids[i].size()).release().ptr());
  }
  return result;
}

template <class Id>
py::tuple concatenate(const std::vector<Ids>& parts) {
  py::array_t<int64_t> offsets(parts.size() + 1);
  int64_t* offset = offsets.mutable_data();
  offset[0] = 0;
  for (size_t i = 0; i < parts.size(); ++i) offset[i + 1] = offset[i] + static_cast<int64_t>(parts[i].size());
  py::array_t<Id> ids(offset[parts.size()]);
  Id* out = ids.mutable_data();
  for (const Ids& part : parts) out = std::copy_n(part.data(), part.size(), out);
  return py::make_tuple(ids, offsets);
}

py::tuple encode_batch_numpy(const Encoder& encoder, const py::list& objects, const Policy& policy,
                             size_t num_threads) {
  const std::vector<Ids> ids = encode_texts(encoder, texts_of(objects), policy, num_threads);
  return encoder.tokens().size() <= 1 << 16 ? concatenate<uint16_t>(ids) : concatenate<uint32_t>(ids);
}

// The bytes of ids from any iterable of integers, arrays of numpy included.
py::bytes decode(const Encoder& encoder, const py::object& object) {
  std::vector<uint32_t> ids;
  const auto add = [&](auto id) {
    if (id < 0 || static_cast<uint64_t>(id) >= kNoId) {
      throw std::invalid_argument("id " + std::to_string(id) + " is not in the vocabulary, whose ids are below " +
                                  std::to_string(encoder.tokens().size()));
    }
    ids.push_back(static_cast<uint32_t>(id));
  };
  if (PyList_Check(object.ptr()) || PyTuple_Check(object.ptr())) {
    ids.reserve(py::len(object));
  }
  for (const py::handle item : object) {
    const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(item.ptr()));
    if (!index) throw py::error_already_set();
    int overflow;
    const long long id = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    add(overflow != 0 ? -1LL : id);
  }
  std::string bytes;
  {
    const py::gil_scoped_release release;
    encoder.decode(ids.data(), ids.size(), bytes);
  }
  return {bytes.data(), bytes.size()};
}

// Text that comes in chunks.
class StreamEncoder {
 public:
  // `least`: bytes of text that are worth a call to the encoder.
  StreamEncoder(std::shared_ptr<Encoder> encoder, Policy policy, size_t least)
      : encoder_(std::move(encoder)), policy_(std::move(policy)), least_(least), wanted_(least) {}

  // The ids that are certain by now; with `last` all that are left.
  py::list feed(py::handle chunk, bool last) {
    const Text text(chunk);
    Ids ids;
    {
      const py::gil_scoped_release release;
      pending_.append(text.view);
      if (last || pending_.size() >= wanted_) encode_pending(last, ids);
    }
    return to_list(ids.data(), ids.size());
  }

 private:
  void encode_pending(bool last, Ids& ids) {
    policy_.check(encoder_->specials(), pending_);
    std::vector<Segment> segments;
    const size_t done =
        cut(pending_, last, kNotFound, encoder_->splitter(), encoder_->specials(), policy_.allowed, segments);
    encoder_->encode_segments(pending_, segments.data(), segments.size(), ids);
    pending_.erase(0, done);
    wanted_ =
        std::max(least_, 2 * pending_.size());  // what is left was looked at in vain: next time with twice as much
  }

  std::shared_ptr<Encoder> encoder_;
  Policy policy_;
  std::string pending_;
  size_t least_, wanted_;
};

std::shared_ptr<Encoder> make_encoder(const std::vector<std::pair<uint32_t, py::bytes>>& tokens,
                                      const std::vector<std::array<uint32_t, 4>>& merges, bool any_split,
                                      const std::array<uint32_t, 256>& byte_ids,
                                      const std::vector<std::pair<py::bytes, uint32_t>>& specials,
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
  const py::gil_scoped_release release;
  return std::make_shared<Encoder>(token_bytes, byte_ids, merge_list, any_split, special_texts, special_ids, splitter);
}

std::vector<size_t> split_all(const std::string& pattern, py::handle object) {
  const Text text(object);
  std::vector<size_t> all;
  make_splitter(pattern).for_each_batch(
      text.view, [&](size_t, const size_t* ends, size_t count) { all.insert(all.end(), ends, ends + count); });
  return all;
}

std::vector<std::pair<uint32_t, uint32_t>> train(const WordCounter& counter, size_t num_merges,
                                                 const std::function<void(size_t)>& progress) {
  const py::gil_scoped_release release;
  return train_bpe(counter.sorted(), num_merges, [&](size_t merges) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    progress(merges);
  });
}

}  // namespace

PYBIND11_MODULE(_text, m) {
  m.doc() = "The tokenizer core. cs336.tokenizer is its documented face.";
  m.attr("NO_ID") = kNoId;

  py::class_<Policy>(m, "Policy")
      .def(py::init<std::vector<bool>, std::vector<bool>>(), py::arg("allowed"), py::arg("forbidden"));

  py::class_<Encoder, std::shared_ptr<Encoder>>(m, "Encoder")
      .def(py::init(&make_encoder), py::arg("tokens"), py::arg("merges"), py::arg("any_split"), py::arg("byte_ids"),
           py::arg("specials"), py::arg("pattern"))
      .def("encode", &encode, py::arg("text"), py::arg("policy"), py::arg("num_threads"))
      .def("encode_batch", &encode_batch, py::arg("texts"), py::arg("policy"), py::arg("num_threads"))
      .def("encode_batch_numpy", &encode_batch_numpy, py::arg("texts"), py::arg("policy"), py::arg("num_threads"))
      .def("decode", &decode, py::arg("ids"))
      .def(
          "merge_piece",
          [](const Encoder& encoder, const py::bytes& piece, uint32_t below) {
            const std::string_view view = piece;
            std::vector<uint32_t> ids(view.size());
            ids.resize(encoder.has_bytes(view) ? encoder.merge_piece(view, below, ids.data()) : 0);
            return ids;
          },
          py::arg("piece"), py::arg("below"));

  py::class_<StreamEncoder>(m, "StreamEncoder")
      .def(py::init<std::shared_ptr<Encoder>, Policy, size_t>(), py::arg("encoder"), py::arg("policy"),
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
          [](WordCounter& counter, py::handle object) {
            const Text text(object);
            const py::gil_scoped_release release;
            return counter.add_front(text.view);
          },
          py::arg("text"))
      .def("train", &train, py::arg("num_merges"), py::arg("progress"));

  m.def("split", &split_all, py::arg("pattern"), py::arg("text"), "The ends of the pieces of a text.");
  m.def(
      "stable_prefix",
      [](const std::string& pattern, py::handle text) { return make_splitter(pattern).stable_prefix(Text(text).view); },
      py::arg("pattern"), py::arg("text"), "Where a text may be cut, whatever follows it.");
}
