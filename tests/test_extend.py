"""A new score, a new search, a new task: each from outside, in at most fifteen lines."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

import train
from conftest import TOY, arguments, read_lines


@pytest.fixture
def command(cache_dir, tmp_path):
    """Words of a command line of train.py that runs EffOPD in tmp_path / "run"."""
    return arguments(TOY | dict(method="effopd", cache_dir=cache_dir, out_dir=tmp_path / "run"))


def confidence(judge, model):
    """A score: the mean log-probability of the most probable token, on the last batch."""
    part = judge.parts[0]
    log_p = torch.log_softmax(model(part.inputs), dim=-1)                        # (b, T, V)
    return log_p.max(-1).values[part.mask].mean()


def test_a_score_of_your_own(command, tmp_path):
    train.main([*command, "--score", "test_extend:confidence"])
    searches = read_lines(tmp_path / "run" / "search.jsonl")
    assert all(-3 < score < 0 for search in searches for score in search["scores"])


def two_tries(score_at, improves, last):
    """A search: 8Δ if it is better than W_t, else -Δ/2."""
    return 8 if improves(score_at(8), score_at(0)) else -0.5


def test_a_search_of_your_own(command, tmp_path):
    train.main([*command, "--candidates", "test_extend:two_tries", "--score", "batch_kl"])
    searches = read_lines(tmp_path / "run" / "search.jsonl")
    assert all(search["multiples"] == [8, 0] for search in searches)
    assert all(search["multiple"] in (8, -0.5) for search in searches)


class Reverse(train.Chains):
    """A task: a number, written backwards."""

    def problem(self, rng):
        return str(rng.randrange(1000, 9999))

    def solve(self, problem):
        return "#" + problem[::-1]


def test_a_task_of_your_own(command, tmp_path):
    train.main([*command, "--task", "test_extend:Reverse", "--gap", "skill"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert all(re.fullmatch(r"\d{4}", example["problem"]) for example in summary["examples"])


@pytest.mark.parametrize("pieces", [(confidence, test_a_score_of_your_own),
                                    (two_tries, test_a_search_of_your_own),
                                    (Reverse, test_a_task_of_your_own)])
def test_that_took_fifteen_lines_at_most(pieces):
    source = "".join(map(inspect.getsource, pieces))
    assert len([line for line in source.splitlines() if line.strip()]) <= 15


def test_the_protocol_of_a_task_is_all_that_train_uses():
    used = {node.attr for node in ast.walk(ast.parse(Path(train.__file__).read_text()))
            if isinstance(node, ast.Attribute)
            and re.search(r"\btask$", ast.unparse(node.value).replace("config.task", ""))}
    documented = re.findall(r"\w+", train.Chains.__doc__.partition("has: ")[2])
    assert len(used) > 10 and used <= set(documented)
