from common import *
from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function
from haystack.utils import Secret

key = Secret.from_token(KEY)
settings = {"max_tokens": LIMIT}


def chat(**more):
    return OpenAIChatGenerator(api_key=key, api_base_url=V1, model=MODEL, generation_kwargs=settings, max_retries=0,
                               **more)


reply = chat().run([ChatMessage.from_user("Hi")])["replies"][0]
strict(reply.text.startswith("Hello"), reply)
pieces = []
chat(streaming_callback=lambda chunk: pieces.append(chunk.content)).run([ChatMessage.from_user("Hi")])
strict("".join(pieces).startswith("Hello"), pieces)
weather = create_tool_from_function(get_weather)
reply = chat(tools=[weather]).run([ChatMessage.from_user(QUESTION)])["replies"][0]
strict(reply.tool_calls and reply.tool_calls[0].arguments == {"city": "Paris", "days": 2}, reply)


def agent():
    calls.clear()
    made = Agent(chat_generator=chat(), tools=[weather], max_agent_steps=4)
    result = made.run([ChatMessage.from_user(QUESTION)])
    strict(calls == [("Paris", 2)] and result["messages"][-1].text.startswith("Hello"), calls, result)


attempt(agent)
try:
    from haystack_integrations.components.generators.anthropic import AnthropicChatGenerator
    import os
    os.environ["ANTHROPIC_BASE_URL"] = URL  # the package has no field for it
    claude = AnthropicChatGenerator(api_key=key, model=MODEL, generation_kwargs=settings, tools=[weather])
    reply = claude.run([ChatMessage.from_user(QUESTION)])["replies"][0]
    strict(reply.tool_calls and reply.tool_calls[0].arguments == {"city": "Paris", "days": 2}, reply)
except ImportError:
    pass
done("haystack-ai")
