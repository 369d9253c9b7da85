"""The house's rules: what may be taken away, what imports what, and one statement a line."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {"effopd": set(), "model": set(), "train": {"effopd", "model"},
              "analyze": {"effopd", "model", "train"}}
OURS = {*MAY_IMPORT, "extras"}
SCRIPTS = [ROOT / f"{name}.py" for name in MAY_IMPORT]


def imports(path):
    """The packages and modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_arrows(script):
    assert imports(script) & OURS <= MAY_IMPORT[script.stem]
    if script.stem == "effopd":                               # it can be copied alone
        assert imports(script) - sys.stdlib_module_names == {"torch"}


def test_extras_docs_and_their_tests_can_be_deleted(tmp_path):
    for test in (ROOT / "tests").glob("*.py"):
        assert "extras" not in imports(test), test
    for script in SCRIPTS:
        shutil.copy(script, tmp_path)
    done = subprocess.run([sys.executable, "-c", "import train, analyze"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_lines_are_short_and_hold_one_statement(script):
    text = script.read_text()
    assert max(map(len, text.splitlines())) <= 100
    starts = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    assert len(starts) == len(set(starts))
