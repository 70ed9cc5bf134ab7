#!/usr/bin/env bash
# Installs what hadal needs to build and run: system packages (Debian 12, Ubuntu 24.04) and LibTorch
# (headers and libraries of the PyPI wheel, unpacked under .deps/; no Python is used at run time).
# Safe to repeat; does nothing when everything is there. `--check` only reports; `--tools` installs what only checks and
# fuzzers need (clang-format, clang 19).
set -euo pipefail
cd "$(dirname "$0")/.."

check_only=0
[ "${1:-}" = "--check" ] && check_only=1
tools_only=0
[ "${1:-}" = "--tools" ] && tools_only=1

packages=(g++ cmake make ninja-build ccache mold git unzip xz-utils python3 python3-pip
  nlohmann-json3-dev libcli11-dev libfmt-dev libspdlog-dev libpcre2-dev liblzma-dev libzstd-dev
  libgtest-dev libbenchmark-dev)

if [ $tools_only -eq 1 ]; then
  packages=(clang-format clang-19 libclang-rt-19-dev)
fi

torch_version=2.11.0
cuda_runtime_version=13.0.96
cuda_cupti_version=13.0.85
deps=$PWD/.deps
torch_dir=$deps/libtorch-$torch_version

# --- system packages -------------------------------------------------------------------------------
missing=()
if command -v dpkg-query >/dev/null 2>&1; then
  for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
else
  echo "install_deps: this is not a Debian or Ubuntu system; install by hand what these packages hold:" >&2
  echo "  ${packages[*]}" >&2
fi
if [ ${#missing[@]} -gt 0 ]; then
  sudo=""
  if [ "$(id -u)" -ne 0 ]; then
    if command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then sudo="sudo"; else sudo="none"; fi
  fi
  if [ $check_only -eq 1 ] || [ "$sudo" = none ]; then
    echo "install_deps: missing system packages: ${missing[*]}" >&2
    echo "install_deps: install them as root with: apt-get install -y ${missing[*]}" >&2
    exit 2
  fi
  echo "install_deps: installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  $sudo apt-get update -qq
  if ! $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; then
    echo "install_deps: apt-get could not install: ${missing[*]}" >&2
    exit 2
  fi
fi

[ $tools_only -eq 1 ] && exit 0

# --- LibTorch --------------------------------------------------------------------------------------
if [ -e "$torch_dir/.complete" ]; then
  [ $check_only -eq 1 ] && echo "install_deps: complete"
  exit 0
fi
if [ $check_only -eq 1 ]; then
  echo "install_deps: LibTorch $torch_version is missing in $torch_dir; run tools/install_deps.sh" >&2
  exit 2
fi
case "$(uname -m)" in
  x86_64) ;;
  *) echo "install_deps: no LibTorch $torch_version wheel is used for $(uname -m); x86_64 is needed" >&2; exit 2 ;;
esac
mkdir -p "$deps"
work=$(mktemp -d "$deps/download.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "install_deps: fetching LibTorch $torch_version (about 530 MB)"
fetch() {
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --abi cp312 --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$work" "$@"
}
if ! fetch "torch==$torch_version" "nvidia-cuda-runtime==$cuda_runtime_version" "nvidia-cuda-cupti==$cuda_cupti_version"; then
  echo "install_deps: pip could not fetch torch==$torch_version and the CUDA runtime it loads;" >&2
  echo "  without network, unpack a LibTorch $torch_version into $torch_dir (include/, lib/) and create $torch_dir/.complete" >&2
  exit 2
fi
mkdir "$work/unpacked"
for wheel in "$work"/*.whl; do unzip -q -o "$wheel" -d "$work/unpacked"; done
mkdir "$work/libtorch"
mv "$work/unpacked/torch/include" "$work/unpacked/torch/lib" "$work/libtorch/"
mv "$work"/unpacked/nvidia/cu13/lib/libcudart.so.13 "$work"/unpacked/nvidia/cu13/lib/libcupti.so.13 "$work/libtorch/lib/"
rm -f "$work/libtorch/lib/libtorch_python.so" "$work/libtorch/lib/libtorch_nvshmem.so"
touch "$work/libtorch/.complete"
rm -rf "$torch_dir"
mv "$work/libtorch" "$torch_dir"
echo "install_deps: LibTorch $torch_version is in $torch_dir"
