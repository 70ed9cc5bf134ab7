#!/usr/bin/env python3
"""What each kernel of a recorded step adds to its end: from the records of one replay of a graph.

    g++ -shared -fPIC -I$CUDA/include bench/timeline/records.cpp -o records.so -L$CUDA/lib64 -lcupti
    CUDA_INJECTION64_PATH=$PWD/records.so KERNEL_RECORDS=k.tsv ./hadal bench model --layers 14 --batch 1 --chunk 64
    bench/timeline/show.py k.tsv [--first 8] [--last 12]

The last replay but two is shown, from one hyper-connection's kernel to another (two a layer). Columns: begin and
duration in us; how much later than all kernels before it this one ended; stream, blocks, threads, name. A kernel that
may begin beside the one before it is shown from when its first block waits.
"""
import argparse
import collections
import re
import subprocess
import sys

LEAST = 150  # kernels of a graph worth showing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records")
    parser.add_argument("--first", type=int, default=8)
    parser.add_argument("--last", type=int, default=12)
    options = parser.parse_args()
    launches = collections.defaultdict(list)
    with open(options.records) as file:
        for line in file:
            launch, *numbers, name = line.rstrip("\n").split("\t")
            launches[launch].append((*map(int, numbers), name))
    replays = sorted((k for k in launches.values() if len(k) >= LEAST), key=lambda k: min(k)[0])
    if len(replays) < 3:
        sys.exit(f"{options.records}: {len(replays)} launches of {LEAST} kernels or more, expected 3")
    kernels = sorted(replays[-3])
    names = subprocess.run(["c++filt"], input="\n".join(k[-1] for k in kernels), capture_output=True, text=True,
                           check=True).stdout.split("\n")
    marks = [i for i, name in enumerate(names) if "hc_pre" in name]
    if options.last >= len(marks):
        sys.exit(f"{options.records}: {len(marks)} hyper-connections in the step, asked for number {options.last}")
    begin = kernels[0][0]
    print(f"{len(kernels)} kernels, {(max(k[1] for k in kernels) - begin) / 1e3:.1f} us")
    ended = None
    for i in range(marks[options.first], marks[options.last] + 1):
        start, end, stream, blocks, threads, _ = kernels[i]
        later = 0 if ended is None else (end - ended) / 1e3
        name = re.sub(r"\(anonymous namespace\)::|hadal::ops::cuda::|^void ", "", names[i]).split("(")[0]
        print(f"{(start - begin) / 1e3:9.2f} {(end - start) / 1e3:7.2f} {later:+7.2f}  s{stream:<3} g{blocks:<5} "
              f"b{threads:<4} {name[:70]}")
        ended = end if ended is None else max(ended, end)


main()
