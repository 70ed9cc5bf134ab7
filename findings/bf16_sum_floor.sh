#!/usr/bin/env bash
# BF16 tensor cores (Hopper): a fused sum has a floor.
#
# Matrix instructions align their products to the largest one's exponent and cut what lies 25 bits or more
# below it. One would expect that to hold at any magnitude, since products are exact and nothing is flushed
# (subnormal results are delivered). But the exponent that products are aligned to never goes below -133: a
# product below 2^-158 is lost even where the largest one is small enough to keep it.
#   2^-138 - 2^-158  gives the FP32 number below 2^-138 (cut toward zero: 2^-138 - 2^-149)
#   2^-138 - 2^-159  gives 2^-138, although 2^-159 is only 21 bits below the largest product
#   2^-100 - 2^-121  (the same 21 bits) gives a number below 2^-100
# Seen on one NVIDIA H200, driver 580.159.04, torch 2.11.0+cu130 (cuBLAS, one instruction of 16 inputs).
# Output seen: "floor: kept 1, lost 1, far above kept 1". Needs a Hopper GPU; exits 1 if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# A machine that has this very version needs no download of 3 GB.
if ! python3 -c 'import torch; assert torch.__version__.split("+")[0] == "2.11.0"' 2>/dev/null; then
  python3 -m pip install --quiet --disable-pip-version-check --target "$folder/packages" torch==2.11.0
fi
cat >"$folder/floor.py" <<'PYTHON'
import torch


def difference(large, small):
    """2^large - 2^small as one matrix instruction adds it."""
    x = torch.zeros(64, 16, dtype=torch.bfloat16, device="cuda")
    w = torch.zeros(64, 16, dtype=torch.bfloat16, device="cuda")
    x[:, 0], w[:, 0] = 2.0 ** -60, 2.0 ** (large + 60)
    x[:, 1], w[:, 1] = 2.0 ** -60, -(2.0 ** (small + 60))
    y = torch.mm(x, w.t(), out_dtype=torch.float32)
    assert (y == y[0, 0]).all()
    return y[0, 0].double().item()


kept = difference(-138, -158) == 2.0 ** -138 - 2.0 ** -149
lost = difference(-138, -159) == 2.0 ** -138
above = difference(-100, -121) < 2.0 ** -100
print(f"floor: kept {kept:d}, lost {lost:d}, far above kept {above:d}")
raise SystemExit(not (kept and lost and above))
PYTHON
PYTHONPATH="$folder/packages" python3 "$folder/floor.py"
