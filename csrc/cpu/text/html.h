// HTML to elements and blocks of text, forgiving as browsers are. It follows the standard's rules for implied and
// misplaced tags where they move text; formatting that overlaps (<b><p></b>) is not rebuilt, since no text depends on
// it. Time is linear: below kMaxDepth elements are no longer nested, so that every search of the open ones is bounded.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/text/html_tags.h"

namespace cs336::text {

constexpr size_t kMaxDepth = 256;
constexpr uint32_t kNone = UINT32_MAX;

enum RunStyle : uint8_t { kBold = 1, kItalic = 2, kCode = 4, kPreformatted = 8 };

struct Element {
  Tag tag;
  uint8_t kind;  // of TagKind
  bool hidden;   // it or one above it is marked so
  uint16_t depth;
  uint32_t parent;                            // index; kNone for the root
  std::string_view classes, id, href, start;  // of the source, as written there
};

// Text of one style, in one element.
struct Run {
  std::string_view text;  // of Page::text
  uint32_t element;
  uint32_t link;  // the <a href> that it is in, or kNone
  uint8_t style;
};

// Neighbouring runs that no start or end of a block parts; never blank.
struct Block {
  uint32_t first_run, end_run;
  uint32_t element;  // the innermost block element around it
};

// elements: in the order of their start tags, the first is the root, which is nobody's. Views are of the source, which
// the caller keeps, or of `text`.
struct Page {
  std::vector<Element> elements;
  std::vector<Run> runs;
  std::vector<Block> blocks;
  std::string text;
  std::string title;
};

// utf8: of a whole page, or a part of one. Throws std::invalid_argument from 2 GB on.
Page parse_html(std::string_view utf8);

// Appends text with its character references replaced.
void append_unescaped(std::string_view html, std::string& out);

}  // namespace cs336::text
