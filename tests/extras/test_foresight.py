"""extras/foresight.py: the claims' table of several analyses, and its figure."""

import json

import pytest

from extras import foresight

LABELS = ("OPD, lr 0.0001, optimizer adamw", "OPD, lr 0.0015, optimizer adamw",
          "OPD, lr 0.007, optimizer muon", "RL")


def stats(mean, half=None):
    """As `analyze.interval` gives them."""
    if half is None:
        return dict(mean=mean, low=None, high=None, n=1)
    return dict(mean=mean, low=mean - half, high=mean + half, n=5)


@pytest.fixture
def directories(tmp_path):
    """Of two gaps: each number is the place of its label, tenfold in the second; its interval .5."""
    made = []
    for factor, gap in ((1, "one"), (10, "two")):
        answers = {}
        for question, keys, _ in foresight.CLAIMS.values():
            for i, label in enumerate(LABELS):
                numbers = answers.setdefault(question, {}).setdefault(label, {})
                numbers |= {key: stats(factor * (1.0 + i), 0.5) for key in keys}
        for numbers in answers["alignment"].values():
            numbers["progress"] = dict(mean=[0.5, 1.0], low=None, high=None, n=1)
            numbers["walk to rest"] = dict(mean=[0.3, 0.0], low=None, high=None, n=1)
            numbers["to rest"] = dict(mean=[0.4], low=None, high=None, n=1)
        (tmp_path / gap).mkdir()
        (tmp_path / gap / "analysis.json").write_text(json.dumps(answers))
        made.append(tmp_path / gap)
    return made


def test_each_claim_has_the_numbers_of_its_runs(directories):
    head, _, first, *others = foresight.table(directories)
    assert head == ["claim: numbers", "`one`", "`two`"]
    assert len(others) == 10
    assert first[1:] == ["1e-4 1.00 ± 0.5<br>tuned 2.00 ± 0.5<br>RL 4.00 ± 0.5",
                         "1e-4 10 ± 0.5<br>tuned 20 ± 0.5<br>RL 40 ± 0.5"]


def test_one_value_has_no_interval():
    runs = {"tuned": {"a": stats(0.25), "b": stats(31.0)}}
    assert foresight.cell(runs, ["a", "b"], ["tuned"]) == "tuned 0.25; 31"


def test_the_command_prints_and_draws(directories, capsys):
    foresight.main([str(directory) for directory in directories])
    assert capsys.readouterr().out.count("\n") == 13
    assert (directories[0].parent / "foresight.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        foresight.main([str(directories[0].parent)])
    assert "has no analysis.json" in capsys.readouterr().err
