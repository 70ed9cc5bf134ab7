#!/usr/bin/env bash
# Builds the fuzz targets (src/**/x_fuzz.cpp, ASan and UBSan, clang) and runs them.
#
#   tools/fuzz.sh [EXECUTIONS | SECONDSs] [TARGET...]     default: 1000000 executions of every target
#
# A target's corpus, build/fuzz/corpus/TARGET, grows from run to run; it begins with the seeds and the
# dictionary beside the source (src/<layer>/fuzz/TARGET/ and TARGET.dict). One line a target; fails on
# any finding and names the file that reproduces it: build/fuzz/TARGET FILE. HADAL_FUZZ_JOBS targets
# run at a time (default: the processors).
set -euo pipefail
cd "$(dirname "$0")/.."
limit=(-runs=1000000)
case "${1:-}" in
  [0-9]*s) limit=(-max_total_time="${1%s}"); shift ;;
  [0-9]*) limit=(-runs="$1"); shift ;;
  -*) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

mapfile -t targets < <(printf '%s\n' "$@" | grep . || find src -name '*_fuzz.cpp' -printf '%f\n' | sed 's/\.cpp$//' | sort)
cmake --preset fuzz >/dev/null
cmake --build --preset fuzz --target "${targets[@]}" >build/fuzz/build.log 2>&1 || { tail -n 40 build/fuzz/build.log >&2; exit 1; }

run_target() { # the target, then libFuzzer's options
  local target=$1 seeds dictionary status=0
  shift
  local corpus=build/fuzz/corpus/$target findings=build/fuzz/findings/$target log=build/fuzz/$target.log
  rm -rf "$findings"
  mkdir -p "$corpus" "$findings"
  seeds=$(find src -type d -path "*/fuzz/$target")
  dictionary=$(find src -name "$target.dict")
  # Every exception sweeps ASan's fake stack, whose default size would take half of the time. Leaks are
  # looked for at the end: targets keep things from one execution to the next.
  local asan=max_uar_stack_size_log=16:malloc_context_size=3:quarantine_size_mb=16
  ASAN_OPTIONS=${ASAN_OPTIONS:-$asan} "build/fuzz/$target" "$@" -max_len=4096 -timeout=20 \
    -detect_leaks=0 -rss_limit_mb=3000 -print_final_stats=1 ${dictionary:+-dict="$dictionary"} \
    -artifact_prefix="$findings/" "$corpus" $seeds >"$log" 2>&1 || status=$?
  local found=("$findings"/*)
  [ -e "${found[0]}" ] || found=()
  if [ "$status" -ne 0 ] && [ "${#found[@]}" -eq 0 ]; then found=("$log"); fi  # a leak, or interrupted
  awk -v target="$target" -v findings="${#found[@]}" '
    /^stat::number_of_executed_units/ { runs = $2 }
    /^stat::average_exec_per_sec/ { rate = $2 }
    / cov: / { for (i = 1; i < NF; ++i) { if ($i == "cov:") cov = $(i + 1); if ($i == "corp:") corpus = $(i + 1) } }
    END { sub("/.*", "", corpus)
      printf "%-18s %9d executions %7d/s  coverage %5d  corpus %5d  findings %d\n", target, runs, rate, cov, corpus, findings }
    ' "$log"
  grep '^reached: ' "$log" | sed 's/^reached: /    /' || true
  [ "${#found[@]}" -eq 0 ] && return
  # Enough to mend it from this text alone: what the target or a sanitizer said, and the input.
  grep -aE -A 12 '^==[0-9]+==ERROR|runtime error:|^SUMMARY' "$log" | cut -c 1-160 | head -n 24 | sed 's/^/    /' || true
  printf '    reproduce: build/fuzz/%s %s\n' "$target" "${found[0]}"
  if [ "${found[0]}" != "$log" ]; then
    printf '    its bytes: base64 -d <<<'
    base64 -w 0 "${found[0]}" && echo
  fi
  return 1
}
export -f run_target
printf '%s\n' "${targets[@]}" |
  xargs -P "${HADAL_FUZZ_JOBS:-$(nproc)}" -I {} bash -c 'out=$(run_target "$@") && status=0 || status=$?; echo "$out"; exit $status' \
    run {} "${limit[@]}"
