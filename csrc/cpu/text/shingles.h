// The n-grams of a text as hashes, after all that copies differ in is taken out: case, accents, punctuation, white
// space.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace cs336::text {

enum class Unit : uint8_t { kWord, kChar };

// Canonically decomposed (NFD), without accents, in lower case, words parted by one space. Symbols part words too.
void normalize(std::string_view utf8, std::string& out);

// Hashes of the words or characters of the normalized text, which is left in `normalized`.
void units_of(std::string_view utf8, Unit unit, std::string& normalized, std::vector<uint64_t>& units);

// Distinct hashes of the n-grams of words or characters of the normalized text, sorted. A text that is shorter than one
// n-gram is one shingle, and one without words has none. n > 0.
std::vector<uint64_t> shingles(std::string_view utf8, size_t n, Unit unit);

// As they come, copies too, into `out`; `scratch` saves allocations.
void shingles_into(std::string_view utf8, size_t n, Unit unit, std::string& scratch, std::vector<uint64_t>& out);

// |a & b| / |a | b| of sorted distinct hashes; 1 for two empty sets.
double jaccard(std::span<const uint64_t> a, std::span<const uint64_t> b);

}  // namespace cs336::text
