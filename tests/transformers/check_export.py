#!/usr/bin/env python3
"""Loads what `hadal convert --to hf-bf16` or `hf-f32` wrote as any model is loaded, and compares.

Usage: check_export.py HADAL FOLDER    (needs torch and transformers 5.17 or newer)

Checks: no tensor missing or left over but the MTP block's; logits in float32 against `hadal logits
--numerics ideal`; the chat template against `hadal chat-encode`; generate() runs and stops at EOS; a
model saved again by transformers holds the same values.
"""
import json
import os
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

hadal, folder = sys.argv[1:]

CONVERSATIONS = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "r"},
     {"role": "user", "content": "c"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
     {"role": "user", "content": "c"}, {"role": "user", "content": "d"}],
]


def ours(messages, mode):
    command = [hadal, "chat-encode", "--thinking-mode", mode]
    return subprocess.run(command, input=json.dumps(messages), capture_output=True, text=True, check=True).stdout


def check(what, good):
    print(("ok    " if good else "WRONG ") + what)
    if not good:
        sys.exit(1)


tokenizer = AutoTokenizer.from_pretrained(folder)
check(f"BOS {tokenizer.bos_token_id}, EOS {tokenizer.eos_token_id}, pad {tokenizer.pad_token_id}",
      None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id))
for messages in CONVERSATIONS:
    for mode in ("chat", "thinking"):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                             enable_thinking=mode == "thinking")
        check(f"template, {len(messages)} messages, {mode}", text == ours(messages, mode))
# A whole conversation, as training takes it.
messages = CONVERSATIONS[3][:2]
for mode in ("chat", "thinking"):
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=mode == "thinking")
    check(f"template, finished, {mode}", text == ours(messages, mode))

model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
left = [key for key in info["unexpected_keys"] if not key.startswith(("mtp.", "model.mtp."))]
check("every tensor found its place", not info["missing_keys"] and not left and not info["mismatched_keys"])
model.eval()
with tempfile.TemporaryDirectory() as work:
    ids = torch.randint(3, model.config.vocab_size // 2, (2, 48))
    save_file({"input_ids": ids.to(torch.int32)}, f"{work}/ids.safetensors")
    subprocess.run([hadal, "logits", "--model", folder, "--numerics", "ideal", "--ids", f"{work}/ids.safetensors",
                    "--out", f"{work}/logits.safetensors"], check=True, stderr=subprocess.DEVNULL)
    with torch.no_grad():
        error = (model(ids).logits - load_file(f"{work}/logits.safetensors")["logits"]).abs().max().item()
    check(f"logits within {error:.1e}", error < 5e-5)
    prompt = tokenizer.apply_chat_template(CONVERSATIONS[1], return_tensors="pt", add_generation_prompt=True,
                                           return_dict=True)
    with torch.no_grad():
        made = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(made[0][prompt["input_ids"].shape[1]:])
    check(f"generate: {text!r}", made.shape[1] > prompt["input_ids"].shape[1])
    model.save_pretrained(f"{work}/saved")
    subprocess.run([hadal, "convert", "--in", f"{work}/saved", "--out", f"{work}/back", "--to", "hf-f32"], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def load(path):
        return {key: value for name in sorted(os.listdir(path)) if name.endswith(".safetensors")
                for key, value in load_file(f"{path}/{name}").items() if not key.startswith("mtp.")}

    first, last = load(folder), load(f"{work}/back")
    check("saved again and read back: the same values",
          first.keys() == last.keys() and all(torch.equal(first[key].to(last[key].dtype), last[key]) for key in first))
