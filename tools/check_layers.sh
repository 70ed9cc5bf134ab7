#!/usr/bin/env bash
# The layer table, checked: a file under src/LAYER may include only what its line allows, and one in a room (a folder of a layer
# that has a table of rooms) only rooms that its line allows (docs/architecture.md). No file includes itself round about. A layer has
# one namespace.
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
  direct["load"] = "server"
  direct["apps"] = "base ops text data dist model checkpoint engine_core engine train post server load"
  direct["testing"] = direct["apps"]
  for (layer in direct) close_over(layer, layer)

  # layer/room: rooms of the layer it may include, all of them named; "." is the layer itself. Test files may include any.
  rooms["ops/."] = "cpu"
  rooms["ops/cpu"] = ""
  rooms["ops/cuda"] = "."
  rooms["ops/rows"] = rooms["ops/norm"] = rooms["ops/quant"] = ". cpu cuda"
  rooms["ops/loss"] = rooms["ops/mhc"] = ". cpu cuda gemm"
  rooms["ops/optim"] = ". cpu gemm"
  rooms["ops/sampling"] = ". cpu cuda"
  rooms["ops/cache"] = ". cpu cuda"
  rooms["ops/gemm"] = ". cpu cuda quant norm"
  rooms["ops/moe"] = ". cpu cuda gemm"
  rooms["ops/absent"] = ". attention cache compressor gemm indexer mhc moe norm sampling"
  rooms["ops/twin"] = ". cpu attention cache norm quant gemm"
  rooms["ops/attention"] = ". cpu cuda cache rows gemm norm"
  rooms["ops/compressor"] = ". cpu cuda cache rows gemm"
  rooms["ops/indexer"] = ". cpu cuda cache rows gemm quant"
  rooms["engine_core/."] = ""
  rooms["engine_core/prefix"] = rooms["engine_core/grammar"] = "."
  rooms["engine_core/disk"] = ". prefix"
  rooms["engine_core/answer"] = ". grammar"
  rooms["engine_core/schedule"] = ". prefix answer"
  for (room in rooms) { split(room, parts, "/"); has_rooms[parts[1]] = 1 }
}
function close_over(root, layer,    parts, count, i) {
  allowed[root, layer] = 1
  count = split(direct[layer], parts, " ")
  for (i = 1; i <= count; i++) if (!((root, parts[i]) in allowed)) close_over(root, parts[i])
}
function room_of(path,    parts, count) { count = split(path, parts, "/"); return count > 2 ? parts[2] : "." }
function check_room(path, other,    room, target) {
  room = room_of(path); target = room_of(other)
  if (room == target) return
  if (!((layer "/" room) in rooms)) { printf "%s/%s is in no table of rooms (%s)\n", layer, room, FILENAME; bad = 1; return }
  if (index(" " rooms[layer "/" room] " ", " " target " ") > 0) return
  printf "%s/%s may not include %s/%s (%s:%d)\n", layer, room, layer, target, FILENAME, FNR
  bad = 1
}
# Depth first over includes; a file that is met again while it is open closes a circle.
function visit(file, trail,    parts, count, i) {
  state[file] = 1
  count = split(includes[file], parts, " ")
  for (i = 1; i <= count; i++) {
    if (!(parts[i] in state)) visit(parts[i], trail " " file " ->")
    else if (state[parts[i]] == 1) { printf "circle of includes: %s %s -> %s\n", trail, file, parts[i]; bad = 1 }
  }
  state[file] = 2
}
FNR == 1 { split(FILENAME, path, "/"); layer = path[2]; is_test = FILENAME ~ /_(test|bench|fuzz)\.(cpp|cu)$/; own = substr(FILENAME, 5) }
FILENAME == "src/pch.cpp" { next }
/^#include "/ {
  split($2, quoted, "\""); split(quoted[2], target, "/"); other = target[1]
  includes[own] = includes[own] " " quoted[2]
  if (!(layer in direct)) { printf "%s is in no layer (%s)\n", layer, FILENAME; bad = 1; next }
  if (!(other in direct)) { printf "%s includes %s, which is no layer (%s:%d)\n", layer, other, FILENAME, FNR; bad = 1; next }
  if (layer == other && layer in has_rooms && !is_test) check_room(own, quoted[2])
  if ((layer, other) in allowed || (is_test && other == "testing")) next
  printf "%s may not include %s (%s:%d)\n", layer, other, FILENAME, FNR
  bad = 1
}
/^#include <(ATen|c10|torch)\// && layer ~ /^(base|text|data|engine_core|server|load)$/ {
  printf "%s may not include LibTorch (%s:%d)\n", layer, FILENAME, FNR; bad = 1
}
# A layer has one namespace; beside it others may be opened, for a declaration.
/^namespace hadal/ {
  name = $2; sub(/^hadal(::)?/, "", name); sub(/::.*/, "", name)
  opened[FILENAME] = opened[FILENAME] " " name
  if (name == (layer == "base" ? "" : layer) || (layer == "base" && name == "log")) owned[FILENAME] = 1
}
END { for (file in opened) if (!(file in owned)) { printf "%s is in namespace%s, not in that of its layer\n", file, opened[file]; bad = 1 } }
END { for (file in includes) if (!(file in state)) visit(file, ""); exit bad }'
