"""README.md says what is there: its links lead somewhere, its code lines and options exist."""

import re
from dataclasses import fields
from pathlib import Path

import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


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
