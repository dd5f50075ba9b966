// Memory for large tables and results. A page that is touched for the first time can cost as much as encoding 700 bytes
// of text, and a huge page a fifth of the small ones it stands for.
#pragma once
#include <sys/mman.h>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace cs336::text {

// Asks for huge pages behind memory that is not touched yet; nothing where it is small.
inline void advise_huge([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096, kLeast = 2 << 20;
  if (bytes < kLeast) return;
  const auto begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

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

// A growing array of plain values. What it has room for and does not use is not touched.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  const T* data() const { return data_; }
  size_t size() const { return size_; }
  // Room for `more` values at the end: write there, then call advance.
  T* room(size_t more) {
    if (more > capacity_ - size_) grow(size_ + more);
    return data_ + size_;
  }
  void advance(size_t count) { size_ += count; }
  void clear() { size_ = 0; }
  // Gives back the room that is not used.
  void shrink() {
    if (size_ == 0 || size_ == capacity_) return;
    if (void* data = std::realloc(data_, size_ * sizeof(T))) data_ = static_cast<T*>(data);
    capacity_ = size_;
  }

 private:
  void grow(size_t least) {
    const size_t capacity = std::max<size_t>({least, capacity_ * 2, 64});
    void* data = std::realloc(data_, capacity * sizeof(T));
    if (data == nullptr) throw std::bad_alloc();
    data_ = static_cast<T*>(data);
    advise_huge(data_ + size_, (capacity - size_) * sizeof(T));
    capacity_ = capacity;
  }
  T* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace cs336::text
