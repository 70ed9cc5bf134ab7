#!/usr/bin/env bash
# Installs client packages, unmodified, each into an environment of its own under .deps/clients-venv, and drives each
# against a server. Safe to repeat: what is installed is not installed again.
#
#   tools/clients.sh                      all of them, against the scripted server (built where it is missing)
#   tools/clients.sh --ci                 the few that every change is tested with
#   tools/clients.sh litellm aider        these
#   tools/clients.sh --hadal ./hadal      against `hadal serve` with the shipped model: the form of answers only
#   --install                             installs and runs nothing
set -euo pipefail
cd "$(dirname "$0")/.."

# name, program in tests/clients/packages, packages
clients=(
  "official -                  openai==3.57.0 anthropic==2.14.0"
  "litellm litellm             litellm==1.110.2"
  "openai-agents openai_agents openai-agents==0.24.0"
  "langchain-openai langchain_openai       langchain-openai==1.7.4"
  "langchain-anthropic langchain_anthropic langchain-anthropic==1.7.10"
  "pydantic-ai pydantic_ai     pydantic-ai-slim[openai,anthropic]==2.68.0"
  "instructor instructor       instructor==1.17.0 anthropic==2.14.0"
  "outlines outlines           outlines==1.3.3 openai==3.57.0"
  "llama-index llama_index     llama-index-core==0.14.25 llama-index-llms-openai-like==0.8.1"
  "haystack haystack           haystack-ai==3.4.1 anthropic-haystack==8.0.1"
  "inspect-ai inspect_ai       inspect-ai==0.3.285 openai==3.57.0 anthropic==2.14.0"
  "aider aider                 aider-chat==0.86.2"
  "lm-eval lm_eval             lm-eval[api]==0.4.13"
)
ci="official litellm openai-agents"
uv_version=0.13.9

wanted="" hadal="" install_only=""
while [ $# -gt 0 ]; do
  case "$1" in
    --ci) wanted=$ci ;;
    --hadal) hadal=${2:?--hadal needs a program}; shift ;;
    --install) install_only=yes ;;
    -*) echo "clients: no option $1; --ci, --hadal and --install are known" >&2; exit 2 ;;
    *) wanted="$wanted $1" ;;
  esac
  shift
done
for name in $wanted; do
  printf '%s\n' "${clients[@]}" | grep -q "^$name " || { echo "clients: no client $name" >&2; exit 2; }
done

deps=$PWD/.deps/clients-venv
uv=$deps/uv/bin/uv
mkdir -p "$deps"
# The certificates that pip was told of serve uv as well.
if [ -n "${PIP_CERT:-}" ]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}; fi
export UV_CACHE_DIR=$deps/cache UV_NO_PROGRESS=1
install_client() {
  local name=$1
  shift
  local folder=$deps/$name
  [ "$(cat "$folder/installed" 2>/dev/null)" = "$*" ] && return
  if ! [ -x "$uv" ]; then
    python3 -m pip install --quiet --disable-pip-version-check --target "$deps/uv" "uv==$uv_version"
  fi
  echo "clients: installing $*" >&2
  rm -rf "$folder"
  "$uv" venv --quiet --python python3 "$folder"
  "$uv" pip install --quiet --python "$folder/bin/python" "$@"
  echo "$*" >"$folder/installed"
}

selected=()
for client in "${clients[@]}"; do
  read -r name program packages <<<"$client"
  case " $wanted " in "  " | *" $name "*) ;; *) continue ;; esac
  selected+=("$name $program")
  # shellcheck disable=SC2086  # the packages are several words
  install_client "$name" $packages
done
[ -n "$install_only" ] && exit 0

free=()
if [ -n "$hadal" ]; then
  free=(--free)
  model=hadal-nano
  log=$(mktemp)
  "$hadal" serve --port 0 --name $model --name claude-$model --max-running 8 2>"$log" &
  server=$!
  stop_server() { kill "$server" 2>/dev/null; wait "$server" || true; rm -f "$log"; }
  for _ in $(seq 600); do
    grep -q ' at http' "$log" && break
    kill -0 "$server" 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 0.1
  done
  url=$(sed -n 's/.* at \(http[^,]*\),.*/\1/p' "$log" | head -n 1 || true)
else
  # The newest there is.
  binary=$(ls -t build/*/scripted_server 2>/dev/null | head -n 1 || true)
  if [ -z "$binary" ]; then
    cmake --preset core >/dev/null
    cmake --build --preset core --target scripted_server >/dev/null
    binary=build/core/scripted_server
  fi
  model=scripted
  coproc SERVER { exec "$binary"; }
  server=$SERVER_PID input=${SERVER[1]}
  stop_server() { eval "exec $input>&-"; wait "$server" 2>/dev/null || true; }
  read -r url <&"${SERVER[0]}"
fi
trap stop_server EXIT

passed=0 failed=0
for entry in "${selected[@]}"; do
  read -r name program <<<"$entry"
  if [ "$program" = - ]; then
    command=(tests/clients/client_test.py)
  else
    command=("tests/clients/packages/${program}_client.py" --model "$model")
  fi
  echo "=== $name"
  if timeout 600 "$deps/$name/bin/python" "${command[@]}" --url "$url" --key test-key \
      ${free[@]+"${free[@]}"} </dev/null >"$deps/$name.log" 2>&1; then
    tail -n 1 "$deps/$name.log"
    passed=$((passed + 1))
  else
    tail -n 30 "$deps/$name.log"
    failed=$((failed + 1))
  fi
done
echo "clients: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
