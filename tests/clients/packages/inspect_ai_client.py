import os
import tempfile

from common import *
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool

os.environ["HADAL_API_KEY"] = KEY
os.environ["HADAL_BASE_URL"] = V1


@tool(name="get_weather")
def weather():
    async def execute(city: str, days: int):
        """The weather in a city.

        Args:
            city: The name of the city.
            days: For how many days.
        """
        return get_weather(city, days)
    return execute


config = GenerateConfig(max_tokens=LIMIT, max_retries=0)
for model in (get_model(f"openai-api/hadal/{MODEL}", config=config),
              get_model(f"openai-api/hadal/{MODEL}", config=config, responses_api=True),
              get_model(f"anthropic/{MODEL}", base_url=URL, api_key=KEY, config=config)):
    for solver, expected in (([generate()], 0), ([use_tools(weather()), generate()], 1)):
        calls.clear()
        task = Task(dataset=[Sample(input=QUESTION, target="Hello")], solver=solver, scorer=includes())
        with tempfile.TemporaryDirectory() as folder:
            log = eval(task, model=model, log_dir=folder, display="none", message_limit=8)[0]
        check(log.status == "success", log.error)
        strict(log.results.scores[0].metrics["accuracy"].value == 1, log.results)
        strict(len(calls) == expected, calls)
done("inspect-ai")
