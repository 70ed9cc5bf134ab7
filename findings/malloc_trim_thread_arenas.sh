#!/usr/bin/env bash
# glibc 2.36: malloc_trim(0) leaves a thread's free memory alone once M_TRIM_THRESHOLD is raised.
#
# malloc_trim(3) says that it releases free memory of all arenas, in all chunks with whole free pages. But of
# arenas other than the main one it leaves the chunk at the end, however large: only free() gives that back, as
# soon as it exceeds M_TRIM_THRESHOLD. So a server that raises the threshold (so that steps do not give memory
# back and take it again) and calls malloc_trim when it is idle keeps what its threads have freed, up to 64 MiB
# an arena. M_ARENA_MAX 1, or no raised threshold, ends it.
# Seen with Debian's GLIBC 2.36-9+deb12u14 (no package is installed: it is the system's).
# Output seen:
#   main: 50 MiB behind free(), 0 MiB behind malloc_trim(0)
#   a thread: 50 MiB behind free(), 50 MiB behind malloc_trim(0)
# Exits 1 if this changes. Needs a C compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/trim.c" <<'C'
#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static pthread_barrier_t stage;
static double resident(void) {
  long pages = 0, ignored = 0;
  FILE* f = fopen("/proc/self/statm", "r");
  if (fscanf(f, "%ld %ld", &ignored, &pages) != 2) exit(2);
  fclose(f);
  return pages * 4096.0 / (1 << 20);
}
static void work(void) {
  void* piece[50];
  for (int i = 0; i < 50; ++i) memset(piece[i] = malloc(1 << 20), 1, 1 << 20);
  for (int i = 0; i < 50; ++i) free(piece[i]);
}
static void* run(void* unused) { work(); pthread_barrier_wait(&stage); pthread_barrier_wait(&stage); return unused; }
int main(int argc, char** argv) {
  mallopt(M_MMAP_THRESHOLD, 256 << 20);
  mallopt(M_TRIM_THRESHOLD, 256 << 20);
  double before = resident(), kept, left;
  if (argc > 1) {
    pthread_t thread;
    pthread_barrier_init(&stage, NULL, 2);
    pthread_create(&thread, NULL, run, NULL);
    pthread_barrier_wait(&stage);
    kept = resident() - before; malloc_trim(0); left = resident() - before;
    pthread_barrier_wait(&stage); pthread_join(thread, NULL);
  } else { work(); kept = resident() - before; malloc_trim(0); left = resident() - before; }
  printf("%s: %.0f MiB behind free(), %.0f MiB behind malloc_trim(0)\n", argc > 1 ? "a thread" : "main", kept, left);
  return argc > 1 ? !(left > 40) : !(left < 5);
}
C
cc -O1 -pthread "$folder/trim.c" -o "$folder/trim"
"$folder/trim"
"$folder/trim" thread
