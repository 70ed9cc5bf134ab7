#!/usr/bin/env bash
# Prints the CMake preset for this machine: cuda where a GPU answers and nvcc is 13 or newer, else cpu.
set -u
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU &&
  command -v nvcc >/dev/null 2>&1; then
  version=$(nvcc --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
  [ "${version:-0}" -ge 13 ] && echo cuda && exit 0
fi
echo cpu
