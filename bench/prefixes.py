#!/usr/bin/env python3
"""Long prompts against a running server's promises, on a random checkpoint of V4-Flash's first layers or any other.

    bench/prefixes.py HADAL [--layers 12] [--model FOLDER] [--tokens 32768] [--seconds 20]

1. The time to the first token of prompts of 32K tokens: never seen; again with another end (from memory); after a
   restart of the server (from disk, files in the system's cache). Medians of five prompts.
2. The gaps between tokens of running streams (eight): alone, and while prompts of 32K arrive every two seconds, each
   never seen before.
Writes the checkpoint with tools/random_checkpoint.py (numpy) unless --model names one. Standard library otherwise.
"""
import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
PORT = 8231


class Server:
    def __init__(self, options, model, disk):
        self.log = open(os.path.join(options.work, "server.log"), "a")
        self.process = subprocess.Popen(
            [options.hadal, "serve", "--model", model, "--name", "m", "--device", options.device, "--port", str(PORT),
             "--cache-gib", str(options.cache_gib), "--disk-cache", disk, "--disk-gib", "8", "--max-running",
             str(max(16, 2 * options.streams)), "--step-tokens", str(options.step_tokens)],
            stderr=self.log)
        for _ in range(6000):
            if self.process.poll() is not None:
                sys.exit(f"the server ended: see {self.log.name}:\n" + open(self.log.name).read()[-2000:])
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models").read()
                return
            except OSError:
                time.sleep(0.05)
        sys.exit("the server did not come up")

    def stop(self):
        self.process.terminate()
        self.process.wait()


def ask(tokens):
    """(milliseconds to a one-token answer, prompt tokens found in caches)."""
    body = json.dumps({"model": "m", "prompt": tokens, "max_tokens": 1, "temperature": 0}).encode()
    begin = time.perf_counter()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", body, {"Content-Type": "application/json"})
    reply = json.loads(urllib.request.urlopen(request, timeout=600).read())
    taken = (time.perf_counter() - begin) * 1000
    usage = reply["usage"]
    assert usage["prompt_tokens"] == len(tokens), usage
    return taken, usage["prompt_tokens_details"]["cached_tokens"]


def prompt(seed, count):
    draw = random.Random(seed)
    return [draw.randrange(3, 8000) for _ in range(count)]


def measure_prefixes(options, model, disk):
    server = Server(options, model, disk)
    ask(prompt(999, options.tokens))  # code and graphs of such steps
    base = [prompt(seed, options.tokens) for seed in range(5)]
    end = [prompt(100 + seed, 8) for seed in range(15)]

    def times(what, number):
        taken, cached = zip(*(ask(p + end[5 * number + i]) for i, p in enumerate(base)))
        print(f"{what:12} {statistics.median(taken):9.1f} ms  ({', '.join(f'{t:.1f}' for t in taken)}; "
              f"{min(cached)} to {max(cached)} of {len(base[0]) + 8} tokens cached)", flush=True)
        return statistics.median(taken)

    cold = times("never seen", 0)
    memory = times("from memory", 1)
    # What is written behind answers is on disk once the server has ended.
    server.stop()
    server = Server(options, model, disk)
    ask(prompt(998, options.tokens))
    from_disk = times("from disk", 2)
    server.stop()
    print(f"cold / memory {cold / memory:.1f}, cold / disk {cold / from_disk:.1f}", flush=True)


def measure_gaps(options, model, disk):
    server = Server(options, model, disk)
    ask(prompt(997, options.tokens))
    ask(prompt(1, 200))
    result = {}
    for what in ("alone", "with"):
        done, asked = threading.Event(), []

        def arrivals():
            seed = 5000
            while not done.wait(options.every):
                seed += 1
                # A thread each: one that waits must not keep the next from arriving.
                thread = threading.Thread(target=lambda s=seed: asked.append(ask(prompt(s, options.tokens))[0]))
                thread.start()

        if what == "with":
            threading.Thread(target=arrivals, daemon=True).start()
        path = os.path.join(options.work, what + ".json")
        subprocess.run([options.hadal, "bench", "serve", "--url", f"http://127.0.0.1:{PORT}", "--endpoint", "completions",
                        "--concurrency", str(options.streams), "--duration", str(options.seconds), "--prompt", "100", "--output", "256",
                        "--temperature", "1", "--extra", '{"ignore_eos": true}', "--json", path], check=True)
        done.set()
        with open(path) as file:
            result[what] = json.load(file)
        gaps = result[what]["gap_ms"]
        print(f"{what:6} gaps p50 {gaps['p50']:.1f} ms, p99 {gaps['p99']:.1f}, max {gaps['max']:.1f}, "
              f"{result[what]['tokens_per_s']:.0f} tokens/s; long prompts answered: {len(asked)}"
              + (f", median {statistics.median(asked):.0f} ms" if asked else ""), flush=True)
    print(f"p99 with / alone {result['with']['gap_ms']['p99'] / result['alone']['gap_ms']['p99']:.2f}")
    time.sleep(options.every)
    server.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hadal")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--model")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between long prompts")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--step-tokens", type=int, default=0, help="of the server; 0: its default")
    parser.add_argument("--cache-gib", type=float, default=8)
    parser.add_argument("--work", help="a folder that is made anew; default: in /dev/shm or /tmp, where there is more room")
    parser.add_argument("--part", default="both", choices=["both", "prefixes", "gaps"])
    options = parser.parse_args()
    if options.work is None:
        options.work = max(("/dev/shm", "/tmp"), key=lambda path: shutil.disk_usage(path).free) + "/hadal-prefixes"
    shutil.rmtree(options.work, ignore_errors=True)
    os.makedirs(options.work)
    try:
        model = options.model
        if model is None:
            model = os.path.join(options.work, "model")
            subprocess.run([sys.executable, os.path.join(HERE, "..", "tools", "random_checkpoint.py"), model, "--layers",
                            str(options.layers)], check=True)
        if options.part != "gaps":
            measure_prefixes(options, model, os.path.join(options.work, "disk"))
        if options.part != "prefixes":
            measure_gaps(options, model, os.path.join(options.work, "disk2"))
    finally:
        shutil.rmtree(options.work, ignore_errors=True)


main()
