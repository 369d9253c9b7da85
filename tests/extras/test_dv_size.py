"""extras/dv_size.py: its decisions against all subsets, its searches against the run's own."""

import itertools
import json

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
    truth = right.mean(1)
    found = dv_size.decisions(right, 3, draws=20_000)
    expected = dict.fromkeys(found, 0.0)
    for subset in map(list, itertools.combinations(range(8), 3)):
        others = [i for i in range(8) if i not in subset]
        kept = 0
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
    for name, value in expected.items():
        assert found[name] / 20_000 == pytest.approx(value / 56, abs=0.015), name


def test_searches_are_rebuilt_to_the_bit(home):
    """The rebuilt candidates score what the run wrote down; the last jump gives its next W_0."""
    config = dv_size.settings_of(home / "run")
    task, model, _, _ = train.load(config)
    effopd = EffOPD(model, None, scope=config.scope)
    held_out = train.evaluation_problems(config, task)
    problems = task.problems(60, train.random.Random("D_v 3"), set(held_out))
    judge = train.Judge(train.SCORES["accuracy"], task, None, problems)
    records = []
    for record, current, delta in dv_size.searches_of(home / "run", effopd):
        records.append(record)
        norm = sum(d.square().sum().item() for d in delta.values()) ** 0.5
        assert norm == pytest.approx(record["delta_norm"], rel=1e-4)
        model.load_state_dict(current, strict=False)
        for multiple, score in zip(record["multiples"], record["scores"]):
            with torch.no_grad():
                effopd.place(current, delta, multiple)
            with undisturbed(model, seed=3 * 1_000_003 + record["step"]):
                assert judge(model) == score
    assert [record["step"] for record in records] == [1, 2, 4]
    assert any(record["multiple"] for record in records[:2])  # so that a W_prev is after a jump
    assert len({score for record in records for score in record["scores"]}) > 2


def test_all_candidates_of_a_search_have_the_same_random_numbers(home, monkeypatch):
    asked = []

    def evaluate(model, task, problems, seed):
        asked.append(seed)
        return 1.0, [task.encode_answer(task.solve(problem)) for problem in problems]

    monkeypatch.setattr(dv_size, "evaluate", evaluate)
    counts = dv_size.score_run(home / "run", 401, "cpu")
    a, b, c = asked[::3]
    assert asked == [a] * 3 + [b] * 3 + [c] * 3 and len({a, b, c}) == 3
    assert {of["draws"] for of in counts.values()} == {3000}


def test_from_end_to_end(home, capsys):
    dv_size.main([str(home / "run"), "--problems", "450", "--out_dir", str(home / "out")])
    lines = capsys.readouterr().out.splitlines()
    table = json.loads((home / "out" / "dv.json").read_text())["table"]
    for words, by_size in table.items():
        means = ["" if s["mean"] is None else f"{s['mean']:.3f}" for s in by_size.values()]
        assert f"| {words} | {' | '.join(means)} |" in lines
    assert len(table) == 4 and len(means) == len(dv_size.SIZES)


@pytest.mark.parametrize("args, change, words", [
    ("", {}, "required: runs"), ("run --problems 400", {}, "above 400"),
    ("nowhere", {}, "no finished run")] + [("run", change, "powers of two") for change in (
        dict(search_every=1), dict(first_trigger=3), dict(candidates="doubling"),
        dict(score="batch_kl"), dict(utility_gate=True), dict(alignment_gate=0.5),
        dict(method="opd"), dict(task="tests.mine:Task"))])
def test_what_it_cannot_do_is_said_in_one_line(args, change, words, home, tmp_path, monkeypatch,
                                               capsys):
    run = tmp_path / "run"
    run.mkdir()
    config = json.loads((home / "run" / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | change))
    (run / "summary.json").write_text((home / "run" / "summary.json").read_text())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        dv_size.main(args.split())
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(said) == 1
    assert said[0].startswith("dv_size: ") and words in said[0]
