#include "base/memory.h"

#include <cstdlib>
#include <fstream>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__linux__)
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace hadal {

void keep_freed_memory() {
#if defined(__GLIBC__)
  constexpr int kBytes = 256 << 20;
  mallopt(M_MMAP_THRESHOLD, kBytes);
  mallopt(M_TRIM_THRESHOLD, kBytes);
  mallopt(M_ARENA_MAX, 1);
#endif
}

void give_back_freed_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

void drop_file_pages() {
#if defined(__linux__)
  struct Mapping {
    uintptr_t begin = 0, end = 0;
    bool drops = false;
  };
  // "begin-end perms offset dev inode path", then lines "Name: value". A page that was written, as
  // by relocation or a debugger, is anonymous: none of such a mapping is dropped.
  const auto drop = [](const Mapping& mapping) {
    if (mapping.drops)
      madvise(reinterpret_cast<void*>(mapping.begin), mapping.end - mapping.begin, MADV_DONTNEED);
  };
  std::ifstream file("/proc/self/smaps");
  Mapping mapping;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string first, permissions, offset, device;
    uint64_t inode = 0;
    words >> first;
    if (first == "Anonymous:") {
      uint64_t kib = 0;
      words >> kib;
      mapping.drops = mapping.drops && kib == 0;
    } else if (first.find('-') != std::string::npos && first.back() != ':') {
      drop(mapping);
      words >> permissions >> offset >> device >> inode;
      const size_t dash = first.find('-');
      mapping = {.begin = std::stoull(first.substr(0, dash), nullptr, 16),
                 .end = std::stoull(first.substr(dash + 1), nullptr, 16),
                 .drops = inode != 0 && permissions[1] == '-' && permissions[3] == 'p'};
    }
  }
  drop(mapping);
#endif
}

#if defined(__linux__)
namespace {

/// Bytes of a program or library that are never written: code and constants.
struct Constants {
  std::string_view file;  ///< empty: the program
  std::vector<std::span<const char>> pieces;
  size_t bytes = 0;
};

// What the program headers call writable holds relocations, also where it was sealed afterwards.
int find_constants(dl_phdr_info* object, size_t, void* context) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  Constants found{.file = object->dlpi_name, .pieces = {}};
  for (const auto& header : std::span(object->dlpi_phdr, object->dlpi_phnum)) {
    const uintptr_t at = object->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_DYNAMIC) {
      for (const auto* entry = reinterpret_cast<const ElfW(Dyn)*>(at); entry->d_tag != DT_NULL;
           ++entry) {
        // Its code was written.
        if (entry->d_tag == DT_TEXTREL) return 0;
        if (entry->d_tag == DT_FLAGS && (entry->d_un.d_val & DF_TEXTREL) != 0) return 0;
      }
    }
    if (header.p_type != PT_LOAD || (header.p_flags & PF_W) != 0) continue;
    const uintptr_t begin = at & ~(page - 1), end = (at + header.p_memsz) & ~(page - 1);
    if (end <= begin) continue;
    found.pieces.emplace_back(reinterpret_cast<const char*>(begin), end - begin);
    found.bytes += end - begin;
  }
  static_cast<std::vector<Constants>*>(context)->push_back(std::move(found));
  return 0;
}

std::vector<Constants> all_constants() {
  std::vector<Constants> all;
  dl_iterate_phdr(find_constants, &all);
  return all;
}

}  // namespace
#endif

void touch_own_code() {
#if defined(__linux__)
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (const Constants& file : all_constants()) {
    if (!file.file.empty() && file.file.find("/libhadal") == std::string_view::npos) continue;
    for (const std::span<const char> piece : file.pieces) {
      const volatile char* const bytes = piece.data();
      for (size_t at = 0; at < piece.size(); at += page) (void)bytes[at];
    }
  }
#endif
}

void drop_library_code() {
#if defined(__linux__)
  constexpr size_t kLarge = size_t{64} << 20;
  for (const Constants& file : all_constants()) {
    if (file.bytes < kLarge || !file.file.starts_with('/')) continue;
    for (const std::span<const char> piece : file.pieces)
      madvise(const_cast<char*>(piece.data()), piece.size(), MADV_DONTNEED);
  }
#endif
}

int64_t resident_bytes() {
#if defined(__linux__)
  std::ifstream file("/proc/self/statm");
  int64_t size = 0, resident = 0;
  if (file >> size >> resident) return resident * sysconf(_SC_PAGESIZE);
#endif
  return 0;
}

}  // namespace hadal
