#!/usr/bin/env bash
# clang-tidy 19 over the given files, or over those that differ from the merge base with the main branch (a changed header
# stands for the .cpp beside it). `--all` takes all torch-free sources. The rules are in .clang-tidy.
# Usage: tools/check_tidy.sh [--all | FILE...]; HADAL_TIDY_SECONDS bounds the time (files not reached are listed).
set -euo pipefail
cd "$(dirname "$0")/.."
tidy=$(command -v clang-tidy-19 || true)
if [ -z "$tidy" ] || ! command -v clang++-19 >/dev/null 2>&1; then
  echo "check_tidy: clang-tidy 19 is missing; install it with: tools/install_deps.sh --tools" >&2
  exit 2
fi
if [ "${1:-}" = --all ]; then
  mapfile -t files < <(git ls-files 'src/base/*.cpp' 'src/text/*.cpp' 'src/data/*.cpp')
elif [ $# -gt 0 ]; then
  files=("$@")
else
  base=HEAD
  for main in origin/main main; do
    if git rev-parse -q --verify "$main" >/dev/null; then base=$(git merge-base HEAD "$main"); break; fi
  done
  mapfile -t files < <({ git diff --name-only --diff-filter=d "$base"; git ls-files --others --exclude-standard; } |
    grep -E '^(src|tests)/.*\.(h|cpp)$' | sed 's/\.h$/.cpp/' | sort -u)
fi
known=()
for file in ${files[@]+"${files[@]}"}; do
  # Kernels of one instruction set and fuzzers have no command of their own in the compile database.
  case "$file" in *_cpu.cpp | *_fuzz.cpp | src/pch.cpp) continue ;; esac
  if [ -f "$file" ]; then known+=("$file"); fi
done
if [ ${#known[@]} -eq 0 ]; then
  echo "check_tidy: no files to look at"
  exit 0
fi
torch=OFF
printf '%s\n' "${known[@]}" | grep -qvE '^src/(base|text|data)/' && torch=ON
cmake --preset tidy -DHADAL_TORCH=$torch >/dev/null
log=$(mktemp)
trap 'rm -f "$log"' EXIT
deadline=$(($(date +%s) + ${HADAL_TIDY_SECONDS:-100000}))
export deadline tidy
status=0
# Torch-free files take seconds and come first.
{ printf '%s\n' "${known[@]}" | grep -E '^src/(base|text|data)/' || true
  printf '%s\n' "${known[@]}" | grep -vE '^src/(base|text|data)/' || true; } |
  xargs -P "$(nproc)" -I FILE bash -c '
    left=$((deadline - $(date +%s)))
    if [ "$left" -le 0 ]; then echo "check_tidy: no time left for FILE"; exit 0; fi
    timeout "$left" "$tidy" -p build/tidy --quiet FILE 2>/dev/null
    rc=$?
    if [ $rc -eq 124 ]; then echo "check_tidy: no time left for FILE"; exit 0; fi
    exit $rc' >"$log" || status=1
grep -vE '^$' "$log" || true
if [ $status -ne 0 ]; then
  echo "check_tidy: the findings above are errors" >&2
  exit 1
fi
echo "check_tidy: ${#known[@]} files"
