import asyncio

from agents import (Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool,
                    set_tracing_disabled)
from common import *
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)


class City(BaseModel):
    city: str
    population: int


async def main():
    client = AsyncOpenAI(base_url=V1, api_key=KEY, max_retries=0)
    settings = ModelSettings(max_tokens=LIMIT)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model=MODEL, openai_client=client)
        agent = Agent(name="a", instructions="Be brief.", model=model, model_settings=settings)
        result = await Runner.run(agent, QUESTION)
        check(isinstance(result.final_output, str), result)
        strict(result.final_output.startswith("Hello"), result.final_output)

        calls.clear()
        agent = Agent(name="w", model=model, tools=[function_tool(get_weather)], model_settings=settings)

        async def with_tool():
            result = await Runner.run(agent, QUESTION, max_turns=4)
            strict(calls == [("Paris", 2)] and result.final_output.startswith("Hello"), calls, result.final_output)
            # The next turn goes on from the whole conversation.
            more = result.to_input_list() + [{"role": "user", "content": "And tomorrow?"}]
            result = await Runner.run(agent, more, max_turns=4)
            strict(result.final_output.startswith("Hello"), result.final_output)

        async def streamed():
            calls.clear()
            result = Runner.run_streamed(agent, QUESTION, max_turns=4)
            kinds = {event.type async for event in result.stream_events()}
            check("raw_response_event" in kinds, kinds)
            strict(calls == [("Paris", 2)], calls)

        async def structured():
            typed = Agent(name="s", model=model, output_type=City, model_settings=settings)
            result = await Runner.run(typed, "A city.")
            check(isinstance(result.final_output, City), result)

        for step in (with_tool, streamed, structured):
            try:
                await step()
            except Exception as error:
                if not FREE:
                    raise
                print("  the model's answer does not fit:", type(error).__name__)


asyncio.run(main())
done("openai-agents")
