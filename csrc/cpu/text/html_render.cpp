#include "cpu/text/html_render.h"

#include <algorithm>
#include <map>
#include <string_view>

#include "cpu/text/content.h"

namespace cs336::text {
namespace {

constexpr size_t kMostCellChars = 300;  // on average: a table with longer cells lays out a page, and is no data

bool is_blank(char c) { return c == ' ' || c == '\n'; }

// Where a block stands.
struct Place {
  uint32_t item = kNone, list = kNone, outer_list = kNone, cell = kNone, row = kNone, table = kNone, pre = kNone;
  uint32_t heading = 0, list_depth = 0, quotes = 0;
};

Place place_of(const Page& page, const Block& block) {
  Place place;
  for (uint32_t e = block.element; e != kNone; e = page.elements[e].parent) {
    const Tag tag = page.elements[e].tag;
    const bool in_table = place.table != kNone;  // what is outside a table does not shape its cells
    if (tag >= Tag::kH1 && tag <= Tag::kH6 && place.heading == 0) {
      place.heading = static_cast<uint32_t>(tag) - static_cast<uint32_t>(Tag::kH1) + 1;
    }
    if (tag == Tag::kPre) place.pre = e;
    if (tag == Tag::kBlockquote) ++place.quotes;
    if (tag == Tag::kLi && place.item == kNone && !in_table) place.item = e;
    if ((tag == Tag::kUl || tag == Tag::kOl) && place.item != kNone && !in_table) {
      if (place.list == kNone) place.list = e;
      place.outer_list = e;
      ++place.list_depth;
    }
    if ((tag == Tag::kTd || tag == Tag::kTh) && place.cell == kNone && place.item == kNone) place.cell = e;
    if (tag == Tag::kTr && place.row == kNone && place.cell != kNone) place.row = e;
    if (tag == Tag::kTable && !in_table && place.row != kNone) place.table = e;
  }
  if (place.list == kNone) place.item = kNone;
  return place;
}

// "(" lead, core, trail ")": marks must touch the text.
struct Trimmed {
  explicit Trimmed(std::string_view text) {
    const size_t begin = std::min(text.find_first_not_of(" \n"), text.size());
    const size_t end = begin == text.size() ? begin : text.find_last_not_of(" \n") + 1;
    lead = text.substr(0, begin);
    core = text.substr(begin, end - begin);
    trail = text.substr(end);
  }
  std::string_view lead, core, trail;
};

void append_marked(std::string& out, std::string_view text, std::string_view before, std::string_view after) {
  const Trimmed t(text);
  out += t.lead;
  if (!t.core.empty()) out.append(before).append(t.core).append(after);
  out += t.trail;
}

std::string url_of(const Page& page, uint32_t link) {
  std::string raw, url;
  append_unescaped(page.elements[link].href, raw);
  const Trimmed trimmed(raw);
  for (const char c : trimmed.core) {
    if (c == ' ')
      url += "%20";
    else if (c == ')')
      url += "%29";
    else if (c != '\n' && c != '\t')
      url += c;
  }
  return url.starts_with("javascript:") ? "" : url;
}

// One space for many, none at line ends and beginnings.
std::string tidy(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '\n') {
      while (!out.empty() && out.back() == ' ') out.pop_back();
    }
    if (is_blank(c) && (out.empty() || out.back() == '\n' || (c == ' ' && out.back() == ' '))) continue;
    out += c;
  }
  while (!out.empty() && is_blank(out.back())) out.pop_back();
  return out;
}

// The runs of a block with marks for links, bold, italic and code.
std::string inline_markdown(const Page& page, const Block& block, bool heading) {
  std::string out, linked, styled;
  for (uint32_t r = block.first_run; r < block.end_run;) {
    const uint32_t link = page.runs[r].link;
    linked.clear();
    while (r < block.end_run && page.runs[r].link == link) {
      const uint8_t style = page.runs[r].style & (heading ? kCode : kBold | kItalic | kCode);
      styled.clear();
      for (; r < block.end_run && page.runs[r].link == link; ++r) {
        const std::string_view text = page.runs[r].text;
        const bool blank = std::all_of(text.begin(), text.end(), is_blank);
        if (!blank && (page.runs[r].style & (heading ? kCode : kBold | kItalic | kCode)) != style) break;
        styled += text;
      }
      std::string before, after;
      if (style & kBold) before += "**", after = "**" + after;
      if (style & kItalic) before += "*", after = "*" + after;
      if (style & kCode) before += "`", after = "`" + after;
      append_marked(linked, styled, before, after);
    }
    const std::string url = link == kNone ? "" : url_of(page, link);
    if (url.empty()) {
      out += linked;
    } else {
      append_marked(out, linked, "[", "](" + url + ")");
    }
  }
  return tidy(out);
}

class Renderer {
 public:
  Renderer(const Page& page, const std::vector<bool>& keep, bool markdown) : page_(page), markdown_(markdown) {
    for (size_t b = 0; b < page.blocks.size(); ++b) {
      if (!keep[b]) continue;
      kept_.push_back(static_cast<uint32_t>(b));
      places_.push_back(place_of(page, page.blocks[b]));
    }
    number_siblings();
    find_data_tables();
  }

  std::string render() {
    for (size_t i = 0; i < kept_.size();) {
      const Place& place = places_[i];
      size_t end = i + 1;
      if (place.table != kNone && data_tables_[place.table]) {
        while (end < kept_.size() && places_[end].table == place.table) ++end;
        separate(place, false);
        add_table(i, end);
      } else if (place.pre != kNone) {
        while (end < kept_.size() && places_[end].pre == place.pre) ++end;
        separate(place, false);
        add_code(i, end);
      } else {
        separate(place, place.item != kNone);
        add_block(i);
      }
      last_ = places_[end - 1];
      i = end;
    }
    return std::move(out_);
  }

 private:
  // The place of each item in its list, and of each cell in its row.
  void number_siblings() {
    number_.resize(page_.elements.size());
    std::vector<uint32_t> children(page_.elements.size());
    for (size_t e = 0; e < page_.elements.size(); ++e) {
      const Element& element = page_.elements[e];
      const bool counts = element.tag == Tag::kLi || element.tag == Tag::kTd || element.tag == Tag::kTh;
      if (counts && element.parent != kNone) number_[e] = children[element.parent]++;
    }
  }

  // Those with two rows of two cells or more, one block a cell, and short ones.
  void find_data_tables() {
    struct Counts {
      uint32_t blocks = 0, cells = 0, rows = 0, cells_of_row = 0, last_row = kNone, last_cell = kNone;
      size_t chars = 0;
    };
    std::map<uint32_t, Counts> tables;
    for (size_t i = 0; i < kept_.size(); ++i) {
      const Place& place = places_[i];
      if (place.table == kNone) continue;
      Counts& table = tables[place.table];
      if (place.row != table.last_row) table.cells_of_row = 0;
      if (place.cell != table.last_cell) {
        ++table.cells;
        table.rows += ++table.cells_of_row == 2;
      }
      ++table.blocks;
      table.last_row = place.row;
      table.last_cell = place.cell;
      const Block& block = page_.blocks[kept_[i]];
      for (uint32_t r = block.first_run; r < block.end_run; ++r) table.chars += page_.runs[r].text.size();
    }
    data_tables_.resize(page_.elements.size());
    for (const auto& [table, c] : tables) {
      data_tables_[table] = c.rows >= 2 && c.blocks <= c.cells + c.cells / 4 && c.chars <= kMostCellChars * c.cells;
    }
  }

  void separate(const Place& next, bool item) {
    if (out_.empty()) return;
    const bool same_list = item && last_.outer_list != kNone && last_.outer_list == next.outer_list;
    out_ += same_list ? "\n" : "\n\n";
  }

  std::string content(size_t i) const {
    const Block& block = page_.blocks[kept_[i]];
    return markdown_ ? inline_markdown(page_, block, places_[i].heading > 0) : tidy(block_text(page_, block));
  }

  void add_block(size_t i) {
    const Place& place = places_[i];
    std::string first, rest;  // what stands before the first line, and before the others
    if (markdown_) {
      for (uint32_t q = 0; q < place.quotes; ++q) first += "> ";
      rest = first;
    }
    if (place.item != kNone) {
      const std::string indent(2 * (place.list_depth - 1), ' ');
      const std::string marker = marker_of(place);
      const bool opens = place.item != last_.item || last_.item == kNone;
      rest += indent + std::string(marker.size(), ' ');
      first += indent + (opens ? marker : std::string(marker.size(), ' '));
    }
    if (markdown_ && place.heading > 0) first += std::string(place.heading, '#') + ' ';
    append_lines(content(i), first, rest);
  }

  std::string marker_of(const Place& place) const {
    const Element& list = page_.elements[place.list];
    if (!markdown_ || list.tag != Tag::kOl) return "- ";
    uint32_t start = 1;
    if (!list.start.empty() && list.start.size() < 6 && std::all_of(list.start.begin(), list.start.end(), ::isdigit)) {
      start = static_cast<uint32_t>(std::stoul(std::string(list.start)));
    }
    return std::to_string(start + number_[place.item]) + ". ";
  }

  void append_lines(std::string_view text, std::string_view first, std::string_view rest) {
    out_ += first;
    for (const char c : text) {
      out_ += c;
      if (c == '\n') out_ += rest;
    }
  }

  void add_code(size_t begin, size_t end) {
    std::string code;
    for (size_t i = begin; i < end; ++i) {
      const Block& block = page_.blocks[kept_[i]];
      if (i > begin) code += '\n';
      for (uint32_t r = block.first_run; r < block.end_run; ++r) code += page_.runs[r].text;
    }
    const size_t from = std::min(code.find_first_not_of('\n'), code.size());
    code = code.substr(from, code.find_last_not_of(" \n\t\r") + 1 - from);
    std::string fence = "```";
    while (code.find(fence) != code.npos) fence += '`';
    out_ += markdown_ ? fence + "\n" + code + "\n" + fence : code;
  }

  void add_table(size_t begin, size_t end) {
    std::vector<std::vector<std::string>> rows;
    uint32_t row = kNone;
    for (size_t i = begin; i < end; ++i) {
      if (places_[i].row != row) rows.emplace_back();
      row = places_[i].row;
      const size_t column = std::min<size_t>(number_[places_[i].cell], 999);
      if (rows.back().size() <= column) rows.back().resize(column + 1);
      std::string& cell = rows.back()[column];
      if (!cell.empty()) cell += ' ';
      for (const char c : content(i)) {
        if (c == '|' && markdown_) cell += '\\';
        cell += c == '\n' || c == '\t' ? ' ' : c;
      }
    }
    size_t columns = 0;
    for (const auto& cells : rows) columns = std::max(columns, cells.size());
    for (size_t r = 0; r < rows.size(); ++r) {
      if (r > 0) out_ += '\n';
      if (markdown_) {
        rows[r].resize(columns);
        out_ += '|';
        for (const std::string& cell : rows[r]) out_ += " " + cell + " |";
        if (r > 0) continue;
        out_ += "\n|";
        for (size_t c = 0; c < columns; ++c) out_ += " --- |";
      } else {
        for (size_t c = 0; c < rows[r].size(); ++c) out_ += (c > 0 ? "\t" : "") + rows[r][c];
      }
    }
  }

  const Page& page_;
  const bool markdown_;
  std::vector<uint32_t> kept_, number_;
  std::vector<Place> places_;
  std::vector<bool> data_tables_;
  Place last_;
  std::string out_;
};

}  // namespace

std::string render(const Page& page, const std::vector<bool>& keep, bool markdown) {
  return Renderer(page, keep, markdown).render();
}

}  // namespace cs336::text
