import os
import pathlib
import subprocess
import sys
import tempfile

from common import *

with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "hello.py").write_text("print('hello')\n")
    environment = dict(os.environ, HOME=folder, OPENAI_API_BASE=V1, OPENAI_API_KEY=KEY, AIDER_ANALYTICS="false",
                       LITELLM_LOCAL_MODEL_COST_MAP="True")
    for model, more in ((f"openai/{MODEL}", []), (f"openai/{MODEL}", ["--no-stream"]),
                        (f"anthropic/{MODEL}", [])):
        if model.startswith("anthropic"):
            environment.update(ANTHROPIC_BASE_URL=URL, ANTHROPIC_API_BASE=URL, ANTHROPIC_API_KEY=KEY)
        run = subprocess.run(
            [str(pathlib.Path(sys.executable).parent / "aider"), "--model", model, "--message", "Say hello.", "--yes-always",
             "--no-git", "--no-check-update", "--no-show-model-warnings", "--edit-format", "whole", "--map-tokens", "0",
             "--no-pretty", "--no-show-release-notes", "--no-auto-lint", "--analytics-disable", *more, "hello.py"],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
        said = run.stdout + run.stderr
        check(run.returncode == 0, said)
        check("Tokens:" in said, said)  # aider says what an answer took, and nothing after an error
        check("litellm." not in said, said)  # whose errors aider prints and goes on
        strict("Hello from choice 0" in said, said)
done("aider-chat")
