#!/usr/bin/env python3
"""The web page of `hadal serve` in a headless Chromium, driven by chromedriver's WebDriver protocol.

Python's standard library only. Without --url the page is served by a scripted server in this file, which answers by the
text of the last user message (class Script). With --url only what any server must do is checked, against that server.

  page_test.py [--generated page.cpp] [--screenshots DIR] [--only NAME] [--url http://127.0.0.1:8000 [--key KEY]]

Exit code 77, the name ctest knows for "skipped", where there is no Chromium: tools/install_deps.sh --browser installs it.
"""
import argparse
import base64
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PAGE = os.path.join(ROOT, "src", "server", "page", "index.html")
KEYS = {"Enter": "\ue007", "Tab": "\ue004", "Escape": "\ue00c", "Shift": "\ue008", "Home": "\ue011", "End": "\ue010",
        "Left": "\ue012", "Up": "\ue013", "Right": "\ue014", "Down": "\ue015", "Control": "\ue009"}
INJECTION = '<img src=x onerror="window.injected=1"><script>window.injected=1</script>'


# --- the scripted server -----------------------------------------------------------------------------

def script_hash(page):
    begin = page.index(b"<script>") + len(b"<script>")
    digest = hashlib.sha256(page[begin:page.index(b"</script>")]).digest()
    return "sha256-" + base64.b64encode(digest).decode()


def make_context(tokens, window=128, topk=512, layers=12, seed=1):
    """What /v1/hadal/context answers: layers alternate as in the model, the first two see the window only."""
    rng = random.Random(seed)
    made = []
    for layer in range(layers):
        kind = "window" if layer < 2 else ("csa" if layer % 2 == 0 else "hca")
        ratio = {"window": 0, "csa": 4, "hca": 128}[kind]
        entry = {"layer": layer, "kind": kind, "ratio": ratio, "blocks": tokens // ratio if ratio else 0}
        if kind == "csa":
            blocks = entry["blocks"]
            near = set(range(max(0, blocks - topk // 4), blocks))
            centres = [rng.randrange(max(1, blocks)) for _ in range(5)]
            while len(near) < min(topk, blocks):
                centre = rng.choice(centres) + int(rng.gauss(0, 20 + blocks / 200))
                near.add(min(max(centre, 0), blocks - 1) if rng.random() < .7 else rng.randrange(blocks))
            entry["selected"] = sorted(near)
        made.append(entry)
    return {"id": "", "tokens": tokens, "window": window, "index_topk": topk, "layers": made}


class Script:
    """State shared by the handler threads and the checks."""

    def __init__(self):
        self.requests = []  # bodies of chat requests, with "authorization" added
        self.gate = threading.Event()  # scenarios wait here where the checks look at something unfinished
        self.left = threading.Event()  # a client closed its stream
        self.context = make_context(1000, topk=64)
        self.health = 200
        self.defaults = {"thinking": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0,
                         "repetition_penalty": 1, "max_tokens": 1024}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script = None

    def log_message(self, *_):
        pass

    def answer(self, status, kind, body, **more):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, status, value, **more):
        self.answer(status, "application/json", json.dumps(value).encode(), **more)

    def do_GET(self):
        path = urllib.parse.urlparse(self.path)
        if path.path == "/":
            with open(PAGE, "rb") as file:
                page = file.read()
            policy = f"default-src 'self'; script-src '{script_hash(page)}'; style-src 'unsafe-inline'"
            self.answer(200, "text/html; charset=utf-8", page, Content_Security_Policy=policy)
        elif path.path == "/health":
            self.json(self.script.health, {"status": "ok"})
        elif path.path == "/v1/models":
            self.json(200, {"object": "list", "data": [{"id": "hadal-nano", "defaults": self.script.defaults},
                                                       {"id": "other-model"}]})
        elif path.path == "/v1/hadal/context":
            if not self.script.context:
                self.json(404, {"error": {"message": "Nothing is kept of this answer."}})
                return
            wanted = urllib.parse.parse_qs(path.query)["id"][0]
            self.json(200, dict(self.script.context, id=wanted))
        elif path.path == "/favicon.ico":
            self.send_response(204)
            self.end_headers()
        else:
            self.json(404, {"error": {"message": f"no {path.path}"}})

    def event(self, value):
        data = value if isinstance(value, str) else json.dumps(value)
        body = f"data: {data}\n\n".encode()
        self.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n")
        self.wfile.flush()

    def delta(self, finish=None, **delta):
        self.event({"id": "chat-1", "object": "chat.completion.chunk", "model": "hadal-nano",
                    "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    def text(self, text, kind="content", pause=.002, piece=5):
        for at in range(0, len(text), piece):
            self.delta(**{kind: text[at:at + piece]})
            time.sleep(pause)

    def finish(self, reason="stop", **more):
        self.event({"id": "chat-1", "object": "chat.completion.chunk", "model": "hadal-nano",
                    "choices": [{"index": 0, "delta": {}, "finish_reason": reason, **more}]})
        self.event({"id": "chat-1", "choices": [], "usage": {
            "prompt_tokens": 1200, "completion_tokens": 37, "total_tokens": 1237,
            "prompt_tokens_details": {"cached_tokens": 1024}}})
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.script.requests.append(dict(body, authorization=self.headers.get("Authorization")))
        last = body["messages"][-1]
        asked = last["content"] if last["role"] == "user" else "result"
        if asked == "refuse":
            self.json(429, {"error": {"message": "The queue is full.", "type": "rate_limit", "code": "queue_full"}},
                      Retry_After="7")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            getattr(self, "play_" + asked.split()[0].rstrip(",.!?").lower(), self.play_hello)(last)
        except OSError:
            self.script.left.set()
            self.close_connection = True

    def play_hello(self, _):
        self.delta(role="assistant", content="")
        self.text("Hello **bold** and `code`.\n\n")
        self.script.gate.wait(10)
        self.text("# Title\n\n- one\n- two\n  - inner\n\n1. first\n2. second\n\n```python\nprint('<b>')\n```\nThe end.")
        self.finish()

    def play_think(self, _):
        self.text("First I consider the question. ", "reasoning_content")
        self.script.gate.wait(10)
        self.text("Then I am sure.", "reasoning_content")
        self.text("The answer is 42.")
        self.finish()

    def play_tool(self, _):
        self.text("I look it up.")
        self.delta(tool_calls=[{"index": 0, "id": "call-1", "type": "function",
                                "function": {"name": "weather", "arguments": ""}}])
        for piece in ('{"city"', ': "Kie', 'l"}'):
            self.delta(tool_calls=[{"index": 0, "function": {"arguments": piece}}])
        self.delta(tool_calls=[{"index": 1, "id": "call-2", "type": "function",
                                "function": {"name": "time", "arguments": "{}"}}])
        self.finish("tool_calls")

    def play_silence(self, _):
        self.finish()

    def play_ponder(self, _):
        self.text("I think and think", "reasoning_content")
        self.finish()

    def play_markup(self, _):
        self.text("Well.")
        self.finish(malformed="a call without a name")

    def play_result(self, last):
        self.text(f"The tool said {last['content']}.")
        self.finish()

    def play_endless(self, _):
        for i in range(3000):
            self.text(f"word{i} ", pause=.01)

    def play_list(self, _):
        self.text("".join(f"- item {i}\n" for i in range(300)), pause=0, piece=200)
        self.script.gate.wait(10)
        self.text("".join(f"- item {i}\n" for i in range(300, 400)), pause=0, piece=200)
        self.finish()

    def play_flood(self, _):
        for mark in ("`", "*", "**a ", "`a``", "- ", "1. ", "*a ", "_", "```\n", "# "):
            self.text("\n\nx " + mark * (60000 // len(mark)), pause=0, piece=2000)
        self.finish()

    def play_broken(self, _):
        self.text("Half a sentence")
        self.delta(tool_calls=[{"index": 0, "id": "call-9", "function": {"name": "weather", "arguments": '{"ci'}}])
        time.sleep(.2)
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def play_midway(self, _):
        self.text("Some text")
        self.event({"error": {"message": "The engine gave up.", "type": "server_error"}})
        self.wfile.write(b"0\r\n\r\n")

    def play_inject(self, _):
        self.text(INJECTION, "reasoning_content")
        self.text(f"{INJECTION}\n\n**{INJECTION}**\n\n- {INJECTION}\n\n# {INJECTION}\n\n`{INJECTION}`\n\n"
                  f"```<b>\n{INJECTION}\n```\n\n[x](javascript:window.injected=1)")
        self.delta(tool_calls=[{"index": 0, "id": "c", "function": {"name": INJECTION, "arguments": INJECTION}}])
        self.finish("tool_calls")

    def play_tour(self, _):
        self.text("The user asks how attention stays cheap. Compressed blocks, the window, the indexer.",
                  "reasoning_content")
        self.text("Every layer reads the last **128 tokens** as they are. Beyond that it reads summaries:\n\n"
                  "- **CSA** keeps one entry per 4 tokens; an *indexer* picks the best `k` of them\n"
                  "- **HCA** keeps one entry per 128 tokens and reads all\n\n"
                  "In code, the visible blocks of a token at position `p` are\n\n"
                  "```cpp\nint64_t visible_blocks(int64_t p, int64_t ratio) { return (p + 1) / ratio; }\n```\n\n"
                  "so that cost grows with the *summaries*, not with the text.")
        self.finish()


# --- WebDriver ---------------------------------------------------------------------------------------

class Browser:
    def __init__(self, driver, binary):
        self.folder = tempfile.mkdtemp(prefix="page_test.")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.base = f"http://127.0.0.1:{port}"
        self.log = open(os.path.join(self.folder, "chromedriver.log"), "wb")
        self.process = subprocess.Popen([driver, f"--port={port}"], stdout=self.log, stderr=self.log)
        arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900",
                     f"--user-data-dir={self.folder}/profile", "--force-color-profile=srgb", "--disable-extensions"]
        if os.geteuid() == 0:
            arguments.append("--no-sandbox")  # Chromium refuses its sandbox to root
        capabilities = {"browserName": "chrome", "goog:loggingPrefs": {"browser": "ALL"},
                        "goog:chromeOptions": {"args": arguments, "binary": binary}}
        deadline = time.time() + 60
        while True:
            try:
                self.call("GET", "/status")
                break
            except OSError:
                if time.time() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(.1)
        made = self.call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self.session = f"/session/{made['sessionId']}"

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"WebDriver {path}: {json.load(error)['value']['message'][:2000]}") from None

    def close(self):
        try:
            self.call("DELETE", self.session)
        finally:
            self.process.terminate()
            self.process.wait(20)
            self.log.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def post(self, path, body):
        return self.call("POST", self.session + path, body)

    def open(self, url):
        self.post("/url", {"url": url})

    def js(self, code, *arguments):
        """Runs `return CODE`; `q` is querySelector."""
        prelude = "const q = (s) => document.querySelector(s), qa = (s) => [...document.querySelectorAll(s)]; return "
        return self.post("/execute/sync", {"script": prelude + code, "args": list(arguments)})

    def wait(self, code, what=None, limit=30):
        deadline = time.time() + limit
        while not (value := self.js(code)):
            if time.time() > deadline:
                raise AssertionError(f"did not come true: {what or code}; the page shows: {self.js('q(`#log`).innerText')}")
            time.sleep(.03)
        return value

    def press(self, *keys):
        """Keys one after another; 'Shift+Tab' holds Shift."""
        actions = []
        for key in keys:
            *held, last = key.split("+") if len(key) > 1 else [key]
            names = [KEYS[name] for name in held]
            actions += [{"type": "keyDown", "value": name} for name in names]
            actions += [{"type": kind, "value": KEYS.get(last, last)} for kind in ("keyDown", "keyUp")]
            actions += [{"type": "keyUp", "value": name} for name in reversed(names)]
        self.post("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def type(self, text):
        self.press(*text)

    def click(self, selector):
        found = self.post("/element", {"using": "css selector", "value": selector})
        self.post(f"/element/{next(iter(found.values()))}/click", {})

    def point(self, x, y):
        self.post("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [
            {"type": "pointerMove", "duration": 0, "x": int(x), "y": int(y), "origin": "viewport"}]}]})

    def cdp(self, command, **parameters):
        return self.post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def size(self, width, height, touch=False):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=touch)

    def scheme(self, value):
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def console(self):
        return [entry["message"] for entry in self.post("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def screenshot(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("GET", self.session + "/screenshot")))


# --- checks ------------------------------------------------------------------------------------------

def equal(found, expected, what=""):
    if found != expected:
        raise AssertionError(f"{what}: expected {expected!r}, found {found!r}")


class Checks:
    """Every check_ method begins on a fresh page with fresh storage; `allowed` console errors are named by it."""

    def __init__(self, browser, url, script, screenshots, key=""):
        self.b, self.url, self.script, self.screenshots, self.key = browser, url, script, screenshots, key
        self.allowed = None

    def fresh(self):
        self.allowed = None
        if self.script:
            self.script.__init__()
            self.script.gate.set()
        self.b.size(1280, 900)
        self.b.scheme("light")
        self.b.open(self.url)
        # A page that is left keeps its chat.
        self.b.js("(removeEventListener('pagehide', keepChat), localStorage.clear(), sessionStorage.clear())")
        if self.key:
            self.b.js("sessionStorage.setItem('hadal-key', arguments[0])", self.key)
        self.b.open(self.url)
        self.b.wait("q('#status').className.includes('good')", "the server is reachable")

    def done(self):
        self.b.wait("!running && conversation.length && lastMessage().state !== 'running'", "the answer ends", 60)

    def ask(self, text, wait=True):
        self.b.js("q('#prompt').focus()")
        self.b.type(text)
        self.b.press("Enter")
        if wait:
            self.done()

    def shot(self, name):
        if self.screenshots:
            time.sleep(.2)
            self.b.screenshot(os.path.join(self.screenshots, name + ".png"))

    def no_overflow(self, what):
        wide = self.b.js("[document.documentElement.scrollWidth, innerWidth, ...qa('#log, #context, dialog')"
                         ".filter(n => n.scrollWidth > n.clientWidth + 1).map(n => n.id)]")
        if wide[0] > wide[1] or len(wide) > 2:
            raise AssertionError(f"{what}: scrolls sideways: {wide}")

    def check_streaming(self):
        b = self.b
        self.script.gate.clear()
        self.ask("hello", wait=False)
        b.wait("q('article.assistant .markdown')?.innerText.includes('Hello bold and code.')", "the first half arrives")
        equal(b.js("!q('#stop').hidden && q('#send').hidden"), True, "stop is offered while streaming")
        equal(b.js("q('article.assistant').getAttribute('aria-busy')"), "true", "busy")
        b.js("window.kept = q('article.assistant strong')")
        self.script.gate.set()
        self.done()
        equal(b.js("window.kept === q('article.assistant strong')"), True, "finished blocks keep their nodes")
        equal(b.js("q('article.assistant strong').textContent"), "bold")
        equal(b.js("qa('.markdown > ul > li').length"), 2, "items")
        equal(b.js("q('.markdown ul ul li').textContent"), "inner")
        equal(b.js("qa('.markdown ol li').length"), 2, "numbered items")
        equal(b.js("q('.markdown pre').textContent"), "print('<b>')")
        equal(b.js("q('.markdown h2').textContent"), "Title")
        figures = b.js("q('.figures').textContent")
        for pattern in (r"first token [\d.]+ m?s", r"[\d.,]+ tokens/s", "37 tokens", "1,024 of 1,200 prompt tokens cached"):
            if not re.search(pattern, figures):
                raise AssertionError(f"figures lack {pattern}: {figures}")
        spoken = b.js("q('#spoken').textContent")
        equal("Hello bold and code." in spoken and "The end." in spoken, True, "the live region: " + spoken)
        equal(b.js("document.activeElement.id"), "prompt", "focus stays")

    def check_reasoning(self):
        b = self.b
        self.script.gate.clear()
        self.ask("think", wait=False)
        b.wait("q('summary')?.textContent.startsWith('Thinking, ')", "the live state")
        equal(b.js("[q('details').open, q('summary').classList.contains('busy')]"), [False, True], "collapsed and busy")
        b.click("summary")
        b.wait("q('details').open && q('details .text').innerText.includes('First I consider')")
        self.script.gate.set()
        self.done()
        equal(b.js("q('summary').textContent.startsWith('Thought for ')"), True)
        equal(b.js("q('details').open"), True, "stays open")
        equal(b.js("q('details .text').innerText"), "First I consider the question. Then I am sure.")
        equal(b.js("q('.markdown').innerText"), "The answer is 42.")
        equal(b.js("q('#spoken').textContent"), "Thinking.The answer is 42.", "the live region")
        b.js("q('summary').focus()")
        b.press("Enter")
        equal(b.js("q('details').open"), False, "closed by the keyboard")
        equal("thinking" in self.script.requests[0], False, "what is not chosen is the model's own")
        self.ask("hello")
        equal(self.script.requests[1]["messages"][1]["reasoning_content"],
              "First I consider the question. Then I am sure.", "reasoning goes back")

    def check_tool_call(self):
        b = self.b
        b.click("#show-settings")
        b.js("q('#tools').value = JSON.stringify([{name: 'weather', parameters: {type: 'object'}}])")
        b.click("#save-settings")
        self.ask("tool")
        equal(self.script.requests[0]["tools"],
              [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}])
        equal(b.js("qa('.call .name').map(n => n.textContent)"), ["weather", "time"])
        equal(b.js("q('.call .arguments').textContent"), '{\n  "city": "Kiel"\n}')
        equal(b.js("document.activeElement === q('.call textarea')"), True, "the first result has the focus")
        self.shot("tool-call")
        self.ask("too early", wait=False)
        equal(b.js("q('#mode').textContent"), "The tool call waits for its result.")
        b.js("q('#prompt').value = ''")
        b.type("rain")
        b.press("Shift+Enter")
        b.type("wind")
        b.press("Enter")
        equal(b.js("q('.call .result').textContent"), "rain\nwind")
        b.type("noon")
        b.press("Enter")
        b.wait("conversation.length === 3")
        self.done()
        sent = self.script.requests[-1]["messages"]
        equal([m["role"] for m in sent], ["user", "assistant", "tool", "tool"])
        equal(sent[1]["tool_calls"][0], {"id": "call-1", "type": "function",
                                         "function": {"name": "weather", "arguments": '{"city": "Kiel"}'}})
        equal(sent[2], {"role": "tool", "tool_call_id": "call-1", "content": "rain\nwind"})
        equal(b.js("qa('.markdown').pop().innerText"), "The tool said noon.")

    def check_stop(self):
        b = self.b
        for press in (lambda: b.press("Escape"), lambda: b.click("#stop")):
            self.script.left.clear()
            self.ask("endless", wait=False)
            b.wait("lastMessage().content.includes('word3')", "some text arrives")
            press()
            self.done()
            equal(b.js("lastMessage().state"), "stopped")
            equal(b.js("lastMessage().content.includes('word3')"), True, "what arrived is kept")
            equal(b.js("qa('.note').pop().textContent"), "Stopped.")
            equal(self.script.left.wait(10), True, "the request is aborted")

    def check_scrolling(self):
        b = self.b
        at_end = "(n => n.scrollTop + n.clientHeight >= n.scrollHeight - 2)(q('#log'))"
        self.ask("list")
        b.wait(at_end, "the log follows the answer")
        self.script.gate.clear()
        self.ask("list", wait=False)
        b.wait("lastMessage().content.includes('item 299') && " + at_end)
        b.js("q('#log').scrollTop = 100")
        self.script.gate.set()
        self.done()
        equal(b.js("q('#log').scrollTop"), 100, "a reader who went back is left there")
        equal(b.js("qa('.markdown').pop().querySelectorAll('li').length"), 400)

    def check_degenerate_text(self):
        started = time.time()
        self.ask("flood")
        equal(self.b.js("lastMessage().state"), "done")
        took = time.time() - started
        print(f"    600 KB of repeated marks: {took:.1f} s")
        equal(took < 30, True, f"rendering keeps up: {took:.1f} s")

    def check_regenerate_and_edit(self):
        b = self.b
        self.ask("hello")
        self.ask("think")
        b.click("article:last-child .again")
        b.wait("running === null && conversation.length === 4")
        self.done()
        equal(len(self.script.requests), 3)
        equal(self.script.requests[2]["messages"], self.script.requests[1]["messages"], "the same question")
        equal(b.js("qa('.edit').filter(n => !n.hidden).length"), 1, "only the last message is edited")
        b.js("q('#prompt').focus()")
        b.press("Up")
        equal(b.js("q('#prompt').value"), "think")
        b.press("Escape")
        equal(b.js("[q('#prompt').value, conversation.length]"), ["", 4], "giving up changes nothing")
        b.click("article.user:nth-last-of-type(2) .edit")
        b.type(" again")
        b.press("Enter")
        self.done()
        equal([m["content"] for m in self.script.requests[3]["messages"] if m["role"] == "user"], ["hello", "think again"])
        equal(b.js("qa('article').length"), 4)
        b.click("#new-chat")
        equal(b.js("[qa('article').length, q('#welcome').hidden]"), [0, False])

    def check_settings(self):
        b = self.b
        equal({"temperature", "seed", "top_p", "max_tokens"} & set((self.ask("hello"), self.script.requests[0])[1]), set(),
              "what is left empty is not sent")
        b.click("#show-settings")
        values = {"temperature": "0.5", "top_p": "0.9", "top_k": "40", "max_tokens": "64", "seed": "7",
                  "system": "Be brief.", "api-key": "secret", "effort": "max", "model": "other-model"}
        b.js("Object.entries(arguments[0]).forEach(([id, value]) => { q('#' + id).value = value; })", values)
        b.js("q('#temperature').value = 'hot'")
        b.click("#save-settings")
        equal(b.js("q('#settings').open && q('#settings-error').innerText"),
              'temperature must be a number from 0 to 2, not "hot".')
        equal(b.js("document.activeElement.id"), "temperature", "the wrong field has the focus")
        b.js("(q('#temperature').value = '0.5', q('#tools').value = '{')")
        b.click("#save-settings")
        equal(b.js("q('#settings-error').innerText.startsWith('Tools are not JSON')"), True)
        b.js("q('#tools').value = ''")
        self.shot("settings")
        b.click("#save-settings")
        equal(b.js("q('#settings').open"), False)
        b.wait("q('#status').textContent === 'other-model'")
        self.ask("hello")
        body = self.script.requests[-1]
        for name, value in {"temperature": .5, "top_p": .9, "top_k": 40, "max_tokens": 64, "seed": 7,
                            "model": "other-model", "reasoning_effort": "max", "authorization": "Bearer secret",
                            "stream": True, "stream_options": {"include_usage": True}}.items():
            equal(body[name], value, name)
        equal(body["messages"][0], {"role": "system", "content": "Be brief."})
        equal(b.js("JSON.stringify({...localStorage}).includes('secret')"), False, "the key is not kept for good")
        b.open(self.url)
        b.wait("q('#status').className.includes('good')")
        equal(b.js("[settings.seed, settings.model, apiKey]"), ["7", "other-model", "secret"], "kept over a reload")
        b.click("#show-settings")
        b.js("(q('#thinking').value = 'off', q('#thinking').dispatchEvent(new Event('change')))")
        equal(b.js("q('#effort').disabled"), True)
        b.click("#save-settings")
        self.ask("hello")
        equal([self.script.requests[-1]["thinking"], "reasoning_effort" in self.script.requests[-1]],
              [{"type": "disabled"}, False])

    def check_model_defaults(self):
        b = self.b
        equal(b.js("q('#mode').textContent"), "Thinking is on")
        b.click("#show-settings")
        equal(b.js("['temperature', 'top_p', 'max_tokens', 'seed'].map(n => q('#' + n).placeholder)"),
              ["0.7", "0.9", "1024", "random"], "the model's own values are shown")
        equal(b.js("q('#thinking').options[0].textContent"), "on (model's)")
        self.shot("settings-defaults")
        for name, text, limit in (("temperature", "10", "from 0 to 2"), ("top_p", "1.5", "from 0 to 1"),
                                  ("top_k", "3000000000", "from 0 to 2147483648")):
            b.js("q('#' + arguments[0]).value = arguments[1]", name, text)
            b.click("#save-settings")
            equal(limit in b.js("q('#settings-error').innerText"), True, name + " has the server's limit")
            b.js("q('#' + arguments[0]).value = ''", name)
        b.press("Escape")
        self.script.defaults["thinking"] = False
        b.open(self.url)
        b.wait("q('#mode').textContent === 'Thinking is off'", "the model's own choice is shown")
        self.ask("hello")
        equal({"thinking", "temperature", "top_p"} & set(self.script.requests[-1]), set(), "nothing is sent")
        b.click("#show-settings")
        equal(b.js("q('#effort').disabled"), True, "no effort without thinking")
        b.js("q('#thinking').value = 'on'")
        b.click("#save-settings")
        self.ask("hello")
        equal(self.script.requests[-1]["thinking"], {"type": "enabled"})

    def check_settings_fit(self):
        b = self.b
        for width, height in ((1280, 700), (1024, 600), (375, 667), (320, 568)):
            b.size(width, height)
            b.click("#show-settings")
            bounds = b.js("(r => [r.top, r.bottom])(q('#save-settings').getBoundingClientRect())")
            equal(0 <= bounds[0] and bounds[1] <= height, True, f"Save is seen at {width} x {height}: {bounds}")
            b.js("q('#tools').value = '{'")
            b.click("#save-settings")
            bounds = b.js("(r => [r.top, r.bottom])(q('#settings-error').getBoundingClientRect())")
            equal(0 <= bounds[0] and bounds[1] <= height, True, f"so is what is wrong: {bounds}")
            b.js("q('#tools').value = ''")
            self.no_overflow(f"settings at {width} x {height}")
            self.shot(f"settings-{width}")
            b.press("Escape")

    def check_explanations(self):
        b = self.b
        note = "qa('article .note').filter(n => !n.hidden && n.textContent).pop().textContent"
        self.ask("silence")
        equal(b.js(note), "The model ended without a word. Regenerate asks again.")
        self.ask("ponder")
        equal(b.js(note), "The model ended while it was thinking, without an answer. "
                          "Regenerate asks again; Settings turn thinking off.")
        self.ask("markup")
        equal(b.js(note), "The model wrote markup that means nothing, and the answer ends before it "
                          "(a call without a name). Regenerate asks again.")
        self.shot("explanations")

    def check_kept_chats(self):
        b = self.b
        self.ask("think")
        self.ask("hello")
        shown = b.js("q('#log').innerText")
        b.open(self.url)
        b.wait("conversation.length === 4", "a reload keeps the chat")
        equal(b.js("q('#log').innerText"), shown, "as it was")
        self.ask("hello again")
        equal([m["role"] for m in self.script.requests[-1]["messages"]],
              ["user", "assistant", "user", "assistant", "user"], "and it goes on")
        equal(self.script.requests[-1]["messages"][1]["reasoning_content"],
              "First I consider the question. Then I am sure.")
        # Left in the middle of an answer.
        b.click("#new-chat")
        self.ask("endless", wait=False)
        b.wait("lastMessage().content.includes('word3')")
        b.open(self.url)
        b.wait("conversation.length === 2")
        equal(b.js("[lastMessage().state, lastMessage().content.includes('word3')]"), ["left", True])
        equal(b.js("qa('article .note').pop().textContent.startsWith('The page was left')"), True)
        b.click("article:last-child .again")
        b.wait("lastMessage().state === 'running' && lastMessage().content.includes('word1')")
        b.press("Escape")
        self.done()
        # The list.
        b.click("#show-chats")
        equal(b.js("qa('#chat-list .open').map(n => n.textContent)"), ["endless", "think"])
        self.shot("chats")
        b.click("#chat-list li:nth-child(2) .open")
        equal(b.js("[q('#chats').open, conversation.length, conversation[0].content]"), [False, 6, "think"])
        b.click("#show-chats")
        b.click("#chat-list li:nth-child(2) .forget")
        equal(b.js("qa('#chat-list .open').length"), 1)
        b.click("#forget-chats")
        equal(b.js("[conversation.length, q('#chat-list').textContent]"), [0, "None yet."])
        b.click("#close-chats")
        equal(b.js("Object.keys(localStorage).filter(n => n.startsWith('hadal-chat'))"), [])
        # What something else wrote there is passed over.
        b.js("localStorage.setItem('hadal-chat-x', '{\"messages\": [{\"role\": \"user\"}]}')")
        b.js("sessionStorage.setItem('hadal-chat', 'x')")
        b.js("removeEventListener('pagehide', keepChat)")
        b.open(self.url)
        b.wait("q('#status').className.includes('good')")
        equal(b.js("conversation.length"), 0)
        # A full storage forgets the oldest.
        b.js("[1, 2, 3, 4].forEach(i => { try { localStorage.setItem('hadal-chat-old' + i, JSON.stringify("
             "{title: 't' + i, time: i, messages: [{role: 'user', content: 'x'.repeat(1.2e6)}]})) } catch {} })")
        b.js("localStorage.setItem('rest', '') || (() => { for (let n = 2e6; n > 100; n /= 2) { try {"
             " localStorage.setItem('rest', localStorage.getItem('rest') + 'y'.repeat(n)) } catch {} } })()")
        self.ask("hello")
        equal(b.js("keptChats().map(c => c[1]).includes('hello') && !keptChats().some(c => c[0] === 'old1')"), True)
        b.js("localStorage.clear()")

    def check_singular(self):
        b = self.b
        self.script.context = make_context(130, layers=4)
        b.click("#show-context")
        self.ask("hello")
        b.wait("qa('#map g[data-layer]').length === 4")
        text = b.js("q('#context-summary').textContent")
        equal(text, "130 tokens, window of 128; 1 CSA layer, each chose up to 512 of 32 blocks; "
                    "1 HCA layer read the only block; 2 layers read the window only.")
        self.script.context = make_context(7, layers=3)
        b.js("loadContext()")
        b.wait("context.data.tokens === 7")
        equal(b.js("q('#context-summary').textContent"),
              "7 tokens, window of 128; 1 CSA layer, each chose up to 512 of 1 block; 2 layers read the window only.")

    def check_errors(self):
        b = self.b
        self.allowed = r"429|ERR_INCOMPLETE_CHUNKED_ENCODING|ERR_CONNECTION|503|404"
        self.ask("refuse")
        equal(b.js("qa('article .error').pop().innerText"), "Error 429: The queue is full. Try again in 7 s.")
        self.ask("midway")
        equal(b.js("[qa('.markdown').pop().innerText, qa('article .error').pop().innerText]"),
              ["Some text", "The engine gave up."])
        self.ask("broken")
        equal(b.js("[qa('.markdown').pop().innerText, qa('article .error').pop().innerText]"),
              ["Half a sentence", "The connection was lost. What arrived is kept."])
        self.shot("errors")
        self.ask("hello")
        equal(any("tool_calls" in m for m in self.script.requests[-1]["messages"]), False, "a half call is not sent")
        self.script.context = None
        b.click("#show-context")
        b.wait("q('#context-summary').textContent === 'Error 404: Nothing is kept of this answer.'")
        self.script.health = 503
        b.js("connect()")
        b.wait("q('#status').textContent === 'not ready'")

    def check_injection(self):
        b = self.b
        self.ask("inject " + INJECTION)
        b.click("summary")
        equal(b.js("qa('#log img, #log script, #log b, #log a').length"), 0, "no element out of text")
        equal(b.js("window.injected === undefined"), True, "nothing ran")
        equal(b.js("q('#log').textContent.split('<img src=x onerror').length - 1"), 11, "all of it is shown as text")
        b.js("q('#spoken').remove()")

    def check_keyboard(self):
        b = self.b
        equal(b.js("document.activeElement.id"), "prompt", "the prompt has the focus from the start")
        b.type("hello")
        b.press("Shift+Enter")
        b.type("there")
        equal(b.js("q('#prompt').value"), "hello\nthere")
        b.press("Enter")
        self.done()
        equal(self.script.requests[0]["messages"][0]["content"], "hello\nthere")

        def reach(target):
            for _ in range(25):
                b.press("Shift+Tab")
                if b.js("document.activeElement.id") == target:
                    break
            equal(b.js("document.activeElement.id"), target, "reached by Tab")
            equal(b.js("getComputedStyle(document.activeElement).outlineStyle"), "solid", f"focus on {target} is seen")
        reach("show-settings")
        b.press("Enter")
        equal(b.js("q('#settings').open"), True)
        b.press("Escape")
        equal(b.js("[q('#settings').open, document.activeElement.id]"), [False, "show-settings"])
        reach("show-context")
        b.press("Enter")
        b.wait("qa('#map g[data-layer]').length")
        equal(b.js("document.activeElement.id"), "close-context")
        b.press("Tab")
        equal(b.js("document.activeElement.id"), "map")
        before = b.js("q('#readout').textContent")
        b.press("Left")
        equal(b.js("q('#readout').textContent") != before, True, "the cursor moves")
        b.press("Down", "Down", "Home")
        equal(b.js("q('#readout').textContent").startswith("Layer 2, CSA (blocks of 4): tokens 0 to 3; block 0, "), True)
        b.press("Right")
        equal(b.js("q('#readout').textContent").startswith("Layer 2, CSA (blocks of 4): tokens 4 to 7; block 1, "), True)
        b.press("Down")
        equal(b.js("q('#readout').textContent"), "Layer 3, HCA (blocks of 128): tokens 0 to 127; block 0, read.")
        b.press("End", "Up")
        equal(b.js("q('#readout').textContent").endswith("in the window."), True)
        b.press("+", "+")
        equal(b.js("context.to - context.from"), 250, "zoomed in twice")
        b.press("0")
        equal(b.js("context.to - context.from"), 1000)
        b.press("Escape")
        equal(b.js("[q('#context').hidden, document.activeElement.id]"), [True, "show-context"])
        unlabelled = b.js("qa('button, input, select, textarea').filter(n => !(n.labels?.length || n.textContent.trim() ||"
                          " n.getAttribute('aria-label'))).map(n => n.id)")
        equal(unlabelled, [], "labels")

    def check_small_screen(self):
        b = self.b
        b.size(320, 640)
        self.script.context = make_context(5000, topk=128)
        self.no_overflow("empty")
        self.ask("tour")
        self.ask("tool x" + "y" * 120)
        self.no_overflow("conversation")
        self.shot("mobile")
        self.ask("hello", wait=False)
        b.js("q('#prompt').value = ''")
        b.click("#show-settings")
        self.no_overflow("settings")
        self.shot("mobile-settings")
        b.press("Escape")
        b.click("#show-context")
        b.wait("qa('#map g[data-layer]').length === 12")
        self.no_overflow("context")
        self.shot("mobile-context")
        b.click("#close-context")
        equal(b.js("(n => n.every(x => x === n[0]))(qa('header button').map(n => n.getBoundingClientRect().top))"), True,
              "the buttons share a row")
        outside = b.js("qa('header button, #send, #prompt').filter(n => { const r = n.getBoundingClientRect();"
                       " return r.left < 0 || r.right > innerWidth || r.bottom > innerHeight; }).map(n => n.id)")
        equal(outside, [], "controls are on the screen")
        # Where there is no keyboard, none is spoken of.
        b.size(360, 740, touch=True)
        b.click("#show-context")
        b.wait("qa('#map g[data-layer]').length === 12")
        equal(b.js("q('#map-keys').innerText"), "Touch a bar to read what it stands for.")
        equal(b.js("getComputedStyle(q('#keys')).display"), "none")
        self.shot("phone-context")
        b.click("#close-context")
        self.shot("phone")
        b.size(320, 640)

    def rectangles(self, data):
        """Compares what is drawn of the whole context with the JSON, computed here anew."""
        b = self.b
        gutter, width = b.js("[GUTTER, mapWidth()]")
        drawn = b.js("qa('#map g[data-layer]').map(g => ({layer: +g.dataset.layer, kind: g.dataset.kind,"
                     " paths: [...g.querySelectorAll('path')].map(p => [p.getAttribute('class'), p.getAttribute('d')]),"
                     " rects: [...g.querySelectorAll('rect')].map(r => [r.getAttribute('class'),"
                     " +r.getAttribute('x'), +r.getAttribute('width')])}))")
        equal([(d["layer"], d["kind"]) for d in drawn], [(x["layer"], x["kind"]) for x in data["layers"]])
        scale = width / data["tokens"]

        def near(found, expected, what):
            if any(abs(f - e) > .01 for f, e in zip(found, expected)) or len(found) != len(expected):
                raise AssertionError(f"{what}: expected {expected}, found {found}")
        for row, layer in zip(drawn, data["layers"]):
            name = f"layer {layer['layer']}"
            rects = {kind: (x, w) for kind, x, w in row["rects"]}
            near(rects["track"], (gutter, width), name)
            extent = max(min(data["window"], data["tokens"]) * scale, 2)
            near(rects["window"], (gutter + width - extent, extent), name + " window")
            if layer["blocks"]:
                near(rects[layer["kind"] + "-cover"], (gutter, layer["blocks"] * layer["ratio"] * scale), name + " cover")
            equal(len(rects), 3 if layer["blocks"] else 2, name)
            found = {}
            for kind, path in row["paths"]:
                for x, w in re.findall(r"M([\d.]+) [\d.]+h([\d.]+)v", path):
                    found[float(x)] = (float(w), int(kind[-1]))
            if layer["kind"] != "csa":
                equal(found, {}, name)
                continue
            if layer["ratio"] * scale >= 1:
                runs = []
                for block in layer["selected"]:
                    if runs and runs[-1][1] == block:
                        runs[-1][1] += 1
                    else:
                        runs.append([block, block + 1])
                expected = [(gutter + a * layer["ratio"] * scale, (e - a) * layer["ratio"] * scale) for a, e in runs]
                near([x for x, _ in sorted((x, w) for x, (w, _) in found.items())], [x for x, _ in expected], name)
                near([found[x][0] for x in sorted(found)], [w for _, w in expected], name)
            else:
                counts = {}
                for block in layer["selected"]:
                    pixel = int(block * layer["ratio"] * width / data["tokens"])
                    counts[pixel] = counts.get(pixel, 0) + 1
                capacity = data["tokens"] / width / layer["ratio"]
                expected = {p: min(4, -int(-4 * c / capacity // 1)) for p, c in counts.items()}
                shown = {int(x - gutter) + i: level for x, (w, level) in found.items() for i in range(round(w))}
                differing = {p for p in expected.keys() | shown.keys() if expected.get(p) != shown.get(p)}
                # A block that begins on the border of two pixels may fall to either by rounding.
                if len(differing) > len(expected) // 50:
                    raise AssertionError(f"{name}: {len(differing)} of {len(expected)} pixels differ")

    def check_context_view(self):
        b = self.b
        b.click("#show-context")
        equal(b.js("[q('#map').hasAttribute('hidden'), q('#context-summary').textContent.startsWith('Once there')]"),
              [True, True], "without an answer it says so")
        self.ask("tour")
        b.wait("qa('#map g[data-layer]').length === 12", "the view follows the answer")
        self.rectangles(self.script.context)
        self.shot("context-1k")
        for tokens, topk, layers in ((37, 512, 4), (7, 512, 4), (20000, 512, 43), (1_000_000, 1024, 61)):
            self.script.context = make_context(tokens, topk=topk, layers=layers, seed=tokens)
            started = time.time()
            b.js("loadContext()")
            b.wait(f"context.data.tokens === {tokens} && qa('#map g[data-layer]').length === {layers}")
            print(f"    {tokens} tokens, {layers} layers: fetched and drawn in {time.time() - started:.2f} s,"
                  f" {b.js('qa(`#map *`).length')} nodes")
            self.rectangles(self.script.context)
            self.no_overflow(f"{tokens} tokens")
            if tokens >= 20000:
                self.shot(f"context-{tokens // 1000}k")
        equal(b.js("q('#context-summary').textContent").startswith("1,000,000 tokens, window of 128; 30 CSA layers"), True)
        box = b.js("(r => [r.left, r.top])(q('#map').getBoundingClientRect())")
        row = 4
        b.point(box[0] + b.js("GUTTER + mapWidth() / 2"), box[1] + b.js("AXIS") + row * b.js("ROW") + 5)
        readout = b.js("q('#readout').textContent")
        match = re.match(r"Layer 4, CSA \(blocks of 4\): tokens ([\d,]+) to ([\d,]+); blocks ([\d,]+) to ([\d,]+), (\d+) of",
                         readout)
        if not match:
            raise AssertionError(f"hover tells the range: {readout}")
        start, end, first, last, chosen = (int(group.replace(",", "")) for group in match.groups())
        equal([first, last], [start // 4, end // 4], "blocks of the range")
        equal(chosen, sum(first <= s <= last for s in self.script.context["layers"][4]["selected"]), "selected in the range")
        equal(abs(start - 500_000) < 4000, True, "the middle is the middle: " + readout)
        for _ in range(8):
            b.click("#zoom-in")
        equal(b.js("context.to - context.from < 4000 && context.from <= context.token && context.token < context.to"), True)
        self.shot("context-zoomed")

    def check_dark(self):
        b = self.b
        b.scheme("dark")
        self.script.context = make_context(100_000, topk=512, layers=20)
        b.click("#show-context")
        self.ask("tour")
        b.wait("qa('#map g[data-layer]').length === 20")
        back, ink = b.js("['backgroundColor', 'color'].map(n => getComputedStyle(document.body)[n])")
        brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (back, ink)]
        equal(brightness[0] < 150 < 500 < brightness[1], True, f"dark page, light text: {back} {ink}")
        b.click("summary")
        self.shot("dark")
        b.scheme("light")
        b.click("#close-context")
        self.shot("desktop")

    # What any server must do.
    def real_chat(self):
        self.ask("Say hello.")
        equal(self.b.js("lastMessage().state"), "done", self.b.js("lastMessage().error"))
        equal(self.b.js("(lastMessage().content + lastMessage().reasoning).length > 0"), True, "text")
        equal(self.b.js("q('.figures').textContent.includes('prompt tokens cached')"), True, "usage")
        self.shot("real-chat")
        self.b.click("#show-context")
        self.b.wait("qa('#map g[data-layer]').length", "the context view is drawn")
        self.rectangles(self.b.js("context.data"))
        self.shot("real-context")

    def real_stop(self):
        self.ask("Count from one to one thousand in words.", wait=False)
        self.b.wait("conversation.length === 2 && lastMessage().first !== undefined", "the first token", 60)
        self.b.press("Escape")
        self.done()
        equal(self.b.js("['stopped', 'done'].includes(lastMessage().state)"), True)

    def real_small_screen(self):
        self.b.size(320, 640)
        self.ask("Say hello.")
        self.no_overflow("conversation")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", help="a running server instead of the scripted one")
    parser.add_argument("--key", default="", help="its API key")
    parser.add_argument("--generated", help="the file cmake/embed_page.cmake wrote: its hash is compared")
    parser.add_argument("--screenshots", help="a folder for pictures")
    parser.add_argument("--only", default="", help="checks whose name holds this")
    options = parser.parse_args()
    driver = shutil.which("chromedriver")
    binary = shutil.which("chromium")
    if not driver or not binary:
        print("page_test: SKIPPED, Chromium or chromedriver is absent; tools/install_deps.sh --browser installs them")
        return 77
    if options.generated and not options.url:
        with open(PAGE, "rb") as page, open(options.generated, encoding="ascii") as generated:
            equal(re.search(r'"(sha256-[^"]+)"', generated.read()).group(1), script_hash(page.read()), "embedded hash")
    if options.screenshots:
        os.makedirs(options.screenshots, exist_ok=True)
    script, server, url = None, None, options.url
    if not url:
        script = Handler.script = Script()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # clients that leave are part of the script
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
    browser = Browser(driver, binary)
    checks = Checks(browser, url, script, options.screenshots, options.key)
    prefix = "real_" if options.url else "check_"
    failed = 0
    try:
        for name in [n for n in vars(Checks) if n.startswith(prefix) and options.only in n]:
            started = time.time()
            try:
                checks.fresh()
                getattr(checks, name)()
                for message in browser.console():
                    if not (checks.allowed and re.search(checks.allowed, message)):
                        raise AssertionError(f"the console says: {message}")
                print(f"ok      {name[len(prefix):]} ({time.time() - started:.1f} s)", flush=True)
            except AssertionError as error:
                failed += 1
                browser.console()
                checks.shot("failed-" + name)
                print(f"FAILED  {name[len(prefix):]}: {error}", flush=True)
    finally:
        browser.close()
        if server:
            server.shutdown()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
