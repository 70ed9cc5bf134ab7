#!/usr/bin/env bash
# Op tests and benches on a GPU, one line each.
#   tools/gpu_check.sh                 on a machine with a GPU and CUDA 13: builds the cuda preset, runs everything
#   tools/gpu_check.sh pack            on a machine without a GPU: builds and gathers what the other machine needs in
#                                      .carry/gpu and .carry/gpu.tar.xz (binaries, and the libraries that they load)
#   tools/gpu_check.sh run [FILTER]    on the machine with the GPU: runs the packed or built binaries
# LIBTORCH_LIB names the folder with LibTorch's libraries; default: .deps, else that of python3's torch.
set -euo pipefail
cd "$(dirname "$0")/.."
packed=.carry/gpu

build() {
  tools/install_deps.sh
  cmake --preset cuda >/dev/null
  cmake --build --preset cuda --target hadal gpu_test kernel_test kernel_bench
}

pack() {
  build
  rm -rf "$packed"
  mkdir -p "$packed/lib"
  cp build/cuda/hadal build/cuda/gpu_test build/cuda/kernel_test build/cuda/kernel_bench "$packed/"
  cp build/cuda/libhadal.so build/cuda/libhadal_core.so "$packed/lib/"
  # What a distribution's minimal image lacks or has in another version.
  ldd build/cuda/hadal build/cuda/gpu_test | awk '$2 == "=>" && $1 ~ /lib(fmt|spdlog|pcre2|lzma|zstd|gtest|rocksdb|snappy|gflags|bz2|lz4|xxhash|ssl|crypto)/ { print $3 }' |
    sort -u | xargs -r cp -L -t "$packed/lib"
  strip --strip-unneeded "$packed/hadal" "$packed/gpu_test" "$packed/kernel_test" "$packed/kernel_bench" "$packed"/lib/*.so*
  tar -C .carry -cJf .carry/gpu.tar.xz gpu
  du -sh "$packed" .carry/gpu.tar.xz
}

# Prints the environment under which the binaries find their libraries, and their folder.
locate() {
  local torch=${LIBTORCH_LIB:-$PWD/.deps/libtorch-2.11.0/lib}
  [ -d "$torch" ] || torch=$(python3 -c 'import torch; print(torch.__path__[0] + "/lib")')
  if [ ! -d "$packed" ] && [ -f .carry/gpu.tar.xz ]; then tar -C .carry -xJf .carry/gpu.tar.xz; fi
  if [ -d "$packed" ]; then
    bin=$packed
    export LD_LIBRARY_PATH="$PWD/$packed/lib:$torch:${LD_LIBRARY_PATH:-}"
  else
    bin=build/cuda
    export LD_LIBRARY_PATH="$torch:${LD_LIBRARY_PATH:-}"
  fi
}

run() {
  locate
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  "$bin/kernel_test" --gtest_brief=1 --gtest_filter="${1:-*}"
  "$bin/gpu_test" --gtest_brief=1 --gtest_filter="${1:-*}"
}

case "${1:-}" in
  "") tools/install_deps.sh --gpu; build; run ;;
  pack) pack ;;
  run) run "${2:-*}" ;;
  *) sed -n '2,9p' "$0"; exit 2 ;;
esac
