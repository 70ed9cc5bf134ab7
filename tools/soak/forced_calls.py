#!/usr/bin/env python3
"""Answers that must be a tool call, of the shipped model at temperature 1: is each one a valid call?

  tools/soak/forced_calls.py --hadal ./hadal [--tries 100] [--tokens 400]

Three APIs, thinking on (with a budget) and off, the tool with and without `strict`, with and without an answer's format beside it,
and the tool by its name or "any call". An answer that the budget of tokens cuts off is counted apart; every other one must be exactly
one call of a tool that was offered, with a JSON object as its arguments, and of a strict tool one that its schema accepts.
Exits with 1 at any that is not. Python's standard library only.
"""
import argparse
import collections
import concurrent.futures
import itertools
import json
import sys

from serving import Server

PARAMETERS = {
    "type": "object",
    "properties": {
        "subject": {"type": "string", "maxLength": 24},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "place": {"type": "object", "properties": {"east": {"type": "boolean"}}, "required": ["east"],
                  "additionalProperties": False},
    },
    "required": ["subject", "count"],
    "additionalProperties": False,
}
OTHER = {"type": "object", "properties": {"to": {"type": "string"}}}
FORMAT = {"type": "object", "properties": {"answer": {"type": "string", "maxLength": 20}}, "required": ["answer"],
          "additionalProperties": False}
QUESTIONS = ("Write down that the old king has three houses.", "Who was the first of the travellers?", "Note: 7 red birds.",
             "How far is it to the river?")
BUDGET = 32  # tokens of reasoning; the model was never taught to think


def accepts(value):
    """Whether PARAMETERS accept it."""
    if not isinstance(value, dict) or not {"subject", "count"} <= set(value) <= set(PARAMETERS["properties"]):
        return False
    count, tags, place = value["count"], value.get("tags", []), value.get("place", {"east": True})
    return (isinstance(value["subject"], str) and len(value["subject"]) <= 24
            and type(count) is int and 0 <= count <= 99
            and isinstance(tags, list) and len(tags) <= 3 and all(tag in ("red", "green", "blue") for tag in tags)
            and isinstance(place, dict) and set(place) == {"east"} and type(place["east"]) is bool)


def chat(case, question, seed, tokens):
    function = {"name": "note_down", "parameters": PARAMETERS, "strict": case["strict"]}
    return "/v1/chat/completions", {
        "messages": [{"role": "user", "content": question}], "temperature": 1, "seed": seed, "max_tokens": tokens,
        "tools": [{"type": "function", "function": function}, {"type": "function", "function": {"name": "go", "parameters": OTHER}}],
        "tool_choice": {"type": "function", "function": {"name": "note_down"}} if case["named"] else "required",
        "parallel_tool_calls": False, "chat_template_kwargs": {"thinking": case["thinking"]},
        **({"thinking_budget": BUDGET} if case["thinking"] else {}),
        **({"response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": FORMAT}}} if case["format"] else {})}


def chat_calls(answer):
    choice = answer["choices"][0]
    calls = choice["message"].get("tool_calls") or []
    return choice["finish_reason"] == "length", [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def responses(case, question, seed, tokens):
    return "/v1/responses", {
        "input": question, "temperature": 1, "seed": seed, "max_output_tokens": tokens,
        "tools": [{"type": "function", "name": "note_down", "parameters": PARAMETERS, "strict": case["strict"]},
                  {"type": "function", "name": "go", "parameters": OTHER, "strict": False}],
        "tool_choice": {"type": "function", "name": "note_down"} if case["named"] else "required",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "high", "max_tokens": BUDGET} if case["thinking"] else {"effort": "none"},
        **({"text": {"format": {"type": "json_schema", "name": "f", "schema": FORMAT}}} if case["format"] else {})}


def responses_calls(answer):
    calls = [item for item in answer["output"] if item["type"] == "function_call"]
    return answer["status"] == "incomplete", [(call["name"], call["arguments"]) for call in calls]


def messages(case, question, seed, tokens):
    return "/v1/messages", {
        "messages": [{"role": "user", "content": question}], "temperature": 1, "seed": seed, "max_tokens": tokens,
        "tools": [{"name": "note_down", "input_schema": PARAMETERS, "strict": case["strict"]}, {"name": "go", "input_schema": OTHER}],
        "tool_choice": {"type": "tool", "name": "note_down", "disable_parallel_tool_use": True} if case["named"]
        else {"type": "any", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": BUDGET} if case["thinking"] else {"type": "disabled"},
        **({"output_config": {"format": {"type": "json_schema", "schema": FORMAT}}} if case["format"] else {})}


def messages_calls(answer):
    calls = [block for block in answer["content"] if block["type"] == "tool_use"]
    return answer["stop_reason"] == "max_tokens", [(call["name"], json.dumps(call["input"])) for call in calls]


APIS = {"chat": (chat, chat_calls), "responses": (responses, responses_calls), "messages": (messages, messages_calls)}


def verdict(case, answer):
    cut, calls = APIS[case["api"]][1](answer)
    if cut:
        return "cut off"
    if len(calls) != 1:
        return f"{len(calls)} calls"
    name, text = calls[0]
    try:
        arguments = json.loads(text)
    except ValueError:
        return "arguments are no JSON"
    if name != "note_down" and (name != "go" or case["named"]):
        return "another tool"
    if not isinstance(arguments, dict) or (name == "note_down" and case["strict"] and not accepts(arguments)):
        return "arguments do not fit"
    return "valid"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hadal", default="./hadal")
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=400)
    args = parser.parse_args()
    server = Server(args.hadal)
    failed, totals = 0, collections.Counter()
    for api, thinking, strict, beside, named in itertools.product(APIS, *[(False, True)] * 4):
        case = {"api": api, "thinking": thinking, "strict": strict, "format": beside, "named": named}

        def ask(seed):
            path, request = APIS[api][0](case, QUESTIONS[seed % len(QUESTIONS)], seed, args.tokens)
            answer = server.post(path, request)
            return verdict(case, answer), answer

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, range(args.tries)))
        counts = collections.Counter(found for found, _ in answers)
        totals += counts
        print(f"{api:9} thinking {thinking:d}, strict {strict:d}, format beside {beside:d}, by name {named:d}: "
              + ", ".join(f"{count} {found}" for found, count in counts.most_common()), flush=True)
        wrong = [(found, answer) for found, answer in answers if found not in ("valid", "cut off")]
        failed += len(wrong)
        if wrong:
            print(f"  the first: {wrong[0][0]}: {json.dumps(wrong[0][1])[:2000]}")
    server.stop()
    print(f"in all: {dict(totals)}")
    return 1 if failed or not totals["valid"] else 0


if __name__ == "__main__":
    sys.exit(main())
