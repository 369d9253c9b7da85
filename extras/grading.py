r"""Is an answer right? One function, for answers written as in GSM8K, in MATH and in their like.

    grade("48 / 2 = 24, 48 + 24 = 72. #### 72", "So the total is \\boxed{72} clips.")     # True

The rule: an answer is the last \boxed{}, else what follows the last #### up to its line's end, else
the last number or formula. It is read as a number before anything else: a sign, thousands, decimals
or a fraction, a percent sign, and a unit after it, which is not compared. Words are equal or not;
whether two formulas (lists, intervals, equations) are equal is what math-verify says.

math-verify works in a process of its own, from any thread. It is killed after TIME_LIMIT seconds,
and the answer counts as wrong: some formulas would keep a computer busy for ever.
"""

import json
import math
import re
import resource
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from importlib.util import find_spec
from typing import NamedTuple

TIME_LIMIT = 3                 # seconds for one comparison of formulas
MAX_FORMULA = 500              # characters: what is longer is no answer


def grade(gold_text: str, answer_text: str) -> bool:
    """Whether an answer is right; gold_text is the file's. Both with or without their solutions.

    ValueError for a gold that cannot be read with certainty.
    """
    gold = final_answer(gold_text, certain=True)
    if gold is None:
        raise ValueError(f"no answer can be read with certainty from {gold_text.strip()[-60:]!r}")
    answer = final_answer(answer_text)
    return answer is not None and same(gold, answer)


# ------------------------------------------------------------------------------------------------
# Where the answer is.

BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
# What LaTeX and prose write in several ways, in one.
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
TIDY = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"[^\S\n]+", " "),                                       # first: so that none takes long
    (r"(?: ?\n ?)+", "\n"),
    (r"[−–]", "-"),
    (r"×", r"\\times "),
    (r"π", r"\\pi "),
    (r"∞", r"\\infty "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"\{,\}|,\\!\s*", ","),
    (r"(?<!\\)\\[,;:! ]|~|\\q?quad", " "),
    (r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|[mh]box)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\?[$€£¥₹]|(?<!\\)\\[()\[\]]", ""),
    (r"\\%|\s*\bper ?cent(?:age points?)?\b", "%"),
    (rf"(?<=\d)\s*({'|'.join(SCALES)})\b", lambda match: f"e{SCALES[match[1]]}"),
    (r"(?<=\d)\s*dozen\b", r" \\times 12"),
    (r"(?<=\d)\s*([apAP])\.?[mM]\b\.?", r"_{\1m}"),            # 7 p.m.: an index, so no word
    (r" +", " "))]
# Words of three letters and more, and shorter ones that are no products of variables, as ab is.
FUNCTIONS = ("sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|sqrt|pi|max|"
             "min|gcd|lcm|mod|det|lim|inf|infty")
SHORT = "am|an|as|at|be|by|do|go|he|if|in|is|it|me|my|no|of|on|or|so|to|up|us|we"
WORD = re.compile(rf"""
    (?<![A-Za-z\\{{_^]) (?!(?:{FUNCTIONS})\b) (?:[A-Za-z]{{3,}} | (?:{SHORT})\b)
  | (?<!\S) (?:a|A|I) \s+ (?=[\w(])""", re.VERBOSE | re.IGNORECASE)


def final_answer(text: str, certain=False) -> str | None:
    """The text of the answer, tidied; None if there is none. certain: never one out of prose."""
    if BOX.search(text):
        return alone(last_box(text))
    if "####" in text:
        return alone(text.rpartition("####")[2].partition("\n")[0])
    whole = None if "\n" in text.strip() else alone(text)
    return whole if certain else whole or last_expression(text)


def last_box(text: str) -> str:
    r"""What the last \boxed{} holds; nothing if it is never closed."""
    start = list(BOX.finditer(text))[-1].end()
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return ""


def alone(text: str) -> str | None:
    """The tidied text if it is a number or a formula, or a few words without a number."""
    text = tidy(re.sub(r"^.*\banswer\b(?:\s+is\b)?", "", text, flags=re.IGNORECASE))
    text = re.sub(r",? (?:and|or) ", ", ", text)              # a list
    few_words = 0 < len(text.split()) <= 4 and not re.search(r"\d", text)
    return text if few_words or is_formula(text) else None


def last_expression(text: str) -> str | None:
    """The last number or formula of running prose, what is after its last =."""
    between_words = re.split(rf"{WORD.pattern}|\n|[.:;!?](?=\s|$)", tidy(text), flags=WORD.flags)
    for piece in reversed(between_words):
        piece = piece.rpartition("=")[2].rstrip(" -+*/")
        if piece.count("(") != piece.count(")"):
            piece = piece.strip("() ")
        if re.search(r"\d|\\[a-z]", piece):
            return alone(piece)
    return None


def tidy(text: str) -> str:
    for pattern, replacement in TIDY:
        text = pattern.sub(replacement, text)
    return text.lstrip(" \n\t*`:,;=").rstrip(" \n\t*`.,;:")


def is_formula(text: str) -> bool:
    """Whether it is a number, or holds no words but perhaps a unit."""
    if not re.search(r"\w", text) or len(text) > MAX_FORMULA:
        return False
    return bool(number(text) or not WORD.search(without_unit(text)))


# ------------------------------------------------------------------------------------------------
# Whether two answers are the same.

NUMBER = re.compile(r"""
    (?P<sign>[-+]?) \s*
    (?: (?: (?P<whole>\d+) \s+ )? (?P<top>-?\d+) \s* / \s* (?P<bottom>\d+)
      | (?P<digits> (?:\d{1,3}(?:,\d{3})+ | \d{1,3}(?:\ \d{3})+ | \d+) (?:\.\d+)? | \.\d+)
        (?: e (?P<exponent>[-+]?\d{1,3})
          | \s* (?:\\times|\\cdot|[*x]) \s* 10 \s* \^ \s* \{? (?P<power>[-+]?\d{1,3}) \}? )? )
    (?P<percent>\s*%)? (?P<unit>.*)""", re.VERBOSE | re.DOTALL | re.IGNORECASE)
FRACTION = re.compile(r"\\frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
CONNECTIVE = "and|or|to|of|by|plus|minus|times|over|than|but"
UNIT = re.compile(rf"""
    \s* (?:\^ \s* \{{? \s* \\circ \s* \}}? | °) \s* [CFK]?                       # degrees
  | (?: \s+ (?!(?:{FUNCTIONS}|{CONNECTIVE})\b)
            \(? (?:[A-Za-z]{{2,}} | [mshgLlJWVN](?![A-Za-z]))                    # clips, m
      | (?:[cmk]m|[mk]?g|ml|mL|[mk]ph|lbs?|oz|ft|hrs?|mins?|secs?|st|nd|rd|th)\b)
    (?! .* (?:[,;]|\b(?:{CONNECTIVE})\b) .* \d)
    [^=+*<>\\]*                                                                  # in 2 months
    """, re.VERBOSE | re.DOTALL)


class Number(NamedTuple):
    value: Fraction
    percent: bool
    fraction: bool             # written as one: a decimal then stands for it to six digits


def same(gold: str, answer: str) -> bool:
    numbers = number(gold), number(answer)
    if all(numbers):
        return same_number(*numbers)
    if is_words(gold) or is_words(answer):
        return plain(gold) == plain(answer)
    return gold == answer or JUDGE.same_formula(without_unit(gold), without_unit(answer))


def is_words(text: str) -> bool:
    """Whether it is compared letter by letter: words, the letter of a choice, 3:30, 3:2, 52_8."""
    return not is_formula(text) or bool(re.search(r"^\(?[A-Za-z]\)?$|\d:\d|\d_", text))


def plain(text: str) -> str:
    text = re.sub(r"[\s(){}]", "", text)
    return text.casefold() if len(text) > 1 else text         # yes is Yes, b is not B


def same_number(gold: Number, answer: Number) -> bool:
    a, b = gold.value, answer.value
    if gold.percent != answer.percent:                        # 50% is .5, and as good as 50
        percent, bare = (a, b) if gold.percent else (b, a)
        return percent / 100 == bare or percent == bare and abs(bare) > 1
    if gold.fraction != answer.fraction:                      # 1/3 and .333333
        return math.isclose(a, b, rel_tol=2e-6)
    return a == b


def number(text: str) -> Number | None:
    text = FRACTION.sub(lambda match: f" {match[1] or match[2]}/{match[3] or match[4]} ", text)
    found = NUMBER.fullmatch(text.strip())
    if not found or found["unit"] and not UNIT.fullmatch(found["unit"]):
        return None
    if found["digits"]:
        value = Fraction(re.sub("[, ]", "", found["digits"]))
        value *= Fraction(10) ** int(found["exponent"] or found["power"] or 0)
    else:
        top, bottom, whole = int(found["top"]), int(found["bottom"]), int(found["whole"] or 0)
        if bottom == 0:
            return None
        value = whole + Fraction(top, bottom)
    value = -value if found["sign"] == "-" else value
    return Number(value, bool(found["percent"]), bool(found["bottom"]))


def without_unit(text: str) -> str:
    r"""5\sqrt{2} cm -> 5\sqrt{2}: without what follows the last digit or bracket, a unit."""
    end = max(text.rfind(character) for character in "0123456789)}") + 1
    is_unit = 0 < end < len(text) and UNIT.fullmatch(text[end:])
    return text[:end] if is_unit else text


# ------------------------------------------------------------------------------------------------
# The judge of formulas, in a process of its own.

class Judge:
    """Keeps its process, which takes a second to start, for the next question."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process = None

    def same_formula(self, gold: str, answer: str) -> bool:
        """What math-verify says; False if it does not know within TIME_LIMIT seconds."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.start()
            print(json.dumps([gold, answer]), file=self.process.stdin, flush=True)
            reply = self.process.stdout.readline()
            if not reply:                                     # its time was up
                self.process.wait()
            return reply == "true\n"

    def start(self):
        if find_spec("math_verify") is None:
            raise ModuleNotFoundError("to compare formulas: pip install math-verify")
        self.process = subprocess.Popen([sys.executable, "-P", __file__], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL)


JUDGE = Judge()


def answer_questions():
    """What the process does: a line [gold, answer] of JSON in, "true" or "false" out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)              # it ends when its input does,
    signal.signal(signal.SIGTERM, signal.SIG_IGN)             # or at the alarm
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    replies, sys.stdout = sys.stdout, sys.stderr              # for what a library prints
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    repair = NormalizationConfig(malformed_operators=True, nits=True)
    formula = [LatexExtractionConfig(normalization_config=repair)]
    for line in sys.stdin:
        signal.alarm(TIME_LIMIT)
        gold, answer = [parse(f"\\boxed{{{text}}}", formula, fallback_mode="no_fallback",
                              parsing_timeout=None) for text in json.loads(line)]
        verdict = verify(gold, answer, timeout_seconds=None)
        signal.alarm(0)
        print(json.dumps(bool(verdict)), file=replies, flush=True)


if __name__ == "__main__":
    answer_questions()
