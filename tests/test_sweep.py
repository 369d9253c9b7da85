"""The sweep of train.py, and what its questions need of the search: other directions, any score accepted, a line."""

import contextlib
import io
import itertools
import json
import math
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import train
from effopd import EffOPD, redirect
from train import bootstrap, grid, main, tabulate

TOY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_ops=2, base_steps=4,
           teacher_steps=2, base_batch_size=8, steps=2, batch_size=6, eval_size=10, device="cpu")


def as_args(settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


# The grid.

def test_a_grid_by_hand():
    runs = grid("lr=1e-5,1e-4 method=opd,effopd+score=batch_kl+scope=attention+mlp dv_size=10,50 seed=3:5")
    opd = [dict(lr=lr, method="opd", seed=seed) for lr in ("1e-5", "1e-4") for seed in "34"]
    effopd = [dict(lr=lr, method="effopd", score="batch_kl", scope="attention+mlp", dv_size=size, seed=seed)
              for lr in ("1e-5", "1e-4") for size in ("10", "50") for seed in "34"]
    got = [run for run, _ in runs.values()]
    assert sorted(map(str, got)) == sorted(map(str, opd + effopd))               # OPD has no D_v: one run, not two
    assert [run["lr"] for run in got] == ["1e-5"] * 6 + ["1e-4"] * 6             # the first axis is the slowest
    for name, (run, beside) in runs.items():
        assert name == ",".join(f"{k}={v}" for k, v in run.items())
        assert beside == f"lr={run['lr']},method=opd,seed={run['seed']}" and beside in runs


def test_what_a_value_brings_along_does_not_move_the_opd_beside_it():
    runs = grid("method=opd,rl+lr=3e-4,opd+lr=1e-3 seed=0:2")
    assert list(runs)[2] == "method=rl,lr=3e-4,seed=0"
    assert {beside for _, beside in runs.values()} == {"method=opd,seed=0", "method=opd,seed=1"} < set(runs)


@pytest.mark.parametrize("text, words", [
    ("lr method=opd", "cannot read 'lr'"), ("lr= method=opd", "cannot read 'lr='"), ("foo=1 method=opd", "'foo=1'"),
    ("lr=1,,2 method=opd", "'lr=1,,2'"), ("seed=3:3 method=opd", "'seed=3:3'"), ("lr=1e-4", "needs the methods"),
    ("method=opd,effopd+=3", "effopd+=3"), ("method=race", "single runs"), ("out_dir=a,b", "'out_dir=a,b'"),
    ("method=opd seed=0.5", "invalid int value: '0.5'"), ("method=opd,foo", "'foo'"), ("method=opd lr=-1", "--lr must"),
    ("method=opd,effopd+accept=maybe", "maybe")])
def test_a_text_that_is_no_grid_ends_in_one_line(text, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["--sweep", text])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in said and said.startswith("train.py: ") and words in said
    assert not list(tmp_path.iterdir())                       # nothing was begun


# The table.

def test_the_bootstrap_interval_is_that_of_all_resamples():
    """5 values have 5^5 = 3125 equally likely resamples: their means' exact quantiles."""
    values = [3.0, 1.0, 4.0, 1.5, 9.0]
    means = sorted(sum(draw) / 5 for draw in itertools.product(values, repeat=5))
    got = bootstrap(values)
    assert got["mean"] == np.mean(values) and got["n"] == 5
    for end, share in (("low", 0.025), ("high", 0.975)):
        below, above = (means[int((share + d) * len(means))] for d in (-0.005, 0.005))
        assert below <= got[end] <= above
    assert bootstrap([2.0]) == dict(mean=2.0, low=None, high=None, n=1)
    assert bootstrap([2.0, 2.0]) == dict(mean=2.0, low=2.0, high=2.0, n=2)


def a_result(*points, final=0.5):
    return dict(final_accuracy=final, tokens=0, seconds=0.0, searches=[], curve=[[0, 0.1, 0, 0.0], *map(list, points)])


def test_a_table_by_hand():
    runs = grid("method=opd,effopd seed=0:2")
    results = {
        "method=opd,seed=0": a_result((2, 0.4, 100, 1.0), (4, 0.6, 200, 2.0), final=0.6),
        "method=opd,seed=1": a_result((2, 0.4, 100, 1.0), (4, 0.7, 200, 3.0), final=0.5),
        "method=effopd,seed=0": a_result((2, 0.6, 150, 0.5), (4, 0.9, 300, 1.0), final=0.9),
        "method=effopd,seed=1": a_result((2, 0.45, 150, 0.5), (4, 0.5, 300, 1.5), final=0.7)}
    opd, effopd = tabulate(runs, results, target=0.0)         # to .6 for seed 0, .5 for seed 1
    assert [row["settings"] for row in (opd, effopd)] == [{"method": "opd"}, {"method": "effopd"}]
    assert opd["goal"] == effopd["goal"] == pytest.approx(0.55) and opd["reached"] == effopd["reached"] == 2
    assert [opd["cost"][u]["mean"] for u in ("step", "tokens", "seconds")] == [4, 200, 2.5]
    assert [effopd["cost"][u]["mean"] for u in ("step", "tokens", "seconds")] == [3, 225, 1.0]
    assert [effopd["times"][u]["mean"] for u in ("step", "tokens", "seconds")] == [1.5, 1.0, 3.0]
    assert effopd["final"]["mean"] == pytest.approx(0.8)
    assert {tuple(opd["times"][u].values()) for u in opd["times"]} == {(1.0, 1.0, 1.0, 2)}


def test_a_run_that_never_gets_there_is_counted_and_shown(capsys, tmp_path):
    results = {"method=opd,seed=0": a_result((8, 0.9, 10, 1.0)), "method=opd,seed=1": a_result((8, 0.7, 20, 3.0))}
    row, = rows = tabulate(grid("method=opd seed=0:2"), results, target=0.8)
    assert row["reached"] == 1 and row["cost"]["step"]["mean"] == 8 and row["cost"]["seconds"]["mean"] == 2.0
    assert row["times"] == {}
    train.print_sweep(rows)
    assert "1 of 2 | ≥ 8.0 [8.0, 8.0]" in capsys.readouterr().out
    for text in ("method=opd seed=0:2", "lr=1e-4,1e-3 method=opd,effopd seed=0:2", "dv_size=10,50 method=opd,effopd"):
        rows = tabulate(grid(text), dict.fromkeys(grid(text), a_result((8, 0.7, 20, 3.0))), target=0.8)
        train.draw_sweep(rows, tmp_path / "x.png")            # words, numbers, a setting that OPD does not have
        assert matplotlib.image.imread(tmp_path / "x.png").shape[1] == 1100


# The real thing, at toy size.

def test_a_sweep_from_the_command_line(tmp_path, capsys, monkeypatch):
    """Two runs; one of them undone, and done again; one that cannot work; the table from the file alone."""
    out, cache, jobs = tmp_path / "out", tmp_path / "cache", []
    real, runs = train.subprocess.run, []

    def job(command, **how):
        assert list(cache.glob("slip-*"))                     # so that two runs at a time do not both make the models
        jobs.append(command)
        runs.append(command)
        if len(runs) <= 2:
            return real(command, **how)
        with contextlib.redirect_stderr(io.StringIO()) as error:             # later ones here: it saves the imports
            try:
                main(command[2:])
            except SystemExit as end:
                return subprocess.CompletedProcess(command, end.code, stderr=error.getvalue())
        return subprocess.CompletedProcess(command, 0, stderr="")
    monkeypatch.setattr(train.subprocess, "run", job)

    def run(text, **more):
        with pytest.raises(SystemExit) as stopped:
            main([*as_args(TOY | dict(out_dir=out, cache_dir=cache, jobs=2, target=0.001) | more), "--sweep", text])
        ran = [command[-2] + " " + Path(command[-1]).name for command in jobs]
        jobs.clear()
        return stopped.value.code, sorted(ran), capsys.readouterr()

    both = ["method=effopd,dv_size=5,seed=1", "method=opd,seed=1"]
    code, ran, said = run("method=opd,effopd+dv_size=5 seed=1")
    assert code == 0 and ran == [f"--out_dir {name}" for name in both] and "| method=effopd dv_size=5 | 1 |" in said.out
    stored = json.loads((out / "sweep.json").read_text())
    assert stored["settings"] == {k: v for k, v in TOY.items()} and stored["versions"]["torch"] == torch.__version__
    for name in both:
        summary = json.loads((out / name / "summary.json").read_text())
        assert [p[:3] for p in stored["runs"][name]["curve"]] == [
            [p["step"], p["accuracy"], p["tokens"]] for p in summary["curve"]]
        assert stored["runs"][name]["final_accuracy"] == summary["final_accuracy"]
    assert [s[0] for s in stored["runs"][both[0]]["searches"]] == [1, 2]
    config = json.loads((out / both[0] / "config.json").read_text())
    assert (config["dv_size"], config["seed"], config["method"], config["steps"]) == (5, 1, "effopd", 2)

    for how in ("--resume", "--out_dir"):                     # as if stopped while this one ran, late and early
        del stored["runs"][both[1]]
        (out / "sweep.json").write_text(json.dumps(stored))
        (out / both[1] / "summary.json").unlink()
        code, ran, said = run("method=opd,effopd+dv_size=5 seed=1")
        assert code == 0 and ran == [f"{how} {both[1]}"] and (out / both[1] / "summary.json").exists()
        stored = json.loads((out / "sweep.json").read_text())
        for state in (out / both[1]).glob("state*.pt"):
            state.unlink()

    code, ran, said = run("method=opd,effopd+dv_size=5,opd+lr=1e38 seed=1")
    assert code == 1 and ran == ["--out_dir method=opd,lr=1e38,seed=1"] and "| method=opd | 1 |" in said.out
    assert "method=opd,lr=1e38,seed=1 failed: train.py: step 2: the loss is nan" in said.err

    for path in (out / both[0], out / both[1], cache):        # as in a clone, where only sweep.json is
        train.shutil.rmtree(path)
    (out / "sweep.png").unlink()
    code, ran, again = run("method=opd,effopd+dv_size=5 seed=1")
    assert code == 0 and ran == [] and (out / "sweep.png").stat().st_size > 10_000 and not cache.exists()
    assert [line for line in again.out.splitlines() if line[0:1] == "|"] == [
        line for line in said.out.splitlines() if line[0:1] == "|"]

    code, ran, said = run("method=opd seed=1", lr=1)
    assert code == 2 and ran == [] and "name another --out_dir" in said.err and said.err.count("\n") == 1


# Directions to compare with.

@pytest.mark.parametrize("direction", ["random", "top", "tail"])
def test_other_directions_have_the_updates_norm(direction):
    delta = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    other = redirect(delta, direction)
    assert other.shape == delta.shape and abs(other.norm() / delta.norm() - 1) < 1e-5
    assert torch.equal(redirect(torch.zeros(3, 3), direction), torch.zeros(3, 3)) or direction == "random"
    assert torch.isfinite(redirect(torch.zeros(3, 3), direction)).all()


def test_top_and_tail_are_the_two_parts_of_the_update():
    delta = torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    sigma = np.linalg.svd(delta.numpy(), compute_uv=False)
    top, tail = redirect(delta, "top"), redirect(delta, "tail")
    assert np.linalg.matrix_rank(top.numpy(), tol=1e-3) == 2 and np.linalg.matrix_rank(tail.numpy(), tol=1e-3) == 18
    norms = np.linalg.norm(sigma[:2]), np.linalg.norm(sigma[2:])                 # undo the scaling
    parts = top * (norms[0] / delta.norm()) + tail * (norms[1] / delta.norm())
    torch.testing.assert_close(parts, delta, atol=1e-5, rtol=0)
    assert abs((top * tail).sum()) < 1e-3
    vector = torch.randn(5)
    assert torch.equal(redirect(vector, "top"), vector)


def a_search(validate, start=0.0, **options):
    """One search of a model of 6 x 5 weights, all moved from start to 1 by a step."""
    model = torch.nn.Linear(5, 6, bias=False)
    with torch.no_grad():
        model.weight.fill_(start)
        search = EffOPD(model, lambda m: validate(m.weight.detach().clone()), scope="all", **options)
        model.weight.fill_(1.0)
    return model.weight, search.step(1)


def test_a_random_direction_does_not_depend_on_the_update_and_does_on_the_seed():
    seen = {}
    for seed, start in [(0, 0.0), (0, -1.0), (1, 0.0)]:
        weights = []
        _, record = a_search(lambda w: weights.append(w) or 0.0, start, direction="random", seed=seed)
        way = (weights[1] - weights[0]) / 2                   # W_t + 2 Δ
        assert abs(way.norm() - (1 - start) * math.sqrt(30)) < 1e-4 and abs(record["delta_norm"] - way.norm()) < 1e-4
        seen[seed, start] = way / way.norm()
    torch.testing.assert_close(seen[0, 0.0], seen[0, -1.0])
    assert not torch.allclose(seen[0, 0.0], seen[1, 0.0], atol=0.1)
    assert abs(seen[0, 0.0].sum() / math.sqrt(30)) < 0.6      # its cosine with the update


def test_accepting_anything():
    weight, record = a_search(lambda w: -w.sum().item(), accept="always", num_candidates=1)
    assert record["accepted"] == 1 and torch.equal(weight, torch.full_like(weight, 3.0))
    weight, record = a_search(lambda w: math.nan if w[0, 0] > 4 else 0.0, accept="always", num_candidates=3)
    assert record["multiple"] == 2 and record["stopped"] == "score not finite"


@pytest.mark.parametrize("best, multiples, kept", [
    (9.0, [0, 2, 4, 8, 16], 8), (1.2, [0, 2, -0.5, -0.75], 0), (0.25, [0, 2, -0.5, -0.75, -0.875], -0.75)])
def test_a_line_goes_on_or_back(best, multiples, kept):
    weight, record = a_search(lambda w: -abs(w[0, 0].item() - best), candidates="line", num_candidates=5)
    assert record["multiple"] == kept and weight[0, 0].item() == 1 + kept
    assert record["multiples"] == multiples[:len(record["multiples"])]
    assert record["accepted"] == {9.0: 3, 1.2: 0, 0.25: 2}[best]


def test_d_v_is_split_off_a_file_for_every_method():
    """With --data, runs of one sweep train on the same problems."""
    text = "method=opd,effopd dv_size=3,4"
    assert len(train.grid(text, data=True)) == 4 and len(train.grid(text)) == 3
    assert len(train.grid(text + " data=x.jsonl")) == 4
    assert all(opd == name.replace("effopd", "opd") for name, (_, opd) in train.grid(text, data=True).items())
