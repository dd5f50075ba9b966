// Counts of the quality rules for cs336.data.filter.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "cpu/text/ngram_index.h"
#include "cpu/text/ngram_model.h"
#include "cpu/text/parallel.h"
#include "cpu/text/phrases.h"
#include "cpu/text/rules.h"
#include "cpu/text/words.h"
#include "text/bindings.h"
#include "text/strings.h"

namespace cs336::text {
namespace {

template <class Count>
auto counted(py::handle object, Count&& count) {
  const Text text(object);
  const py::gil_scoped_release release;
  return count(text.view());
}

py::dict gopher_quality(py::handle text) {
  const QualityCounts c = counted(text, gopher_quality_counts);
  py::dict counts;
  counts["words"] = c.words;
  counts["plain_words"] = c.plain_words;
  counts["plain_chars"] = c.plain_chars;
  counts["hashes"] = c.hashes;
  counts["ellipses"] = c.ellipses;
  counts["lines"] = c.lines;
  counts["bullet_lines"] = c.bullet_lines;
  counts["ellipsis_lines"] = c.ellipsis_lines;
  counts["letter_words"] = c.letter_words;
  counts["stop_words"] = c.stop_words;
  return counts;
}

py::dict gopher_repetition(py::handle text) {
  const RepetitionCounts c = counted(text, gopher_repetition_counts);
  py::dict counts;
  counts["chars"] = c.chars;
  counts["paragraphs"] = c.paragraphs;
  counts["repeated_paragraphs"] = c.repeated_paragraphs;
  counts["repeated_paragraph_chars"] = c.repeated_paragraph_chars;
  counts["lines"] = c.lines;
  counts["repeated_lines"] = c.repeated_lines;
  counts["repeated_line_chars"] = c.repeated_line_chars;
  const auto name = [](const char* what, size_t n) { return py::str(what + std::to_string(n) + "_gram_chars"); };
  for (size_t i = 0; i < c.kTop; ++i) counts[name("top_", c.kFirstTop + i)] = c.top_chars[i];
  for (size_t i = 0; i < c.kRepeated; ++i) counts[name("repeated_", c.kFirstRepeated + i)] = c.repeated_chars[i];
  return counts;
}

py::dict fineweb(py::handle text) {
  const FineWebCounts c = counted(text, fineweb_counts);
  py::dict counts;
  counts["lines"] = c.lines;
  counts["ended_lines"] = c.ended_lines;
  counts["short_lines"] = c.short_lines;
  counts["chars"] = c.chars;
  counts["repeated_chars"] = c.repeated_chars;
  counts["newlines"] = c.newlines;
  counts["words"] = c.words;
  return counts;
}

py::tuple c4(py::handle text) {
  std::string kept;
  const C4Counts c = counted(text, [&](std::string_view view) { return c4_counts(view, kept); });
  py::dict counts;
  counts["lines"] = c.lines;
  counts["long_word"] = c.long_word;
  counts["no_end"] = c.no_end;
  counts["few_words"] = c.few_words;
  counts["javascript"] = c.javascript;
  counts["policy"] = c.policy;
  counts["kept"] = c.kept;
  counts["sentences"] = c.sentences;
  counts["lorem_ipsum"] = static_cast<int>(c.lorem_ipsum);
  counts["curly_bracket"] = static_cast<int>(c.curly_bracket);
  return py::make_tuple(counts, str_of(kept));
}

std::vector<py::str> words_of(py::handle object) {
  const Text text(object);
  std::vector<Word> words;
  split_words(text.view(), words);
  std::vector<py::str> all;
  for (const Word& word : words) all.push_back(str_of(word.text));
  return all;
}

py::object find_ngram(const NgramIndex& index, py::handle text) {
  const auto match = counted(text, [&](std::string_view view) { return index.find(view); });
  if (!match) return py::none();
  return py::make_tuple(match->count, match->item, str_of(match->ngram));
}

py::tuple find_phrase(const Phrases& phrases, py::handle text, size_t most) {
  const Phrases::Found found = counted(text, [&](std::string_view view) { return phrases.find(view, most); });
  return py::make_tuple(found.count, found.count == 0 ? py::object(py::none()) : py::int_(found.first));
}

void add_texts(NgramModel& model, const py::list& texts) {
  const Texts all(texts);
  const Unlocked unlocked;
  Utf8 utf8;
  for (const RawText& raw : all.raws()) model.add(utf8.assign({&raw, 1})[0]);
}

// (N,) natural logarithms of probabilities, (N,) units.
py::tuple score_texts(const NgramModel& model, const py::list& texts, size_t num_threads) {
  const Texts all(texts);
  py::array_t<double> logs(static_cast<py::ssize_t>(all.raws().size()));
  py::array_t<uint64_t> units(static_cast<py::ssize_t>(all.raws().size()));
  double* log = logs.mutable_data();
  uint64_t* unit = units.mutable_data();
  const std::vector<size_t> ends = all.groups(1 << 16);
  {
    const Unlocked unlocked;
    parallel_for(ends.size(), num_threads, [&](size_t g, size_t) {
      Utf8 utf8;
      for (size_t i = g == 0 ? 0 : ends[g - 1]; i < ends[g]; ++i) {
        const NgramModel::Score score = model.score(utf8.assign(all.raws().subspan(i, 1))[0]);
        log[i] = score.log_probability;
        unit[i] = score.units;
      }
    });
  }
  return py::make_tuple(logs, units);
}

// (N,) keys, (N, 3) counts, sums and distinct; (2 n,) how many n-grams of each order were counted once and twice.
py::tuple ngram_state(const NgramModel& model) {
  const std::vector<NgramModel::Entry> entries = model.entries();
  py::array_t<uint64_t> keys(static_cast<py::ssize_t>(entries.size()));
  py::array_t<uint32_t> counts({entries.size(), size_t{3}});
  uint32_t* count = counts.mutable_data();
  for (size_t i = 0; i < entries.size(); ++i) {
    keys.mutable_data()[i] = entries[i].key;
    *count++ = entries[i].count;
    *count++ = entries[i].sum;
    *count++ = entries[i].distinct;
  }
  return py::make_tuple(keys, counts,
                        py::array_t<uint64_t>(static_cast<py::ssize_t>(model.few().size()), model.few().data()));
}

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void restore_ngrams(NgramModel& model, const Array<uint64_t>& keys, const Array<uint32_t>& counts,
                    const Array<uint64_t>& few) {
  if (counts.size() != keys.size() * 3) throw py::value_error("expected three counts a key");
  std::vector<NgramModel::Entry> entries;
  for (py::ssize_t i = 0; i < keys.size(); ++i) {
    const uint32_t* count = counts.data() + i * 3;
    entries.push_back({keys.data()[i], count[0], count[1], count[2]});
  }
  model.restore(entries, {few.data(), static_cast<size_t>(few.size())});
}

}  // namespace

void bind_filter(py::module_& m) {
  m.def("gopher_quality_counts", &gopher_quality, py::arg("text"));
  m.def("gopher_repetition_counts", &gopher_repetition, py::arg("text"));
  m.def("fineweb_counts", &fineweb, py::arg("text"));
  m.def("c4_counts", &c4, py::arg("text"));
  py::class_<NgramIndex>(m, "NgramIndex")
      .def(py::init<size_t>(), py::arg("n"))
      .def(
          "add", [](NgramIndex& index, py::handle text, uint32_t item) { return index.add(Text(text).view(), item); },
          py::arg("text"), py::arg("item"))
      .def("find", &find_ngram, py::arg("text"), "(how many n-grams, item of the first, that n-gram) or None.")
      .def("__len__", &NgramIndex::size);
  py::class_<NgramModel>(m, "NgramModel")
      .def(py::init([](size_t order, bool words) { return NgramModel(order, words ? Unit::kWord : Unit::kChar); }),
           py::arg("order"), py::arg("words"))
      .def("add", &add_texts, py::arg("texts"))
      .def("score", &score_texts, py::arg("texts"), py::arg("num_threads"))
      .def("state", &ngram_state)
      .def("restore", &restore_ngrams, py::arg("keys"), py::arg("counts"), py::arg("few"))
      .def("__len__", &NgramModel::size);
  py::class_<Phrases>(m, "Phrases")
      .def(py::init(
               [](const std::vector<std::string>& phrases, bool whole_words) { return Phrases(phrases, whole_words); }),
           py::arg("phrases"), py::arg("whole_words"))
      .def("find", &find_phrase, py::arg("text"), py::arg("most"), "(how many, index of the first or None).");
  m.def("rule_words", &words_of, py::arg("text"), "The words that the rules count.");
}

}  // namespace cs336::text
