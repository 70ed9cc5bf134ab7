#!/usr/bin/env python3
"""Drives the openai and anthropic packages, unmodified, against a running server.

  tests/clients/client_test.py --url http://127.0.0.1:8000 --key KEY
  tests/clients/client_test.py --hadal ./hadal --free             # `hadal serve` with the default model
  tests/clients/client_test.py --server build/core/scripted_server   # starts it, uses its address

Needs the packages openai and anthropic (tools/install_deps.sh --clients); exits with 77 without them. With --free the wording of answers is not checked, only their form:
for real models, which may call tools or not.
"""
import argparse
import json
import pathlib
import subprocess
import sys

if sys.prefix == sys.base_prefix:  # not where tools/clients.sh installed them
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / ".deps/clients"))
try:
    import anthropic
    import openai
except ImportError as missing:
    print("skipped:", missing, "(tools/install_deps.sh --clients)")
    sys.exit(77)

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
CITY_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "population": {"type": "integer"}},
    "required": ["city", "population"],
    "additionalProperties": False,
}
CHAT_TOOL = {"type": "function",
             "function": {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}}
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
checks = 0


def check(condition, *what):
    global checks
    checks += 1
    if not condition:
        raise AssertionError(" ".join(map(str, what)) or "a check failed")


def no_markup(*texts):
    for text in texts:
        check("DSML" not in (text or "") and "<think>" not in (text or ""), "markup in", repr(text))


class Clients:
    def __init__(self, url, key, free):
        self.openai = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)
        self.anthropic = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
        self.url, self.free = url, free
        self.model = self.openai.models.list().data[0].id
        self.limit = 400

    def test_models_and_errors(self):
        check(self.openai.models.retrieve(self.model).id == self.model)
        bad = openai.OpenAI(base_url=self.url + "/v1", api_key="wrong", max_retries=0)
        if not self.free:
            for call in (lambda: bad.models.list(),
                         lambda: anthropic.Anthropic(base_url=self.url, api_key="wrong", max_retries=0)
                         .messages.create(model=self.model, max_tokens=5, messages=QUESTION)):
                try:
                    call()
                    check(False, "a wrong key was accepted")
                except (openai.AuthenticationError, anthropic.AuthenticationError):
                    check(True)
        try:
            self.openai.chat.completions.create(model="no-such-model", messages=QUESTION)
            check(False, "an unknown model was accepted")
        except openai.NotFoundError as error:
            check(error.code == "model_not_found", error)
        try:
            self.openai.chat.completions.create(model=self.model, messages=QUESTION, temperature=9)
            check(False, "a temperature of 9 was accepted")
        except openai.BadRequestError as error:
            check(error.param == "temperature", error)
        try:
            self.anthropic.messages.create(model=self.model, max_tokens=5, messages=[])
            check(False, "no messages were accepted")
        except anthropic.BadRequestError as error:
            check(error.body["error"]["type"] == "invalid_request_error", error)

    def test_chat(self):
        reply = self.openai.chat.completions.create(
            model=self.model, messages=QUESTION, max_completion_tokens=self.limit, reasoning_effort="none", n=2,
            logprobs=True, top_logprobs=2, seed=1)
        check(len(reply.choices) == 2 and reply.choices[0].message.role == "assistant")
        check(reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens)
        check(reply.usage.prompt_tokens_details.cached_tokens >= 0)
        check(reply.choices[0].logprobs.content[0].logprob <= 0)
        check(len(reply.choices[0].logprobs.content[0].top_logprobs) == 2)
        if not self.free:
            check(reply.choices[1].message.content.startswith("Hello from choice 1"), reply)
            check(reply.choices[0].finish_reason == "stop")
        # The shipped model was not taught to think: an effort alone does not switch it on.
        thinking = self.openai.chat.completions.create(
            model=self.model, messages=QUESTION, max_completion_tokens=self.limit, reasoning_effort="high",
            extra_body={"chat_template_kwargs": {"thinking": True}} if self.free else None)
        check(thinking.choices[0].message.reasoning_content)
        check(thinking.usage.completion_tokens_details.reasoning_tokens > 0)

    def test_chat_stream(self):
        content, reasoning, usage, finish = "", "", None, None
        for chunk in self.openai.chat.completions.create(
                model=self.model, messages=QUESTION, max_completion_tokens=self.limit, stream=True,
                stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                content += choice.delta.content or ""
                reasoning += getattr(choice.delta, "reasoning_content", None) or ""
                finish = choice.finish_reason or finish
        check(usage.completion_tokens > 0 and finish in ("stop", "length"))
        no_markup(content, reasoning)
        if not self.free:
            check(reasoning == "Let me think." and content.startswith("Hello"), content, reasoning)
            check(content.endswith("\u00e4\u20ac!"), content)

    def test_chat_tools(self):
        messages = list(QUESTION)
        for choice in ("auto", "required", {"type": "function", "function": {"name": "get_weather"}}):
            reply = self.openai.chat.completions.create(
                model=self.model, messages=messages, tools=[CHAT_TOOL], tool_choice=choice,
                max_completion_tokens=self.limit)
            message = reply.choices[0].message
            no_markup(message.content)
            if not self.free:
                check(reply.choices[0].finish_reason == "tool_calls", reply)
                check(json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris", "days": 2})
        calls, content = {}, ""
        for chunk in self.openai.chat.completions.create(
                model=self.model, messages=messages, tools=[CHAT_TOOL], max_completion_tokens=self.limit, stream=True):
            for choice in chunk.choices:
                content += choice.delta.content or ""
                for call in choice.delta.tool_calls or []:
                    entry = calls.setdefault(call.index, {"name": "", "arguments": "", "id": "", "pieces": 0})
                    entry["pieces"] += 1
                    entry["id"] += call.id or ""
                    entry["name"] += call.function.name or ""
                    entry["arguments"] += call.function.arguments or ""
        no_markup(content)
        if self.free:
            return
        check(calls[0]["pieces"] > 1, calls)  # short calls come once they are known to be whole
        check(calls[0]["name"] == "get_weather" and json.loads(calls[0]["arguments"])["city"] == "Paris", calls)
        messages += [{"role": "assistant", "content": content, "tool_calls": [
            {"id": calls[0]["id"], "type": "function",
             "function": {"name": calls[0]["name"], "arguments": calls[0]["arguments"]}}]},
            {"role": "tool", "tool_call_id": calls[0]["id"], "content": "22 degrees"}]
        reply = self.openai.chat.completions.create(
            model=self.model, messages=messages, tools=[CHAT_TOOL], max_completion_tokens=self.limit)
        check(reply.choices[0].finish_reason == "stop" and not reply.choices[0].message.tool_calls, reply)

    def test_chat_structured(self):
        reply = self.openai.chat.completions.create(
            model=self.model, messages=QUESTION, max_completion_tokens=self.limit,
            response_format={"type": "json_schema",
                             "json_schema": {"name": "city", "strict": True, "schema": CITY_SCHEMA}})
        if reply.choices[0].finish_reason == "stop":
            check(set(json.loads(reply.choices[0].message.content)) == {"city", "population"}, reply)
        reply = self.openai.chat.completions.create(
            model=self.model, messages=QUESTION, max_completion_tokens=self.limit,
            response_format={"type": "json_object"})
        if reply.choices[0].finish_reason == "stop":
            check(isinstance(json.loads(reply.choices[0].message.content), dict), reply)

    def test_completions(self):
        reply = self.openai.completions.create(model=self.model, prompt=["a", "b"], max_tokens=5, logprobs=1)
        check(len(reply.choices) == 2 and len(reply.choices[0].logprobs.tokens) <= 5)
        text = ""
        for chunk in self.openai.completions.create(model=self.model, prompt="a", max_tokens=5, stream=True):
            text += chunk.choices[0].text
        check(self.free or text == "Hello", text)

    def test_responses(self):
        reply = self.openai.responses.create(model=self.model, input="Hi", max_output_tokens=self.limit)
        check(reply.status in ("completed", "incomplete"))
        check(reply.usage.output_tokens > 0 and reply.usage.input_tokens_details.cached_tokens >= 0)
        if not self.free:
            check([item.type for item in reply.output] == ["reasoning", "message"], reply)
            check(reply.output_text.startswith("Hello"), reply.output_text)
        text, kinds = "", []
        with self.openai.responses.stream(
                model=self.model, input=QUESTION, instructions="Be brief.", max_output_tokens=self.limit) as stream:
            for event in stream:
                kinds.append(event.type)
                if event.type == "response.output_text.delta":
                    text += event.delta
            # The package's final response exists for complete ones only.
            final = event.response
        check(kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete"), kinds)
        check(final.output_text == text)
        no_markup(text)
        tool = {"type": "function", "name": "get_weather", "description": "The weather.", "parameters": PARAMETERS,
                "strict": False}
        items = list(QUESTION)
        reply = self.openai.responses.create(model=self.model, input=items, tools=[tool], max_output_tokens=self.limit)
        calls = [item for item in reply.output if item.type == "function_call"]
        if not self.free:
            check(len(calls) == 1 and json.loads(calls[0].arguments)["days"] == 2, reply)
            items += [item.model_dump(exclude_none=True) for item in reply.output]
            items.append({"type": "function_call_output", "call_id": calls[0].call_id, "output": "22 degrees"})
            reply = self.openai.responses.create(model=self.model, input=items, tools=[tool],
                                                 max_output_tokens=self.limit)
            check(reply.output_text.startswith("Hello"), reply)
        reply = self.openai.responses.create(
            model=self.model, input="A city.", max_output_tokens=self.limit,
            text={"format": {"type": "json_schema", "name": "city", "schema": CITY_SCHEMA, "strict": True}})
        if reply.status == "completed":
            check("city" in json.loads(reply.output_text), reply)

    def test_messages(self):
        reply = self.anthropic.messages.create(model=self.model, max_tokens=self.limit, system="Be brief.",
                                               messages=QUESTION)
        check(reply.role == "assistant" and reply.usage.output_tokens > 0)
        check(reply.usage.cache_read_input_tokens >= 0)
        count = self.anthropic.messages.count_tokens(model=self.model, system="Be brief.", messages=QUESTION)
        check(count.input_tokens == reply.usage.input_tokens + reply.usage.cache_read_input_tokens)
        if not self.free:
            check(reply.stop_reason == "end_turn" and reply.content[0].text.startswith("Hello"), reply)
        with self.anthropic.messages.stream(
                model=self.model, max_tokens=2000, messages=QUESTION,
                thinking={"type": "enabled", "budget_tokens": 1024}) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        check(final.content[0].type == "thinking", final)
        # A stream begins before the cache has been asked; its last numbers count.
        count = self.anthropic.messages.count_tokens(
            model=self.model, messages=QUESTION, thinking={"type": "enabled", "budget_tokens": 1024})
        check(count.input_tokens == final.usage.input_tokens + final.usage.cache_read_input_tokens, final)
        no_markup(text, final.content[0].thinking)

    def test_messages_tools(self):
        tool = {"name": "get_weather", "description": "The weather.", "input_schema": PARAMETERS}
        messages = list(QUESTION)
        with self.anthropic.messages.stream(model=self.model, max_tokens=self.limit, messages=messages,
                                            tools=[tool]) as stream:
            for event in stream:
                if event.type == "text":
                    no_markup(event.text)
            final = stream.get_final_message()
        if self.free:
            return
        check(final.stop_reason == "tool_use", final)
        call = final.content[-1]
        check(call.type == "tool_use" and call.input == {"city": "Paris", "days": 2}, final)
        messages += [{"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in final.content]},
                     {"role": "user", "content": [
                         {"type": "tool_result", "tool_use_id": call.id, "content": "22 degrees"}]}]
        for block in messages[1]["content"]:
            block.pop("parsed_output", None)
        reply = self.anthropic.messages.create(model=self.model, max_tokens=self.limit, messages=messages, tools=[tool])
        check(reply.stop_reason == "end_turn", reply)
        for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
            reply = self.anthropic.messages.create(model=self.model, max_tokens=self.limit, messages=QUESTION,
                                                   tools=[tool], tool_choice=choice)
            check(reply.content[-1].input == {"city": "Paris", "days": 2}, reply)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--key", default="test-key")
    parser.add_argument("--server", help="a scripted_server to start")
    parser.add_argument("--hadal", help="a hadal binary to start as a server")
    parser.add_argument("--free", action="store_true")
    args = parser.parse_args()
    server = None
    if args.server:
        server = subprocess.Popen([args.server], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        args.url = server.stdout.readline().strip()
    if args.hadal:
        server = subprocess.Popen([args.hadal, "serve", "--port", "0"], stderr=subprocess.PIPE, text=True)
        for line in server.stderr:
            if " at http" in line:
                args.url = line.split(" at ", 1)[1].split(",")[0]
                break
    failed = 0
    try:
        clients = Clients(args.url.rstrip("/"), args.key, args.free)
        for name in sorted(dir(clients)):
            if not name.startswith("test_"):
                continue
            try:
                getattr(clients, name)()
                print("ok    ", name)
            except Exception as error:  # the next test still runs
                failed += 1
                print("FAILED", name, type(error).__name__, str(error)[:2000])
    finally:
        if args.hadal:
            server.terminate()
        if args.server:
            server.stdin.close()
        if server:
            failed += server.wait(timeout=20) != 0
    print(f"{checks} checks, {failed} failures (openai {openai.__version__}, anthropic {anthropic.__version__})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
