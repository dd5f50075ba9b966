// Coverage-guided fuzzing of the tokenizer core: vocabulary, special tokens and text all come from the input.
//   clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -Icsrc tests/fuzz/fuzz_text.cpp csrc/cpu/text/*.cpp
//   ./a.out -max_len=1024 -max_total_time=600
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <set>
#include <stdexcept>

#include "cpu/text/bpe_encode.h"
#include "cpu/text/pretokenize.h"
#include "cpu/text/scanners.h"
#include "cpu/text/utf8.h"

using namespace cs336::text;

namespace {

void require(bool truth, const char* what) {
  if (truth) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::abort();
}

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(reinterpret_cast<const char*>(data), size) {}
  uint8_t byte() {
    if (data_.empty()) return 0;
    const auto first = static_cast<uint8_t>(data_[0]);
    data_.remove_prefix(1);
    return first;
  }
  std::string bytes(size_t size) {
    const std::string taken(data_.substr(0, size));
    data_.remove_prefix(taken.size());
    return taken;
  }
  std::string rest() { return bytes(data_.size()); }

 private:
  std::string_view data_;
};

std::vector<size_t> scan(Pattern pattern, std::string_view text) {
  std::vector<size_t> ends;
  const Ptr begin = reinterpret_cast<Ptr>(text.data()), end = begin + text.size();
  with_scanner(pattern, [&](auto scanner) {
    for (Ptr p = begin; p < end;) ends.push_back(static_cast<size_t>((p = scanner.next(p, end)) - begin));
  });
  return ends;
}

std::vector<size_t> pieces(Pattern pattern, std::string_view text) {
  std::vector<size_t> all;
  Splitter(pattern).for_each_batch(
      text, [&](size_t, const size_t* ends, size_t count) { all.insert(all.end(), ends, ends + count); });
  return all;
}

struct Vocabulary {
  std::vector<std::pair<uint32_t, std::string>> tokens;
  std::array<uint32_t, 256> byte_ids;
  std::map<std::string, uint32_t> id_of;
};

// Every byte, then tokens of any bytes.
Vocabulary read_vocabulary(Input& input) {
  Vocabulary v;
  const auto add = [&](const std::string& bytes) {
    if (!v.id_of.emplace(bytes, v.tokens.size()).second) return;
    v.tokens.emplace_back(static_cast<uint32_t>(v.tokens.size()), bytes);
  };
  for (size_t i = input.byte() % 24; i > 0; --i) {
    const std::string bytes = input.bytes(2 + input.byte() % 18);
    if (bytes.size() > 1) add(bytes);
  }
  for (int byte = 0; byte < 256; ++byte) {
    const std::string one(1, static_cast<char>(byte));
    add(one);
    v.byte_ids[byte] = v.id_of[one];
  }
  return v;
}

// Merges of two tokens that together are one, no two of them the same, in any order; none for tiktoken's rule.
std::vector<Merge> read_merges(Input& input, const Vocabulary& v) {
  std::vector<Merge> merges;
  std::set<std::pair<uint32_t, uint32_t>> seen;
  for (size_t i = input.byte() % 32; i > 0; --i) {
    const auto& [id, bytes] = v.tokens[input.byte() % v.tokens.size()];
    const size_t at = 1 + input.byte() % bytes.size();
    const auto left = v.id_of.find(bytes.substr(0, at)), right = v.id_of.find(bytes.substr(at));
    if (left == v.id_of.end() || right == v.id_of.end() || !seen.emplace(left->second, right->second).second) continue;
    merges.push_back({left->second, right->second, id, static_cast<uint32_t>(merges.size())});
  }
  return merges;
}

// Merges the pair of the lowest rank until there is none. Without merges by tiktoken's rule, as it is told: a piece
// that is a token is that token, and the rank of a pair is the id of what it makes.
std::vector<uint32_t> naive(const Vocabulary& v, const std::vector<Merge>& merges, const std::string& piece) {
  if (const auto whole = v.id_of.find(piece); merges.empty() && whole != v.id_of.end()) return {whole->second};
  std::vector<std::string> parts;
  for (const char c : piece) parts.emplace_back(1, c);
  const auto rank_of = [&](const std::string& left, const std::string& right) {
    const auto made = v.id_of.find(left + right);
    if (merges.empty() || made == v.id_of.end()) return made == v.id_of.end() ? kNoRank : made->second;
    const auto listed = std::find_if(merges.begin(), merges.end(), [&](const Merge& m) {
      return m.left == v.id_of.at(left) && m.right == v.id_of.at(right);
    });
    return listed == merges.end() ? kNoRank : listed->rank;
  };
  for (;;) {
    uint32_t best = kNoRank;
    size_t place = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const uint32_t rank = rank_of(parts[i], parts[i + 1]);
      if (rank < best) best = rank, place = i;
    }
    if (best == kNoRank) break;
    parts[place] += parts[place + 1];
    parts.erase(parts.begin() + static_cast<ptrdiff_t>(place) + 1);
  }
  std::vector<uint32_t> ids;
  for (const std::string& part : parts) ids.push_back(v.id_of.at(part));
  return ids;
}

std::vector<uint32_t> taken(const Buffer<uint32_t>& ids) { return {ids.data(), ids.data() + ids.size()}; }

template <class Id>
std::vector<std::vector<uint32_t>> encode(const Encoder& encoder, const std::vector<std::string_view>& texts,
                                          const TokenSet& allowed) {
  std::vector<size_t> counts(texts.size());
  Buffer<Id> flat;
  encoder.encode_batch(Encoder::Lease(encoder), texts, allowed, kNotFound, counts.data(), flat);
  std::vector<std::vector<uint32_t>> ids;
  const Id *next = flat.data(), *end = next + flat.size();
  for (const size_t count : counts) {
    require(count <= static_cast<size_t>(end - next), "no more ids are counted than there are");
    ids.emplace_back(next, next + count);
    next += count;
  }
  require(next == end, "the ids of the texts are all of them");
  return ids;
}

template <class Id>
std::vector<uint32_t> encode(const Encoder& encoder, std::string_view text, const TokenSet& allowed) {
  return encode<Id>(encoder, std::vector{text}, allowed)[0];
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  const auto pattern = static_cast<Pattern>(input.byte() % std::size(kPatternNames));
  const Vocabulary v = read_vocabulary(input);
  std::vector<std::string> specials;
  for (size_t i = input.byte() % 4; i > 0; --i) {
    const std::string text = input.bytes(1 + input.byte() % 6);
    if (!text.empty() && std::find(specials.begin(), specials.end(), text) == specials.end()) specials.push_back(text);
  }
  const std::vector<Merge> merges = read_merges(input, v);
  const size_t cut_at = input.byte();
  const std::string text = input.rest();

  // The masks and the scanner that goes one piece at a time agree, and a stable prefix is one.
  const std::vector<size_t> ends = pieces(pattern, text);
  require(ends == scan(pattern, text), "pieces by masks are those of the scanner");
  const size_t seen = text.empty() ? 0 : cut_at % (text.size() + 1);
  const size_t stable = stable_prefix(pattern, std::string_view(text).substr(0, seen));
  require(stable <= seen, "a stable prefix is a prefix");
  require(stable == 0 || std::binary_search(ends.begin(), ends.end(), stable), "pieces end at a stable prefix");

  auto tokens = v.tokens;
  std::vector<uint32_t> ordinary(tokens.size());
  std::iota(ordinary.begin(), ordinary.end(), 0);
  std::vector<uint32_t> special_ids;
  for (const std::string& special : specials) {
    special_ids.push_back(static_cast<uint32_t>(tokens.size()));
    tokens.emplace_back(special_ids.back(), special);
  }
  const Encoder encoder(tokens, ordinary, {v.byte_ids, {}}, merges, merges.empty(), SpecialTokens(specials),
                        special_ids, Splitter(pattern));
  const TokenSet none{std::vector<bool>(specials.size(), false), true};
  const TokenSet all{std::vector<bool>(specials.size(), true), specials.empty()};

  std::vector<uint32_t> expected;
  for (size_t i = 0; i < ends.size(); ++i) {
    const size_t begin = i == 0 ? 0 : ends[i - 1];
    for (const uint32_t id : naive(v, merges, text.substr(begin, ends[i] - begin))) expected.push_back(id);
  }
  for (int pass = 0; pass < 2; ++pass) {  // the second time out of the cache
    require(encode<uint32_t>(encoder, text, none) == expected, "ids are those of the naive encoder");
  }

  // With special tokens: the same in two parts as in one, and back to the text.
  const std::vector<uint32_t> whole = encode<uint32_t>(encoder, text, all);
  Buffer<uint32_t> parts;
  std::string pending = text.substr(0, seen);
  for (const bool last : {false, true}) {
    std::vector<Segment> segments;
    const size_t done = cut(pending, last, kNotFound, encoder.splitter(), encoder.specials(), all, segments);
    encoder.encode_segments(Encoder::Lease(encoder), pending, segments.data(), segments.size(), parts);
    pending = pending.substr(done) + text.substr(seen);
  }
  require(whole == taken(parts), "a text in two parts has the ids of the whole");
  Buffer<char> back;
  encoder.decode(whole.data(), whole.size(), back);
  require(std::string_view(back.data(), back.size()) == text, "ids decode to the text");

  // Several texts at once have the ids of each.
  const std::string_view view = text, front = view.substr(0, seen);
  const auto several = encode<uint32_t>(encoder, std::vector<std::string_view>{front, "", view}, all);
  require(several[0] == encode<uint32_t>(encoder, front, all), "the first of several texts has its ids");
  require(several[1].empty() && several[2] == whole, "texts keep their ids behind others");

  // Narrow ids are the same, and so is text that goes through code points.
  require(encode<uint16_t>(encoder, text, all) == whole, "ids of 16 bits are those of 32");
  const Extent extent = extent_of(text);
  std::vector<uint32_t> codes(extent.size);
  if (from_utf8(text, extent, codes.data())) {
    Buffer<char> again;
    to_utf8(codes.data(), codes.size(), again);
    require(std::string_view(again.data(), again.size()) == text, "UTF-8 comes back from its code points");
  }
  return 0;
}
