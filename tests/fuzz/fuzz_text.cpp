// Coverage-guided fuzzing of the tokenizer core: vocabulary, special tokens and text all come from the input.
//   clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -Icsrc tests/fuzz/fuzz_text.cpp csrc/cpu/text/*.cpp
//   ./a.out -max_len=1024 -max_total_time=600
#include <cstdio>
#include <cstdlib>
#include <map>
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

template <class Scanner>
std::vector<size_t> scan(std::string_view text) {
  std::vector<size_t> ends;
  const Ptr begin = reinterpret_cast<Ptr>(text.data()), end = begin + text.size();
  for (Ptr p = begin; p < end;) ends.push_back(static_cast<size_t>((p = Scanner::next(p, end)) - begin));
  return ends;
}

std::vector<size_t> scan(Pattern pattern, std::string_view text) {
  if (pattern == Pattern::kGpt2) return scan<Gpt2>(text);
  return pattern == Pattern::kCl100k ? scan<Cl100k>(text) : scan<O200k>(text);
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

// tiktoken's rule, as it is told: a piece that is a token is that token, else merge the pair of the lowest id.
std::vector<uint32_t> naive(const Vocabulary& v, const std::string& piece) {
  if (const auto whole = v.id_of.find(piece); whole != v.id_of.end()) return {whole->second};
  std::vector<std::string> parts;
  for (const char c : piece) parts.emplace_back(1, c);
  for (;;) {
    uint32_t best = kNoId;
    size_t place = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto made = v.id_of.find(parts[i] + parts[i + 1]);
      if (made != v.id_of.end() && made->second < best) best = made->second, place = i;
    }
    if (best == kNoId) break;
    parts[place] += parts[place + 1];
    parts.erase(parts.begin() + static_cast<ptrdiff_t>(place) + 1);
  }
  std::vector<uint32_t> ids;
  for (const std::string& part : parts) ids.push_back(v.id_of.at(part));
  return ids;
}

std::vector<uint32_t> taken(const Buffer<uint32_t>& ids) { return {ids.data(), ids.data() + ids.size()}; }

template <class Id>
std::vector<uint32_t> encode(const Encoder& encoder, std::string_view text, const TokenSet& allowed) {
  size_t count;
  std::vector<Buffer<Id>> parts(1);
  encoder.encode_batch({&text, 1}, allowed, kNotFound, 1, &count, parts);
  require(parts.size() == 1 && count == parts[0].size(), "the ids of one text are all of them");
  return {parts[0].data(), parts[0].data() + count};
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  const auto pattern = static_cast<Pattern>(input.byte() % 3);
  const Vocabulary v = read_vocabulary(input);
  std::vector<std::string> specials;
  for (size_t i = input.byte() % 4; i > 0; --i) {
    const std::string text = input.bytes(1 + input.byte() % 6);
    if (!text.empty() && std::find(specials.begin(), specials.end(), text) == specials.end()) specials.push_back(text);
  }
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
  std::vector<uint32_t> special_ids;
  for (const std::string& special : specials) {
    special_ids.push_back(static_cast<uint32_t>(tokens.size()));
    tokens.emplace_back(special_ids.back(), special);
  }
  const Encoder encoder(tokens, v.byte_ids, {}, true, specials, special_ids, Splitter(pattern));
  const TokenSet none{std::vector<bool>(specials.size(), false), true};
  const TokenSet all{std::vector<bool>(specials.size(), true), specials.empty()};

  std::vector<uint32_t> expected;
  for (size_t i = 0; i < ends.size(); ++i) {
    const size_t begin = i == 0 ? 0 : ends[i - 1];
    for (const uint32_t id : naive(v, text.substr(begin, ends[i] - begin))) expected.push_back(id);
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
    encoder.encode_segments(pending, segments.data(), segments.size(), parts);
    pending = pending.substr(done) + text.substr(seen);
  }
  require(whole == taken(parts), "a text in two parts has the ids of the whole");
  Buffer<char> back;
  encoder.decode(whole.data(), whole.size(), back);
  require(std::string_view(back.data(), back.size()) == text, "ids decode to the text");

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
