#!/usr/bin/env bash
# torch 2.11.0's wheel (Linux, x86-64): its C++ process group for Gloo works, but the header that declares it cannot be
# included.
#
# The wheel installs torch/csrc/distributed/c10d/ProcessGroupGloo.hpp among its public headers, and libtorch_cpu.so defines
# c10d::ProcessGroupGloo with all of Gloo linked in. One would expect a C++ program to include the header and link. But it
# includes <gloo/algorithm.h> and others, of which the wheel has none (while it has those of other bundled libraries), so
# a program that includes it with USE_C10D_GLOO stops there (without, the header declares nothing), and the class can only be
# reached by declaring Gloo's types oneself or from Python.
# Output seen:
#   header ProcessGroupGloo.hpp: there; headers below include/gloo: 0
#   c10d::ProcessGroupGloo in libtorch_cpu.so: defined
#   compiler: fatal error: gloo/algorithm.h: No such file or directory
# Exits 1 unless the header is there, the class is defined, and the header cannot be compiled for want of Gloo's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version 3.12 --platform manylinux_2_28_x86_64 --dest "$folder" torch==2.11.0
unzip -q "$folder"/torch-2.11.0*.whl 'torch/include/*' 'torch/lib/libtorch_cpu.so' -d "$folder"
rm "$folder"/torch-2.11.0*.whl
include=$folder/torch/include
header=torch/csrc/distributed/c10d/ProcessGroupGloo.hpp

there=missing
[ -f "$include/$header" ] && there=there
count=$(find "$include" -path '*/gloo/*' -name '*.h*' | wc -l)
echo "header ProcessGroupGloo.hpp: $there; headers below include/gloo: $count"

symbols=$(nm -D -C --defined-only "$folder/torch/lib/libtorch_cpu.so" | grep -c 'c10d::ProcessGroupGloo::' || true)
defined=undefined
[ "$symbols" -gt 0 ] && defined=defined
echo "c10d::ProcessGroupGloo in libtorch_cpu.so: $defined"

printf '#define USE_C10D_GLOO 1\n#include <%s>\nint main() {}\n' "$header" >"$folder/a.cpp"
if g++ -std=c++17 -fsyntax-only -I"$include" -I"$include/torch/csrc/api/include" "$folder/a.cpp" 2>"$folder/errors"; then
  echo "compiler: no error"
  exit 1
fi
message=$(grep -m1 'fatal error' "$folder/errors" | sed 's/.*fatal error/fatal error/')
echo "compiler: $message"
[ "$there" = there ] && [ "$count" = 0 ] && [ "$defined" = defined ] && [[ $message == *gloo/* ]]
