import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network when it is imported
import litellm
from common import *

litellm.drop_params = False
litellm.suppress_debug_info = True
MESSAGES = [{"role": "user", "content": QUESTION}]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER_SCHEMA}}
openai_like = {"api_base": V1, "api_key": KEY}
ANTHROPIC = {"api_base": URL, "api_key": KEY}

for model, where in ((f"openai/{MODEL}", openai_like), (f"hosted_vllm/{MODEL}", openai_like),
                     (f"anthropic/{MODEL}", ANTHROPIC)):
    reply = litellm.completion(model=model, messages=MESSAGES, max_tokens=LIMIT, **where)
    check(reply.usage.completion_tokens > 0, reply)
    strict((reply.choices[0].message.content or "").startswith("Hello"), reply)
    text, finish = "", None
    for chunk in litellm.completion(model=model, messages=MESSAGES, max_tokens=LIMIT, stream=True, **where):
        text += chunk.choices[0].delta.content or ""
        finish = chunk.choices[0].finish_reason or finish
    check(finish in ("stop", "length"), finish)
    strict(text.startswith("Hello") and finish == "stop", text, finish)
    reply = litellm.completion(model=model, messages=MESSAGES, tools=[TOOL], max_tokens=LIMIT, **where)
    strict(reply.choices[0].finish_reason == "tool_calls", reply)
    if not FREE:
        call = reply.choices[0].message.tool_calls[0]
        check(json.loads(call.function.arguments) == {"city": "Paris", "days": 2}, call)
        again = MESSAGES + [reply.choices[0].message.model_dump(),
                            {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}]
        reply = litellm.completion(model=model, messages=again, tools=[TOOL], max_tokens=LIMIT, **where)
        check(reply.choices[0].message.content.startswith("Hello"), reply)

# Thinking through each API's own field.
reply = litellm.completion(model=f"openai/{MODEL}", messages=MESSAGES, reasoning_effort="high", max_tokens=LIMIT,
                           allowed_openai_params=["reasoning_effort"], **openai_like)
strict(reply.choices[0].message.reasoning_content == "Let me think.", reply)
reply = litellm.completion(model=f"anthropic/{MODEL}", messages=MESSAGES, max_tokens=THINKING_LIMIT,
                           thinking={"type": "enabled", "budget_tokens": 1024}, allowed_openai_params=["thinking"],
                           **ANTHROPIC)
strict(reply.choices[0].message.reasoning_content == "Let me think.", reply)
# The Responses API, and errors by kind.
reply = litellm.responses(model=f"openai/{MODEL}", input=QUESTION, max_output_tokens=LIMIT, **openai_like)
check(reply.status in ("completed", "incomplete"), reply)
try:
    litellm.completion(model=f"openai/{MODEL}", messages=[{"role": "user", "content": "a " * 300_000}], **openai_like)
    check(False, "a prompt that is too long was accepted")
except litellm.ContextWindowExceededError:
    check(True)
try:
    litellm.completion(model=f"anthropic/{MODEL}", messages=[{"role": "user", "content": "a " * 300_000}], **ANTHROPIC)
    check(False, "a prompt that is too long was accepted")
except litellm.ContextWindowExceededError:
    check(True)
try:
    litellm.completion(model="openai/nobody", messages=MESSAGES, **openai_like)
    check(False, "an unknown model was accepted")
except litellm.NotFoundError:
    check(True)
done("litellm")
