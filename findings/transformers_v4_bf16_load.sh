#!/usr/bin/env bash
# transformers 5.17.0, DeepseekV4ForCausalLM: from_pretrained(dtype=bfloat16) gives a model that cannot run.
#
# One would expect a model loaded in BF16 to run in BF16, since the same one cast by .to(torch.bfloat16) does. The loader keeps
# what the model wants in FP32 (sinks, hyper-connections), and with it the weights of all norms: by this loader a
# norm multiplies its BF16 result with an FP32 weight and gives FP32, which the first BF16 matrix behind it refuses.
# 5.24.0 loads the same parameters in the same types and runs. Seen on CPU with torch 2.15.0.
# Output seen:
#   loaded in FP32: torch.float32
#   loaded, then cast to BF16: torch.bfloat16
#   loaded in BF16: RuntimeError, expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16
# Exits 1 if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.17.0 torch==2.15.0
cat >"$folder/load.py" <<'PYTHON'
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model(
    "deepseek_v4", vocab_size=64, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
    head_dim=32, qk_rope_head_dim=8, q_lora_rank=32, num_experts_per_tok=2, n_routed_experts=4, o_groups=2,
    o_lora_rank=16, index_n_heads=2, index_head_dim=32, index_topk=8, hc_mult=2)
AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])


def load(**options):
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)


def outcome(model):
    try:
        return str(model(torch.arange(8)[None]).logits.dtype)
    except RuntimeError as error:
        return f"RuntimeError, {str(error).splitlines()[0]}"


whole, cast, low = outcome(load()), outcome(load().to(torch.bfloat16)), outcome(load(dtype=torch.bfloat16))
print(f"loaded in FP32: {whole}\nloaded, then cast to BF16: {cast}\nloaded in BF16: {low}")
sys.exit(not (whole == "torch.float32" and cast == "torch.bfloat16" and low.startswith("RuntimeError, expected m1")))
PYTHON
"$folder/venv/bin/python" "$folder/load.py" "$folder/saved" 2>/dev/null
