// Python face of csrc/cpu/text: strings and bytes in, ids out. The work is done without the GIL.
#include <pybind11/critical_section.h>
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <optional>
#include <span>
#include <unordered_map>
#include <variant>

#include "cpu/text/bpe_encode.h"
#include "cpu/text/bpe_train.h"
#include "cpu/text/interrupt.h"
#include "cpu/text/parallel.h"
#include "cpu/text/pretokenize.h"
#include "cpu/text/special.h"
#include "cpu/text/word_count.h"
#include "text/bindings.h"
#include "text/characters.h"
#include "text/strings.h"

namespace py = pybind11;
using namespace cs336::text;

namespace {

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

// The name of a pattern, or a function from bytes to the list of the ends of its pieces.
using PatternOfPython = std::variant<std::string, py::function>;
Splitter make_splitter(const PatternOfPython& pattern) {
  if (const auto* name = std::get_if<std::string>(&pattern)) {
    if (const auto named = pattern_named(*name)) return Splitter(*named);
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

// An array that owns its memory.
template <class Id>
py::array_t<Id> to_array(Buffer<Id> ids) {
  auto owned = std::make_unique<Buffer<Id>>(std::move(ids));
  const Buffer<Id>& all = *owned;
  const py::capsule owner(owned.get(), [](void* p) { delete static_cast<Buffer<Id>*>(p); });
  owned.release();
  return py::array_t<Id>(static_cast<py::ssize_t>(all.size()), all.data(), owner);
}

class PyEncoder {
 public:
  // ordinary: the ids of the tokens that text may merge to, ascending. specials: text and id; they are among the tokens
  // too. merges: pairs of tokens, the first merge first; none for tiktoken's rule. Raises ValueError for two ids that
  // are the same ordinary token, and for a merge of what are none.
  PyEncoder(const std::vector<std::pair<uint32_t, py::bytes>>& tokens, const std::vector<uint32_t>& ordinary,
            const std::optional<std::vector<std::pair<py::bytes, py::bytes>>>& merges,
            const std::vector<std::tuple<py::bytes, uint32_t, bool, bool>>& specials,
            const std::variant<PatternOfPython, Characters>& pattern) {
    std::vector<std::string> special_texts;
    std::vector<uint32_t> special_ids;
    std::vector<Strips> strips;
    for (const auto& [bytes, id, left, right] : specials) {
      special_texts.emplace_back(bytes);
      special_ids.push_back(id);
      strips.push_back({left, right});
    }
    const auto* const characters = std::get_if<Characters>(&pattern);
    Tokens token_bytes;
    std::unordered_map<std::string_view, uint32_t> id_of;  // of ordinary tokens
    for (const auto& [id, bytes] : tokens) {
      token_bytes.emplace_back(id, bytes);
      if (!std::binary_search(ordinary.begin(), ordinary.end(), id)) continue;
      const auto [known, is_new] = id_of.emplace(std::string_view(bytes), id);
      if (is_new) continue;
      throw py::value_error("ids " + std::to_string(known->second) + " and " + std::to_string(id) +
                            " are the same token " + std::string(py::repr(bytes)));
    }
    const auto find = [&](std::string_view bytes) {
      const auto found = id_of.find(bytes);
      return found == id_of.end() ? kNoId : found->second;
    };
    Alphabet alphabet;
    for (size_t byte = 0; byte < alphabet.byte_ids.size(); ++byte) {
      const auto one = static_cast<char>(byte);
      alphabet.byte_ids[byte] = find({&one, 1});
    }
    if (characters != nullptr) add_characters(*characters, id_of, alphabet);
    std::vector<Merge> merge_list;
    std::string made;
    for (const auto& [left, right] : merges.value_or(std::vector<std::pair<py::bytes, py::bytes>>())) {
      const auto rank = static_cast<uint32_t>(merge_list.size());
      made.assign(std::string_view(left)).append(std::string_view(right));
      merge_list.push_back({find(std::string_view(left)), find(std::string_view(right)), find(made), rank});
      const Merge& merge = merge_list.back();
      if (merge.left != kNoId && merge.right != kNoId && merge.result != kNoId) continue;
      const py::bytes missing = merge.left == kNoId ? left : merge.right == kNoId ? right : py::bytes(made);
      throw py::value_error("merge " + std::to_string(rank) + ", of " + std::string(py::repr(left)) + " and " +
                            std::string(py::repr(right)) + ", needs the token " + std::string(py::repr(missing)) +
                            ", which is not an ordinary token of the vocabulary");
    }
    if (characters != nullptr) tie(characters->tied, merge_list);
    const Splitter splitter = characters != nullptr ? Splitter(joints_of(*characters, token_bytes, ordinary, alphabet))
                                                    : make_splitter(std::get<PatternOfPython>(pattern));
    {
      const Unlocked unlocked;
      core_ =
          std::make_unique<Encoder>(token_bytes, ordinary, alphabet, merge_list, !merges,
                                    SpecialTokens(std::move(special_texts), std::move(strips)), std::move(special_ids),
                                    splitter, characters ? characters->front : FrontSpace{});
    }
    ints_.resize(core_->tokens().size());
    for (const auto& [id, bytes] : tokens) ints_[id] = py::int_(id);
  }

  const Encoder& core() const { return *core_; }

  py::list encode_batch(const py::list& objects, const Policy& policy, size_t num_threads) const {
    return with_id_type<py::list>([&]<class Id>(Id) {
      const Texts texts(objects);
      py::list lists;
      const Unlocked unlocked;
      encode_texts<Id>(texts, policy, kNotFound, num_threads,
                       [&](std::span<const size_t> counts, const std::vector<Buffer<Id>>& parts) {
                         const py::gil_scoped_acquire gil;
                         auto part = parts.begin();
                         size_t done = 0;  // of it
                         for (const size_t count : counts) {
                           py::list list = list_of(count);
                           PyObject** out = PySequence_Fast_ITEMS(list.ptr());
                           for (size_t left = count; left > 0;) {
                             while (done == part->size()) ++part, done = 0;
                             const size_t some = std::min({left, part->size() - done, kGroup});
                             Interrupt::poll();
                             out = to_ints(part->data() + done, some, out);
                             left -= some;
                             done += some;
                           }
                           lists.append(std::move(list));
                         }
                       });
      return lists;
    });
  }

  // The ids, and where each text begins and the last ends.
  py::tuple encode_batch_numpy(const py::list& objects, const Policy& policy, size_t num_threads) const {
    return with_id_type<py::tuple>([&]<class Id>(Id) {
      const Texts texts(objects);
      py::array_t<int64_t> offsets(static_cast<py::ssize_t>(texts.raws().size() + 1));
      int64_t* offset = offsets.mutable_data();
      *offset = 0;
      Buffer<Id> ids = joined<Id>(texts, policy, kNotFound, num_threads, [&](size_t count) {
        offset[1] = offset[0] + static_cast<int64_t>(count);
        ++offset;
      });
      return py::make_tuple(to_array(std::move(ids)), offsets);
    });
  }

  // The ids of texts with the special token `after` behind each, and the bytes of the texts.
  py::tuple encode_documents(const py::list& objects, const Policy& policy, size_t after, size_t num_threads) const {
    return with_id_type<py::tuple>([&]<class Id>(Id) {
      const Texts texts(objects);
      size_t num_bytes = 0;
      Buffer<Id> ids = joined<Id>(texts, policy, after, num_threads, [](size_t) {}, &num_bytes);
      return py::make_tuple(to_array(std::move(ids)), num_bytes);
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
    to_ints(ids.data(), ids.size(), PySequence_Fast_ITEMS(list.ptr()));
    return list;
  }

 private:
  // Writes a new reference to the one Python int of each id, and returns where the next belongs: most of the time of a
  // list would go into making ints. All are made at the start (200,000 in 5 ms), so that threads only read them.
  template <class Id>
  PyObject** to_ints(const Id* ids, size_t count, PyObject** out) const {
    const py::object* const ints = ints_.data();
    for (size_t i = 0; i < count; ++i) *out++ = ints[ids[i]].inc_ref().ptr();
    return out;
  }

  // With an id of the smallest type that holds all.
  template <class Result, class Work>
  Result with_id_type(Work&& work) const {
    return core_->tokens().size() <= 1 << 16 ? Result(work(uint16_t{})) : Result(work(uint32_t{}));
  }

  // The ids of all texts, one after the other. Calls count_of(the number of its ids) for each text.
  template <class Id, class CountOf>
  Buffer<Id> joined(const Texts& texts, const Policy& policy, size_t after, size_t num_threads, CountOf&& count_of,
                    size_t* num_bytes = nullptr) const {
    const Unlocked unlocked;
    Buffer<Id> all;
    all.room(texts.size() / 2);  // seldom more, and what is not used costs nothing
    const size_t bytes = encode_texts<Id>(texts, policy, after, num_threads,
                                          [&](std::span<const size_t> counts, const std::vector<Buffer<Id>>& parts) {
                                            for (const size_t count : counts) count_of(count);
                                            for (const Buffer<Id>& part : parts) {
                                              std::copy_n(part.data(), part.size(), all.room(part.size()));
                                              all.advance(part.size());
                                            }
                                          });
    if (num_bytes != nullptr) *num_bytes = bytes;
    all.shrink();
    return all;
  }

  // Encodes texts in groups, whose UTF-8 and ids stay in a core's cache; a long one is cut for all threads. Calls
  // consume(how many ids each text of a group has, their ids in parts) for one group after the other, from this thread,
  // while others go on. Returns the bytes of all texts.
  template <class Id, class Consume>
  size_t encode_texts(const Texts& texts, const Policy& policy, size_t after, size_t num_threads,
                      Consume&& consume) const {
    struct Group {
      size_t begin = 0, end = 0;  // texts
      std::vector<Buffer<Id>> parts;
      std::atomic<bool> is_ready = false;
    };
    struct alignas(128) Worker {
      Utf8 utf8;
      std::optional<Encoder::Lease> cache;
      size_t num_bytes = 0;  // of all texts that it met
    };
    const std::span<const RawText> raws = texts.raws();
    std::vector<Worker> workers(std::min(num_threads, 1 + texts.size() / kGroup));
    const std::vector<size_t> ends = texts.groups(kGroup);
    std::vector<Group> groups(ends.size());
    for (size_t i = 0; i < ends.size(); ++i) {
      groups[i].begin = i == 0 ? 0 : ends[i - 1];
      groups[i].end = ends[i];
    }
    std::vector<size_t> counts(raws.size());
    std::mutex spare_mutex;
    std::vector<Buffer<Id>> spare;  // memory that was touched before

    const auto is_long = [&](const Group& group) {
      return workers.size() > 1 && group.end - group.begin == 1 && raws[group.begin].size > kLong;
    };
    const auto cache_of = [&](Worker& worker) -> const Encoder::Lease& {
      return worker.cache ? *worker.cache : worker.cache.emplace(*core_);
    };
    const auto read = [&](const Group& group, Worker& worker) {
      const auto views = worker.utf8.assign(raws.subspan(group.begin, group.end - group.begin));
      for (const std::string_view text : views) {
        policy.check(core_->specials(), text);
        worker.num_bytes += text.size();
      }
      return views;
    };
    const auto take_buffer = [&] {
      const std::lock_guard lock(spare_mutex);
      if (spare.empty()) return Buffer<Id>();
      Buffer<Id> buffer = std::move(spare.back());
      spare.pop_back();
      return buffer;
    };
    size_t consumed = 0;
    const auto consume_ready = [&] {
      for (; consumed < groups.size() && groups[consumed].is_ready; ++consumed) {
        Group& group = groups[consumed];
        consume(std::span(counts).subspan(group.begin, group.end - group.begin), group.parts);
        const std::lock_guard lock(spare_mutex);
        for (Buffer<Id>& part : group.parts) {
          part.clear();
          spare.push_back(std::move(part));
        }
        group.parts.clear();
      }
    };

    Team team(workers.size());
    team.run(groups.size(), [&](size_t i, size_t number) {
      Group& group = groups[i];
      Worker& worker = workers[number];
      if (is_long(group)) return;
      Buffer<Id> ids = take_buffer();
      core_->encode_batch(cache_of(worker), read(group, worker), policy.allowed, after, &counts[group.begin], ids);
      group.parts.push_back(std::move(ids));
      group.is_ready = true;
      if (number == 0) consume_ready();
    });
    for (Group& group : groups) {
      if (!is_long(group)) continue;
      const std::string_view text = read(group, workers[0])[0];
      std::vector<Segment> segments;
      cut(text, true, kGroup, core_->splitter(), core_->specials(), policy.allowed, segments);
      if (after != kNotFound) segments.push_back({text.size(), text.size(), after});
      group.parts.resize(segments.size());
      team.run(segments.size(), [&](size_t i, size_t number) {
        Buffer<Id> ids = take_buffer();
        core_->encode_segments(cache_of(workers[number]), text, &segments[i], 1, ids);
        group.parts[i] = std::move(ids);
      });
      for (const Buffer<Id>& part : group.parts) counts[group.begin] += part.size();
      group.is_ready = true;
      consume_ready();
    }
    consume_ready();
    size_t num_bytes = 0;
    for (const Worker& worker : workers) num_bytes += worker.num_bytes;
    return num_bytes;
  }

  // The bytes of ids: an array of integers, or any iterable of what is an integer to Python.
  Buffer<char> decoded(const py::object& object) const {
    const py::scoped_critical_section unchanged(object);
    Buffer<char> bytes;
    const auto decode = [&](const auto* ids, size_t count) {
      const Unlocked unlocked;
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
      if (i % (1 << 20) == 0 && PyErr_CheckSignals() != 0) throw py::error_already_set();
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

  static constexpr size_t kGroup = 256 << 10;  // characters of text that one worker takes at a time
  static constexpr size_t kLong = 4 * kGroup;  // of a text that is worth all workers
  std::unique_ptr<const Encoder> core_;
  std::vector<py::object> ints_;
};

// Text that comes in chunks, from one thread at a time.
class StreamEncoder {
 public:
  // `least`: bytes of text that are worth a call to the encoder. `after`: what the text comes behind.
  StreamEncoder(std::shared_ptr<PyEncoder> encoder, Policy policy, size_t least, After after)
      : encoder_(std::move(encoder)), policy_(std::move(policy)), after_(after), least_(least), wanted_(least) {}

  // The ids that are certain by now; with `last` all that are left.
  py::list feed(py::handle chunk, bool last) {
    const Text text(chunk);
    Buffer<uint32_t> ids;
    {
      const Unlocked unlocked;
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
    if (!segments.empty()) {
      if (segments[0].begin == 0) segments[0].after = after_;
      after_ = segments.back().special == kNotFound ? After::kText : After::kSpecial;
    }
    core.encode_segments(Encoder::Lease(core), pending_, segments.data(), segments.size(), ids);
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
  After after_;         // what is before it
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
  const Unlocked unlocked;
  return train_bpe(counter, num_merges, [&](size_t merges) {
    const py::gil_scoped_acquire gil;
    progress(merges);
  });
}

}  // namespace

// Needs no GIL: what threads can share does not change once it is made, but for the encoder's caches, each of which one
// call has to itself, and streams, which refuse a second thread. A WordCounter never leaves Tokenizer.train.
PYBIND11_MODULE(_text, m, py::mod_gil_not_used()) {
  m.doc() = "The tokenizer core. cs336.tokenizer is its documented face.";

  py::class_<Policy>(m, "Policy")
      .def(py::init<std::vector<bool>, std::vector<bool>>(), py::arg("allowed"), py::arg("forbidden"));

  bind_characters(m);
  py::class_<PyEncoder, std::shared_ptr<PyEncoder>>(m, "Encoder")
      .def(py::init<const std::vector<std::pair<uint32_t, py::bytes>>&, const std::vector<uint32_t>&,
                    const std::optional<std::vector<std::pair<py::bytes, py::bytes>>>&,
                    const std::vector<std::tuple<py::bytes, uint32_t, bool, bool>>&,
                    const std::variant<PatternOfPython, Characters>&>(),
           py::arg("tokens"), py::arg("ordinary"), py::arg("merges"), py::arg("specials"), py::arg("pattern"))
      .def("encode_batch", &PyEncoder::encode_batch, py::arg("texts"), py::arg("policy"), py::arg("num_threads"))
      .def("encode_batch_numpy", &PyEncoder::encode_batch_numpy, py::arg("texts"), py::arg("policy"),
           py::arg("num_threads"))
      .def("encode_documents", &PyEncoder::encode_documents, py::arg("texts"), py::arg("policy"), py::arg("after"),
           py::arg("num_threads"))
      .def("decode", &PyEncoder::decode, py::arg("ids"))
      .def("decode_text", &PyEncoder::decode_text, py::arg("ids"))
      .def("merge_piece", &PyEncoder::merge_piece, py::arg("piece"), py::arg("below"));

  py::enum_<After>(m, "After")
      .value("nothing", After::kNothing)
      .value("special", After::kSpecial)
      .value("text", After::kText);
  py::class_<StreamEncoder>(m, "StreamEncoder")
      .def(py::init<std::shared_ptr<PyEncoder>, Policy, size_t, After>(), py::arg("encoder"), py::arg("policy"),
           py::arg("least"), py::arg("after") = After::kNothing)
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
            const Unlocked unlocked;
            counter.add_documents(Utf8(texts.raws()).views());
          },
          py::arg("documents"))
      .def(
          "add_front",
          [](WordCounter& counter, const py::buffer& buffer) {
            const py::buffer_info info = buffer.request();
            const std::string_view text(static_cast<const char*>(info.ptr),
                                        static_cast<size_t>(info.size * info.itemsize));
            const Unlocked unlocked;
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

  bind_data(m);
}
