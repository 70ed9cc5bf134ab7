#!/usr/bin/env python3
"""Measures drafts of `hadal serve`: without, always, and as the engine chooses (adaptive).

  tools/soak/speculation.py --hadal ./hadal --text book.txt [--streams 1,16] [--temperatures 0,0.7] [--rounds 5]

Each mode has a server. In every round each gets the same prompts (pieces of the text), as many at a time as there are
streams; who is first changes from round to round, so that what else the machine does bears on all alike. The time of
the same requests with one token each is taken off: what is left is decoding. All answers must be those without drafts.
Prints medians over the rounds; ratios are taken within a round; "per CPU s" is the ratio of tokens per second of
processor time, which a loaded machine disturbs less. Exits with 1 if an answer differs. `--text` is plain
text or JSON lines with "text", also .xz. Python's standard library only.
"""
import argparse
import json
import lzma
import os
import random
import statistics
import sys
import threading
import time

from serving import Server

MODES = {"off": ["--max-drafts", "0"], "always": ["--max-drafts", "1", "--always-draft"], "adaptive": ["--max-drafts", "1"]}


class DraftingServer(Server):
    def ask(self, request):
        answer = self.post("/v1/completions", request)
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    def ask_all(self, requests):
        """All at once: the answers in order, the seconds until the last, and processor seconds."""
        answers = [None] * len(requests)

        def one(index):
            answers[index] = self.ask(requests[index])

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(requests))]
        began, busy = time.monotonic(), self.processor_seconds()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers, time.monotonic() - began, self.processor_seconds() - busy

    def processor_seconds(self):
        with open(f"/proc/{self.process.pid}/stat", encoding="utf-8") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def drafts(self):
        """Tokens drafted and accepted so far."""
        return [self.metric(f"hadal_{name}_tokens_total") for name in ("drafted", "accepted")]


def read_text(path):
    opened = lzma.open(path, "rt", encoding="utf-8") if path.endswith(".xz") else open(path, encoding="utf-8")
    with opened as file:
        if ".jsonl" in path:
            return [json.loads(line)["text"] for line in file]
        return [file.read()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hadal", default="./hadal")
    parser.add_argument("--model", help="default: the shipped model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--temperatures", default="0,0.7")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--prompt-bytes", type=int, default=600)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng, books, modes = random.Random(args.seed), read_text(args.text), args.modes.split(",")
    flags = ["--model", args.model] if args.model else []
    servers = {mode: DraftingServer(args.hadal, *flags, *MODES[mode]) for mode in modes}
    different = 0
    print(f"{'streams':>7} {'temp':>5} {'mode':>9} {'tokens/s':>9} {'of off':>7} {'all rounds':>24} {'per CPU s':>10} {'accepted':>9} "
          f"{'drafts/token':>13}", flush=True)
    try:
        for streams in map(int, args.streams.split(",")):
            for temperature in map(float, args.temperatures.split(",")):
                rates, costs = {mode: [] for mode in modes}, {mode: [] for mode in modes}
                drafts = {mode: [0, 0, 0] for mode in modes}
                for number in range(args.rounds):
                    requests = []
                    for stream in range(streams):
                        book = rng.choice(books)
                        start = rng.randrange(max(1, len(book) - args.prompt_bytes))
                        requests.append({"prompt": book[start:start + args.prompt_bytes], "max_tokens": args.max_tokens,
                                         "temperature": temperature, "seed": 1000 * number + stream,
                                         "ignore_eos": True, "use_prefix_cache": False})
                    answers = {}
                    shift = number % len(modes)
                    for mode in modes[shift:] + modes[:shift]:
                        _, before, busy_before = servers[mode].ask_all([dict(request, max_tokens=1) for request in requests])
                        first = servers[mode].drafts()
                        answers[mode], seconds, busy = servers[mode].ask_all(requests)
                        last = servers[mode].drafts()
                        tokens = sum(count - 1 for _, count in answers[mode])
                        rates[mode].append(tokens / max(seconds - before, 1e-3))
                        costs[mode].append(max(busy - busy_before, 1e-3) / tokens)
                        for index, amount in enumerate((last[0] - first[0], last[1] - first[1], tokens)):
                            drafts[mode][index] += amount
                    different += sum(answers[mode] != answers[modes[0]] for mode in modes)
                for mode in modes:
                    ratios = sorted(rate / base for rate, base in zip(rates[mode], rates[modes[0]]))
                    work = statistics.median(cost / base for cost, base in zip(costs[mode], costs[modes[0]]))
                    drafted, accepted, tokens = drafts[mode]
                    share = f"{accepted / drafted:.3f}" if drafted else "-"
                    print(f"{streams:7} {temperature:5} {mode:>9} {statistics.median(rates[mode]):9.1f} "
                          f"{statistics.median(ratios):7.3f} {f'{ratios[0]:.3f} to {ratios[-1]:.3f}':>24} {1 / work:10.3f} {share:>9} "
                          f"{drafted / tokens:13.3f}", flush=True)
    finally:
        for server in servers.values():
            server.stop()
    print("all answers are those without drafts" if not different else f"{different} answers differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
