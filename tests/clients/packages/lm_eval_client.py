"""Multiple choice and generation through the newest lm-eval, whose tokenizer is the server's own."""
import math
import os
import pathlib
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
import lm_eval
from common import *
from lm_eval.tasks import TaskManager

os.environ["OPENAI_API_KEY"] = KEY
ITEMS = [("The capital of France is", [" Paris", " a fish", " green"], 0),
         ("Two and two are", [" seven trees", " four", " blue"], 1),
         ("Water is", [" wet", " made of stone and iron"], 0)]
CHOICE = """
task: small_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
GENERATE = """
task: small_generate
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: generate_until
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "Hello"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 24, temperature: 0}
metric_list: [{metric: exact_match}]
"""

with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    os.environ["HF_HOME"] = str(folder)
    (folder / "items.jsonl").write_text("".join(
        json.dumps({"context": c, "choices": o, "answer": a}) + "\n" for c, o, a in ITEMS))
    (folder / "choice.yaml").write_text(CHOICE % (folder / "items.jsonl"))
    (folder / "generate.yaml").write_text(GENERATE % (folder / "items.jsonl"))
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def run(kind, path, tasks, **more):
        found = lm_eval.simple_evaluate(
            model=kind, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True, batch_size=1,
            model_args={"model": MODEL, "base_url": V1 + path, "auth_token": KEY, "max_length": 2000,
                        "num_concurrent": 1, "max_retries": 1}, **more)
        check(set(found["results"]) == set(tasks), found["results"])
        return found["samples"]

    for samples in run("local-completions", "/completions", ["small_choice"]).values():
        for sample in samples:
            for score, _ in sample["filtered_resps"]:
                check(math.isfinite(float(score)) and float(score) < 0, sample)
    run("local-completions", "/completions", ["small_generate"])
    samples = run("local-chat-completions", "/chat/completions", ["small_generate"], apply_chat_template=True)
    strict(all(s["resps"][0][0].startswith("Hello") for s in samples["small_generate"]), samples)
done("lm-eval")
