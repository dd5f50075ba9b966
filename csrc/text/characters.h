// What Python says of a tokenizer of SentencePiece's kind, and what the encoder is made of for it.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpu/text/bpe_encode.h"
#include "cpu/text/joints.h"
#include "cpu/text/utf8.h"

namespace cs336::text {

// What makes a tokenizer one of SentencePiece's kind: merges begin with characters, and spaces go where it says.
struct Characters {
  std::vector<uint32_t> byte_ids;   // what stands for each byte of a character that is no token, or
  std::optional<uint32_t> unknown;  // for such a character whole, and
  bool fuses_unknown;               // for several of them in a row
  FrontSpace front;
  bool before_spaces;          // a piece ends before each space
  std::vector<uint32_t> tied;  // how many merges in a row are of one rank; or each is of its own
};

// Of tokens that are one character, and of what stands for the others.
inline void add_characters(const Characters& characters, const std::unordered_map<std::string_view, uint32_t>& id_of,
                           Alphabet& alphabet) {
  alphabet.unknown = characters.unknown.value_or(kNoId);
  alphabet.fuses_unknown = characters.fuses_unknown;
  for (size_t byte = 0; byte < alphabet.byte_ids.size(); ++byte) {
    uint32_t& id = alphabet.byte_ids[byte];
    if (byte >= 0x80 || id == kNoId) id = characters.byte_ids.empty() ? alphabet.unknown : characters.byte_ids[byte];
  }
  alphabet.char_ids.resize(1, kNoId);
  for (const auto& [bytes, id] : id_of) {
    const auto* const first = reinterpret_cast<const uint8_t*>(bytes.data());
    const CodePoint c = *first < 0x80 ? CodePoint{*first, 1} : decode_multibyte(first, first + bytes.size());
    if (c.size != bytes.size()) continue;
    alphabet.char_ids.resize(std::max<size_t>(alphabet.char_ids.size(), c.code + 1), kNoId);
    alphabet.char_ids[c.code] = id;
  }
}

// Gives merges the order of their group, and those of one group and result one rank.
inline void tie(const std::vector<uint32_t>& groups, std::vector<Merge>& merges) {
  if (std::accumulate(groups.begin(), groups.end(), size_t{0}) != (groups.empty() ? 0 : merges.size()))
    throw std::invalid_argument("the sizes of tied merges must add up to " + std::to_string(merges.size()));
  auto merge = merges.begin();
  uint32_t rank = 0;
  for (uint32_t order = 0; order < groups.size(); ++order) {
    for (const auto first = merge; merge < first + groups[order]; ++merge) {
      if (merge != first && merge->result != (merge - 1)->result) ++rank;
      merge->rank = rank;
      merge->order = order;
    }
    ++rank;
  }
}

inline std::shared_ptr<const Joints> joints_of(const Characters& characters, const Tokens& tokens,
                                               const std::vector<uint32_t>& ordinary, const Alphabet& alphabet) {
  std::vector<std::string_view> made;
  for (const auto& [id, bytes] : tokens) {
    if (std::binary_search(ordinary.begin(), ordinary.end(), id)) made.emplace_back(bytes);
  }
  std::vector<bool> known;
  if (characters.fuses_unknown && characters.byte_ids.empty()) {
    for (const uint32_t id : alphabet.char_ids) known.push_back(id != kNoId);
  }
  return std::make_shared<const Joints>(made, std::move(known), characters.before_spaces);
}

inline void bind_characters(pybind11::module_& m) {
  namespace py = pybind11;
  py::enum_<Prefix>(m, "Prefix")
      .value("never", Prefix::kNone)
      .value("first", Prefix::kFirst)
      .value("always", Prefix::kEach);
  py::class_<Characters>(m, "Characters")
      .def(py::init([](std::vector<uint32_t> byte_ids, std::optional<uint32_t> unknown, bool fuses_unknown,
                       Prefix prefix, bool doubled, bool before_spaces, std::vector<uint32_t> tied) {
             return Characters{std::move(byte_ids), unknown,       fuses_unknown,
                               {prefix, doubled},   before_spaces, std::move(tied)};
           }),
           py::arg("byte_ids"), py::arg("unknown"), py::arg("fuses_unknown"), py::arg("prefix"), py::arg("doubled"),
           py::arg("before_spaces"), py::arg("tied"));
}

}  // namespace cs336::text
