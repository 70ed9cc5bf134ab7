from common import *
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel


class City(BaseModel):
    """A city."""
    city: str
    population: int


weather = tool(get_weather)
for thinking in (None, {"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}):
    model = ChatAnthropic(base_url=URL, api_key=KEY, model=MODEL, max_tokens=THINKING_LIMIT if thinking else LIMIT,
                          thinking=thinking, max_retries=0)
    reply = model.invoke([("system", "Be brief."), ("human", "Hi")])
    check(reply.usage_metadata["output_tokens"] > 0, reply)
    strict(reply.text.startswith("Hello"), reply)
    text = "".join(chunk.text for chunk in model.stream("Hi"))
    strict(text.startswith("Hello"), text)
    bound = model.bind_tools([weather])
    messages = [HumanMessage(QUESTION)]
    reply = bound.invoke(messages)
    strict(reply.tool_calls and reply.tool_calls[0]["args"] == {"city": "Paris", "days": 2}, reply)
    if reply.tool_calls and not FREE:
        messages += [reply, ToolMessage("22 degrees", tool_call_id=reply.tool_calls[0]["id"])]
        check(bound.invoke(messages).text.startswith("Hello"))
    if not thinking:
        for method in ("function_calling", "json_schema"):
            city = attempt(lambda: model.with_structured_output(City, method=method).invoke("A city."))
            check(FREE or isinstance(city, City), method, city)
check(model.get_num_tokens_from_messages([HumanMessage("Hi")]) > 0)
done("langchain-anthropic")
