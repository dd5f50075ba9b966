// Blocks of a page as plain text, or as Markdown with its headings, lists, tables, quotes, code and links.
#pragma once
#include <string>
#include <vector>

#include "cpu/text/html.h"

namespace cs336::text {

// keep: which blocks. Paragraphs are parted by an empty line, items of a list and rows of a table by a line end, cells
// by a tab. Markdown has what stands in the text as it is: characters that mean something there are not escaped, but
// for
// "|" in a table.
std::string render(const Page& page, const std::vector<bool>& keep, bool markdown);

}  // namespace cs336::text
