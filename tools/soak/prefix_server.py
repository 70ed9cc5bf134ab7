#!/usr/bin/env python3
"""Time to the first token of a long prompt: cold, with its beginning in memory, with its beginning on disk.

  tools/soak/prefix_server.py --hadal ./hadal [--tokens 32768] [--policy full|periodic|zero ...] [--lengths 32]

A prompt of so many tokens and 16 others behind it is sent cold; then the same beginning with 16 other tokens, from memory, and, after
a restart, from disk (in the page cache). Then beginnings of random length, which end between checkpoints. The first tokens and their
log-probabilities must be those of a server that knows no prefix. Quiet machines only. Python's standard library only.
"""
import argparse
import random
import shutil
import sys
import tempfile
import time

from serving import Server, mean, percentile, random_tokens


def first_token(server, prompt, cache=True):
    """Seconds, what came (text, log-probabilities), cached tokens, of them from disk."""
    began = time.monotonic()
    answer = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 5, "ignore_eos": True,
                                             "use_prefix_cache": cache})
    seconds = time.monotonic() - began
    details = answer["usage"]["prompt_tokens_details"]
    choice = answer["choices"][0]
    return seconds, (choice["text"], choice["logprobs"]), details["cached_tokens"], details["disk_tokens"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hadal", default="./hadal")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--policy", nargs="+", default=["full", "periodic", "zero"])
    parser.add_argument("--lengths", type=int, default=32)
    parser.add_argument("--tries", type=int, default=3)
    args = parser.parse_args()
    rng = random.Random(5)
    base = [0] + random_tokens(rng, args.tokens - 1)
    tails = [random_tokens(rng, 16) for _ in range(args.tries + 2)]
    lengths = [rng.randrange(1, args.tokens + 1) for _ in range(args.lengths)]
    plain = Server(args.hadal)
    wanted, cold = {}, []
    for index in range(1, args.tries + 2):
        seconds, wanted[index], cached, _ = first_token(plain, base + tails[index], cache=False)
        cold.append(seconds)
        if cached:
            sys.exit(f"cold, but {cached} tokens cached")
    short = {}
    for length in lengths:
        seconds, answer, _, _ = first_token(plain, base[:length] + tails[0], cache=False)
        short[length] = (seconds, answer)
    plain.stop()
    print(f"{args.tokens} + 16 tokens cold: {', '.join(f'{x:.2f}' for x in cold)} s")
    print(f"{args.lengths} random lengths cold: mean {mean([seconds for seconds, _ in short.values()]):.3f} s", flush=True)
    failed = False

    def compare(where, found, expected):
        nonlocal failed
        if found != expected:
            print(f"{where}: wrong answer {found}, expected {expected}")
            failed = True

    for policy in args.policy:
        folder = tempfile.mkdtemp(prefix="hadal-soak-")
        try:
            flags = ("--disk-cache", folder, "--disk-policy", policy)
            server = Server(args.hadal, *flags)
            first_token(server, base + tails[0])
            memory = []
            for index in range(1, args.tries + 1):
                seconds, answer, cached, disk = first_token(server, base + tails[index])
                compare(f"{policy}, memory", answer, wanted[index])
                memory.append((seconds, cached, disk))
            memory_short = []
            for length in lengths:
                seconds, answer, cached, disk = first_token(server, base[:length] + tails[0])
                compare(f"{policy}, memory, {length}", answer, short[length][1])
                memory_short.append((seconds, length + 16 - cached))
            server.stop()
            disk_times, disk_short = [], []
            for index in range(1, args.tries + 1):
                server = Server(args.hadal, *flags)
                seconds, answer, cached, disk = first_token(server, base + tails[index])
                compare(f"{policy}, disk", answer, wanted[index])
                disk_times.append((seconds, cached, disk))
                server.stop()
            for length in lengths:
                server = Server(args.hadal, *flags)
                seconds, answer, cached, disk = first_token(server, base[:length] + tails[0])
                compare(f"{policy}, disk, {length}", answer, short[length][1])
                disk_short.append((seconds, length + 16 - cached))
                server.stop()
            base_cold = percentile(cold, 0.5)
            for where, found, bar in (("memory", memory, 100), ("disk", disk_times, 20)):
                seconds = percentile([x[0] for x in found], 0.5)
                print(f"{policy}, {where}: {', '.join(f'{x[0]:.3f}' for x in found)} s, {base_cold / seconds:.0f} times faster "
                      f"(bar {bar}), {found[0][1]} tokens cached, {found[0][2]} of them from disk")
                failed |= base_cold / seconds < bar
            for where, found in (("memory", memory_short), ("disk", disk_short)):
                print(f"{policy}, {args.lengths} random lengths from {where}: mean {mean([x[0] for x in found]):.3f} s, "
                      f"{mean([x[1] for x in found]):.0f} tokens computed", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print("failed" if failed else "all answers are those without a prefix")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
