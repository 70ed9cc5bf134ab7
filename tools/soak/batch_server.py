#!/usr/bin/env python3
"""Sixteen requests together against one at a time, and the engine's own time a step.

  tools/soak/batch_server.py --hadal ./hadal [--batch 16] [--tokens 200] [--rounds 3]

Each round sends the same requests one after another, then all at once; the texts must be equal. Prints tokens a second of
both, their ratio, and the engine's time outside model and sampler (wall, and processor time of its thread, without what the server's
threads take from it), which may be 50 us a step and 2 us a sequence. Exits with 1 at a
difference. Quiet machines only. Python's standard library only.
"""
import argparse
import concurrent.futures
import random
import sys
import time

from serving import Server, percentile, random_tokens

COUNTERS = ("hadal_steps_total", "hadal_sampling_seconds_total", "hadal_overhead_seconds_total",
            "hadal_overhead_cpu_seconds_total")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hadal", default="./hadal")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    server = Server(args.hadal)
    rates = {"one at a time": [], "together": []}
    outside = {}
    for number in range(args.rounds):
        rng = random.Random(number)
        requests = [{"prompt": [0] + random_tokens(rng, 30), "max_tokens": args.tokens, "ignore_eos": True, "seed": index,
                     "temperature": 0.8 if index % 2 else 0, "use_prefix_cache": False} for index in range(args.batch)]

        def ask(request):
            return server.post("/v1/completions", request)["choices"][0]["text"]

        texts = {}
        for way, workers in (("one at a time", 1), ("together", args.batch)):
            steps, *spent = [server.metric(name) for name in COUNTERS]
            began = time.monotonic()
            with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                texts[way] = list(pool.map(ask, requests))
            rates[way].append(args.batch * args.tokens / (time.monotonic() - began))
            steps = server.metric(COUNTERS[0]) - steps
            outside.setdefault(way, []).append([(server.metric(name) - before) / steps * 1e6
                                                for name, before in zip(COUNTERS[1:], spent)])
        if texts["together"] != texts["one at a time"]:
            print("texts differ")
            return 1
        print(f"round {number + 1}: {rates['one at a time'][-1]:.0f} and {rates['together'][-1]:.0f} tokens/s, "
              f"{rates['together'][-1] / rates['one at a time'][-1]:.2f} times; sampling {outside['one at a time'][-1][0]:.1f} and "
              f"{outside['together'][-1][0]:.1f} us a step, the rest {outside['one at a time'][-1][1]:.1f} and "
              f"{outside['together'][-1][1]:.1f} us, {outside['one at a time'][-1][2]:.1f} and "
              f"{outside['together'][-1][2]:.1f} us of the engine's own", flush=True)
    server.stop()
    ratio = percentile(rates["together"], 0.5) / percentile(rates["one at a time"], 0.5)
    rest = {way: percentile([times[2] for times in all_times], 0.5) for way, all_times in outside.items()}
    print(f"medians: {ratio:.2f} times (bar 3), outside model and sampler {rest['one at a time']:.1f} us (bar 52) and "
          f"{rest['together']:.1f} us a step of {args.batch} (bar {50 + 2 * args.batch})")
    return int(ratio < 3)


if __name__ == "__main__":
    sys.exit(main())
