"""DeepSeek-V4 by Hugging Face transformers (5.17 or newer): what hadal's figures stand beside.

    transformers_v4.py layers [--layers 6]        steps of V4-Flash's first layers, random weights in BF16: prefill of
                                                  4,096 tokens behind 4,096 and 8,192, decode of one token at 8,192
    transformers_v4.py generate FOLDER            generate() of a checkpoint that `hadal convert --to hf-bf16` wrote:
                                                  64 streams, prompts of 128 tokens, answers of 256

hadal's side: `hadal bench model --layers 6 --batch 1`, and `hadal bench serve --concurrency 64` of `hadal serve`.
Times are medians, milliseconds; a layer's is the step's by the layers, embedding and head included.
"""
import argparse
import statistics
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache


def flash_config(layers, tiny):
    kinds = ["sliding_attention"] * 2 + ["compressed_sparse_attention", "heavily_compressed_attention"] * layers
    widths = dict(vocab_size=512, hidden_size=64, moe_intermediate_size=32, num_attention_heads=4, head_dim=64,
                  qk_rope_head_dim=32, q_lora_rank=32, o_groups=2, o_lora_rank=16, n_routed_experts=8,
                  index_n_heads=2, index_head_dim=64, index_topk=32) if tiny else {}
    return DeepseekV4Config(
        num_hidden_layers=layers, layer_types=kinds[:layers],
        mlp_layer_types=(["hash_moe"] * 3 + ["moe"] * layers)[:layers],
        rope_scaling={"rope_type": "yarn", "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
                      "original_max_position_embeddings": 65536}, **widths)


@torch.no_grad()
def random_model(config, device, experts):
    with torch.device(device):
        model = DeepseekV4ForCausalLM._from_config(config, dtype=torch.bfloat16, experts_implementation=experts)
    for name, value in model.named_buffers():
        if name.endswith("tid2eid"):
            value.copy_(torch.rand(value.shape[0], config.n_routed_experts, device=device).topk(value.shape[1], 1).indices)
    return model.eval()


class Clock:
    def __init__(self, device):
        self.cuda = device == "cuda"

    def milliseconds(self, work):
        if self.cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1000


@torch.no_grad()
def bench_layers(options, device):
    config = flash_config(options.layers, options.tiny)
    model = random_model(config, device, options.experts)
    if device == "cuda":
        print(f"{options.layers} layers, {torch.cuda.memory_allocated() / 2**30:.1f} GiB, experts by {options.experts}")
    clock, chunk, context = Clock(device), options.chunk, options.context
    ids = torch.randint(3, config.vocab_size, (1, context + chunk + options.steps), device=device)
    prefill, decode = {}, []
    for run in range(options.runs + 1):  # the first one warms up
        cache, at = DynamicCache(config=config), 0

        def step(count):
            nonlocal at
            model(ids[:, at:at + count], past_key_values=cache, use_cache=True, logits_to_keep=1)
            at += count

        while at < context:
            here = at
            taken = clock.milliseconds(lambda: step(min(chunk, context - at)))
            if run > 0 and at - here == chunk:
                prefill.setdefault(here, []).append(taken)
        for _ in range(options.steps):
            taken = clock.milliseconds(lambda: step(1))
            if run > 0:
                decode.append(taken)
        here = at
        taken = clock.milliseconds(lambda: step(chunk))
        if run > 0:
            prefill.setdefault(here, []).append(taken)
    for here, times in sorted(prefill.items()):
        taken = statistics.median(times)
        print(f"transformers prefill of {chunk} behind {here}: {taken:.1f} ms, {taken / options.layers:.2f} ms a layer")
    taken = statistics.median(decode)
    print(f"transformers decode at {context}: {taken:.2f} ms, {taken / options.layers * 1000:.0f} us a layer")


@torch.no_grad()
def bench_generate(options, device):
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16,
                                                 experts_implementation=options.experts).to(device).eval()
    # What from_pretrained keeps in float32 (norms, hyper-connections) meets BF16 matrices in linear, which refuses.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    clock = Clock(device)
    ids = torch.randint(3, model.config.vocab_size // 2, (options.streams, options.prompt), device=device)
    mask = torch.ones_like(ids)
    rates = []
    for run in range(options.runs + 1):
        made = []
        taken = clock.milliseconds(lambda: made.append(model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=options.answer, min_new_tokens=options.answer,
            do_sample=True, temperature=0.8, pad_token_id=0)))
        tokens = made[0].numel() - ids.numel()
        assert tokens == options.streams * options.answer, tokens
        if run > 0:
            rates.append(tokens / taken * 1000)
    print(f"transformers generate, {options.streams} streams, prompts of {options.prompt}, answers of {options.answer}, "
          f"experts by {options.experts}: {statistics.median(rates):.0f} tokens/s ({', '.join(f'{r:.0f}' for r in rates)})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--experts", default="grouped_mm", choices=["grouped_mm", "batched_mm", "eager"])
    parser.add_argument("--runs", type=int, default=3)
    commands = parser.add_subparsers(dest="command", required=True)
    layers = commands.add_parser("layers")
    layers.add_argument("--layers", type=int, default=6)
    layers.add_argument("--context", type=int, default=8192)
    layers.add_argument("--chunk", type=int, default=4096)
    layers.add_argument("--steps", type=int, default=20)
    layers.add_argument("--tiny", action="store_true", help="small widths: to try the program on a CPU")
    generate = commands.add_parser("generate")
    generate.add_argument("folder")
    generate.add_argument("--streams", type=int, default=64)
    generate.add_argument("--prompt", type=int, default=128)
    generate.add_argument("--answer", type=int, default=256)
    options = parser.parse_args()
    torch.manual_seed(1)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {DeepseekV4ForCausalLM.__name__}")
    (bench_layers if options.command == "layers" else bench_generate)(options, options.device)


main()
