#include "base/memory.h"

#include <cstdlib>
#include <fstream>
#include <span>
#include <sstream>
#include <string>

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

void drop_code_pages() {
#if defined(__linux__)
  // What the program headers call writable holds relocations, also where it was sealed afterwards.
  const auto drop = [](dl_phdr_info* object, size_t, void*) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const bool is_file = object->dlpi_name[0] == '\0' || object->dlpi_name[0] == '/';
    bool is_relocated = false;  // its code was written
    for (const auto& header : std::span(object->dlpi_phdr, object->dlpi_phnum)) {
      if (header.p_type != PT_DYNAMIC) continue;
      const auto* entry = reinterpret_cast<const ElfW(Dyn)*>(object->dlpi_addr + header.p_vaddr);
      for (; entry->d_tag != DT_NULL; ++entry) {
        is_relocated |= entry->d_tag == DT_TEXTREL;
        is_relocated |= entry->d_tag == DT_FLAGS && (entry->d_un.d_val & DF_TEXTREL) != 0;
      }
    }
    if (!is_file || is_relocated) return 0;
    for (const auto& header : std::span(object->dlpi_phdr, object->dlpi_phnum)) {
      if (header.p_type != PT_LOAD || (header.p_flags & PF_W) != 0) continue;
      const uintptr_t begin = (object->dlpi_addr + header.p_vaddr) & ~(page - 1);
      const uintptr_t end = (object->dlpi_addr + header.p_vaddr + header.p_memsz) & ~(page - 1);
      if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
    }
    return 0;
  };
  dl_iterate_phdr(drop, nullptr);
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
