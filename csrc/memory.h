// Scratch memory that a thread keeps between calls, and huge pages for large outputs.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(data_); }

  // At least `bytes`, 64-byte aligned, contents undefined; valid until the next call from this thread.
  void* get(size_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = 0;
      size_t rounded = (bytes + 4095) / 4096 * 4096;
      data_ = aligned_alloc(64, rounded);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline void* scratch(size_t bytes) {
  static thread_local Scratch mine;
  return mine.get(bytes);
}

// Asks for huge pages before the first touch: with 4 KiB pages, the faults of a fresh 260 MB gradient cost more than
// computing it. A hint only; it changes no contents.
inline void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}
