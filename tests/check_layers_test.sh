#!/usr/bin/env bash
# tools/check_layers.sh finds what it is there to find.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/src/{base,ops/gemm,ops/cpu,text,train,engine,engine_core/disk,testing}
echo '#include "base/x.h"' > "$root/src/ops/good.cpp"
echo '#include "testing/x.h"' > "$root/src/ops/good_test.cpp"
echo '#include "ops/cpu/vec.h"' > "$root/src/ops/gemm/good.h"
tools/check_layers.sh "$root" || { echo "check_layers_test: refuses a correct tree"; exit 1; }
expect() { # file, include line, message
  echo "$2" > "$root/src/$1"
  if output=$(tools/check_layers.sh "$root" 2>&1); then echo "check_layers_test: accepts '$2' in $1"; exit 1; fi
  case "$output" in *"$3"*) ;; *) echo "check_layers_test: expected '$3', found '$output'"; exit 1 ;; esac
  rm "$root/src/$1"
}
expect engine/a.cpp '#include "train/trainer.h"' 'engine may not include train'
expect base/a.cpp '#include "ops/op.h"' 'base may not include ops'
expect text/a.cpp '#include <ATen/ATen.h>' 'text may not include LibTorch'
expect ops/a.cpp '#include "testing/gpu.h"' 'ops may not include testing'
expect ops/cpu/a.h '#include "ops/gemm/good.h"' 'ops/cpu may not include ops/gemm'
expect ops/new.h '#include "ops/gemm/good.h"' 'ops/. may not include ops/gemm'
expect engine_core/disk/a.h '#include "engine_core/grammar/x.h"' 'engine_core/disk may not include engine_core/grammar'
echo '#include "base/b.h"' > "$root/src/base/a.h"
expect base/b.h '#include "base/a.h"' 'circle of includes'
echo "check_layers_test: ok"
