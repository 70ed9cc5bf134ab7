#!/usr/bin/env bash
# Files of more than 500 lines and functions of more than 80 are in tools/long.txt, each with the reason. Usage: tools/check_sizes.sh
# A function is what begins at the left margin, ends in "{" and is closed by "}" there.
set -euo pipefail
cd "$(dirname "$0")/.."
git ls-files 'src/*.h' 'src/*.cpp' 'src/*.cu' 'src/*.cuh' 'tests/*.h' 'tests/*.cpp' 'bench/*' | xargs awk '
function report(name, lines, limit) {
  if (name in known) { seen[name] = 1; return }
  printf "check_sizes: %s has %d lines, at most %d (or a reason in tools/long.txt)\n", name, lines, limit
  bad = 1
}
function end_file() { if (file != "" && count > 500) report(file, count, 500) }
BEGIN {
  while ((getline line < "tools/long.txt") > 0) if (line !~ /^(#|$)/) { split(line, parts, " "); known[parts[1]] = 1 }
}
FNR == 1 { end_file(); file = FILENAME; begin = 0 }
{ count = FNR }
/^[^ \t#\/}].*\{$/ && !/^(namespace|struct|class|enum|union|extern|const|constexpr|constinit|static const|inline const)[ (]/ { begin = FNR; head = $0 }
/^[^ \t#\/}].*\($/ || /^[^ \t#\/}].*,$/ { if (!begin && !/^(class|struct|enum|union|extern|constexpr|constinit)/) { start = FNR; first = $0 } }
/^ .*\) (const )?\{$/ { if (!begin && start) { begin = start; head = first } }
/^}/ {
  if (begin && FNR - begin + 1 > 80) {
    name = head
    if (name ~ /^TEST/) { sub(/\).*/, "", name); sub(/.*, */, "", name) }
    else { sub(/__launch_bounds__\([^)]*\) */, "", name); sub(/\(.*/, "", name); sub(/.*[ *&]/, "", name) }
    report(file ":" name, FNR - begin + 1, 80)
  }
  begin = start = 0
}
END { end_file(); for (name in known) if (!(name in seen)) { printf "check_sizes: tools/long.txt names %s, which is short\n", name; bad = 1 }; exit bad }'
