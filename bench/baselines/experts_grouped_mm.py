"""Routed experts in BF16 by PyTorch: two torch._grouped_mm and SwiGLU, captured in a graph.

The baseline of `kernel_bench experts` at the same shapes and number of tokens, on uniform routing.
Prints one line per number of tokens: tokens, microseconds a call.
"""
import sys

import torch

DIM, INTER, EXPERTS, TOPK = 4096, 2048, 256, 6


def main():
    torch.manual_seed(1)
    gate_up = torch.randn(EXPERTS, DIM, 2 * INTER, dtype=torch.bfloat16, device="cuda") / 64
    down = torch.randn(EXPERTS, INTER, DIM, dtype=torch.bfloat16, device="cuda") / 64
    for tokens in (int(t) for t in sys.argv[1:]):
        sets = []
        for _ in range(8):
            chosen = torch.stack([torch.randperm(EXPERTS)[:TOPK] for _ in range(tokens)]).flatten()
            ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).int().cuda()
            rows = torch.randn(tokens * TOPK, DIM, dtype=torch.bfloat16, device="cuda")
            sets.append((rows, ends))

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
        for _ in range(15):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1000 / len(sets))
        print(f"grouped_mm {tokens} {sorted(times)[len(times) // 2]:.1f}")


main()
