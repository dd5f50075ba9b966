// The tags that matter for text, and how each behaves.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace cs336::text {

// clang-format off
enum class Tag : uint8_t {
  kOther, kA, kAddress, kArticle, kAside, kB, kBlockquote, kBody, kBr, kCaption, kCenter, kCode, kDd, kDiv, kDl, kDt, kEm,
  kFigcaption, kFigure, kFooter, kForm, kH1, kH2, kH3, kH4, kH5, kH6, kHead, kHeader, kHr, kHtml, kI, kLabel, kLi, kMain,
  kNav, kOl, kP, kPre, kSection, kSpan, kStrong, kTable, kTbody, kTd, kTextarea, kTfoot, kTh, kThead, kTitle, kTr, kUl,
  kBlock, kDropped, kRawDropped, kVoid, kCount,
};
// clang-format on

// What a tag does, as bits.
enum TagKind : uint8_t {
  kIsBlock = 1,      // its start and its end part paragraphs
  kClosesP = 2,      // its start ends an open <p>
  kIsVoid = 4,       // it has no end tag
  kIsDropped = 8,    // what is in it is not text for a reader
  kIsRaw = 16,       // no tag but its own end is one until then
  kIsCell = 32,      // a table or a part of one: end tags within do not reach outside
  kIsHeading = 64,   // h1 to h6
  kIsMetadata = 128  // stands in <head>
};

struct TagEntry {
  std::string_view name;
  Tag tag;
  uint8_t kind;
};

// clang-format off
inline constexpr TagEntry kTags[] = {
    {"a", Tag::kA, 0}, {"b", Tag::kB, 0}, {"code", Tag::kCode, 0}, {"em", Tag::kEm, 0}, {"i", Tag::kI, 0},
    {"label", Tag::kLabel, 0}, {"span", Tag::kSpan, 0}, {"strong", Tag::kStrong, 0}, {"kbd", Tag::kCode, 0},
    {"samp", Tag::kCode, 0}, {"tt", Tag::kCode, 0},
    {"address", Tag::kAddress, kIsBlock | kClosesP}, {"article", Tag::kArticle, kIsBlock | kClosesP},
    {"aside", Tag::kAside, kIsBlock | kClosesP}, {"blockquote", Tag::kBlockquote, kIsBlock | kClosesP},
    {"center", Tag::kCenter, kIsBlock | kClosesP}, {"dd", Tag::kDd, kIsBlock | kClosesP},
    {"div", Tag::kDiv, kIsBlock | kClosesP}, {"dl", Tag::kDl, kIsBlock | kClosesP},
    {"dt", Tag::kDt, kIsBlock | kClosesP}, {"figcaption", Tag::kFigcaption, kIsBlock | kClosesP},
    {"figure", Tag::kFigure, kIsBlock | kClosesP}, {"footer", Tag::kFooter, kIsBlock | kClosesP},
    {"form", Tag::kForm, kIsBlock | kClosesP}, {"header", Tag::kHeader, kIsBlock | kClosesP},
    {"h1", Tag::kH1, kIsBlock | kClosesP | kIsHeading}, {"h2", Tag::kH2, kIsBlock | kClosesP | kIsHeading},
    {"h3", Tag::kH3, kIsBlock | kClosesP | kIsHeading}, {"h4", Tag::kH4, kIsBlock | kClosesP | kIsHeading},
    {"h5", Tag::kH5, kIsBlock | kClosesP | kIsHeading}, {"h6", Tag::kH6, kIsBlock | kClosesP | kIsHeading},
    {"hr", Tag::kHr, kIsBlock | kClosesP | kIsVoid}, {"li", Tag::kLi, kIsBlock | kClosesP},
    {"main", Tag::kMain, kIsBlock | kClosesP}, {"nav", Tag::kNav, kIsBlock | kClosesP},
    {"ol", Tag::kOl, kIsBlock | kClosesP}, {"p", Tag::kP, kIsBlock | kClosesP}, {"pre", Tag::kPre, kIsBlock | kClosesP},
    {"listing", Tag::kPre, kIsBlock | kClosesP}, {"section", Tag::kSection, kIsBlock | kClosesP},
    {"ul", Tag::kUl, kIsBlock | kClosesP}, {"dir", Tag::kUl, kIsBlock | kClosesP},
    {"menu", Tag::kUl, kIsBlock | kClosesP}, {"body", Tag::kBody, kIsBlock}, {"html", Tag::kHtml, kIsBlock},
    {"details", Tag::kBlock, kIsBlock | kClosesP}, {"summary", Tag::kBlock, kIsBlock | kClosesP},
    {"dialog", Tag::kBlock, kIsBlock | kClosesP}, {"fieldset", Tag::kBlock, kIsBlock | kClosesP},
    {"hgroup", Tag::kBlock, kIsBlock | kClosesP}, {"search", Tag::kBlock, kIsBlock | kClosesP},
    {"legend", Tag::kBlock, kIsBlock}, {"frameset", Tag::kBlock, kIsBlock}, {"noframes", Tag::kRawDropped, kIsDropped | kIsRaw},
    {"table", Tag::kTable, kIsBlock | kClosesP | kIsCell}, {"caption", Tag::kCaption, kIsBlock | kIsCell},
    {"tbody", Tag::kTbody, kIsBlock | kIsCell}, {"thead", Tag::kThead, kIsBlock | kIsCell},
    {"tfoot", Tag::kTfoot, kIsBlock | kIsCell}, {"tr", Tag::kTr, kIsBlock | kIsCell},
    {"td", Tag::kTd, kIsBlock | kIsCell}, {"th", Tag::kTh, kIsBlock | kIsCell}, {"br", Tag::kBr, kIsVoid},
    {"img", Tag::kVoid, kIsVoid}, {"input", Tag::kVoid, kIsVoid}, {"wbr", Tag::kVoid, kIsVoid},
    {"area", Tag::kVoid, kIsVoid}, {"col", Tag::kVoid, kIsVoid}, {"embed", Tag::kVoid, kIsVoid},
    {"source", Tag::kVoid, kIsVoid}, {"track", Tag::kVoid, kIsVoid}, {"param", Tag::kVoid, kIsVoid},
    {"frame", Tag::kVoid, kIsVoid}, {"base", Tag::kVoid, kIsVoid | kIsMetadata},
    {"link", Tag::kVoid, kIsVoid | kIsMetadata}, {"meta", Tag::kVoid, kIsVoid | kIsMetadata},
    {"head", Tag::kHead, kIsMetadata}, {"title", Tag::kTitle, kIsRaw | kIsMetadata},
    {"script", Tag::kRawDropped, kIsDropped | kIsRaw | kIsMetadata},
    {"style", Tag::kRawDropped, kIsDropped | kIsRaw | kIsMetadata}, {"iframe", Tag::kRawDropped, kIsDropped | kIsRaw},
    {"noembed", Tag::kRawDropped, kIsDropped | kIsRaw}, {"textarea", Tag::kTextarea, kIsDropped | kIsRaw},
    {"noscript", Tag::kDropped, kIsDropped | kIsMetadata}, {"template", Tag::kDropped, kIsDropped | kIsMetadata},
    {"select", Tag::kDropped, kIsDropped}, {"svg", Tag::kDropped, kIsDropped}, {"canvas", Tag::kDropped, kIsDropped},
    {"audio", Tag::kDropped, kIsDropped}, {"video", Tag::kDropped, kIsDropped}, {"datalist", Tag::kDropped, kIsDropped},
    {"annotation", Tag::kDropped, kIsDropped}, {"object", Tag::kDropped, kIsDropped},
};
// clang-format on

// Lower-case names by their first eight bytes, in a table that the linear search seldom leaves.
class TagTable {
 public:
  TagTable() {
    for (const TagEntry& entry : kTags) {
      size_t at = place(key(entry.name));
      while (entries_[at] != nullptr) at = (at + 1) % kSize;
      entries_[at] = &entry;
    }
  }
  // name: in lower case. An unknown tag is inline.
  const TagEntry& find(std::string_view name) const {
    static constexpr TagEntry kUnknown{"", Tag::kOther, 0};
    for (size_t at = place(key(name)); entries_[at] != nullptr; at = (at + 1) % kSize) {
      if (entries_[at]->name == name) return *entries_[at];
    }
    return kUnknown;
  }

 private:
  static constexpr size_t kSize = 512;
  static uint64_t key(std::string_view name) {
    uint64_t key = name.size();
    for (size_t i = 0; i < name.size() && i < 8; ++i) key = key << 7 ^ static_cast<uint8_t>(name[i]);
    return key;
  }
  static size_t place(uint64_t key) { return (key * 0x9E3779B97F4A7C15u) >> 55; }
  std::array<const TagEntry*, kSize> entries_{};
};

}  // namespace cs336::text
