#!/usr/bin/env bash
# Formatter, banned includes and calls. `--fix` formats in place.
set -euo pipefail
cd "$(dirname "$0")/.."
format=$(command -v clang-format || command -v clang-format-14 || true)
if [ -z "$format" ]; then
  echo "check_style: clang-format is missing; install it with: apt-get install -y clang-format" >&2
  exit 2
fi
mapfile -t files < <(git ls-files --cached --others --exclude-standard 'src/*.h' 'src/*.cpp' 'src/*.cu' 'src/*.cuh' 'tests/*.cpp' 'bench/*.cpp' 'bench/*.cu')
if [ "${1:-}" = "--fix" ]; then
  printf '%s\n' "${files[@]}" | xargs -P 2 -n 20 "$format" -i
  exit 0
fi
bad=0
printf '%s\n' "${files[@]}" | xargs -P 2 -n 20 "$format" --dry-run -Werror || bad=1
complain() { # text, lines
  if [ -n "$2" ]; then printf 'check_style: %s\n%s\n' "$1" "$2" >&2; bad=1; fi
}
complain 'these headers cost minutes of build time' \
  "$(grep -nE '#include *[<"]torch/(torch|extension|nn)' "${files[@]}" || true)"
complain 'kernels include no ATen or torch' \
  "$(grep -nE '#include *[<"](ATen|torch|c10)' $(printf '%s\n' "${files[@]}" | grep -E '\.cuh?$') /dev/null || true)"
complain 'nlohmann-json is included by .cpp files only' \
  "$(grep -nE '#include *<nlohmann/json.hpp>' $(printf '%s\n' "${files[@]}" | grep -E '\.h$') /dev/null || true)"
complain 'no using namespace' "$(grep -nE '^ *using namespace' "${files[@]}" || true)"
complain 'float atomics break determinism' \
  "$(grep -nE 'atomicAdd|red\.(global\.)?add\.(noftz\.)?f' $(printf '%s\n' "${files[@]}" | grep -E '\.cuh?$') /dev/null || true)"
complain 'no exit, abort or printf below apps' \
  "$(grep -nE '\b(std::)?(exit|abort|printf)\(' $(printf '%s\n' "${files[@]}" | grep -E '^src/' | grep -vE '^src/(apps|testing)/|_(test|fuzz)\.cpp$') /dev/null || true)"
complain 'lines over 100 columns' \
  "$(LC_ALL=C awk '{ line = $0; gsub(/[\200-\277]/, "", line) } length(line) > 100 { print FILENAME ":" FNR }' \
      $(printf '%s\n' "${files[@]}") | head -20 || true)"
exit $bad
