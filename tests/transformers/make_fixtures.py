#!/usr/bin/env python3
"""Makes the checkpoints of this folder with Hugging Face transformers (README.md says with which).

Usage: make_fixtures.py OUT    (needs torch and transformers 5.17 or newer)
"""
import os
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

VOCAB, TOKENS = 48, 40


def config():
    return DeepseekV4Config(
        vocab_size=VOCAB, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=2, head_dim=16, qk_rope_head_dim=8, q_lora_rank=16, o_groups=2, o_lora_rank=8,
        n_routed_experts=3, num_experts_per_tok=2, sliding_window=8, hc_mult=2, swiglu_limit=1.5,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
                     "compressed_sparse_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        # More blocks than the text has: with few heads whole blocks score 0, and ties are anybody's.
        index_n_heads=2, index_head_dim=16, index_topk=16, max_position_embeddings=4096,
        rope_scaling={"rope_type": "yarn", "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
                      "original_max_position_embeddings": 256})


@torch.no_grad()
def model():
    result = DeepseekV4ForCausalLM(config())
    for name, value in result.named_parameters():
        if value.dim() >= 2:
            value.normal_(0, 0.3 if "_hc." in name or "hc_head" in name else 1.2 / value.shape[-1] ** 0.5)
        else:
            value.copy_((1 if "norm" in name else 0) + 0.2 * torch.randn_like(value))
    for name, value in result.named_buffers():
        if name.endswith("tid2eid"):
            for row in range(value.shape[0]):
                value[row] = torch.randperm(result.config.n_routed_experts)[:value.shape[1]]
        if name.endswith("e_score_correction_bias"):
            value.copy_(0.2 * torch.randn_like(value))
    return result.eval()


@torch.no_grad()
def record(folder, ids):
    # Loaded anew: a model turned from BF16 into float32 keeps BF16's rotary frequencies.
    net = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    save_file({"input_ids": ids.to(torch.int32), "logits": net(ids).logits.contiguous()},
              os.path.join(folder, "logits.safetensors"))


def main():
    out = sys.argv[1]
    torch.manual_seed(5)
    net = model()
    ids = torch.randint(0, VOCAB, (2, TOKENS))
    net.save_pretrained(f"{out}/f32")
    record(f"{out}/f32", ids)
    # Every float in BF16, what official files keep in F32 included; in shards, experts stacked.
    net.to(torch.bfloat16).save_pretrained(f"{out}/bf16-stacked", max_shard_size="60KB",
                                           save_original_format=False)
    record(f"{out}/bf16-stacked", ids)
    print("transformers", transformers.__version__, "torch", torch.__version__)


main()
