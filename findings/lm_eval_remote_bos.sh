#!/usr/bin/env bash
# lm-eval 0.4.13: with the server's own tokenizer, add_bos_token=True is ignored, and texts are scored one token early.
#
# local-completions finds that a server offers /tokenizer_info and /tokenize and takes its tokenizer ("remote").
# One would expect add_bos_token=True to put a BOS before every context, as it does with a tokenizer from a folder,
# and tokenized_requests=False to give the same sums, since it only sends the text instead of the ids. But the remote
# tokenizer always asks for no special tokens: ids never begin with BOS; and where a server puts a BOS before texts,
# as /tokenizer_info says it does, the context's length is counted without it, so that the sum of a continuation begins
# with the last token of the context. Nothing warns; the number of samples and all shapes are right.
# Output seen (a server whose token c costs ord(c) / 1000; the continuation cd after ab costs 0.199):
#   ids: sent [97, 98, 99, 100], log-likelihood -0.199
#   text: sent 'abcd', log-likelihood -0.297
# Exits 1 unless ids come without BOS and the sum of the text holds one token more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "lm-eval[api]==0.4.13"
cat >"$folder/bos.py" <<'PYTHON'
import http.server
import json
import logging
import threading

BOS = 1
seen = []


class Server(http.server.BaseHTTPRequestHandler):
    def reply(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply({"tokenizer_class": "T", "bos_token": "<s>", "eos_token": "z", "add_bos_token": True})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body.get("prompt")
        if self.path == "/tokenize":
            special = [BOS] if body.get("add_special_tokens", True) else []
            self.reply({"tokens": special + [ord(c) for c in prompt]})
        elif self.path == "/detokenize":
            self.reply({"prompt": "".join(chr(i) for i in body["tokens"] if i != BOS)})
        else:
            (prompt,) = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else (prompt,)
            seen.append(prompt)
            ids = prompt if isinstance(prompt, list) else [BOS] + [ord(c) for c in prompt]
            logprobs = [None] + [-i / 1000 for i in ids[1:]] + [-1.0]
            tops = [None] + [{"?": value} for value in logprobs[1:]]
            self.reply({"choices": [{"index": 0, "text": "", "logprobs": {
                "tokens": ["?"] * len(logprobs), "token_logprobs": logprobs, "top_logprobs": tops}}]})

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
logging.disable(logging.CRITICAL)
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

sums = {}
for name, ids in (("ids", True), ("text", False)):
    model = LocalCompletionsAPI(base_url=f"http://127.0.0.1:{server.server_port}/v1/completions", model="m",
                                add_bos_token=True, tokenized_requests=ids, max_length=100)
    request = Instance("loglikelihood", {}, ("ab", "cd"), 0)
    ((sums[name], _),) = model.loglikelihood([request], disable_tqdm=True)
    print(f"{name}: sent {seen[-1]!r}, log-likelihood {sums[name]:.3f}")
raise SystemExit(not (seen[0] == [97, 98, 99, 100] and abs(sums["ids"] + 0.199) < 1e-9 and abs(sums["text"] + 0.297) < 1e-9))
PYTHON
"$folder/venv/bin/python" "$folder/bos.py" 2>/dev/null
