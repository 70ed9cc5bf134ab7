from common import *
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    city: str
    population: int


models = [OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=V1, api_key=KEY)),
          OpenAIResponsesModel(MODEL, provider=OpenAIProvider(base_url=V1, api_key=KEY)),
          AnthropicModel(MODEL, provider=AnthropicProvider(base_url=URL, api_key=KEY))]
settings = {"max_tokens": LIMIT}
for model in models:
    result = attempt(lambda: Agent(model, instructions="Be brief.", model_settings=settings).run_sync("Hi"))
    check(FREE or result.output.startswith("Hello"), result)
    calls.clear()
    agent = Agent(model, tools=[get_weather], model_settings=settings)
    result = attempt(lambda: agent.run_sync(QUESTION))
    strict(calls == [("Paris", 2)] and result.output.startswith("Hello"), calls, result)
    if not FREE:
        again = agent.run_sync("And tomorrow?", message_history=result.all_messages())
        check(again.output.startswith("Hello"), again)
    result = attempt(lambda: Agent(model, output_type=ToolOutput(City), model_settings=settings).run_sync("A city."))
    check(FREE or isinstance(result.output, City), result)
    if not isinstance(model, AnthropicModel):
        native = Agent(model, output_type=NativeOutput(City), model_settings=settings)
        result = attempt(lambda: native.run_sync("A city."))
        check(FREE or isinstance(result.output, City), result)
    both = Agent(model, tools=[get_weather], output_type=City, model_settings=settings)
    result = attempt(lambda: both.run_sync(QUESTION))
    check(FREE or isinstance(result.output, City), result)
done("pydantic-ai-slim")
