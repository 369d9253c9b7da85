"""extras/dv_size.py: its decisions against all subsets, its searches against the run's own."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from effopd import EffOPD, undisturbed
from extras import dv_size

TOY = dict(method="effopd", num_ops=1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
           base_steps=150, teacher_steps=60, steps=5, batch_size=8, eval_size=10, dv_size=60,
           num_candidates=2, rollout_batch_size=40, accept="ge", seed=3, device="cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    settings = TOY | dict(cache_dir=home / "cache", out_dir=home / "run")
    train.main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    return home


def test_decisions_are_those_of_all_subsets():
    """Every choice of 3 of 8 problems, searched by the letter."""
    right = np.array([[1, 0, 0, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 1, 0, 0],
                      [1, 1, 1, 1, 0, 1, 1, 0]], dtype=float)
    again = np.array([0, 1, 0, 0, 1, 0, 0, 0], dtype=float)
    truth, subsets = right.mean(1), list(itertools.combinations(range(8), 3))
    found = dv_size.decisions(right, again, 3, draws=20_000)
    expected = dict.fromkeys(found, 0.0)
    for subset in map(list, subsets):
        kept, others = 0, [i for i in range(8) if i not in subset]
        for k in (1, 2, 3):
            accepted = right[k, subset].sum() > right[k - 1, subset].sum()
            better = truth[k] > truth[k - 1]
            expected["better_asked" if better else "worse_asked"] += 1
            expected["worse_accepted"] += accepted and not better
            expected["better_rejected"] += better and not accepted
            if not accepted:
                break
            kept = k
        expected["draws"] += 1
        expected["lost"] += truth[1] - truth[kept]            # all 8 problems keep the first
        expected["jumps"] += kept > 0
        fresh = right[kept, others].mean()
        expected["curse"] += (right[kept, subset].mean() - fresh) * (kept > 0)
        expected["null_higher"] += again[subset].sum() > right[0, subset].sum()
    for name, value in expected.items():
        assert found[name] / 20_000 == pytest.approx(value / len(subsets), abs=0.015), name


def test_searches_are_rebuilt_to_the_bit(home):
    """The rebuilt candidates score what the run wrote down; the last jump gives its next W_0."""
    config = dv_size.settings_of(home / "run")
    task, model, _, _ = train.load(config)
    effopd = EffOPD(model, None, scope=config.scope)
    held_out = train.evaluation_problems(config, task)
    problems = task.problems(60, train.random.Random("D_v 3"), set(held_out))
    judge = train.Judge(train.SCORES["accuracy"], task, None, problems)
    searches = list(dv_size.searches_of(home / "run", effopd))
    assert [record["step"] for record, _, _ in searches] == [1, 2, 4]
    assert any(record["multiple"] for record, _, _ in searches)
    assert len({score for record, _, _ in searches for score in record["scores"]}) > 2
    for record, current, delta in searches:
        norm = sum(d.square().sum().item() for d in delta.values()) ** 0.5
        assert norm == pytest.approx(record["delta_norm"], rel=1e-4)
        model.load_state_dict(current, strict=False)
        for multiple, score in zip(record["multiples"], record["scores"]):
            with torch.no_grad():
                effopd.place(current, delta, multiple)
            with undisturbed(model, seed=3 * 1_000_003 + record["step"]):
                assert judge(model) == score


def test_all_candidates_and_common_random_numbers(home, monkeypatch):
    """One seed for all candidates of a search, another for W_t again and for the next search."""
    asked = []

    def evaluate(model, task, problems, seed):
        asked.append(seed)
        return 1.0, [task.encode_answer(task.solve(problem)) for problem in problems]

    monkeypatch.setattr(dv_size, "evaluate", evaluate)
    counts, _ = dv_size.score_run(home / "run", 401, "cpu")
    again, first = asked[0], asked[1]
    assert len(asked) == 3 * 4 and asked[1:4] == [first] * 3 and len(set(asked)) == 6
    assert again != first and {of["draws"] for of in counts.values()} == {3000}
    config = dv_size.settings_of(home / "run")
    assert dv_size.all_multiples(config) == [0, 2, 4]
    config.candidates, config.num_candidates = "doubling", 4
    assert dv_size.all_multiples(config) == [0, 2, 4, 8, 16]


def test_from_end_to_end_and_drawn_again(home, capsys):
    args = [str(home / "run"), "--problems", "450", "--out_dir", str(home / "out")]
    dv_size.main(args)
    said = capsys.readouterr().out
    assert "| better, but rejected |" in said
    table = json.loads((home / "out" / "dv.json").read_text())["table"]
    assert set(table["better, but rejected"]) == {str(size) for size in dv_size.SIZES}
    dv_size.main(["--redraw", str(home / "out" / "dv.json"), "--out_dir", str(home / "again")])
    assert capsys.readouterr().out == said
    pictures = [(home / name / "dv.png").read_bytes() for name in ("out", "again")]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("change", [
    dict(search_every=1), dict(first_trigger=3), dict(candidates="line"), dict(score="batch_kl"),
    dict(utility_gate=True), dict(method="opd"), dict(task="tests.mine:Task")])
def test_runs_that_it_cannot_be_asked_of(change, home, tmp_path, capsys):
    config = json.loads((home / "run" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "summary.json").write_text((home / "run" / "summary.json").read_text())
    refused([str(tmp_path)], "powers of two", tmp_path, capsys)


@pytest.mark.parametrize("args, words", [
    ("", "give EffOPD runs"), ("run --problems 400", "above 400"), ("nowhere", "no finished run"),
    ("--redraw nowhere.json", "nowhere.json"), ("--redraw old.json", "no numbers")])
def test_bad_input(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old.json").write_text(json.dumps(dict(table={"curse": {"10": 1}}, problems=5)))
    refused(args.split(), words, tmp_path, capsys)


def refused(args, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        dv_size.main([*args, "--out_dir", str(tmp_path / "out")])
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(said) == 1
    assert said[0].startswith("dv_size: ") and words in said[0]
