#!/usr/bin/env bash
# transformers 5.24.0, DeepseekV4ForCausalLM: save_pretrained writes names of nobody.
#
# transformers reads official V4 checkpoints by renaming tensors, and undoes renamings when it saves. One would
# expect a saved model to have either the official names (embed.weight, layers.0.attn.wq_a.weight,
# layers.0.attn.kv_norm.weight, hc_head_fn, head.weight) or those of its own modules
# (model.layers.0.self_attn.q_a_proj.weight, ..., lm_head.weight). It has a mixture: official ones behind
# "model." for the layers, "attn.norm" in place of "attn.kv_norm", its own for the embedding and the last
# hyper-connection, and the official "head.weight" without the prefix. Neither a reader of official names nor
# one of module names finds the tensors; transformers itself loads them. Seen on CPU with torch 2.15.0.
# Output seen:
#   model.embed_tokens.weight, model.norm.weight, model.hc_head.hc_fn, head.weight
#   model.layers.0.attn.wq_a.weight, model.layers.0.attn.norm.weight, model.layers.0.hc_attn_fn
#   official names: 0 but head.weight; module names: 5 of 43
# Exits 1 if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.15.0
cat >"$folder/names.py" <<'PYTHON'
import sys

from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model(
    "deepseek_v4", vocab_size=64, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
    head_dim=32, qk_rope_head_dim=8, q_lora_rank=32, num_experts_per_tok=2, n_routed_experts=4, o_groups=2,
    o_lora_rank=16, index_n_heads=2, index_head_dim=32, index_topk=8, hc_mult=2)
model = AutoModelForCausalLM.from_config(config)
model.save_pretrained(sys.argv[1])
names = set(safe_open(f"{sys.argv[1]}/model.safetensors", "pt").keys())
modules = set(model.state_dict())
mixture = ["model.embed_tokens.weight", "model.norm.weight", "model.hc_head.hc_fn", "head.weight"]
layer = ["model.layers.0.attn.wq_a.weight", "model.layers.0.attn.norm.weight", "model.layers.0.hc_attn_fn"]
official = {"embed.weight", "norm.weight", "hc_head_fn", "layers.0.attn.wq_a.weight", "layers.0.attn.kv_norm.weight"}
print(", ".join(mixture) + "\n" + ", ".join(layer))
print(f"official names: {len(official & names)} but head.weight; module names: {len(modules & names)} of {len(names)}")
sys.exit(not (names.issuperset(mixture + layer) and not official & names and len(modules & names) < len(names) / 2))
PYTHON
"$folder/venv/bin/python" "$folder/names.py" "$folder/saved" 2>/dev/null
