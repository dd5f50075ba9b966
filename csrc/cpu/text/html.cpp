#include "cpu/text/html.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

namespace cs336::text {
namespace {

const TagTable kTagTable;
using TagSet = uint64_t;
static_assert(static_cast<size_t>(Tag::kCount) <= 64);

constexpr TagSet set_of(std::initializer_list<Tag> tags) {
  TagSet set = 0;
  for (const Tag tag : tags) set |= TagSet{1} << static_cast<int>(tag);
  return set;
}
constexpr bool has(TagSet set, Tag tag) { return set >> static_cast<int>(tag) & 1; }

constexpr TagSet kRows = set_of({Tag::kTbody, Tag::kThead, Tag::kTfoot, Tag::kTr, Tag::kTd, Tag::kTh, Tag::kCaption});
constexpr TagSet kCells = set_of({Tag::kTd, Tag::kTh, Tag::kCaption});
constexpr TagSet kScope = set_of({Tag::kTable, Tag::kTd, Tag::kTh, Tag::kCaption});
constexpr TagSet kListScope =
    kScope | set_of({Tag::kUl, Tag::kOl, Tag::kDl, Tag::kSection, Tag::kArticle, Tag::kBlockquote});

constexpr bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r' || c == '\f'; }
constexpr char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 32) : c; }

bool equal_lower(std::string_view text, std::string_view lower_text) {
  return text.size() == lower_text.size() &&
         std::equal(text.begin(), text.end(), lower_text.begin(), [](char a, char b) { return lower(a) == b; });
}

// style="display: none" and the like.
bool hides(std::string_view style) {
  std::string tight;
  for (const char c : style) {
    if (!is_space(c)) tight += lower(c);
  }
  return tight.find("display:none") != tight.npos || tight.find("visibility:hidden") != tight.npos;
}

struct Attributes {
  std::string_view classes, id, href, start;
  bool hidden = false;
};

class Parser {
 public:
  explicit Parser(std::string_view html) : html_(html) {
    if (html.size() > INT32_MAX)
      throw std::invalid_argument("a page of 2 GB or more: expected at most 2147483647 bytes");
    // Views of the text must not move. No reference stands for more than 6 bytes out of 5.
    page_.text.reserve(html.size() + html.size() / 4 + 16);
    push(Tag::kOther, 0, {});
    if (html.starts_with("\xEF\xBB\xBF")) at_ = 3;  // a byte order mark
  }

  Page parse() {
    while (at_ < html_.size()) {
      const size_t tag = std::min(html_.find('<', at_), html_.size());
      if (tag > at_) add_text(html_.substr(at_, tag - at_));
      at_ = tag;
      if (at_ < html_.size()) read_markup();
    }
    end_block();
    return std::move(page_);
  }

 private:
  char peek(size_t ahead) const { return at_ + ahead < html_.size() ? html_[at_ + ahead] : '\0'; }

  // At a "<".
  void read_markup() {
    const char next = lower(peek(1));
    if (next >= 'a' && next <= 'z') return read_start_tag();
    if (next == '/' && lower(peek(2)) >= 'a' && lower(peek(2)) <= 'z') return read_end_tag();
    if (next == '!' && html_.substr(at_, 4) == "<!--") return skip_comment();
    if (next == '!' || next == '?' || next == '/') return skip_past(">", at_ + 1);
    add_text("<");
    ++at_;
  }

  void skip_past(std::string_view mark, size_t from) {
    const size_t found = html_.find(mark, from);
    at_ = found == html_.npos ? html_.size() : found + mark.size();
  }

  // <!-- ... -->, <!-- ... --!>, <!-->, <!--->
  void skip_comment() {
    for (size_t end = html_.find("--", at_ + 2); end != html_.npos; end = html_.find("--", end + 1)) {
      const std::string_view rest = html_.substr(end + 2, 2);
      if (!rest.starts_with('>') && (rest != "!>" || end < at_ + 4)) continue;
      at_ = end + (rest[0] == '>' ? 3 : 4);
      return;
    }
    at_ = html_.size();
  }

  std::string_view read_name() {
    size_t size = 0;
    for (; at_ < html_.size() && !is_space(html_[at_]) && html_[at_] != '>' && html_[at_] != '/'; ++at_) {
      if (size < sizeof(name_)) name_[size++] = lower(html_[at_]);
    }
    return {name_, size};
  }

  // Up to and with the ">".
  Attributes read_attributes() {
    Attributes found;
    while (at_ < html_.size()) {
      while (at_ < html_.size() && (is_space(html_[at_]) || html_[at_] == '/')) ++at_;
      if (at_ == html_.size()) break;
      if (html_[at_] == '>') {
        ++at_;
        break;
      }
      const size_t name_at = at_++;
      while (at_ < html_.size() && !is_space(html_[at_]) && html_[at_] != '=' && html_[at_] != '>' && html_[at_] != '/')
        ++at_;
      const std::string_view name = html_.substr(name_at, at_ - name_at);
      while (at_ < html_.size() && is_space(html_[at_])) ++at_;
      std::string_view value;
      if (at_ < html_.size() && html_[at_] == '=') {
        ++at_;
        while (at_ < html_.size() && is_space(html_[at_])) ++at_;
        value = read_value();
      }
      keep(name, value, found);
    }
    return found;
  }

  std::string_view read_value() {
    if (at_ == html_.size()) return {};
    const char quote = html_[at_];
    if (quote == '"' || quote == '\'') {
      const size_t begin = at_ + 1, end = std::min(html_.find(quote, begin), html_.size());
      at_ = std::min(end + 1, html_.size());
      return html_.substr(begin, end - begin);
    }
    const size_t begin = at_;
    while (at_ < html_.size() && !is_space(html_[at_]) && html_[at_] != '>') ++at_;
    return html_.substr(begin, at_ - begin);
  }

  static void keep(std::string_view name, std::string_view value, Attributes& found) {
    if (equal_lower(name, "class"))
      found.classes = value;
    else if (equal_lower(name, "id"))
      found.id = value;
    else if (equal_lower(name, "href"))
      found.href = value;
    else if (equal_lower(name, "start"))
      found.start = value;
    else if (equal_lower(name, "hidden"))
      found.hidden = true;
    else if (equal_lower(name, "style") && hides(value))
      found.hidden = true;
  }

  void read_start_tag() {
    ++at_;
    const TagEntry& entry = kTagTable.find(read_name());
    const Attributes attributes = read_attributes();
    const Tag tag = entry.tag;
    if (entry.kind & kIsRaw) return read_raw(entry);
    if (dropped_ > 0 && !(entry.kind & kIsDropped)) {
      if (!(entry.kind & kIsVoid)) ++unseen_[static_cast<size_t>(tag)];
      return;
    }
    if (tag == Tag::kDropped && html_[at_ - 2] == '/') return;  // <svg/>
    if (!(entry.kind & kIsMetadata) && open_[static_cast<size_t>(Tag::kHead)] > 0 && tag != Tag::kOther)
      close(Tag::kHead);
    if (entry.kind & kClosesP) close_within(set_of({Tag::kP}), kScope);
    if (entry.kind & kIsHeading && page_.elements[stack_.back()].kind & kIsHeading) pop();
    close_implied(tag);
    if (entry.kind & kIsBlock) end_block();
    if (tag == Tag::kBr) return break_line();
    if (entry.kind & kIsVoid) return;
    if (tag == Tag::kHead && !before_content()) return;
    if ((tag == Tag::kHtml || tag == Tag::kBody) && open_[static_cast<size_t>(tag)] > 0) return;
    push(tag, entry.kind, attributes);
  }

  bool before_content() const {
    return stack_.size() <= 1 + open_[static_cast<size_t>(Tag::kHtml)] && page_.blocks.empty() && !block_visible_;
  }

  void close_implied(Tag tag) {
    switch (tag) {
      case Tag::kLi:
        return close_within(set_of({Tag::kLi}), kListScope);
      case Tag::kDd:
      case Tag::kDt:
        return close_within(set_of({Tag::kDd, Tag::kDt}), kListScope);
      case Tag::kA:
        link_ = kNone;
        if (page_.elements[stack_.back()].tag == Tag::kA) pop();
        return;
      case Tag::kTd:
      case Tag::kTh:
        return close_within(kCells, set_of({Tag::kTable, Tag::kTr}));
      case Tag::kTr:
        return close_within(kCells | set_of({Tag::kTr}), set_of({Tag::kTable, Tag::kTbody, Tag::kThead, Tag::kTfoot}));
      case Tag::kTbody:
      case Tag::kThead:
      case Tag::kTfoot:
        return close_within(kRows, set_of({Tag::kTable}));
      default:
        return;
    }
  }

  void read_end_tag() {
    at_ += 2;
    const TagEntry& entry = kTagTable.find(read_name());
    read_attributes();
    if (dropped_ > 0 && !(entry.kind & kIsDropped)) {
      uint32_t& unseen = unseen_[static_cast<size_t>(entry.tag)];
      if (unseen > 0) {
        --unseen;
        return;
      }
      if (!(entry.kind & kIsBlock)) return;
      // The end of what is around an element that is dropped and was not closed.
    }
    if (entry.tag == Tag::kBr) return break_line();
    if (entry.tag == Tag::kA) link_ = kNone;
    if (entry.kind & kIsBlock) end_block();
    if (entry.kind & kIsVoid || entry.tag == Tag::kHtml || entry.tag == Tag::kBody || entry.tag == Tag::kOther) return;
    uint32_t& flat = flat_[static_cast<size_t>(entry.tag)];
    if (flat > 0) {  // of one that was too deep to be nested
      --flat;
      return;
    }
    close(entry.tag);
  }

  // <script>, <style>, <title> ...: all up to the end tag.
  void read_raw(const TagEntry& entry) {
    size_t end = at_;
    for (;; end += 2) {
      end = std::min(html_.find("</", end), html_.size());
      if (end == html_.size()) break;
      const size_t name_end = end + 2 + entry.name.size();
      const bool whole =
          name_end >= html_.size() || is_space(html_[name_end]) || html_[name_end] == '>' || html_[name_end] == '/';
      if (whole && equal_lower(html_.substr(end + 2, entry.name.size()), entry.name)) break;
    }
    if (entry.tag == Tag::kTitle && page_.title.empty() && dropped_ == 0) {
      append_unescaped(html_.substr(at_, end - at_), page_.title);
    }
    at_ = end;
    if (at_ < html_.size()) skip_past(">", at_);
  }

  void push(Tag tag, uint8_t kind, const Attributes& attributes) {
    if (stack_.size() >= kMaxDepth) {
      if (tag != Tag::kOther) ++flat_[static_cast<size_t>(tag)];
      return;
    }
    if (tag == Tag::kOther && !stack_.empty()) return;  // an unknown inline tag changes nothing
    const auto index = static_cast<uint32_t>(page_.elements.size());
    const uint32_t parent = stack_.empty() ? kNone : stack_.back();
    const bool hidden = attributes.hidden || (parent != kNone && page_.elements[parent].hidden);
    page_.elements.push_back({tag, kind, hidden, static_cast<uint16_t>(stack_.size()), parent, attributes.classes,
                              attributes.id, attributes.href, attributes.start});
    stack_.push_back(index);
    ++open_[static_cast<size_t>(tag)];
    dropped_ += (kind & kIsDropped) != 0;
    if (tag == Tag::kA && !attributes.href.empty()) link_ = index;
  }

  void pop() {
    const Element& element = page_.elements[stack_.back()];
    --open_[static_cast<size_t>(element.tag)];
    dropped_ -= (element.kind & kIsDropped) != 0;
    if (element.kind & kIsDropped && dropped_ == 0) unseen_.fill(0);
    if (element.kind & kIsBlock) end_block();
    if (link_ == stack_.back()) link_ = kNone;
    stack_.pop_back();
  }

  // Closes down to the innermost open element of `tags`, unless one of `bounds` is nearer.
  void close_within(TagSet tags, TagSet bounds) {
    for (size_t i = stack_.size(); i-- > 1;) {
      const Tag tag = page_.elements[stack_[i]].tag;
      if (has(tags, tag)) {
        while (stack_.size() > i) pop();
        return;
      }
      if (has(bounds, tag)) return;
    }
  }

  void close(Tag tag) {
    if (open_[static_cast<size_t>(tag)] == 0) return;
    const bool is_cell = has(kRows | set_of({Tag::kTable}), tag);
    const bool is_block = kIsBlock & kind_of_open(tag);
    for (size_t i = stack_.size(); i-- > 1;) {
      const Element& element = page_.elements[stack_[i]];
      if (element.tag == tag) {
        while (stack_.size() > i) pop();
        return;
      }
      if (is_cell ? element.tag == Tag::kTable : has(kScope, element.tag)) return;
      if (!is_block && element.kind & kIsBlock && !(element.kind & kIsDropped) && dropped_ == 0) return;
    }
  }

  uint8_t kind_of_open(Tag tag) const {
    for (size_t i = stack_.size(); i-- > 0;) {
      if (page_.elements[stack_[i]].tag == tag) return page_.elements[stack_[i]].kind;
    }
    return 0;
  }

  uint8_t style() const {
    const auto open = [&](Tag tag) { return open_[static_cast<size_t>(tag)] > 0; };
    uint8_t style = 0;
    if (open(Tag::kB) || open(Tag::kStrong)) style |= kBold;
    if (open(Tag::kI) || open(Tag::kEm)) style |= kItalic;
    if (open(Tag::kCode)) style |= kCode;
    if (open(Tag::kPre)) style |= kPreformatted;
    return style;
  }

  // Two line breaks part blocks, as old pages have it.
  void break_line() {
    if (dropped_ > 0) return;
    if (++breaks_ == 2 && open_[static_cast<size_t>(Tag::kPre)] == 0) return end_block();
    append_run("\n", false);
  }

  void add_text(std::string_view raw) {
    if (dropped_ > 0) return;
    if (open_[static_cast<size_t>(Tag::kHead)] > 0) {  // of which it is the end
      if (std::all_of(raw.begin(), raw.end(), is_space)) return;
      close(Tag::kHead);
    }
    decoded_.clear();
    append_unescaped(raw, decoded_);
    append_run(decoded_, open_[static_cast<size_t>(Tag::kPre)] == 0);
  }

  // White space becomes one space if `collapse`, and U+00A0 a space; a NUL is nothing.
  void append_run(std::string_view text, bool collapse) {
    const size_t before = page_.text.size();
    bool visible = false;
    for (size_t i = 0; i < text.size(); ++i) {
      const char c = text[i];
      const bool hard = c == '\xC2' && i + 1 < text.size() && text[i + 1] == '\xA0';
      i += hard;
      if (c == '\0') continue;
      if (!hard && !is_space(c)) {
        visible = true;
        page_.text += c;
      } else if (!collapse) {
        page_.text += hard ? ' ' : c;
      } else if (page_.text.size() == before || page_.text.back() != ' ') {
        page_.text += ' ';
      }
    }
    if (visible) breaks_ = 0;
    block_visible_ |= visible;
    const std::string_view added(page_.text.data() + before, page_.text.size() - before);
    if (added.empty()) return;
    page_.runs.push_back({added, stack_.back(), link_, style()});
  }

  // A block that shows nothing is dropped with its runs.
  void end_block() {
    const auto end = static_cast<uint32_t>(page_.runs.size());
    breaks_ = 0;
    if (!block_visible_) {
      page_.runs.resize(block_begin_);
      return;
    }
    block_visible_ = false;
    // All runs lie in the same block element: its start or end would have ended the block.
    uint32_t element = page_.runs[block_begin_].element;
    while (page_.elements[element].parent != kNone && !(page_.elements[element].kind & kIsBlock)) {
      element = page_.elements[element].parent;
    }
    page_.blocks.push_back({block_begin_, end, element});
    block_begin_ = end;
  }

  std::string_view html_;
  size_t at_ = 0;
  char name_[16];
  Page page_;
  std::vector<uint32_t> stack_;
  // How many of a tag are open, too deep to be nested, and within what is dropped.
  std::array<uint32_t, static_cast<size_t>(Tag::kCount)> open_{}, flat_{}, unseen_{};
  uint32_t link_ = kNone, block_begin_ = 0, dropped_ = 0, breaks_ = 0;
  bool block_visible_ = false;
  std::string decoded_;
};

}  // namespace

Page parse_html(std::string_view utf8) { return Parser(utf8).parse(); }

}  // namespace cs336::text
