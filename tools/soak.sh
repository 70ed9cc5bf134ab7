#!/usr/bin/env bash
# What takes too long for every change, on a quiet machine: tools/soak.sh [PART...], all parts without arguments. Stops at the
# first part that fails; prints figures for docs/log.md. Parts: see docs/serving.md.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory build
hadal=$PWD/hadal
build=$(dirname "$(readlink -f "$hadal")")
[ $# -gt 0 ] || set -- batch prefix speculation schedules schemas calls kills load
for part in "$@"; do
  began=$SECONDS
  echo "=== $part"
  case $part in
    batch) tools/soak/batch_server.py --hadal "$hadal" --rounds 5 ;;
    prefix) tools/soak/prefix_server.py --hadal "$hadal" ;;
    speculation)
      tools/soak/speculation.py --hadal "$hadal" --text "${HADAL_TEXT:-../shared/data/books-longctx/books-longctx.jsonl.xz}"
      ;;
    schemas) HADAL_SCHEMAS=${HADAL_SCHEMAS:-200} "$build/cross_test" --gtest_filter='*Constrained*' --gtest_brief=1 ;;
    calls) tools/soak/forced_calls.py --hadal "$hadal" ;;
    schedules)
      HADAL_SCHEDULES=${HADAL_SCHEDULES:-500} "$build/model_test" --gtest_filter='*SchedulesTest*' --gtest_brief=1
      HADAL_SCHEDULES=${HADAL_SCHEDULES:-500} "$build/cross_test" --gtest_filter='NanoSchedules*' --gtest_brief=1
      ;;
    kills)
      for policy in full periodic zero; do
        tools/soak/kill_server.py --hadal "$hadal" --policy "$policy" --kills "${HADAL_KILLS:-200}"
      done
      ;;
    load) tools/soak/load_server.py --hadal "$hadal" --minutes "${HADAL_MINUTES:-30}" ;;
    *) echo "soak.sh: no part $part; parts are batch prefix speculation schedules schemas calls kills load" >&2; exit 2 ;;
  esac
  echo "--- $part: $((SECONDS - began)) s"
done
