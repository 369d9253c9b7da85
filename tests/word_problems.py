"""Word problems in GSM8K's format, for trying --data where nothing can be downloaded.

    python tests/word_problems.py 2000 > problems.jsonl
"""

import json
import random
import sys

NAMES = ("Ann", "Ben", "Carla", "Dmitri", "Emeka", "Fatima", "Goro", "Hana")
THINGS = ("apples", "marbles", "stickers", "books", "coins", "shells", "pencils", "stamps")


def problem(rng: random.Random) -> dict:
    """{"question": ..., "answer": worked steps and #### number}."""
    name, other = rng.sample(NAMES, 2)
    thing, a, b, c = rng.choice(THINGS), rng.randrange(3, 30), rng.randrange(2, 20), rng.randrange(2, 6)
    kind = rng.randrange(3)
    if kind == 0:
        question = f"{name} has {a} {thing}. {other} gives {name} {b} more, and then {name} buys {c} more. " \
                   f"How many {thing} does {name} have now?"
        steps = f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."
        result = a + b + c
    elif kind == 1:
        b = min(b, c * a)
        question = f"{name} has {c} boxes with {a} {thing} each. {name} gives {b} of the {thing} to {other}. " \
                   f"How many {thing} are left?"
        steps = f"{c} * {a} = {c * a}. {c * a} - {b} = {c * a - b}."
        result = c * a - b
    else:
        question = f"{name} has {a} {thing} and {other} has {c} times as many. How many {thing} do they have together?"
        steps = f"{c} * {a} = {c * a}. {a} + {c * a} = {a + c * a}."
        result = a + c * a
    return {"question": question, "answer": f"{steps}\n#### {result}"}


if __name__ == "__main__":
    rng = random.Random(0)
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 1000):
        print(json.dumps(problem(rng)))
