#!/usr/bin/env python3
"""How fast `hadal serve --device cuda` starts from a checkpoint in memory, beside what the machine allows.

    bench/load.py HADAL [--layers 20] [--dir FOLDER]

Writes a random checkpoint of V4-Flash's first layers (tools/random_checkpoint.py) to /dev/shm, which it lets grow if it
may, or to a file system whose files the memory holds, whichever has room for more layers; measures how fast all processors together read it, and how fast one stream copies from pinned and from pageable
memory to the device; then starts the server twice and asks for one token until it answers. Needs numpy and torch.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
LAYER_BYTES, TOP_BYTES = 3.62e9, 2.2e9
COPY = """
import time, torch
bytes = 1 << 30
device = torch.empty(bytes, dtype=torch.uint8, device="cuda")
for name, pinned in (("pinned", True), ("pageable", False)):
    host = torch.ones(bytes, dtype=torch.uint8).pin_memory() if pinned else torch.ones(bytes, dtype=torch.uint8)
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        device.copy_(host, non_blocking=pinned)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    print(name, bytes / 1e9 / sorted(times)[2])
"""


def read_rate(folder):
    """GB/s of all threads that read the shards, 4 MiB a call, into memory of their own."""
    parts = []
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            path = os.path.join(folder, name)
            parts += [(path, at) for at in range(0, os.path.getsize(path), 256 << 20)]
    local = threading.local()

    def read(part):
        path, at = part
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(4 << 20)
        done, file = 0, os.open(path, os.O_RDONLY)
        while done < 256 << 20:
            got = os.preadv(file, [local.buffer], at + done)
            if got == 0:
                break
            done += got
        os.close(file)
        return min(done, 256 << 20)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(read, parts[:os.cpu_count()]))  # buffers
        begin = time.perf_counter()
        total = sum(threads.map(read, parts))
        return total / 1e9 / (time.perf_counter() - begin)


def start(hadal, folder, device, port):
    """(seconds to the first answer, what the server said with the second at which it did)."""
    begin, said = time.perf_counter(), []
    server = subprocess.Popen([hadal, "serve", "--model", folder, "--device", device, "--port", str(port),
                               "--cache-gib", "2", "--max-running", "8", "--max-context", "8192"],
                              stderr=subprocess.PIPE, text=True)

    def listen():
        for line in server.stderr:
            said.append(f"{time.perf_counter() - begin:7.2f}  {line.rstrip()}")

    threading.Thread(target=listen, daemon=True).start()
    body = json.dumps({"prompt": "It was", "max_tokens": 1}).encode()
    try:
        while server.poll() is None and time.perf_counter() - begin < 300:
            try:
                request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body,
                                                 {"Content-Type": "application/json"})
                urllib.request.urlopen(request, timeout=120).read()
                return time.perf_counter() - begin, said
            except OSError:
                time.sleep(0.01)
        sys.exit(f"the server did not answer:\n" + "\n".join(said))
    finally:
        server.terminate()
        server.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hadal")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--dir", help="where the checkpoint goes, a folder that is made anew")
    parser.add_argument("--like", help="a small checkpoint in place of V4-Flash's widths")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    layers = options.layers
    if options.dir is None:
        subprocess.run(["mount", "-o", f"remount,size={int(layers * LAYER_BYTES + 2 * TOP_BYTES)}", "/dev/shm"],
                       stderr=subprocess.DEVNULL, check=False)
        place = max(("/dev/shm", "/tmp"), key=lambda path: shutil.disk_usage(path).free)
        options.dir = place + "/hadal-load"
    shutil.rmtree(options.dir, ignore_errors=True)
    if not options.like:
        free = shutil.disk_usage(os.path.dirname(options.dir.rstrip("/"))).free
        layers = min(layers, int((0.97 * free - TOP_BYTES) / LAYER_BYTES))
    if layers < 1:
        sys.exit(f"not one layer fits beside {options.dir}")
    print(f"{layers} layers in {options.dir}")
    like = ["--like", options.like] if options.like else ["--layers", str(layers)]
    try:
        subprocess.run([sys.executable, os.path.join(HERE, "..", "tools", "random_checkpoint.py"), options.dir] + like,
                       check=True)
        print(f"read by {os.cpu_count()} threads: {read_rate(options.dir):.1f} GB/s", flush=True)
        if options.device == "cuda":
            print(subprocess.run([sys.executable, "-c", COPY], capture_output=True, text=True, check=True).stdout
                  .replace("\n", " GB/s to the device\n").rstrip(), flush=True)
        for run in range(2):
            seconds, said = start(options.hadal, options.dir, options.device, 8123 + run)
            print(f"first answer after {seconds:.2f} s; the server said")
            print("\n".join("    " + line for line in said), flush=True)
            loaded = [re.search(r"([\d.]+) GB of weights in ([\d.]+) s, ([\d.]+) GB/s", line) for line in said]
            print("".join(f"loaded at {m[3]} GB/s ({m[2]} s)\n" for m in loaded if m), end="", flush=True)
    finally:
        shutil.rmtree(options.dir, ignore_errors=True)


main()
