from typing import Literal

import openai
import outlines
from common import *
from pydantic import BaseModel


class City(BaseModel):
    city: str
    population: int


client = openai.OpenAI(base_url=V1, api_key=KEY, max_retries=0)
model = outlines.from_openai(client, MODEL)
text = model("Hi", max_tokens=LIMIT)
check(isinstance(text, str), text)
city = model("A city.", City, max_tokens=LIMIT)
attempt(lambda: check(City.model_validate_json(city)))

# vLLM's mode sends its fields for structured output.
vllm = outlines.from_vllm(client, MODEL)
city = vllm("A city.", City, max_tokens=LIMIT)
attempt(lambda: check(City.model_validate_json(city)))
word = vllm("Yes or no?", Literal["yes", "no"], max_tokens=LIMIT)
strict(word is not None, word)
if FREE:
    check(word in ("yes", "no"), word)
digits = vllm("A number.", outlines.regex("[0-9]{3}"), max_tokens=LIMIT)
if FREE:
    check(digits.isdigit() and len(digits) == 3, digits)
done("outlines")
