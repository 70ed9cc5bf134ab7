#!/usr/bin/env python3
"""Small recorded checkpoints from an independent implementation of DeepSeek-V4 in NumPy (float64).

  make_golden.py DIR          writes DIR/ideal and DIR/released: config.json, model.safetensors, expected.safetensors
  make_golden.py --check DIR  recomputes the expected tensors of an existing folder and prints the differences

A tool, not part of the build. Written from the formulas of the model's specification alone: it shares no code, no
order of summation and no data layout with hadal. One dense pass over the whole sequence, no cache: what it records as
`decode` are later rows of the same pass. Sums and transcendental functions are float64; values are rounded where the
formats say so (BF16, FP8 and FP4 round trips in `released`; nowhere in `ideal`).
"""
import json
import os
import struct
import sys

import numpy as np

# --- number formats ---------------------------------------------------------------------------------------------------

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([(m * 2.0**-9) if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127])


def bf16_bits(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def bf16(x):
    return bf16_values(bf16_bits(x))


def nearest_code(x, table):
    """Index of the nearest entry of an ascending table of magnitudes, ties to the even index; |x| saturates."""
    a = np.minimum(np.abs(x), table[-1])
    high = np.clip(np.searchsorted(table, a), 1, len(table) - 1)
    low = high - 1
    to_low, to_high = a - table[low], table[high] - a
    return np.where((to_low < to_high) | ((to_low == to_high) & (low % 2 == 0)), low, high)


def round_to(x, table):
    return np.copysign(table[nearest_code(x, table)], x)


def power_scale(amax, largest, floor):
    """2^ceil(log2(amax / largest)), the division by a product with FP32's reciprocal."""
    ratio = (np.maximum(amax, floor).astype(np.float32) * np.float32(1.0 / largest)).astype(np.float32)
    fraction, exponent = np.frexp(ratio.astype(np.float64))
    return 2.0 ** np.where(fraction == 0.5, exponent - 1, exponent)


def round_trip(x, group, table, floor):
    g = x.reshape(x.shape[:-1] + (x.shape[-1] // group, group))
    scale = power_scale(np.abs(g).max(-1, keepdims=True), table[-1], floor)
    return (round_to(g / scale, table) * scale).reshape(x.shape)


def q8(x, group):
    return round_trip(x, group, E4M3, 1e-4)


def q4(x, group):
    return round_trip(x, group, E2M1, 6 * 2.0**-126)


# --- safetensors --------------------------------------------------------------------------------------------------------

BYTES = {"F32": 4, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1}


def write_tensors(path, tensors):
    """tensors: name -> (dtype tag, shape, raw bytes); larger elements first, so that all are aligned."""
    header, offset, blobs = {"__metadata__": {"format": "pt"}}, 0, []
    for name, (tag, shape, raw) in sorted(tensors.items(), key=lambda item: (-BYTES[item[1][0]], item[0])):
        assert len(raw) == BYTES[tag] * int(np.prod(shape)), name
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [offset, offset + len(raw)]}
        offset += len(raw)
        blobs.append(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def read_tensors(path):
    data = open(path, "rb").read()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    out = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        out[name] = (info["dtype"], tuple(info["shape"]), data[8 + size + begin : 8 + size + end])
    return out


def values(entry):
    tag, shape, raw = entry
    if tag == "BF16":
        return bf16_values(np.frombuffer(raw, np.uint16)).reshape(shape)
    kind = {"F32": np.float32, "I64": np.int64, "I32": np.int32}[tag]
    array = np.frombuffer(raw, kind).reshape(shape)
    return array.astype(np.float64) if tag == "F32" else array.astype(np.int64)


def dequantised(tensors, name):
    """A matrix as float64: BF16 or F32 as it is, FP8 with a scale per 128x128, packed FP4 with one per 1x32."""
    tag, shape, raw = tensors[name + ".weight"]
    if tag in ("BF16", "F32"):
        return values(tensors[name + ".weight"])
    scale_tag, scale_shape, scale_raw = tensors[name + ".scale"]
    scale = 2.0 ** (np.frombuffer(scale_raw, np.uint8).astype(np.float64) - 127).reshape(scale_shape)
    codes = np.frombuffer(raw, np.uint8).reshape(shape)
    if tag == "F8_E4M3":
        w = np.where(codes >= 128, -1.0, 1.0) * E4M3[codes & 127]
        return w * np.repeat(np.repeat(scale, 128, 0), 128, 1)[: shape[0], : shape[1]]
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(shape[0], shape[1] * 2)
    return np.where(nibbles >= 8, -1.0, 1.0) * E2M1[nibbles & 7] * np.repeat(scale, 32, 1)


def f32(x):
    return ("F32", np.shape(x), np.ascontiguousarray(x, np.float32).tobytes())


def i32(x):
    return ("I32", np.shape(x), np.ascontiguousarray(x, np.int32).tobytes())


def in_bf16(x):
    return ("BF16", np.shape(x), bf16_bits(x).tobytes())


# --- the model ----------------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def hadamard_matrix(size):
    h = np.ones((1, 1))
    while h.shape[0] < size:
        h = np.block([[h, h], [h, -h]])
    return h


class Model:
    def __init__(self, config, tensors):
        self.c, self.t = config, tensors
        self.released = "quantization_config" in config
        self.round = bf16 if self.released else (lambda x: x)
        self.cache = {}

    def weight(self, name):
        if name not in self.cache:
            self.cache[name] = dequantised(self.t, name)
        return self.cache[name]

    def raw(self, name):
        return values(self.t[name])

    # Matrix products. lin8 and lin4 differ in how the weight was stored alone: products of dequantised values are exact.
    def lin_quantised(self, name, x):
        return self.round((q8(x, 128) if self.released else x) @ self.weight(name).T)

    def lin_bf16(self, name, x):
        return self.round(x @ self.weight(name).T)

    def lin_f32(self, name, x):
        return x @ self.weight(name).T

    def norm(self, name, x):
        w = self.raw(name + ".weight")
        return self.round(w * (x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c["rms_norm_eps"])))

    def rotary(self, ratio, positions):
        """cos and sin [n, R / 2]: FP32 frequencies, the angle a product rounded to FP32."""
        c, half = self.c, self.c["qk_rope_head_dim"] // 2
        dim, scaling = 2 * half, c["rope_scaling"]
        base = c["compress_rope_theta"] if ratio else c["rope_theta"]
        i = np.arange(half)
        f = (np.float32(1) / np.power(float(base), 2 * i / dim).astype(np.float32)).astype(np.float32)
        if ratio:
            length = scaling["original_max_position_embeddings"]
            edge = lambda turns: dim * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(base))
            lo = max(np.floor(edge(scaling["beta_fast"])), 0)
            hi = min(np.ceil(edge(scaling["beta_slow"])), dim - 1)
            if lo == hi:
                hi += 0.001
            g = np.clip((i - np.float32(lo)) / (np.float32(hi) - np.float32(lo)), 0, 1).astype(np.float32)
            f = (f / np.float32(scaling["factor"])) * g + f * (np.float32(1) - g)
        angle = (np.asarray(positions, np.float32)[:, None] * f[None, :]).astype(np.float32).astype(np.float64)
        return np.cos(angle).astype(np.float32).astype(np.float64), np.sin(angle).astype(np.float32).astype(np.float64)

    def rope(self, x, table, inverse=False):
        """x [n, ..., dim]; adjacent pairs of the last R channels."""
        cos, sin = table
        shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (cos.shape[1],)
        cos, sin = cos.reshape(shape), (-sin if inverse else sin).reshape(shape)
        r = 2 * cos.shape[-1]
        head, tail = x[..., :-r], x[..., -r:]
        a, b = tail[..., 0::2], tail[..., 1::2]
        turned = np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(tail.shape)
        return np.concatenate([head, self.round(turned)], -1)

    def latent(self, x):
        """FP8 round trip of all but the rotary channels."""
        if not self.released:
            return x
        r = self.c["qk_rope_head_dim"]
        return np.concatenate([q8(x[..., :-r], 64), x[..., -r:]], -1)

    def index_form(self, x):
        h = hadamard_matrix(x.shape[-1])
        factor = float(np.float32(x.shape[-1] ** -0.5)) if self.released else x.shape[-1] ** -0.5
        y = self.round((x @ h) * factor)
        return q4(y, 32) if self.released else y

    # Hyper-connections.
    def mix(self, prefix, streams, head=False):
        c, n = self.c, self.c["hc_mult"]
        eps = c["hc_eps"]
        v = streams.reshape(len(streams), -1)
        rho = 1 / np.sqrt((v * v).mean(-1, keepdims=True) + c["rms_norm_eps"])
        z = (v @ self.raw(prefix + "_fn").T) * rho
        s, b = self.raw(prefix + "_scale"), self.raw(prefix + "_base")
        a = sigmoid(z[:, :n] * s[0] + b[:n]) + eps
        u = self.round((a[:, :, None] * streams).sum(1))
        if head:
            return u
        expand = 2 * sigmoid(z[:, n : 2 * n] * s[1] + b[n : 2 * n])
        p = softmax((z[:, 2 * n :] * s[2] + b[2 * n :]).reshape(-1, n, n), 2) + eps
        p = p / (p.sum(1, keepdims=True) + eps)
        for _ in range(c["hc_sinkhorn_iters"] - 1):
            p = p / (p.sum(2, keepdims=True) + eps)
            p = p / (p.sum(1, keepdims=True) + eps)
        return u, expand, p

    def unmix(self, out, streams, expand, p):
        return self.round(expand[:, :, None] * out[:, None, :] + np.einsum("tjk,tjd->tkd", p, streams))

    # Attention.
    def compress(self, prefix, x, ratio):
        """Every complete block of the sequence, before norm and rotation: [blocks, d]."""
        k = self.lin_f32(prefix + "wkv", x)
        ape = self.raw(prefix + "ape")
        g = self.lin_f32(prefix + "wgate", x) + ape[np.arange(len(x)) % ratio]
        blocks, out = len(x) // ratio, []
        d = k.shape[1] // (2 if ratio == 4 else 1)
        for c in range(blocks):
            rows = slice(c * ratio, (c + 1) * ratio)
            if ratio == 4:
                values_, scores = k[rows, d:], g[rows, d:]
                if c > 0:
                    before = slice((c - 1) * ratio, c * ratio)
                    values_ = np.concatenate([k[before, :d], values_])
                    scores = np.concatenate([g[before, :d], scores])
            else:
                values_, scores = k[rows], g[rows]
            out.append((softmax(scores, 0) * values_).sum(0))
        y = self.norm(prefix + "norm", self.round(np.array(out).reshape(blocks, d)))
        return self.rope(y, self.rotary(ratio, np.arange(blocks) * ratio))

    def select(self, prefix, x, qr, table, blocks):
        """[T, blocks] bool: what each query attends to of the compressed blocks, by the indexer's choice."""
        c, t = self.c, len(x)
        heads, dim = c["index_n_heads"], c["index_head_dim"]
        keys = self.index_form(self.compress(prefix + "compressor.", x, 4))
        q = self.lin_quantised(prefix + "wq_b", qr).reshape(t, heads, dim)
        q = self.index_form(self.rope(q, table))
        w = self.round(self.lin_bf16(prefix + "weights_proj", x) * (dim**-0.5 * heads**-0.5))
        products = self.round(np.maximum(self.round(np.einsum("thd,cd->thc", q, keys)), 0) * w[:, :, None])
        scores = self.round(products.sum(1))
        chosen = np.zeros((t, blocks), bool)
        for p in range(t):
            visible = (p + 1) // 4
            order = sorted(range(visible), key=lambda b: (-scores[p, b], b))
            chosen[p, order[: c["index_topk"]]] = True
        return chosen

    def attention(self, prefix, ratio, x, selections):
        c, t = self.c, len(x)
        heads, dim = c["num_attention_heads"], c["head_dim"]
        table = self.rotary(ratio, np.arange(t))
        qr = self.norm(prefix + "q_norm", self.lin_quantised(prefix + "wq_a", x))
        q = self.lin_quantised(prefix + "wq_b", qr).reshape(t, heads, dim)
        if self.released:
            mean = bf16(bf16(q * q).mean(-1, keepdims=True))
            q = bf16(q * bf16(1 / np.sqrt(bf16(mean + c["rms_norm_eps"]))))
        else:
            q = q / np.sqrt((q * q).mean(-1, keepdims=True) + c["rms_norm_eps"])
        q = self.rope(q, table)
        kv = self.latent(self.rope(self.norm(prefix + "kv_norm", self.lin_quantised(prefix + "wkv", x)), table))
        p = np.arange(t)
        allowed = (p[None, :] <= p[:, None]) & (p[None, :] > p[:, None] - c["sliding_window"])
        keys = kv
        if ratio:
            rows = self.latent(self.compress(prefix + "compressor.", x, ratio))
            visible = np.arange(len(rows))[None, :] < (p[:, None] + 1) // ratio
            if ratio == 4:
                visible = self.select(prefix + "indexer.", x, qr, table, len(rows))
                selections.append(visible)
            keys, allowed = np.concatenate([kv, rows]), np.concatenate([allowed, visible], 1)
        logits = np.where(allowed[:, None, :], np.einsum("thd,kd->thk", q, keys) * dim**-0.5, -np.inf)
        top = logits.max(-1, keepdims=True)
        weights = np.exp(logits - top)
        sink = np.exp(self.raw(prefix + "attn_sink")[None, :, None] - top)
        o = np.einsum("thk,kd->thd", self.round(weights), keys) / (weights.sum(-1, keepdims=True) + sink)
        o = self.rope(self.round(o), table, inverse=True)
        groups = c["o_groups"]
        wo_a = self.weight(prefix + "wo_a").reshape(groups, c["o_lora_rank"], -1)
        y = self.round(np.einsum("tgi,goi->tgo", o.reshape(t, groups, -1), wo_a))
        return self.lin_quantised(prefix + "wo_b", y.reshape(t, -1))

    # Mixture of experts.
    def expert(self, prefix, x, weight):
        limit = self.c["swiglu_limit"]
        gate = np.minimum(self.lin_quantised(prefix + "w1", x), limit)
        up = np.clip(self.lin_quantised(prefix + "w3", x), -limit, limit)
        return self.lin_quantised(prefix + "w2", self.round(weight * (gate * sigmoid(gate) * up)))

    def moe(self, prefix, x, ids):
        c, k = self.c, self.c["num_experts_per_tok"]
        z = self.lin_f32(prefix + "gate", x)
        affinity = np.sqrt(np.log1p(np.exp(z)))
        if prefix + "gate.tid2eid" in self.t:
            chosen = self.raw(prefix + "gate.tid2eid")[ids]
        else:
            score = affinity + self.raw(prefix + "gate.bias")
            chosen = np.argsort(-score, axis=1, kind="stable")[:, :k]
        out, total = np.zeros_like(x), np.take_along_axis(affinity, chosen, 1).sum(1)
        for e in range(c["n_routed_experts"]):
            rows = np.nonzero((chosen == e).any(1))[0]
            weight = c["routed_scaling_factor"] * affinity[rows, e] / total[rows]
            out[rows] += self.expert(f"{prefix}experts.{e}.", x[rows], weight[:, None])
        return self.round(out + self.expert(prefix + "shared_experts.", x, 1.0))

    def block(self, prefix, ratio, streams, ids, selections):
        u, expand, p = self.mix(prefix + "hc_attn", streams)
        f = self.attention(prefix + "attn.", ratio, self.norm(prefix + "attn_norm", u), selections)
        streams = self.unmix(f, streams, expand, p)
        u, expand, p = self.mix(prefix + "hc_ffn", streams)
        f = self.moe(prefix + "ffn.", self.norm(prefix + "ffn_norm", u), ids)
        return self.unmix(f, streams, expand, p)

    def head(self, prefix, streams):
        return self.lin_f32("head", self.norm(prefix + "norm", self.mix(prefix + "hc_head", streams, head=True)))

    def forward(self, ids):
        """One sequence: logits [T, V], streams after each layer, selections of the CSA layers."""
        embedded = self.weight("embed")[ids]
        streams = np.repeat(embedded[:, None, :], self.c["hc_mult"], 1)
        outs, selections = [], {}
        for i in range(self.c["num_hidden_layers"]):
            chosen = []
            streams = self.block(f"layers.{i}.", self.c["compress_ratios"][i], streams, ids, chosen)
            outs.append(streams)
            if chosen:
                selections[i] = chosen[0]
        return self.head("", streams), outs, selections

    def mtp(self, streams, next_ids):
        e = self.norm("mtp.0.enorm", self.weight("embed")[next_ids])
        h = self.norm("mtp.0.hnorm", streams)
        projected = self.lin_quantised("mtp.0.h_proj", h.reshape(-1, h.shape[-1])).reshape(h.shape)
        z = self.round(self.lin_quantised("mtp.0.e_proj", e)[:, None, :] + projected)
        ratio = self.c["compress_ratios"][self.c["num_hidden_layers"]]
        return self.head("mtp.0.", self.block("mtp.0.", ratio, z, next_ids, []))


def expected_tensors(config, tensors, ids, prompt, positions):
    model, released = Model(config, tensors), "quantization_config" in config
    rows = [model.forward(row) for row in ids]
    logits = np.stack([row[0] for row in rows])
    at_prompt = logits[:, :prompt]
    peak = at_prompt.max(-1, keepdims=True)
    log_p = at_prompt - peak - np.log(np.exp(at_prompt - peak).sum(-1, keepdims=True))
    actual = np.take_along_axis(log_p[:, :-1], ids[:, 1:prompt, None], 2)[..., 0]
    out = {
        "input_ids": i32(ids),
        "positions": i32(positions),
        "prefill.logits": f32(at_prompt[:, positions]),
        "prefill.argmax": i32(at_prompt.argmax(-1)),
        "prefill.logprob": f32(actual),
        "decode.logits": f32(logits[:, prompt:]),
    }
    for i in range(config["num_hidden_layers"]):
        streams = np.stack([row[1][i] for row in rows])[:, positions]
        out[f"prefill.layers.{i}.out"] = in_bf16(streams) if released else f32(streams)
        if i in rows[0][2]:
            k = min(config["index_topk"], prompt // 4)
            table = np.full((len(ids), len(positions), k), -1)
            for b, row in enumerate(rows):
                for s, p in enumerate(positions):
                    chosen = np.nonzero(row[2][i][p])[0][::-1]
                    table[b, s, : len(chosen)] = chosen
            out[f"prefill.layers.{i}.topk"] = i32(table)
    if config["num_nextn_predict_layers"]:
        inside = [p for p in positions if p < prompt - 1]
        mtp = np.stack([model.mtp(row[1][-1][: prompt - 1], ids[b, 1:prompt]) for b, row in enumerate(rows)])
        out["mtp.logits"] = f32(mtp[:, inside])
        out["mtp.argmax"] = i32(mtp.argmax(-1))
    return out


# --- random checkpoints -------------------------------------------------------------------------------------------------


class Maker:
    def __init__(self, config, seed):
        self.c, self.rng, self.t = config, np.random.default_rng(seed), {}
        self.quantised = "quantization_config" in config

    def normal(self, shape, size=1.0, centre=0.0):
        return centre + size * self.rng.standard_normal(shape)

    def matrix(self, name, out, inputs, kind):
        """kind: fp8 or fp4 in a quantised checkpoint, bf16 everywhere."""
        w = self.normal((out, inputs), inputs**-0.5)
        if not self.quantised or kind == "bf16":
            self.t[name + ".weight"] = in_bf16(w)
            return
        table, rows, columns = (E4M3, 128, 128) if kind == "fp8" else (E2M1, 1, 32)
        high, wide = -(-out // rows), -(-inputs // columns)
        scale = np.zeros((high, wide))
        for i in range(high):
            for j in range(wide):
                part = w[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                scale[i, j] = power_scale(np.abs(part).max(), table[-1], 1e-30)
        full = np.repeat(np.repeat(scale, rows, 0), columns, 1)[:out, :inputs]
        codes = nearest_code(w / full, table).astype(np.uint8)
        exponents = (np.log2(scale) + 127).astype(np.uint8)
        self.t[name + ".scale"] = ("F8_E8M0", scale.shape, exponents.tobytes())
        if kind == "fp8":
            self.t[name + ".weight"] = ("F8_E4M3", (out, inputs), (codes | (w < 0).astype(np.uint8) << 7).tobytes())
        else:
            codes |= (w < 0).astype(np.uint8) << 3
            packed = codes[:, 0::2] | codes[:, 1::2] << 4
            self.t[name + ".weight"] = ("I8", (out, inputs // 2), packed.tobytes())

    def norm(self, name, width):
        self.t[name + ".weight"] = in_bf16(self.normal(width, 0.1, 1.0))

    def hyper(self, name, rows, scales):
        width = self.c["hc_mult"] * self.c["hidden_size"]
        self.t[name + "_fn"] = f32(self.normal((rows, width), width**-0.5))
        self.t[name + "_base"] = f32(self.normal(rows, 0.5))
        self.t[name + "_scale"] = f32(self.normal(scales, 0.1, 0.5))

    def compressor(self, name, ratio, width):
        columns = width * (2 if ratio == 4 else 1)
        self.t[name + "ape"] = f32(self.normal((ratio, columns), 0.5))
        self.matrix(name + "wkv", columns, self.c["hidden_size"], "bf16")
        self.matrix(name + "wgate", columns, self.c["hidden_size"], "bf16")
        self.norm(name + "norm", width)

    def block(self, prefix, index):
        c, d = self.c, self.c["hidden_size"]
        n, ratio, inter = c["hc_mult"], c["compress_ratios"][index], c["moe_intermediate_size"]
        heads, dim, rank = c["num_attention_heads"], c["head_dim"], c["q_lora_rank"]
        groups, o_rank, experts = c["o_groups"], c["o_lora_rank"], c["n_routed_experts"]
        for name in ("attn_norm", "ffn_norm"):
            self.norm(prefix + name, d)
        for name in ("hc_attn", "hc_ffn"):
            self.hyper(prefix + name, (2 + n) * n, 3)
        a = prefix + "attn."
        self.t[a + "attn_sink"] = f32(self.normal(heads, 0.5))
        self.norm(a + "q_norm", rank)
        self.norm(a + "kv_norm", dim)
        self.matrix(a + "wq_a", rank, d, "fp8")
        self.matrix(a + "wq_b", heads * dim, rank, "fp8")
        self.matrix(a + "wkv", dim, d, "fp8")
        self.matrix(a + "wo_a", groups * o_rank, heads // groups * dim, "fp8")
        self.matrix(a + "wo_b", d, groups * o_rank, "fp8")
        if ratio:
            self.compressor(a + "compressor.", ratio, dim)
        if ratio == 4:
            self.matrix(a + "indexer.wq_b", c["index_n_heads"] * c["index_head_dim"], rank, "fp8")
            self.matrix(a + "indexer.weights_proj", c["index_n_heads"], d, "bf16")
            self.compressor(a + "indexer.compressor.", ratio, c["index_head_dim"])
        f = prefix + "ffn."
        self.matrix(f + "gate", experts, d, "bf16")
        if index < c["num_hash_layers"]:
            k = c["num_experts_per_tok"]
            table = np.stack([self.rng.permutation(experts)[:k] for _ in range(c["vocab_size"])])
            self.t[f + "gate.tid2eid"] = ("I64", table.shape, table.astype(np.int64).tobytes())
        else:
            self.t[f + "gate.bias"] = f32(self.normal(experts, 0.1))
        for e in list(range(experts)) + [None]:
            stem, kind = (f + "shared_experts.", "fp8") if e is None else (f"{f}experts.{e}.", "fp4")
            self.matrix(stem + "w1", inter, d, kind)
            self.matrix(stem + "w3", inter, d, kind)
            self.matrix(stem + "w2", d, inter, kind)

    def make(self):
        c, d, n = self.c, self.c["hidden_size"], self.c["hc_mult"]
        self.t["embed.weight"] = in_bf16(self.normal((c["vocab_size"], d)))
        self.t["head.weight"] = in_bf16(self.normal((c["vocab_size"], d), 2 * d**-0.5))
        self.norm("norm", d)
        self.hyper("hc_head", n, 1)
        for i in range(c["num_hidden_layers"]):
            self.block(f"layers.{i}.", i)
        if c["num_nextn_predict_layers"]:
            self.matrix("mtp.0.e_proj", d, d, "fp8")
            self.matrix("mtp.0.h_proj", d, d, "fp8")
            for name in ("enorm", "hnorm", "norm"):
                self.norm("mtp.0." + name, d)
            self.hyper("mtp.0.hc_head", n, 1)
            self.block("mtp.0.", c["num_hidden_layers"])
        return self.t


COMMON = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "attention_bias": False,
    "bos_token_id": 0, "eos_token_id": 1, "hc_eps": 1e-6, "hc_sinkhorn_iters": 20, "hidden_act": "silu",
    "max_position_embeddings": 4096, "n_shared_experts": 1, "norm_topk_prob": True, "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "compress_rope_theta": 160000.0, "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "swiglu_limit": 1.5,
    "routed_scaling_factor": 1.5, "num_experts_per_tok": 2, "num_hash_layers": 1,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 256,
                     "type": "yarn"},
}  # fmt: skip
IDEAL = {
    "vocab_size": 64, "hidden_size": 12, "num_hidden_layers": 2, "num_nextn_predict_layers": 1, "hc_mult": 4,
    "num_attention_heads": 4, "head_dim": 24, "qk_rope_head_dim": 8, "q_lora_rank": 20, "o_groups": 2,
    "o_lora_rank": 12, "sliding_window": 12, "compress_ratios": [4, 16, 0], "index_n_heads": 3,
    "index_head_dim": 16, "index_topk": 5, "n_routed_experts": 4, "moe_intermediate_size": 18,
}  # fmt: skip
RELEASED = {
    "vocab_size": 32, "hidden_size": 128, "num_hidden_layers": 2, "num_nextn_predict_layers": 0, "hc_mult": 2,
    "num_attention_heads": 2, "head_dim": 128, "qk_rope_head_dim": 64, "q_lora_rank": 128, "o_groups": 2,
    "o_lora_rank": 64, "sliding_window": 12, "compress_ratios": [4, 16], "index_n_heads": 2,
    "index_head_dim": 64, "index_topk": 8, "n_routed_experts": 3, "moe_intermediate_size": 128,
    "expert_dtype": "fp4",
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
}  # fmt: skip


def write_golden(folder, own, seed):
    config = {**COMMON, **own}
    os.makedirs(folder, exist_ok=True)
    tensors = Maker(config, seed).make()
    prompt, decode = 90, 10
    ids = np.random.default_rng(seed + 1).integers(0, config["vocab_size"], (2, prompt + decode))
    positions = np.array([0, 3, 4, 11, 12, 31, 47, 63, 80, 88, 89])
    with open(folder + "/config.json", "w") as out:
        out.write(json.dumps(config, indent=1) + "\n")
    write_tensors(folder + "/model.safetensors", tensors)
    write_tensors(folder + "/expected.safetensors", expected_tensors(config, tensors, ids, prompt, positions))


def check(folder):
    config = json.load(open(folder + "/config.json"))
    tensors, recorded = read_tensors(folder + "/model.safetensors"), read_tensors(folder + "/expected.safetensors")
    ids, decode = values(recorded["input_ids"]), recorded["decode.logits"][1][1]
    found = expected_tensors(config, tensors, ids, ids.shape[1] - decode, list(values(recorded["positions"])))
    for name in sorted(recorded):
        a, b = values(found[name]), values(recorded[name])
        print(f"{name:28} max {np.abs(a - b).max():.3e} mean {np.abs(a - b).mean():.3e} equal {(a == b).mean():.4f}")


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "--check":
        check(sys.argv[2])
    elif len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        write_golden(sys.argv[1] + "/ideal", IDEAL, 20)
        write_golden(sys.argv[1] + "/released", RELEASED, 34)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
