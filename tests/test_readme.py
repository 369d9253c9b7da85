"""README.md says what is there: its links lead somewhere, its code lines and options exist, its promises are kept."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = {name: (ROOT / name).read_text() for name in ("effopd.py", "train.py", "model.py", "analyze.py")}


def test_links_lead_somewhere():
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).strip().replace(" ", "-")
                for line in README.splitlines() if line.startswith("#")}
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_step_of_the_idea_is_a_line_of_the_code():
    code = (ROOT / "train.py").read_text() + (ROOT / "effopd.py").read_text()
    lines = re.findall(r"^   `(.+)`$", README, re.M)
    assert len(lines) == 7
    for line in lines:
        assert line in code, line


def test_every_option_exists():
    """In the shell blocks and in the text; those of other programs are named here."""
    ours = {f.name for f in fields(train.Config)}
    ours |= set(re.findall(r'add_argument\("--(\w+)"', (ROOT / "analyze.py").read_text()))
    ours |= set(re.findall(r'add_argument\("--(\w+)"', (ROOT / "tests" / "bench.py").read_text()))
    named = set(re.findall(r"--([a-z]\w+)", README)) - {"no"}                     # pip's --no-deps
    assert named <= ours | {"help"}, named - ours


def test_settings_of_a_sweep_exist():
    axes = re.findall(r"(?:\+|[\" ])([a-z_]+)=", " ".join(re.findall(r'--sweep "[^"]*"', README)))
    assert len(axes) > 30 and set(axes) <= {f.name for f in fields(train.Config)}, axes


def words(text):
    """Operators and rules are none."""
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def test_a_reader_needs_no_more_than_what_is_promised():
    """Twenty minutes for README.md's open part, 45 for the scripts down to their appendices, at 240 words a minute."""
    stories = [code.split("\n# Appendix. ") for code in SCRIPTS.values()]
    assert all(len(parts) == 2 for parts in stories)
    assert sum(words(story) for story, _ in stories) <= 45 * 240
    assert words(re.sub(r"<details>.*?</details>", "", README, flags=re.S)) <= 20 * 240


def test_functions_are_short():
    """At most 40 lines without the docstring."""
    for name, code in SCRIPTS.items():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                assert body[-1].end_lineno - body[0].lineno < 40, (name, node.name)
