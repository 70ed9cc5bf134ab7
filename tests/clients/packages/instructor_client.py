import anthropic
import instructor
import openai
from common import *
from pydantic import BaseModel


class City(BaseModel):
    city: str
    population: int


MESSAGES = [{"role": "user", "content": "A city."}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
    client = instructor.from_openai(openai.OpenAI(base_url=V1, api_key=KEY, max_retries=0), mode=mode)
    if mode is instructor.Mode.JSON and not FREE:
        continue  # the script knows no schema there
    city = attempt(lambda: client.chat.completions.create(model=MODEL, messages=MESSAGES, response_model=City,
                                                          max_tokens=LIMIT, max_retries=1))
    check(FREE or isinstance(city, City), mode, city)
client = instructor.from_anthropic(anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0),
                                   mode=instructor.Mode.ANTHROPIC_TOOLS)
city = attempt(lambda: client.messages.create(model=MODEL, messages=MESSAGES, response_model=City, max_tokens=LIMIT,
                                              max_retries=1))
check(FREE or isinstance(city, City), city)
done("instructor")
