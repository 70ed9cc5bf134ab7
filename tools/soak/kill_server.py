#!/usr/bin/env python3
"""Kills `hadal serve` with SIGKILL at random moments under load, with a store on disk, and compares every answer.

  tools/soak/kill_server.py --hadal ./hadal --kills 200 [--policy full|periodic|zero] [--seed 1]

Answers are recorded from a server without a store, one at a time. Then, as often as asked: a server with the store starts,
clients send random requests of the recorded ones, the server is killed. Every answer that arrived whole must be the
recorded one; every start must succeed. Exits with 1 at the first difference. Python's standard library only.
"""
import argparse
import random
import shutil
import sys
import tempfile
import threading
import time

from serving import Server


def ask(server, request):
    """The answer's text, tokens and cached tokens; None if the server went away."""
    answer = server.post("/v1/completions", request)
    if answer is None:
        return None
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"], answer["usage"]["prompt_tokens_details"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hadal", default="./hadal")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--policy", default="periodic")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    shared = [[0] + [rng.randrange(20, 8000) for _ in range(length)] for length in (300, 700, 1400)]
    requests = []
    for index in range(args.requests):
        base = rng.choice(shared)
        prompt = base[:rng.randrange(1, len(base) + 1)] + [rng.randrange(20, 8000) for _ in range(rng.randrange(1, 40))]
        requests.append({"prompt": prompt, "max_tokens": rng.randrange(1, 40), "seed": index, "ignore_eos": True,
                         "temperature": rng.choice([0, 0.8])})
    server = Server(args.hadal)
    wanted = [ask(server, request)[:2] for request in requests]
    server.stop()

    folder = tempfile.mkdtemp(prefix="hadal-soak-")
    counts = {"whole answers": 0, "from disk": 0, "tokens from disk": 0, "cut off": 0}
    wrong, began = [], time.monotonic()
    try:
        for kill in range(args.kills):
            server = Server(args.hadal, "--disk-cache", folder, "--disk-policy", args.policy)
            deadline = time.monotonic() + rng.uniform(0.1, 4.0)

            def client(seed):
                local = random.Random(seed)
                while time.monotonic() < deadline + 1:
                    index = local.randrange(len(requests))
                    answer = ask(server, requests[index])
                    if answer is None:
                        counts["cut off"] += 1
                        return
                    counts["whole answers"] += 1
                    if answer[2]["disk_tokens"] > 0:
                        counts["from disk"] += 1
                        counts["tokens from disk"] += answer[2]["disk_tokens"]
                    if answer[:2] != wanted[index]:
                        wrong.append((kill, index, answer, wanted[index]))

            clients = [threading.Thread(target=client, args=(rng.random(),)) for _ in range(args.clients)]
            for thread in clients:
                thread.start()
            time.sleep(max(0.0, deadline - time.monotonic()))
            server.kill()
            for thread in clients:
                thread.join()
            trouble = server.trouble()
            if trouble:
                counts["warnings"] = counts.get("warnings", 0) + len(trouble)
                print("kill", kill, *trouble[:3], sep="\n  ")
            if wrong:
                print("wrong answers:", wrong[:3])
                return 1
            if (kill + 1) % 10 == 0:
                print(f"{kill + 1} of {args.kills} kills, {time.monotonic() - began:.0f} s, {counts}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("all answers are the recorded ones")
    return 0


if __name__ == "__main__":
    sys.exit(main())
