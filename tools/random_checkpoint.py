#!/usr/bin/env python3
"""Writes an official checkpoint of V4-Flash's first layers with random weights: to measure loading and serving.

    random_checkpoint.py OUT --layers 20         72 GB; a shard a layer, written by as many threads as there are processors
    random_checkpoint.py OUT --like FOLDER       the widths and layers of another checkpoint's config

Needs numpy. Tokenizer and generation settings are hadal-nano's, whose ids are the first of the vocabulary. Weights are
slices of blocks of random bytes, in codes and scales that give activations of moderate size.
"""
import argparse
import json
import math
import os
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

NANO = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "models", "hadal-nano")
BLOCK = 1 << 24
SIZES = {"F32": 4, "I64": 8, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1}


def flash_config(layers):
    with open(os.path.join(NANO, "config.json")) as file:
        config = json.load(file)
    config.pop("trained_length", None)
    ratios = ([0, 0] + [4, 128] * layers)[:layers]
    config.update(vocab_size=129280, hidden_size=4096, num_hidden_layers=layers, num_nextn_predict_layers=0,
                  num_hash_layers=min(3, layers), num_attention_heads=64, head_dim=512, q_lora_rank=1024, o_groups=8,
                  o_lora_rank=1024, compress_ratios=ratios, index_n_heads=64, index_topk=512, n_routed_experts=256,
                  num_experts_per_tok=6, moe_intermediate_size=2048)
    return config


def block_tensors(c, layer):
    """(name, kind, shape) of a layer; docs/model.md 14."""
    dim, heads, width, inter = c["hidden_size"], c["num_attention_heads"], c["head_dim"], c["moe_intermediate_size"]
    streams, q_rank, groups, rank = c["hc_mult"], c["q_lora_rank"], c["o_groups"], c["o_lora_rank"]
    ratio, at = c["compress_ratios"][layer], f"layers.{layer}."
    yield from ((at + n, "norm", [dim]) for n in ("attn_norm.weight", "ffn_norm.weight"))
    for part in ("hc_attn", "hc_ffn"):
        rows = 2 * streams + streams * streams
        yield from ((f"{at}{part}_{n}", "f32", s) for n, s in (("fn", [rows, streams * dim]), ("base", [rows]), ("scale", [3])))
    yield at + "attn.attn_sink", "f32", [heads]
    yield at + "attn.q_norm.weight", "norm", [q_rank]
    yield at + "attn.kv_norm.weight", "norm", [width]
    for name, out, columns in (("wq_a", q_rank, dim), ("wq_b", heads * width, q_rank), ("wkv", width, dim),
                               ("wo_a", groups * rank, heads // groups * width), ("wo_b", dim, groups * rank)):
        yield f"{at}attn.{name}.weight", "fp8", [out, columns]

    def compressor(prefix, wide):
        columns = (2 if ratio == 4 else 1) * wide
        yield prefix + "ape", "f32", [ratio, columns]
        yield prefix + "wkv.weight", "bf16", [columns, dim]
        yield prefix + "wgate.weight", "bf16", [columns, dim]
        yield prefix + "norm.weight", "norm", [wide]

    if ratio > 0:
        yield from compressor(at + "attn.compressor.", width)
    if ratio == 4:
        index_heads, index_width = c["index_n_heads"], c["index_head_dim"]
        yield at + "attn.indexer.wq_b.weight", "fp8", [index_heads * index_width, q_rank]
        yield at + "attn.indexer.weights_proj.weight", "bf16", [index_heads, dim]
        yield from compressor(at + "attn.indexer.compressor.", index_width)
    yield at + "ffn.gate.weight", "bf16", [c["n_routed_experts"], dim]
    if layer < c["num_hash_layers"]:
        yield at + "ffn.gate.tid2eid", "table", [c["vocab_size"], c["num_experts_per_tok"]]
    else:
        yield at + "ffn.gate.bias", "f32", [c["n_routed_experts"]]
    for expert in range(c["n_routed_experts"]):
        for name, shape in (("w1", [inter, dim]), ("w2", [dim, inter]), ("w3", [inter, dim])):
            yield f"{at}ffn.experts.{expert}.{name}.weight", "fp4", shape
    for name, shape in (("w1", [inter, dim]), ("w2", [dim, inter]), ("w3", [inter, dim])):
        yield f"{at}ffn.shared_experts.{name}.weight", "fp8", shape


def top_tensors(c):
    streams, dim = c["hc_mult"], c["hidden_size"]
    yield "embed.weight", "bf16", [c["vocab_size"], dim]
    yield "head.weight", "bf16", [c["vocab_size"], dim]
    yield "norm.weight", "norm", [dim]
    yield from (("hc_head_" + n, "f32", s) for n, s in (("fn", [streams, streams * dim]), ("base", [streams]), ("scale", [1])))


class Bytes:
    """Blocks of random bytes of every kind."""

    def __init__(self, config):
        self.config, self.random = config, np.random.default_rng(1)
        self.raw = self.random.integers(0, 256, BLOCK, dtype=np.uint8)
        self.made = {}

    @staticmethod
    def power(columns):
        """The exponent of the power of two next to 1 / sqrt(columns)."""
        return -round(math.log2(columns) / 2)

    def make(self, dtype, kind, shape):
        power = self.power(shape[-1])
        if kind == "table":
            experts, (rows, count) = self.config["n_routed_experts"], shape
            first = self.random.integers(0, experts, (rows, 1))
            return ((first + np.arange(count)) % experts).astype(np.int64).view(np.uint8).reshape(-1)
        if dtype == "I8":
            return self.raw
        if dtype == "F8_E4M3":  # magnitudes of 0.5 to 1.9
            return (self.raw & 0x8F) | 0x30
        if kind == "scale4":
            return (self.raw & 1) + np.uint8(125 + self.power(shape[-1] * 32))
        if kind == "scale8":
            return np.full(BLOCK, 127 + self.power(shape[-1] * 128), np.uint8)
        if kind == "norm":
            return np.full(BLOCK // 2, 0x3F80, np.uint16).view(np.uint8)
        if dtype == "BF16":
            words = self.raw.view(np.uint16)
            return ((words & np.uint16(0x807F)) | np.uint16((126 + power) << 7)).view(np.uint8)
        return (self.random.standard_normal(BLOCK // 4).astype(np.float32) * 0.02).view(np.uint8)

    def block(self, dtype, kind, shape):
        key = (dtype, kind, tuple(shape) if kind == "table" else shape[-1])
        if key not in self.made:
            self.made[key] = self.make(dtype, kind, shape)
        return self.made[key]


def stored(name, kind, shape):
    """(name, dtype, kind, shape) of what is in the file."""
    if kind == "fp4":
        yield name, "I8", kind, [shape[0], shape[1] // 2]
        yield name[:-6] + "scale", "F8_E8M0", "scale4", [shape[0], shape[1] // 32]
    elif kind == "fp8":
        yield name, "F8_E4M3", kind, shape
        yield name[:-6] + "scale", "F8_E8M0", "scale8", [-(-shape[0] // 128), -(-shape[1] // 128)]
    else:
        yield name, {"norm": "BF16", "bf16": "BF16", "f32": "F32", "table": "I64"}[kind], kind, shape


def write_shard(path, tensors, source, seed):
    """Returns names and bytes."""
    entries = [entry for tensor in tensors for entry in stored(*tensor)]
    entries.sort(key=lambda entry: -SIZES[entry[1]])
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, _, shape in entries:
        size = math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    random = np.random.default_rng(seed)
    with open(path, "wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, dtype, kind, shape in entries:
            left, block = math.prod(shape) * SIZES[dtype], source.block(dtype, kind, shape)
            begin = 0 if kind == "table" else int(random.integers(0, len(block) // 128)) * 64
            while left > 0:
                left -= file.write(memoryview(block[begin:begin + left]))
                begin = 0
    return list(header)[1:], at


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--like")
    options = parser.parse_args()
    config = flash_config(options.layers)
    if options.like:
        with open(os.path.join(options.like, "config.json")) as file:
            config = json.load(file)
        config["compress_ratios"] = config["compress_ratios"][:config["num_hidden_layers"]]
        config["num_nextn_predict_layers"] = 0
    os.makedirs(options.out)
    with open(os.path.join(options.out, "config.json"), "w") as file:
        json.dump(config, file, indent=1)
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(os.path.join(NANO, name), options.out)
    begin, source, layers = time.time(), Bytes(config), config["num_hidden_layers"]
    parts = [list(top_tensors(config))] + [list(block_tensors(config, layer)) for layer in range(layers)]
    for part in parts:  # before the threads share them
        for tensor in part:
            for _, dtype, kind, shape in stored(*tensor):
                source.block(dtype, kind, shape)
    shards = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        done = list(threads.map(lambda i: write_shard(os.path.join(options.out, shards[i]), parts[i], source, i),
                                range(len(parts))))
    total = sum(size for _, size in done)
    index = {"metadata": {"total_size": total},
             "weight_map": {name: shard for shard, (names, _) in zip(shards, done) for name in names}}
    with open(os.path.join(options.out, "model.safetensors.index.json"), "w") as file:
        json.dump(index, file)
    seconds = time.time() - begin
    print(f"{options.out}: {layers} layers, {total / 1e9:.1f} GB in {seconds:.1f} s, {total / 1e9 / seconds:.1f} GB/s")


main()
