"""Routed experts in BF16 by PyTorch: two torch._grouped_mm and SwiGLU, captured in a graph.

    experts_grouped_mm.py 1 8 64                               the baseline alone: tokens, microseconds a call
    experts_grouped_mm.py 1 8 64 --kernel-bench KERNEL_BENCH   hadal's `kernel_bench experts` beside it, and the ratio

The eight routings of each number of tokens are those of `kernel_bench experts` (bench/kernels.cu, std::mt19937 with
seed 3). A call's weights are more than the second-level cache holds, and the next call reads other ones; medians of
15 replays. hadal gathers and quantises its rows in that time, the baseline gets them gathered. kernel_bench runs before
and after the baseline; its slower run counts.
"""
import argparse
import re
import subprocess

DIM, INTER, EXPERTS, TOPK, SETS = 4096, 2048, 256, 6, 8
BENCH_TOKENS = (1, 8, 64, 4096)  # in the order in which kernel_bench draws


class Mt19937:
    """std::mt19937."""

    def __init__(self, seed):
        self.state = [seed]
        for i in range(1, 624):
            before = self.state[-1]
            self.state.append((1812433253 * (before ^ before >> 30) + i) & 0xFFFFFFFF)
        self.at = 624

    def __call__(self):
        if self.at == 624:
            for i in range(624):
                y = (self.state[i] & 0x80000000) | (self.state[(i + 1) % 624] & 0x7FFFFFFF)
                self.state[i] = self.state[(i + 397) % 624] ^ y >> 1 ^ (0x9908B0DF if y & 1 else 0)
            self.at = 0
        y = self.state[self.at]
        self.at += 1
        y ^= y >> 11
        y ^= y << 7 & 0x9D2C5680
        y ^= y << 15 & 0xEFC60000
        return y ^ y >> 18


def routings():
    """{tokens: [experts chosen by one set's tokens]}, as make_routing of bench/kernels.cu draws them."""
    random, result = Mt19937(3), {}
    for tokens in BENCH_TOKENS:
        result[tokens] = []
        for _ in range(SETS):
            chosen = []
            for _ in range(tokens):
                mine = []
                while len(mine) < TOPK:
                    expert = random() % EXPERTS
                    if expert not in mine:
                        mine.append(expert)
                chosen += mine
            result[tokens].append(chosen)
    return result


def baseline(all_tokens):
    """{tokens: microseconds a call}."""
    import torch

    torch.manual_seed(1)
    gate_up = torch.randn(EXPERTS, DIM, 2 * INTER, dtype=torch.bfloat16, device="cuda") / 64
    down = torch.randn(EXPERTS, INTER, DIM, dtype=torch.bfloat16, device="cuda") / 64
    drawn, result = routings(), {}
    for tokens in all_tokens:
        sets = []
        for chosen in drawn[tokens]:
            ends = torch.bincount(torch.tensor(chosen), minlength=EXPERTS).cumsum(0).int().cuda()
            sets.append((torch.randn(tokens * TOPK, DIM, dtype=torch.bfloat16, device="cuda"), ends))

        def step():
            for rows, ends in sets:
                h = torch._grouped_mm(rows, gate_up, offs=ends)
                gate, up = h.chunk(2, dim=-1)
                torch._grouped_mm(torch.nn.functional.silu(gate) * up, down, offs=ends)

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        times = []
        for turn in range(18):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                times.append(start.elapsed_time(end) * 1000 / len(sets))
        result[tokens] = sorted(times)[len(times) // 2]
        print(f"grouped_mm {tokens} {result[tokens]:.1f}", flush=True)
    return result


def hadal(kernel_bench):
    """{tokens: microseconds a call}, with the tile that hadal chooses."""
    text = subprocess.run([kernel_bench, "experts"], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"experts tokens +(\d+) tile +-1 all +([\d.]+) us", text)
    if not found:
        raise SystemExit(f"{kernel_bench} experts printed no time of tile -1:\n{text}")
    return {int(tokens): float(us) for tokens, us in found}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tokens", type=int, nargs="+", choices=BENCH_TOKENS)
    parser.add_argument("--kernel-bench")
    options = parser.parse_args()
    before = hadal(options.kernel_bench) if options.kernel_bench else None
    theirs = baseline(options.tokens)
    if not before:
        return
    after = hadal(options.kernel_bench)
    print(f"{'tokens':>6} {'hadal us':>10} {'(runs)':>18} {'grouped_mm us':>14} {'ratio':>6}")
    for tokens in options.tokens:
        ours = max(before[tokens], after[tokens])
        print(f"{tokens:6} {ours:10.1f} {before[tokens]:9.1f}{after[tokens]:9.1f} {theirs[tokens]:14.1f} "
              f"{theirs[tokens] / ours:6.2f}")


main()
