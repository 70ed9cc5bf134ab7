#!/usr/bin/env bash
# tools/check_docs.py finds what it is there to find.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
git -C "$root" init -q
mkdir -p "$root"/src/ops "$root"/docs/decisions
printf '# Model\n\n## 2 Norms\n\n### 2.1 Weighted\n' > "$root/docs/model.md"
printf '# Trees\n' > "$root/docs/decisions/0001-trees.md"
printf '// Norms (model.md 2, 2.1; docs/decisions/0001-trees.md).\nint rms_norm();\n' > "$root/src/ops/norm.h"
printf '# Map\n\n| norm | `ops/norm.h` `rms_norm` | [2.1](model.md#21-weighted) |\n' > "$root/docs/map.md"
tools/check_docs.py "$root" || { echo "check_docs_test: refuses a correct tree"; exit 1; }
expect() { # file, text, message
  cp "$root/$1" "$root/kept"
  printf '%s\n' "$2" >> "$root/$1"
  if output=$(tools/check_docs.py "$root" 2>&1); then echo "check_docs_test: accepts '$2' in $1"; exit 1; fi
  case "$output" in *"$3"*) ;; *) echo "check_docs_test: expected '$3', found '$output'"; exit 1 ;; esac
  mv "$root/kept" "$root/$1"
}
expect src/ops/norm.h '// model.md 2 to 3' 'model.md has no section 3'
expect src/ops/norm.h '// see spec.md 4' 'no page spec.md'
expect docs/map.md '| x | `ops/norm.cpp` |' 'no ops/norm.cpp'
expect docs/map.md '| x | `ops/norm.h` `layer_norm` |' 'src/ops/norm.h does not have layer_norm'
expect docs/map.md '[x](modell.md)' 'no modell.md'
expect docs/map.md '[x](model.md#22-heads)' 'docs/model.md has no heading #22-heads'
echo "check_docs_test: ok"
