import asyncio

from common import *
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class City(BaseModel):
    """A city."""
    city: str
    population: int


model = OpenAILike(model=MODEL, api_base=V1, api_key=KEY, is_chat_model=True, is_function_calling_model=True,
                   max_tokens=LIMIT, max_retries=0, context_window=8000)
reply = model.chat([ChatMessage(role="user", content="Hi")])
strict(reply.message.content.startswith("Hello"), reply)
text = "".join(part.delta or "" for part in model.stream_chat([ChatMessage(role="user", content="Hi")]))
strict(text.startswith("Hello"), text)
check(isinstance(OpenAILike(model=MODEL, api_base=V1, api_key=KEY, is_chat_model=False, max_tokens=5,
                            max_retries=0).complete("It was").text, str))
weather = FunctionTool.from_defaults(get_weather)
reply = model.chat_with_tools([weather], QUESTION)
strict(model.get_tool_calls_from_response(reply)[0].tool_kwargs == {"city": "Paris", "days": 2}, reply)
city = attempt(lambda: model.structured_predict(City, __import__("llama_index.core", fromlist=["x"])
                                                .PromptTemplate("A city.")))
check(FREE or isinstance(city, City), city)


async def agent():
    calls.clear()
    result = await FunctionAgent(tools=[weather], llm=model, streaming=True).run(QUESTION)
    strict(calls == [("Paris", 2)] and str(result).startswith("Hello"), calls, result)


attempt(lambda: asyncio.run(agent()))
done("llama-index-llms-openai-like")
