"""A small data set for extras/real.py, where none can be downloaded.

    python -m extras.word_problems 2000 > problems.jsonl                    # GSM8K's format
    python -m extras.word_problems 2000 --style math > problems.jsonl       # MATH's
"""

import argparse
import json
import random
from fractions import Fraction

NAMES = ("Ann", "Ben", "Carla", "Dmitri", "Emeka", "Fatima", "Goro", "Hana")
THINGS = ("apples", "marbles", "stickers", "books", "coins", "shells", "pencils", "stamps")


def gsm8k_problem(rng: random.Random) -> dict:
    """{"question": ..., "answer": worked steps and #### number}."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    a, b, c = rng.randrange(3, 30), rng.randrange(2, 20), rng.randrange(2, 6)
    kind = rng.randrange(3)
    if kind == 0:
        question = (f"{name} has {a} {thing}. {other} gives {name} {b} more, and then {name} buys "
                    f"{c} more. How many {thing} does {name} have now?")
        result = a + b + c
        steps = f"{a} + {b} = {a + b}. {a + b} + {c} = {result}."
    elif kind == 1:
        b = min(b, c * a)
        question = (f"{name} has {c} boxes with {a} {thing} each. {name} gives {b} of the {thing} "
                    f"to {other}. How many {thing} are left?")
        result = c * a - b
        steps = f"{c} * {a} = {c * a}. {c * a} - {b} = {result}."
    else:
        question = (f"{name} has {a} {thing} and {other} has {c} times as many. How many {thing} "
                    "do they have together?")
        result = a + c * a
        steps = f"{c} * {a} = {c * a}. {a} + {c * a} = {result}."
    return {"question": question, "answer": f"{steps}\n#### {result}"}


def math_problem(rng: random.Random) -> dict:
    """{"problem": ..., "solution": with its result in a \\boxed{}}: LaTeX in both."""
    a, b = rng.sample(range(1, 30), 2)
    kind = rng.randrange(4)
    if kind == 0:
        sum_ = Fraction(1, a) + Fraction(1, b)
        problem = rf"Compute $\frac{{1}}{{{a}}} + \frac{{1}}{{{b}}}$ as a common fraction."
        result = rf"\frac{{{sum_.numerator}}}{{{sum_.denominator}}}"
    elif kind == 1:
        problem = f"Where do the lines $y = x + {a}$ and $y = {b} - x$ meet? Give an ordered pair."
        result = rf"\left({Fraction(b - a, 2)}, {Fraction(a + b, 2)}\right)"
    elif kind == 2:
        problem = f"Expand $(x + {a})(x - {b})$."
        result = f"x^2 {a - b:+d}x {-a * b:+d}"
    else:
        problem = f"Find all solutions of $x^2 {-(a + b):+d}x {a * b:+d} = 0$."
        result = f"{a}, {b}"
    return {"problem": problem, "solution": rf"The result is $\boxed{{{result}}}$."}


STYLES = {"gsm8k": gsm8k_problem, "math": math_problem}


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("number", type=int, nargs="?", default=1000, help="of problems")
    parser.add_argument("--style", choices=STYLES, default="gsm8k")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    rng = random.Random(options.seed)
    for _ in range(options.number):
        print(json.dumps(STYLES[options.style](rng)))


if __name__ == "__main__":
    main()
