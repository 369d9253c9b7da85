"""README.md and docs/: links lead somewhere, options and quoted code exist, examples print that.

    python tests/test_docs.py --write      # run the examples, write what they print into the pages

An example is a block of python in one of EXAMPLES; the block of text after it is what it prints.
All run in order and share their names. Three spaces and `code` quote a line of the four scripts
(less its comment). The tables that are made from assets/: tests/extras/test_tables.py.
"""

import io
import math
import os
import re
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")                 # before torch: as in conftest.py
ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import train                                                  # before torch, see there
import pytest
import torch

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
EXAMPLES = [DOCS / "tutorial.md", DOCS / "internals.md"]
SCRIPTS = [ROOT / name for name in ("effopd.py", "model.py", "train.py", "analyze.py")]
EXTRAS = list((ROOT / "extras").glob("*.py"))
EXAMPLE = re.compile(r"```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?")

pytestmark = pytest.mark.skipif(not (DOCS.is_dir() and EXTRAS), reason="docs/, extras/ are deleted")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def run(page: Path, names: dict) -> str:
    """The page with what its examples print now. names: their global variables."""
    text = page.read_text()

    def with_output(example):
        line = text[:example.start()].count("\n") + 1
        printed = io.StringIO()
        with redirect_stdout(printed):                        # tracebacks name the page's line
            exec(compile("\n" * line + example[1], str(page), "exec"), names)
        shown = f"\n```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
        return f"```python\n{example[1]}```\n{shown}"

    return EXAMPLE.sub(with_output, text)


def run_all() -> dict:
    """{page: its text with what the examples print now}."""
    names = {"__name__": "examples"}
    with mock.patch.dict(train.TASKS):                        # examples add tasks of their own
        return {page: run(page, names) for page in EXAMPLES}


def alike(shown: str, printed: str) -> bool:
    """Equal but for spaces and, in a decimal, for 2% or two units of its last place."""
    shown, printed = (re.sub(r"-(?=0\.0+\b)", "", line) for line in (shown, printed))
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", printed).split():
        return False
    for a, b in zip(NUMBER.findall(shown), NUMBER.findall(printed)):
        places = len(a.partition(".")[2])
        near = math.isclose(float(a), float(b), rel_tol=0.02, abs_tol=2.01 * 10 ** -places)
        if not (near if places else a == b):
            return False
    return True


def usual_random_numbers() -> bool:
    """Whether torch draws what it drew where the pages were made (x86): else all answers differ."""
    generator = torch.Generator().manual_seed(0)
    total = torch.empty(100).exponential_(generator=generator).sum().item()
    return math.isclose(total, 94.5017, rel_tol=1e-5)


def test_examples_print_what_the_pages_show():
    for page, text in run_all().items():
        shown, printed = page.read_text().splitlines(), text.splitlines()
        assert len(shown) == len(printed), f"{page.name}: python tests/test_docs.py --write"
        for number, (a, b) in enumerate(zip(shown, printed), start=1):
            same = alike(a, b) or not usual_random_numbers()
            assert same, f"{page.name}, line {number}: now it is {b!r}"


def test_a_number_that_moved_is_seen():
    assert alike("KL   0.100, -0.00, keeps 4", "KL 0.101, 0.00, keeps 4")
    assert not alike("KL 0.100, keeps 4", "KL 0.103, keeps 4")
    assert not alike("KL 0.100, keeps 4", "KL 0.100, keeps 5")
    assert not alike("KL 0.100", "kl 0.100")


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_options_exist(page):
    options = {f.name for f in fields(train.Config)} | {"help", "write"}
    for script in [ROOT / "analyze.py", *EXTRAS]:
        code = script.read_text()
        options |= set(re.findall(r'add_argument\("--(\w+)"', code))
        options |= set(re.findall(r"^    (\w+): .+ = setting\(", code, re.MULTILINE))
    named = set(re.findall(r"--([a-z][\w-]*)", page.read_text()))
    missing = {name for name in named - options if "-" not in name}     # with a hyphen: pip's
    assert not missing


@each_page
def test_quoted_code_is_in_the_scripts(page):
    lines = set()
    for script in SCRIPTS:
        lines |= {line.partition("  #")[0].strip() for line in script.read_text().splitlines()}
    quoted = re.findall(r"^   `(.+)`$", page.read_text(), re.MULTILINE)
    assert set(quoted) <= lines, set(quoted) - lines
    assert page.name != "README.md" or len(quoted) == 7      # the steps of the algorithm


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_docs.py --write")
    for page, text in run_all().items():
        page.write_text(text)
