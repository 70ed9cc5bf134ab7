#!/usr/bin/env python3
"""A thousand open streams for half an hour, every byte compared.

  tools/soak/load_server.py --hadal ./hadal [--streams 1000] [--minutes 30] [--requests 200] [--seed 1] [--json FILE]

Records the answers of distinct requests (completions and chats; prompts that share beginnings, up to 6,000 tokens) one at a time.
Then keeps so many streams open, each with a random one of them: a tenth is cancelled on the way, a twentieth reads slowly. In every
second window of time, the first among them, prompts of 32,768 tokens arrive under another key, one after another. Every byte that arrives must be the recorded
answer's, to its end unless the client left. Reports the gaps between tokens with and without long prompts, resident memory after minute 5,
tokens a second. Exits with 1 at a wrong byte, an error or a broken bar. Python's standard library only.
"""
import argparse
import asyncio
import json
import os
import random
import socket
import sys
import tempfile
import time

from serving import Server, percentile, random_tokens

LONG_PROMPT = 32768
WINDOW = 150.0  # seconds
SETTLE = 10.0   # of a window's begin whose gaps are not counted


def make_requests(rng, count):
    """(path, body) of each; bodies without "stream"."""
    shared = [[0] + random_tokens(rng, length) for length in (40, 300, 1500, 6000)]
    words = "the old man went down to sea and his boat was lost in deep water where no light comes from above".split()
    made = []
    for index in range(count):
        body = {"max_tokens": rng.randrange(8, 160), "seed": index, "temperature": rng.choice([0, 0.8]), "top_p": 0.95}
        if index % 5 < 3:
            base = shared[rng.choice([0, 0, 0, 1, 1, 1, 2, 2, 3])]
            body["prompt"] = base[:rng.randrange(1, len(base) + 1)] + random_tokens(rng, rng.randrange(1, 60))
            body["ignore_eos"] = True
            made.append(("/v1/completions", body))
        else:
            turns = []
            for turn in range(1 + 2 * rng.randrange(3)):
                text = " ".join(rng.choice(words) for _ in range(rng.randrange(3, 60)))
                turns.append({"role": "assistant" if turn % 2 else "user", "content": text})
            body["messages"] = turns
            body["reasoning_effort"] = rng.choice(["none", "high"])
            made.append(("/v1/chat/completions", body))
    return made


def answer_of(reply):
    """What must be equal: kind of text to text, and why it ended."""
    choice = reply["choices"][0]
    message = choice.get("message", {"content": choice.get("text")})
    return {"content": message.get("content") or "", "reasoning_content": message.get("reasoning_content") or "",
            "tool_calls": [call["function"] for call in message.get("tool_calls") or []],
            "finish_reason": choice["finish_reason"]}


class Gathered:
    """The deltas of a stream put together."""

    def __init__(self):
        self.content, self.reasoning, self.calls, self.finish, self.done = [], [], [], None, False

    def add(self, event):
        """Whether a token's text came with it."""
        if "choices" not in event:
            raise ValueError(f"not a chunk: {event}")
        found = False
        for choice in event["choices"]:
            delta = choice.get("delta", choice)
            text = delta.get("content") or delta.get("text")
            if text:
                self.content.append(text)
                found = True
            if delta.get("reasoning_content"):
                self.reasoning.append(delta["reasoning_content"])
                found = True
            for call in delta.get("tool_calls") or []:
                while len(self.calls) <= call["index"]:
                    self.calls.append({"name": "", "arguments": ""})
                function = call.get("function", {})
                self.calls[call["index"]]["name"] += function.get("name") or ""
                self.calls[call["index"]]["arguments"] += function.get("arguments") or ""
                found = True
            self.finish = choice.get("finish_reason") or self.finish
        return found

    def wrong(self, wanted):
        """What differs from the recorded answer; an unfinished stream may be its beginning."""
        content, reasoning = "".join(self.content), "".join(self.reasoning)
        if self.done:
            if self.finish != wanted["finish_reason"]:
                return f"finish_reason {self.finish}"
            if self.calls != wanted["tool_calls"]:
                return f"tool calls {self.calls}"
            same = content == wanted["content"] and reasoning == wanted["reasoning_content"]
        else:
            same = wanted["content"].startswith(content) and wanted["reasoning_content"].startswith(reasoning)
        return None if same else f"text {content!r} {reasoning!r}"


class Load:
    def __init__(self, args, server, requests, wanted):
        self.args, self.server, self.requests, self.wanted = args, server, requests, wanted
        self.host, port = server.url.removeprefix("http://").split(":")
        self.port = int(port)
        self.began = time.monotonic()
        self.end = self.began + 60 * args.minutes
        self.counts = dict.fromkeys(["whole", "cancelled", "slow", "long prompts", "refused", "tokens"], 0)
        self.gaps = {False: [], True: []}  # without and with long prompts
        self.memory = []                   # (second, bytes)
        self.wrong = []

    def with_long(self, now):
        """Whether long prompts arrive now; None just after a change."""
        window, inside = divmod(now - self.began, WINDOW)
        return None if inside < SETTLE else window % 2 == 0

    async def connect(self, slow):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (self.host, self.port))
        return await asyncio.open_connection(sock=sock, limit=1 << 20)

    async def open(self, path, body, key, slow=False):
        reader, writer = await self.connect(slow)
        data = json.dumps(body).encode()
        writer.write(f"POST {path} HTTP/1.1\r\nHost: soak\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
                     f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        status = int((await reader.readuntil(b"\r\n")).split()[1])
        await reader.readuntil(b"\r\n\r\n")
        return status, reader, writer

    async def stream(self, rng):
        index = rng.randrange(len(self.requests))
        path, body = self.requests[index]
        kind = rng.random()
        slow, leaves = kind < 0.05, 0.05 <= kind < 0.15
        leave_after = rng.randrange(0, 60) if leaves else None
        status, reader, writer = await self.open(path, {**body, "stream": True}, "soak", slow)
        gathered, last, tokens, left = Gathered(), None, 0, False
        try:
            if status == 429:
                self.counts["refused"] += 1
                await asyncio.sleep(1)
                return
            if status != 200:
                raise ValueError(f"status {status}: {await reader.read(2000)}")
            if leaves and leave_after < 5:  # before the first token
                await asyncio.sleep(rng.uniform(0, 5))
                left = True
                return
            while True:
                line = await reader.readline()
                if not line:
                    break
                # The body is chunked: sizes stand on lines of their own and never begin like this.
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    gathered.done = True
                    break
                if not gathered.add(json.loads(line[6:])):
                    continue
                now = time.monotonic()
                self.counts["tokens"] += 1
                tokens += 1
                if last is not None and not slow:
                    phase = self.with_long(now)
                    if phase is not None:
                        self.gaps[phase].append(now - last)
                last = now
                if slow:
                    await asyncio.sleep(rng.uniform(0, 0.2))
                if leaves and tokens >= leave_after:
                    left = True
                    break
        finally:
            writer.close()
        wrong = gathered.wrong(self.wanted[index])
        if wrong is None and not gathered.done and not left:
            wrong = "the stream ended early"
        if wrong:
            self.wrong.append((index, path, wrong, self.wanted[index]))
        self.counts["cancelled" if left else "slow" if slow else "whole"] += 1

    async def keep_open(self, number):
        rng = random.Random(f"{self.args.seed} {number}")
        await asyncio.sleep(rng.uniform(0, 5))
        while time.monotonic() < self.end and not self.wrong:
            try:
                await self.stream(rng)
            except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                self.wrong.append((number, repr(error)))

    async def long_prompts(self):
        rng = random.Random(f"{self.args.seed} long")
        while time.monotonic() < self.end and not self.wrong:
            if int((time.monotonic() - self.began) // WINDOW) % 2 == 1:
                await asyncio.sleep(0.5)
                continue
            body = {"prompt": random_tokens(rng, LONG_PROMPT), "max_tokens": 4, "temperature": 0, "ignore_eos": True}
            status, reader, writer = await self.open("/v1/completions", body, "long")
            answer = await reader.read()
            writer.close()
            if status != 200 or b'"length"' not in answer:
                self.wrong.append(("long prompt", status, answer[:500]))
            self.counts["long prompts"] += 1

    async def watch(self):
        told = self.began
        while time.monotonic() < self.end and not self.wrong:
            now = time.monotonic()
            self.memory.append((now - self.began, self.server.resident_bytes()))
            if now >= told:
                told += 60
                print(f"{(now - self.began) / 60:.1f} of {self.args.minutes:g} minutes, {self.memory[-1][1] / 2**20:.1f} MiB, "
                      f"{self.counts}", flush=True)
            await asyncio.sleep(5)

    async def run(self):
        tasks = [asyncio.create_task(self.keep_open(number)) for number in range(self.args.streams)]
        await asyncio.gather(self.watch(), self.long_prompts(), *tasks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hadal", default="./hadal")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", help="where the figures go")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further flags of hadal serve, last")
    args = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as keys:
        keys.write("soak\nlong\n")
        keys.flush()
        os.chmod(keys.name, 0o600)
        requests = make_requests(random.Random(args.seed), args.requests)
        recorder = Server(args.hadal)
        print(f"recording {len(requests)} answers, one at a time", flush=True)
        wanted = [answer_of(recorder.post(path, body)) for path, body in requests]
        recorder.stop()
        server = Server(args.hadal, "--api-keys", keys.name, "--max-waiting", str(args.streams + 64), *args.serve)
        load = Load(args, server, requests, wanted)
        asyncio.run(load.run())
        server.stop()
    seconds = time.monotonic() - load.began
    figures = {"seconds": round(seconds), "streams": args.streams, **load.counts, "tokens a second": round(load.counts["tokens"] / seconds)}
    failed = bool(load.wrong)
    for name, gaps in (("without", load.gaps[False]), ("with", load.gaps[True])):
        for share in (0.5, 0.99, 0.999):
            if gaps:
                figures[f"gap p{100 * share:g} {name} long prompts, ms"] = round(1000 * percentile(gaps, share), 1)
    if all(load.gaps.values()):
        ratio = percentile(load.gaps[True], 0.99) / percentile(load.gaps[False], 0.99)
        figures["p99 ratio"] = round(ratio, 2)
        failed |= ratio > 3
    after = [size for second, size in load.memory if second >= 300]
    if len(after) > 24:
        grown = percentile(after[-12:], 0.5) / percentile(after[:12], 0.5) - 1
        figures["resident MiB at minute 5"] = round(percentile(after[:12], 0.5) / 2**20, 1)
        figures["grown since, %"] = round(100 * grown, 2)
        failed |= grown >= 0.01
    for name, value in figures.items():
        print(f"{name:40} {value}")
    for wrong in load.wrong[:3]:
        print("wrong:", *wrong, sep="\n  ")
    for line in server.trouble()[:10]:
        print("log:", line, end="")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as out:
            json.dump(figures, out, indent=1)
    print("failed" if failed else "every byte is the recorded one")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
