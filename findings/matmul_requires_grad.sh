#!/usr/bin/env bash
# torch.matmul: the values of a product depend on whether an operand requires a gradient, also under no_grad.
#
# One would expect requires_grad to decide what is remembered, not what is computed. But for a matrix times a batch
# of matrices the flag decides whether the batch is folded into one product or multiplied matrix by matrix, and the
# sums of the two run in different orders, in float64 as in float32. no_grad does not switch that off: a parameter
# multiplies as in training there, its detached copy does not. Activations require gradients with a graph and none
# under no_grad, so an evaluation, or a layer's first pass where the backward pass computes it again, has other bits
# than the training forward pass of the same values. BF16 products of these shapes agree.
# Seen with torch 2.11.0+cu130 on an x86-64 CPU (MKL), one thread; libtorch 2.11.0 on another one likewise.
# Output seen (how many shapes differ hangs on the processor):
#   float32: of 120 shapes 45 differ with requires_grad, 45 with it under no_grad, 0 between those two
#   float64: of 120 shapes 56 differ with requires_grad, 56 with it under no_grad, 0 between those two
# Exits 1 if none differs, or if the last two do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# A machine that has this very version needs no download of 3 GB.
if ! python3 -c 'import torch; assert torch.__version__.split("+")[0] == "2.11.0"' 2>/dev/null; then
  python3 -m pip install --quiet --disable-pip-version-check --target "$folder/packages" torch==2.11.0
fi
cat >"$folder/matmul.py" <<'PYTHON'
import itertools

import torch

torch.set_num_threads(1)
torch.manual_seed(0)
as_seen = True
for dtype in (torch.float32, torch.float64):
    shapes = list(itertools.product((1, 2, 5, 7, 16, 33), (8, 33, 64, 200), (1, 3, 8, 17, 64)))
    training = no_grad = between = 0
    for rows, inner, columns in shapes:
        x = torch.randn(rows, inner).to(dtype)
        batch = torch.randn(3, inner, columns).to(dtype)
        plain = torch.matmul(x, batch)
        parameter = x.clone().requires_grad_()
        with_graph = torch.matmul(parameter, batch).detach()
        with torch.no_grad():
            without_graph = torch.matmul(parameter, batch)
        training += not torch.equal(with_graph, plain)
        no_grad += not torch.equal(without_graph, plain)
        between += not torch.equal(without_graph, with_graph)
    print(f"{str(dtype)[6:]}: of {len(shapes)} shapes {training} differ with requires_grad, "
          f"{no_grad} with it under no_grad, {between} between those two")
    as_seen &= training > 0 and no_grad > 0 and between == 0
raise SystemExit(not as_seen)
PYTHON
PYTHONPATH="$folder/packages" python3 "$folder/matmul.py"
