"""What the programs beside this file share: the server's address, and checks.

Each drives one package, unmodified, as its documentation shows. tools/clients.sh installs the packages and starts the
server. With --free a real model answers, so only the form of answers is checked, not that tools were called.
"""
import argparse
import json

parser = argparse.ArgumentParser()
parser.add_argument("--url", required=True)
parser.add_argument("--key", default="test-key")
parser.add_argument("--model", required=True)
parser.add_argument("--free", action="store_true")
args = parser.parse_args()
URL, V1, KEY, MODEL, FREE = args.url, args.url + "/v1", args.key, args.model, args.free
QUESTION = "What is the weather in Paris?"
LIMIT = 60 if FREE else 400
THINKING_LIMIT = 60 if FREE else 2000  # with a budget of 1024
checks = 0


def check(condition, *what):
    global checks
    checks += 1
    if not condition:
        raise AssertionError(" ".join(map(repr, what)) or "a check failed")


def strict(condition, *what):
    """A check that only the script's answers pass."""
    if not FREE:
        check(condition, *what)


def attempt(function, *errors):
    """Runs what a free model may fail at: its answer need not fit."""
    try:
        return function()
    except errors or Exception as error:
        if not FREE:
            raise
        print("  the model's answer does not fit:", type(error).__name__, str(error)[:100].replace("\n", " "))
        return None


def get_weather(city: str, days: int) -> str:
    """The weather in a city.

    Args:
        city: The name of the city.
        days: For how many days.
    """
    calls.append((city, days))
    return f"22 degrees in {city}"


calls = []
WEATHER_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}


def done(package):
    import importlib.metadata
    print(f"ok: {package} {importlib.metadata.version(package)}, {checks} checks")
