from common import *
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel


class City(BaseModel):
    """A city."""
    city: str
    population: int


weather = tool(get_weather)
for responses in (False, True):
    model = ChatOpenAI(base_url=V1, api_key=KEY, model=MODEL, max_tokens=LIMIT, use_responses_api=responses,
                       max_retries=0)
    reply = model.invoke("Hi")
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
    for method in ("json_schema", "function_calling"):
        city = attempt(lambda: model.with_structured_output(City, method=method).invoke("A city."))
        check(FREE or isinstance(city, City), method, city)
reply = OpenAI(base_url=V1, api_key=KEY, model=MODEL, max_tokens=5, max_retries=0).invoke("It was")
check(isinstance(reply, str), reply)
done("langchain-openai")
