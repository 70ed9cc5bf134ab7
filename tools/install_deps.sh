#!/usr/bin/env bash
# Installs what hadal needs to build and run: system packages (Debian 12, Ubuntu 24.04) and LibTorch
# (headers and libraries of the PyPI wheel, unpacked under .deps/; no Python is used at run time), and the sources of
# xgrammar's C++ core.
# Safe to repeat and to interrupt: wheels that arrived are kept until they are unpacked, and nothing appears under its
# name before it is whole. Does nothing when everything is there.
#   --check  only reports what is missing
#   --tools  installs what only checks and fuzzers need (clang-format, clang 19, clang-tidy 19)
#   --clients installs the Python packages of OpenAI and Anthropic under .deps/clients, for the test that drives them
#   --browser installs what the test of the web page needs (Debian's chromium and chromium-driver)
#   --gpu    also the CUDA libraries that LibTorch needs to run on a GPU (about 2.4 GB, PyPI), under .deps/nvidia
#   --cuda   unpacks a CUDA compiler under .deps/ when there is no nvcc; enough to compile the kernels, not to run them
set -euo pipefail
cd "$(dirname "$0")/.."

mode=${1:-}
case "$mode" in
  "" | --check | --tools | --clients | --browser | --cuda | --gpu) ;;
  *) echo "install_deps: no option $mode; --check, --tools, --clients, --browser, --gpu and --cuda are known" >&2; exit 2 ;;
esac

packages=(g++ cmake make ninja-build unzip xz-utils python3 python3-pip
  nlohmann-json3-dev libcli11-dev libfmt-dev libspdlog-dev libpcre2-dev liblzma-dev libzstd-dev zlib1g-dev
  librocksdb-dev libxxhash-dev libboost-dev libssl-dev libgtest-dev libbenchmark-dev libedit-dev pkg-config)
comforts=(ccache mold git)  # builds are faster with them; nothing fails without
if [ "$mode" = --tools ]; then
  packages=(clang-format clang-19 clang-tidy-19 libclang-rt-19-dev)
  comforts=()
elif [ "$mode" = --browser ]; then
  packages=(chromium chromium-driver fonts-dejavu-core)
  comforts=()
fi

torch_version=2.11.0
cuda_runtime=nvidia-cuda-runtime==13.0.96
torch_wheels=("torch==$torch_version" "$cuda_runtime" nvidia-cuda-cupti==13.0.85)
cuda_wheels=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 "$cuda_runtime"
  nvidia-cuda-cccl==13.0.85)
deps=$PWD/.deps
torch_dir=$deps/libtorch-$torch_version
cuda_dir=$deps/cuda-13.0
xgrammar_version=0.2.8
xgrammar_sha256=8305646fd2b319d6c3003f51a1665e54cbbe9cba1fb636bc41d0b46434ccbb80
xgrammar_dir=$deps/xgrammar-$xgrammar_version

# --- system packages -------------------------------------------------------------------------------
missing=()
missing_comforts=()
installed() { dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'ok installed'; }
if command -v dpkg-query >/dev/null 2>&1; then
  for package in "${packages[@]}"; do
    # pkgconf took over from pkg-config; either will do.
    [ "$package" = pkg-config ] && command -v pkg-config >/dev/null 2>&1 && continue
    installed "$package" || missing+=("$package")
  done
  for package in ${comforts[@]+"${comforts[@]}"}; do
    installed "$package" || missing_comforts+=("$package")
  done
else
  echo "install_deps: this is not a Debian or Ubuntu system; install by hand what these packages hold:" >&2
  echo "  ${packages[*]} ${comforts[*]-}" >&2
fi
wanted=(${missing[@]+"${missing[@]}"} ${missing_comforts[@]+"${missing_comforts[@]}"})
if [ ${#wanted[@]} -gt 0 ]; then
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    as_root=(none)
    if command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then as_root=(sudo); fi
  fi
  if [ "$mode" = --check ] || [ "${as_root[*]-}" = none ]; then
    if [ ${#missing[@]} -gt 0 ]; then
      echo "install_deps: missing system packages: ${missing[*]}" >&2
      echo "install_deps: install them as root with: apt-get install -y ${wanted[*]}" >&2
      exit 2
    fi
    echo "install_deps: going on without ${missing_comforts[*]}" >&2
  else
    echo "install_deps: installing ${wanted[*]}"
    as_root+=(env DEBIAN_FRONTEND=noninteractive)
    log=$(mktemp)
    if ! { "${as_root[@]}" apt-get update -qq &&
           "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${wanted[@]}"; } >"$log" 2>&1; then
      tail -n 5 "$log" >&2
      rm -f "$log"
      echo "install_deps: apt-get could not install: ${wanted[*]}" >&2
      exit 2
    fi
    rm -f "$log"
  fi
fi
case "$mode" in --tools | --browser) exit 0 ;; esac
if [ "$mode" = --clients ]; then
  clients=(openai==3.57.0 anthropic==2.14.0)
  if [ "$(cat "$deps/clients/installed" 2>/dev/null)" != "${clients[*]}" ]; then
    echo "install_deps: fetching ${clients[*]}" >&2
    rm -rf "$deps/clients"
    python3 -m pip install --quiet --disable-pip-version-check --target "$deps/clients" "${clients[@]}"
    echo "${clients[*]}" >"$deps/clients/installed"
  fi
  exit 0
fi

# --- xgrammar ---------------------------------------------------------------------------------------
# The source package (2.6 MB); cmake/xgrammar.cmake builds its C++ core.
take_lock() {
  mkdir -p "$deps/download"
  command -v flock >/dev/null 2>&1 || return 0
  exec 9>"$deps/download/lock"
  flock -n 9 || { echo "install_deps: waiting for another install_deps in $deps" >&2; flock 9; }
}
install_xgrammar() {
  local folder=$deps/download/xgrammar package=xgrammar-$xgrammar_version.tar.gz
  take_lock
  [ -e "$xgrammar_dir/.complete" ] && return
  echo "install_deps: fetching xgrammar $xgrammar_version (about 3 MB)"
  mkdir -p "$folder"
  if ! echo "$xgrammar_sha256  $folder/$package" | sha256sum -c --status 2>/dev/null &&
      ! python3 -m pip download -q --disable-pip-version-check --no-deps --no-binary=xgrammar -d "$folder" \
        "xgrammar==$xgrammar_version"; then
    echo "install_deps: pip could not fetch the source package of xgrammar $xgrammar_version; the same command tries again." >&2
    echo "  Without network, unpack it into $xgrammar_dir and create $xgrammar_dir/.complete" >&2
    exit 2
  fi
  if ! echo "$xgrammar_sha256  $folder/$package" | sha256sum -c --status; then
    echo "install_deps: $folder/$package has not the SHA-256 $xgrammar_sha256" >&2
    exit 2
  fi
  tar -xzf "$folder/$package" -C "$folder" "xgrammar-$xgrammar_version"/{cpp,include,LICENSE,NOTICE} \
    "xgrammar-$xgrammar_version/3rdparty"/{dlpack/include,dlpack/LICENSE,picojson}
  touch "$folder/xgrammar-$xgrammar_version/.complete"
  rm -rf "$xgrammar_dir"
  mv "$folder/xgrammar-$xgrammar_version" "$xgrammar_dir"
  rm -rf "$folder"
}
if [ ! -e "$xgrammar_dir/.complete" ] && [ "$mode" != --cuda ]; then
  if [ "$mode" = --check ]; then
    echo "install_deps: xgrammar $xgrammar_version is missing in $xgrammar_dir; run tools/install_deps.sh" >&2
    exit 2
  fi
  install_xgrammar
fi

# --- wheels ----------------------------------------------------------------------------------------
# fetch FOLDER REQUIREMENT...: wheels for Linux on x86_64, one by one; what is there already is not fetched again.
fetch() {
  local folder=$1 requirement name version wheel
  shift
  mkdir -p "$folder" "$deps/download/tmp"
  for requirement in "$@"; do
    name=${requirement%%==*} version=${requirement##*==}
    for wheel in "$folder/${name//-/_}-$version"-*.whl; do
      [ -e "$wheel" ] && unzip -tqq "$wheel" >/dev/null 2>&1 && continue 2
    done
    rm -f "$folder/${name//-/_}-$version"-*.whl
    if ! TMPDIR=$deps/download/tmp python3 -m pip download -q --disable-pip-version-check --no-deps \
        --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi none \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 -d "$folder" "$requirement"; then
      echo "install_deps: pip could not fetch $requirement" >&2
      return 1
    fi
  done
}

if [ "$mode" = --gpu ] && [ -e "$torch_dir/.complete" ] && [ -e "$deps/nvidia/.complete" ]; then exit 0; fi
if [ "$mode" != --cuda ] && [ "$mode" != --gpu ] && [ -e "$torch_dir/.complete" ]; then
  [ "$mode" = --check ] && echo "install_deps: complete"
  exit 0
fi
if [ "$mode" = --check ]; then
  echo "install_deps: LibTorch $torch_version is missing in $torch_dir; run tools/install_deps.sh" >&2
  exit 2
fi
if [ "$mode" = --cuda ] && { command -v nvcc >/dev/null 2>&1 || [ -e "$cuda_dir/.complete" ]; }; then exit 0; fi
case "$(uname -m)" in
  x86_64) ;;
  *) echo "install_deps: no wheel of LibTorch $torch_version or CUDA is used for $(uname -m); x86_64 is needed" >&2; exit 2 ;;
esac
for program in python3 unzip; do
  command -v "$program" >/dev/null 2>&1 || { echo "install_deps: $program is missing" >&2; exit 2; }
done
if ! python3 -m pip --version >/dev/null 2>&1; then
  echo "install_deps: python3 has no pip; install python3-pip" >&2
  exit 2
fi
take_lock
rm -rf "$deps/download/tmp" "$deps"/download.?????? "$deps/unpacked"  # left by one that was killed

if [ "$mode" = --cuda ]; then
  [ -e "$cuda_dir/.complete" ] && exit 0
  echo "install_deps: fetching a CUDA 13.0 compiler (about 105 MB)"
  fetch "$deps/download/cuda" "${cuda_wheels[@]}" || exit 2
  for wheel in "$deps"/download/cuda/*.whl; do unzip -q -o "$wheel" 'nvidia/cu13/*' -d "$deps/unpacked"; done
  root=$deps/unpacked/nvidia/cu13
  chmod -R a+rX,u+w "$root"
  find "$root/bin" "$root/nvvm/bin" -type f -exec chmod a+x {} +
  ln -sfn lib "$root/lib64"
  touch "$root/.complete"
  rm -rf "$cuda_dir"
  mv "$root" "$cuda_dir"
  rm -rf "$deps/unpacked" "$deps/download/cuda"
  echo "install_deps: nvcc is in $cuda_dir/bin"
  exit 0
fi

# The CUDA libraries of the same wheel's requirements, where libtorch_cuda.so looks for them: beside its folder.
gpu_libraries() {
  [ -e "$deps/nvidia/.complete" ] && return
  echo "install_deps: fetching the CUDA libraries of LibTorch $torch_version (about 2.4 GB)"
  local folder=$deps/download/gpu wheel
  mkdir -p "$folder"
  if ! TMPDIR=$deps/download/tmp python3 -m pip download -q --disable-pip-version-check --only-binary=:all: \
      --python-version 3.12 --implementation cp --abi cp312 --abi none $(printf -- '--platform manylinux_2_%s_x86_64 ' \
        35 34 31 28 27 26 25 24 18 17 5) --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
      -d "$folder" "torch==$torch_version"; then
    echo "install_deps: pip could not fetch the CUDA libraries; the same command tries again" >&2
    exit 2
  fi
  rm -rf "$deps/unpacked"
  for wheel in "$folder"/nvidia_*.whl; do
    unzip -q -o "$wheel" 'nvidia/*/lib/*' -d "$deps/unpacked" || [ $? -eq 11 ]
  done
  unzip -q -o "$folder"/torch-*.whl 'torch/lib/libtorch_nvshmem.so' -d "$deps/unpacked"
  mv -f "$deps/unpacked/torch/lib/libtorch_nvshmem.so" "$torch_dir/lib/"
  touch "$deps/unpacked/nvidia/.complete"
  rm -rf "$deps/nvidia"
  mv "$deps/unpacked/nvidia" "$deps/nvidia"
  rm -rf "$deps/unpacked" "$folder"
  echo "install_deps: CUDA's libraries are in $deps/nvidia"
}
if [ -e "$torch_dir/.complete" ]; then
  mkdir -p "$deps/download/tmp"
  [ "$mode" = --gpu ] && gpu_libraries
  exit 0
fi
echo "install_deps: fetching LibTorch $torch_version (about 530 MB)"
if ! fetch "$deps/download/torch" "${torch_wheels[@]}"; then
  echo "install_deps: LibTorch $torch_version and the CUDA runtime it loads are needed; the same command tries again." >&2
  echo "  Without network, unpack a LibTorch $torch_version into $torch_dir (include/, lib/) and create $torch_dir/.complete" >&2
  exit 2
fi
unpacked=$deps/unpacked
for wheel in "$deps"/download/torch/*.whl; do
  case "$wheel" in
    */torch-*) unzip -q -o "$wheel" 'torch/include/*' 'torch/lib/*' -d "$unpacked" ;;
    *) unzip -q -o "$wheel" 'nvidia/cu13/lib/*' -d "$unpacked" ;;
  esac
done
mkdir "$unpacked/libtorch"
mv "$unpacked/torch/include" "$unpacked/torch/lib" "$unpacked/libtorch/"
mv "$unpacked"/nvidia/cu13/lib/libcudart.so.13 "$unpacked"/nvidia/cu13/lib/libcupti.so.13 "$unpacked/libtorch/lib/"
rm -f "$unpacked/libtorch/lib/libtorch_python.so" "$unpacked/libtorch/lib/libtorch_nvshmem.so"
touch "$unpacked/libtorch/.complete"
rm -rf "$torch_dir"
mv "$unpacked/libtorch" "$torch_dir"
rm -rf "$unpacked" "$deps/download/torch"
echo "install_deps: LibTorch $torch_version is in $torch_dir"
if [ "$mode" = --gpu ]; then gpu_libraries; fi
