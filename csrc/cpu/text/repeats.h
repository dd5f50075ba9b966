// Passages of a corpus that were there before, exactly: of every window of `length` symbols inside a document, whether
// an equal one comes earlier without overlapping it.
//
//   window at i is repeated  <=>  f + length <= i  for the first f whose window holds the same symbols
//
// No suffix array: all windows have one length, so that a table from the hash of a window to where it first was does.
// It costs 8 bytes a window and one probe, whatever the text; a suffix array costs a sort, which periodic text makes
// slow, and cannot be parted where memory is short. Here parts take the hashes that fall to them, one after the other
// or on several threads. Hashes only propose: symbols are compared, and what differs is told apart. Two things cost
// more: a repeated window is compared whole, `length` symbols; and text that is made for it, of windows of 1,024
// symbols or more that differ and hash alike (Thue-Morse words), is compared with each of them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace cs336::text {

struct Stretch {
  int64_t begin, end;  // in symbols of the corpus
};

struct RepeatSearch {
  size_t length;      // of a window, above 0
  size_t max_memory;  // bytes of the tables that exist at one time; another bit a symbol is needed beside them
  size_t num_threads;
};

// What repeated windows cover, in order; stretches that touch are one. ends: where each document ends, the first of
// them begins at 0. Symbol: uint8_t for bytes, uint32_t for tokens. Throws std::invalid_argument from 2^40 symbols on.
template <class Symbol>
std::vector<Stretch> find_repeats(std::span<const Symbol> corpus, std::span<const int64_t> ends,
                                  const RepeatSearch& search);

}  // namespace cs336::text
