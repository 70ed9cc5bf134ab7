// How the process deals with memory.
#pragma once

#include <cstdint>

namespace hadal {

/// Keeps memory that was freed for the next allocation, up to 256 MiB, in place of giving it back
/// to the system and taking it anew, page by page, in every step. All threads allocate from one
/// heap: glibc's malloc_trim() leaves what is free at the end of other threads' heaps, up to 64 MiB
/// of each. Call it once, at the start of a program and before its threads. Without effect on other
/// C libraries than glibc.
void keep_freed_memory();

/// Gives freed memory back to the system all the same: when nothing is going on.
void give_back_freed_memory();

/// Takes pages of files that were read into memory and never written, code and weights alike, out
/// of the process; what is needed of them comes back from the system's cache when it is next
/// touched. For the end of a start, most of whose code does not run again.
void drop_file_pages();

/// Brings the code and constants of the program's own files into memory, so that what the process
/// takes does not depend on which of it was used.
void touch_own_code();

/// Takes the code and constants of libraries of more than 64 MiB out of the process (LibTorch: a
/// step uses a twentieth); what is needed of them comes back from the system's cache, in about a
/// microsecond a piece of 64 KiB. For when nothing is going on. (A debugger's breakpoints go, too.)
void drop_library_code();

/// Bytes of the process in memory; 0 where the system does not say.
int64_t resident_bytes();

}  // namespace hadal
