// How the process deals with memory.
#pragma once

namespace hadal {

/// Keeps memory that was freed for the next allocation, up to 256 MiB, in place of giving it back
/// to the system and taking it anew, page by page, in every step. Call it once, at the start of a
/// program. Without effect on other C libraries than glibc.
void keep_freed_memory();

}  // namespace hadal
