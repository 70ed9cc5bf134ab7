#!/usr/bin/env bash
# The layer table, checked: a file under src/LAYER may include only what its line allows (docs/architecture.md).
# Usage: tools/check_layers.sh [ROOT]; prints each violation as "engine may not include train (file:line)".
set -euo pipefail
cd "${1:-$(dirname "$0")/..}"
find src -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | sort | xargs awk '
BEGIN {
  # layer: layers it may include directly; an arrow allows everything reachable from it.
  direct["base"] = ""
  direct["ops"] = direct["text"] = "base"
  direct["data"] = "text base"
  direct["dist"] = "ops"
  direct["model"] = "dist ops"
  direct["checkpoint"] = "model dist"
  direct["engine_core"] = "text"
  direct["engine"] = "engine_core checkpoint model"
  direct["train"] = "data checkpoint model"
  direct["post"] = "train engine data text"
  direct["server"] = "text engine_core"
  direct["apps"] = "base ops text data dist model checkpoint engine_core engine train post server"
  direct["testing"] = direct["apps"]
  for (layer in direct) close_over(layer, layer)
}
function close_over(root, layer,    parts, count, i) {
  allowed[root, layer] = 1
  count = split(direct[layer], parts, " ")
  for (i = 1; i <= count; i++) if (!((root, parts[i]) in allowed)) close_over(root, parts[i])
}
FNR == 1 { split(FILENAME, path, "/"); layer = path[2]; is_test = FILENAME ~ /_(test|bench|fuzz)\.(cpp|cu)$/ }
FILENAME == "src/pch.cpp" { next }
/^#include "/ {
  split($2, quoted, "\""); split(quoted[2], target, "/"); other = target[1]
  if (!(layer in direct)) { printf "%s is in no layer (%s)\n", layer, FILENAME; bad = 1; next }
  if (!(other in direct)) { printf "%s includes %s, which is no layer (%s:%d)\n", layer, other, FILENAME, FNR; bad = 1; next }
  if ((layer, other) in allowed || (is_test && other == "testing")) next
  printf "%s may not include %s (%s:%d)\n", layer, other, FILENAME, FNR
  bad = 1
}
/^#include <(ATen|c10|torch)\// && layer ~ /^(base|text|data|engine_core|server)$/ {
  printf "%s may not include LibTorch (%s:%d)\n", layer, FILENAME, FNR; bad = 1
}
END { exit bad }'
