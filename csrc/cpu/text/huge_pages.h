// Memory for large tables.
#pragma once
#include <sys/mman.h>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <vector>

namespace cs336::text {

// On cache lines; on huge pages where there is more than one, so that few accesses wait for the page table.
template <class T>
struct TableAllocator {
  using value_type = T;
  static constexpr size_t kCacheLine = 64, kHugePage = 2 << 20;

  TableAllocator() = default;
  template <class U>
  TableAllocator(const TableAllocator<U>&) {}
  T* allocate(size_t count) {
    const size_t align = count * sizeof(T) < kHugePage ? kCacheLine : kHugePage;
    const size_t bytes = (count * sizeof(T) + align - 1) / align * align;
    void* memory = std::aligned_alloc(align, bytes);
    if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (align == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { std::free(memory); }
  bool operator==(const TableAllocator&) const { return true; }
};

template <class T>
using TableVector = std::vector<T, TableAllocator<T>>;

}  // namespace cs336::text
