"""extras/grading.py: which answers are right, and which only look so."""

import itertools
import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from extras import grading, word_problems
from extras.grading import grade

TABLE = [  # gold, right answers, wrong ones
    # numbers: thousands, decimals, signs, powers of ten
    ("#### 72", ["#### 72 clips in 2 months", "#### 72.", "#### **72**", "$72$", "\\boxed{72.0}",
                 "#### 72\n\nQuestion: Ben has 5 apples. How many?", "#### The answer is 72.",
                 "So 48 / 2 = 24 and 48 + 24 = \\boxed{72}", "The total is 48 + 24 = 72 clips.",
                 "\\boxed{\\text{72 clips}}", "#### 5\n#### 72", "\\fbox{72}", "The answer is 72",
                 "36 * 2 = 72", "#### 144/2", "Many clips (48 + 24 = 72)", "clips (72 in all)"],
                ["#### 5\nNo, it is 72", "\\boxed{7.2}", "#### 720", "so 1072", "72 - 1 = 71", "",
                 "#", "####\n72", "\\boxed{72", "\\boxed{}", "I do not know", "#### 72 clips = 3",
                 "\\boxed{72} no, it is \\boxed{5}", "#### 72 and 5", "#### 72/100"]),
    ("#### 1,080", ["#### 1080", "\\boxed{1{,}080}", "so it is $1,080.00"], ["#### 1,08", "1.080"]),
    ("32,348", ["\\boxed{\\$32,\\!348}", "32 348"], ["\\boxed{32, 348}", "32.348"]),
    ("7", ["10 - 3 = 7"], ["10 - 4", "\\boxed{72", "#### 7 of the 9", "#### 10 - 7 = 3",
                            "7 dozen"]),
    ("36", ["3 dozen", "So it is 3 dozen eggs."], ["12 dozen", "36 dozen", "36 thousand"]),
    ("#### -4", ["#### - 4", "\\boxed{−4}"], ["#### 4", "\\boxed{-0.4}"]),
    ("0.0625", ["\\boxed{.0625}", "\\frac{1}{16}"], ["\\boxed{.063}", "0.625"]),
    ("3.14", ["3.140"], ["3.1416", "\\pi"]),
    ("1500000", ["#### $1.5 million", "1.5 \\times 10^{6}", "1.5e6"], ["1.5", "1.5 \\times 10^5"]),
    ("5", ["I have a 5"], ["#### 5 thousand", "5 hundred", "\\boxed{5x}", "#### 5 or 6"]),
    ("2^{10}", ["\\boxed{1024}"], ["\\boxed{20}", "2^{11}"]),
    # fractions and mixed numbers
    ("\\frac{1}{2}", ["\\boxed{0.5}", "\\boxed{\\dfrac12}", "the half, $\\frac{2}{4}$", "50\\%",
                      "\\boxed{\\frac{2}{\\frac{8}{2}}}"],
                     ["\\boxed{\\frac{1}{20}}", "#### 1/20", "\\boxed{-\\frac{1}{2}}", "2"]),
    ("\\frac{1}{3}", ["\\boxed{0.333333}"], ["\\boxed{0.33}", "0.\\overline{6}"]),
    ("-\\frac{1}{2}", ["\\boxed{\\frac{-1}{2}}", "-0.5"], ["\\boxed{\\frac{1}{2}}"]),
    ("3 1/2", ["\\boxed{\\frac{7}{2}}", "#### 3.5 hours", "3\\frac{1}{2}"],
              ["\\boxed{2}", "#### 31/2", "3", "\\boxed{\\frac{3}{2}}"]),
    ("-3 1/2", ["-3.5"], ["-2.5", "3.5"]),
    ("2/3 cup", ["\\boxed{\\frac{2}{3}}", "2/3 of a cup"], ["\\boxed{2}", "3/2 cup"]),
    # percent, money, units, times
    ("50%", ["\\boxed{50\\%}", "50", "\\boxed{0.5}", "50 percent"], ["5%", "\\boxed{0.5\\%}"]),
    ("0.5", ["50%"], ["0.5%", "5"]),
    ("$18", ["#### 18", "18 dollars", "She makes $9 and then $9, so $18."], ["#### $-18", "$1.8"]),
    ("$18.50", ["\\boxed{\\$18.5}"], ["$18", "18.05"]),
    ("90°", ["\\boxed{90}", "90^\\circ"], ["\\boxed{\\frac{\\pi}{2}}", "9"]),
    ("10 m^2", ["\\boxed{10}", "10\\mbox{ cm}^2"], ["\\boxed{100}", "10 - 2"]),
    ("60 mph", ["#### 60 miles per hour", "60 km/h", "60mph"], ["60 + 5", "6 mph"]),
    ("5\\sqrt{2} \\text{ cm}", ["\\boxed{5\\sqrt{2}}"], ["\\boxed{2\\sqrt{5}}"]),
    ("5m", ["m \\cdot 5"], ["\\boxed{5}", "5n"]),
    ("3:30 PM", ["#### 3:30 p.m.", "The train leaves at 3:30 PM."], ["3:30 AM", "3:03 PM", "3.5"]),
    ("7 pm", ["7 p.m."], ["7 am", "7"]),
    ("3:2", ["\\boxed{3:2}", "The ratio is 3:2."], ["\\boxed{2:3}", "3", "32"]),
    # letters and words
    ("\\text{(B)}", ["\\boxed{B}", "(B)", "The answer is B."], ["\\boxed{C}", "b", "\\text{(D)}"]),
    ("Yes", ["so \\boxed{Yes}", "#### yes"], ["\\boxed{No}", "Yesterday"]),
    ("\\text{Evelyn}", ["\\boxed{Evelyn}"], ["\\boxed{\\text{Evelin}}", "\\text{Eve}"]),
    ("\\text{not possible}", ["#### Not possible."], ["possible", "not"]),
    # lists, pairs, intervals
    ("-2,1", ["\\boxed{-2, 1}", "\\boxed{1,-2}"], ["\\boxed{-2.1}", "\\boxed{2, -1}", "-2"]),
    ("3,5,7", ["\\boxed{3, 5, 7}", "7, 5 and 3"], ["\\boxed{3, 5}", "3, 5, 8", "357"]),
    ("(1, 2)", ["(1, 2)", "\\boxed{\\left(1,2\\right)}"], ["(2, 1)", "[1, 2]", "(1, 2]", "1.2"]),
    ("(3, \\frac{\\pi}{2})", ["\\left( 3, \\dfrac{\\pi}{2} \\right)"], ["(3, \\pi)"]),
    ("(1,2), (3,4)", ["\\boxed{(3,4) \\text{ and } (1,2)}"], ["(2,1), (4,3)", "(1,2)"]),
    ("[0,\\infty)", ["\\boxed{[0, \\infty)}"], ["(0,\\infty)", "[1,\\infty)", "0"]),
    ("(-\\infty,2)\\cup(3,\\infty)", ["(-\\infty, 2) \\cup (3, \\infty)"],
                                   ["(-\\infty, 2] \\cup (3, \\infty)", "(-\\infty, 3)"]),
    ("\\{1,2,3\\}", ["\\boxed{\\{3,2,1\\}}", "1, 2, 3"], ["\\{1,2\\}", "123"]),
    ("2 \\pm \\sqrt{3}", ["2+\\sqrt{3}, 2-\\sqrt{3}"], ["2+\\sqrt{3}", "3 \\pm \\sqrt{2}"]),
    ("x=3 \\text{ or } x=-3", ["\\boxed{-3, 3}", "\\pm 3"], ["3", "x=3"]),
    # formulas
    ("x^2+1", ["x^2+1", "The result is $1 + x^2$."], ["x^2-1", "x^2", "1", "2x+1"]),
    ("1", ["1"], ["The result is x^2 + 1."]),
    ("x=3", ["\\boxed{3}", "x = 3"], ["x=-3", "y=3", "-3"]),
    ("y = 2x+3", ["y=3+2x", "2x+3"], ["y=2x-3", "y=3x+2"]),
    ("(x+1)(x-2)", ["x^2-x-2"], ["(x-1)(x+2)", "x^2-x+2"]),
    ("2\\sqrt{3}", ["2\\sqrt{3}", "2\\sqrt3", "\\sqrt{12}"], ["3\\sqrt{2}", "\\sqrt{6}", "23"]),
    ("\\frac{\\sqrt{3}}{3}", ["$\\boxed{\\frac{1}{\\sqrt{3}}}$."], ["\\frac{1}{3}", "\\sqrt{3}"]),
    ("6 - 5i", ["-5i+6"], ["6+5i", "5i - 6"]),
    ("p - q", ["-q + p"], ["q - p", "pq"]),
    ("1 < x < 2", ["1<x<2"], ["1 < x \\le 2", "1 < x < 3"]),
    ("52_8", ["52_{8}"], ["52_9", "52"]),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", ["\\begin{pmatrix}1\\\\2\\end{pmatrix}"],
     ["\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}", "(1, 2, 3)"]),
]
MATH_ANSWERS = r"""
\frac{14}{3} | \dfrac{9}{7} | -\frac{35}{9} | \frac 59 | \frac{3}{56} | .35,\!625 | 9,\!901 | 2220
1,\!000,\!000 | 0.75 | \$32,\!348 | \$18.90 | 10\% | 5.4 \text{ cents} | 36\text{ cm} | 90^\circ
-50 | 15\mbox{ cm}^2 | 3\sqrt{13} | 11\sqrt2 | \sqrt{51} | 6+9i | 3 \pm 2\sqrt{2} | -2+\sqrt{2}
2k+2 | x \in [-2,7] | x=5 | y = 2x + 3 | 2x^3-3x+7 | \frac{\sqrt{3}}{3}
\left( 3, \frac{\pi}{2} \right) | (6,31,-1) | [-2,7] | (5,\infty) | (-\infty, 2) \cup (3, \infty)
\left[\frac{1}{2},1\right) | 1,-2 | 10, 11, 12, 13, 14, -2, -1 | \{1\pm\sqrt{5},-2\} | \text{east}
\text{(C)} | \text{Navin} | 3:1 | 7:00 | 4210_{5} | 0.\overline{3} | \emptyset | 16x+9y-25z+5=0
x^{2}+y^2=1 | 3^{2n} | 9! | \pi | \begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix} | \cot x
\frac{1}{2}(x-1) | 2\text{ and }-3 | 100 | 1\frac{4}{5} | 2.5 \times 10^{-3} | p(x)=x+1
f(x)=\frac{1}{x} | e^{i\pi} | |x-3| | \binom{7}{3} | \text{ellipse} | 2^{31}-1 | x^2y-xy^2 | 12\pi
\tan^2 \theta | \sqrt[3]{4} | \text{not possible} | a+b | \log_2 5 | 16 | \text{June} | 0
\frac{x}{y}
"""


MATH_SOLUTIONS = [f"First we see that $x^2 = 4$. So it is $\\boxed{{{answer}}}$, or 17 in all."
                  for answer in MATH_ANSWERS.strip().replace("\n", " | ").split(" | ")]


@pytest.mark.parametrize("gold, right, wrong", TABLE, ids=[row[0] for row in TABLE])
def test_right_answers_are_right_and_others_wrong(gold, right, wrong):
    assert [text for text in [gold, *right] if not grade(gold, text)] == []
    assert [text for text in wrong if grade(gold, text)] == []


@pytest.mark.parametrize("text", [
    "", " ", "####", "#### \n72", "\\boxed{}", "\\boxed{5", "### nobody knows ####", "5 to 7",
    "First 3 then 4 then 5.", "So it is\n5", "3+4\n7", "#### all real numbers except 2",
    "#### 3 of the 5", "#### 16 hours and 30 minutes", "\\boxed{\\text{June 20}}", "1" * 600,
    "It is a long story, without any number in it."])
def test_golds_that_cannot_be_read_with_certainty_are_refused(text):
    with pytest.raises(ValueError, match="no answer can be read with certainty"):
        grade(text, "5")


def test_answers_are_right_against_themselves(monkeypatch):
    """Hundreds in MATH's and GSM8K's formats, without the judge of formulas."""
    monkeypatch.setattr(grading, "JUDGE", None)
    rng = random.Random(0)
    texts = [word_problems.gsm8k_problem(rng)["answer"] for _ in range(400)]
    texts += [word_problems.math_problem(rng)["solution"] for _ in range(400)]
    texts += [f"<<1+1=2>>2 and so on\n#### {number:,}" for number in (5, -5, 1234, 1e6, .25, 12.5)]
    texts += MATH_SOLUTIONS
    assert [text for text in texts if not grade(text, text)] == []
    assert [text for text in texts if not grade(text, f"Well. {text}")] == []


def test_different_answers_are_wrong_for_each_other():
    pairs = itertools.pairwise(MATH_SOLUTIONS)
    assert [(gold, other) for gold, other in pairs if grade(gold, other)] == []


@pytest.mark.parametrize("piece", ["1 ", "a1 ", " \n", "{", "\\boxed{", "1,", "(1,", "-1 cm of "])
def test_a_long_text_is_read_quickly(piece):
    start = time.perf_counter()
    assert not grade("72", piece * 5000)
    assert time.perf_counter() - start < 5


def test_a_formula_that_never_ends_is_wrong_after_seconds_and_does_no_harm():
    """In big-integer arithmetic no signal handler of Python's would run. Off the main thread."""
    def timed(*texts):
        start = time.perf_counter()
        return grade(*texts), time.perf_counter() - start

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(timed, "x^2+1", "\\boxed{1+x^2}").result()[0]
        right, seconds = pool.submit(timed, "x", "\\boxed{9^{9^{9^9}} + x}").result(60)
        assert not right and seconds < 5
        assert pool.submit(timed, "x^2+1", "\\boxed{1+x^2}").result()[0]


def test_the_judge_outlives_a_ctrl_c_and_is_replaced_when_it_is_killed():
    assert grade("x+y", "\\boxed{y+x}")
    process = grading.JUDGE.process
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    assert grade("x+z", "\\boxed{z+x}") and grading.JUDGE.process is process
    process.kill()
    process.wait()
    assert grade("x+y", "\\boxed{y+x}") and grading.JUDGE.process is not process


@pytest.mark.parametrize("style, fields, mark", [
    ("gsm8k", ["question", "answer"], "\n#### "), ("math", ["problem", "solution"], "\\boxed{")])
def test_word_problems_are_as_the_formats_say(capsys, style, fields, mark):
    outputs = []
    for _ in range(2):
        word_problems.main(["5", "--style", style, "--seed", "3"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    problems = [json.loads(line) for line in outputs[0].splitlines()]
    assert [list(problem) for problem in problems] == [fields] * 5
    assert all(problem[fields[1]].count(mark) == 1 for problem in problems)
