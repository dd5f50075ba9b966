// Words of texts that lie between two pages that nobody may read: a byte before or after a text is not looked at.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "cpu/text/words.h"

using namespace cs336::text;

int main() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* const map = static_cast<char*>(mmap(nullptr, 3 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (map == MAP_FAILED || mprotect(map + page, page, PROT_READ | PROT_WRITE) != 0) return 2;
  const std::string parts[] = {"\xC3\xA9",
                               "\xE4\xB8\xAD",
                               "\xF0\x9F\x98\x80",
                               "\xE2\x80\x99",
                               "\xE2\x80\xA6",
                               "\xC2\xA3",
                               "a",
                               "5",
                               ".",
                               "'",
                               "km",
                               "n't",
                               "\xE2",
                               "\x80",
                               "\xF0\x9F",
                               " ",
                               "-",
                               ""};
  std::vector<Word> words;
  size_t count = 0;
  for (const std::string& first : parts) {
    for (const std::string& second : parts) {
      for (const std::string& third : parts) {
        const std::string text = first + second + third;
        char* const begin = map + page;
        char* const end = begin + page - text.size();
        for (char* const at : {begin, end}) {
          std::memcpy(at, text.data(), text.size());
          words.clear();
          split_words({at, text.size()}, words);
          count += words.size();
        }
      }
    }
  }
  std::printf("%zu words\n", count);
  return count == 0;
}
