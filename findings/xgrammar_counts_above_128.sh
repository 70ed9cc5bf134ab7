#!/usr/bin/env bash
# xgrammar 0.2.8: a count above 128 in a string's pattern makes every token's mask thousands of times slower.
#
# A JSON schema's pattern with a bounded count is compiled to an automaton, copy by copy, and a mask takes a
# microsecond whatever the vocabulary. One would expect a larger count to cost more at compiling. It does not:
# above 128 the count becomes a counter of the parser, compiling gets cheaper, and from then on every mask checks
# nearly the whole vocabulary byte by byte: with 18,000 tokens 2 ms a token of the answer, with 129,280 some 20 ms,
# for as long as the string goes on. maxLength of the same number stays fast (its states are kept).
# Output seen (one core of a server of 2024):
#   pattern {1,128}: compiled in 216 ms, a mask takes 0.8 us
#   pattern {1,129}: compiled in 1.5 ms, a mask takes 2056.7 us
#   maxLength 129: compiled in 582 ms, a mask takes 0.8 us
# Exits 1 unless the mask of 129 takes more than 50 times that of 128 and of the length.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check xgrammar==0.2.8
cat >"$folder/counts.py" <<'PYTHON'
import itertools
import json
import string
import time

import xgrammar

vocabulary = [chr(code) for code in range(32, 127)]
vocabulary += ["".join(letters) for size in (2, 3) for letters in itertools.product(string.ascii_lowercase, repeat=size)]
vocabulary.append("<eos>")
info = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[len(vocabulary) - 1])
compiler = xgrammar.GrammarCompiler(info, cache_enabled=False)


def mask_microseconds(name, schema):
    began = time.perf_counter()
    compiled = compiler.compile_json_schema(json.dumps({"type": "string", **schema}))
    compiling = time.perf_counter() - began
    matcher, mask = xgrammar.GrammarMatcher(compiled), xgrammar.allocate_token_bitmask(1, info.vocab_size)
    assert matcher.accept_string('"ab')
    times = []
    for _ in range(20):
        began = time.perf_counter()
        matcher.fill_next_token_bitmask(mask)
        times.append(time.perf_counter() - began)
    print(f"{name}: compiled in {compiling * 1e3:.3g} ms, a mask takes {min(times) * 1e6:.1f} us")
    return min(times)


few = mask_microseconds("pattern {1,128}", {"pattern": "^[a-z]{1,128}$"})
many = mask_microseconds("pattern {1,129}", {"pattern": "^[a-z]{1,129}$"})
length = mask_microseconds("maxLength 129", {"maxLength": 129})
raise SystemExit(not (many > 50 * few and many > 50 * length))
PYTHON
"$folder/venv/bin/python" "$folder/counts.py"
