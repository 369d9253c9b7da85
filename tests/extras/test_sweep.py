"""Grids, their statistics, and the controls that go with them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from extras import controls, sweep

ROOT = Path(__file__).resolve().parents[2]
TOY = ("--num_ops 1 --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 "
       "--base_steps 30 --teacher_steps 30 --batch_size 8 --eval_size 20 --dv_size 8 --steps 2 "
       "--eval_every 1").split()


def kept(**runs) -> dict:
    """A sweep.json: {name: (row, reference, accuracy and seconds at steps 0, 1, 2, ...)}."""
    entries = {}
    for name, (row, reference, accuracies) in runs.items():
        curve = [[step, accuracy, 10 * step, 5 * step, 1.0 * step]
                 for step, accuracy in enumerate(accuracies)]
        entries[name] = dict(settings={}, row=row, reference=reference, curve=curve,
                             final_accuracy=accuracies[-1], searches=[])
    return dict(control=None, runs=entries)


def test_a_grid_by_hand():
    runs = sweep.parse_grid("lr=1e-5,1e+3 method=opd,effopd+accept=ge seed=0:2")
    assert len(runs) == 8
    run = runs["lr=1e+3,method=effopd,accept=ge,seed=1"]
    assert run["settings"] == dict(lr="1e+3", method="effopd", accept="ge", seed="1")
    assert run["row"] == "lr=1e+3 method=effopd accept=ge"
    assert run["reference"] == "lr=1e+3,method=opd,seed=1"


def test_a_label_names_the_row_and_the_first_opd_is_the_reference():
    grid = "label=slow_OPD+method=opd+lr=1e-4,fast+method=opd+lr=1e-3,ours+method=effopd seed=3:4"
    runs = list(sweep.parse_grid(grid).values())
    assert [run["row"] for run in runs] == ["slow OPD", "fast", "ours"]
    assert {run["reference"] for run in runs} == {"label=slow_OPD,method=opd,lr=1e-4,seed=3"}
    assert "--label" not in sweep.words_of(runs[0]["settings"])


@pytest.mark.parametrize("text", ["", "lr=1e-4", "lr method=opd", "color=red method=opd",
                                  "lr=,1 method=opd", "method=race", "out_dir=x method=opd"])
def test_a_text_that_is_no_grid_is_one_line(text, capsys):
    with pytest.raises(SystemExit):
        sweep.main([text, *TOY])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_table_by_hand():
    runs = kept(a0=("OPD", "a0", [0, .2, .4, .6]), a1=("OPD", "a1", [0, .4, .6, .8]),
                b0=("ours", "a0", [0, .6, .6, .6]), b1=("ours", "a1", [0, .8, .8, .8]))
    table = sweep.tabulate(runs, target=0.0, at=[1])
    assert table["OPD"]["step"]["mean"] == 3 and table["ours"]["step"]["mean"] == 1
    assert table["ours"]["goal"]["mean"] == pytest.approx(.7)     # what OPD ends with, seed by seed
    assert table["ours"]["times"] == dict(mean=3.0, low=3.0, high=3.0, n=2)
    assert table["OPD"]["at 1"]["mean"] == pytest.approx(.3)
    half = 12.706 * .1                                        # t(1) x standard error
    assert table["OPD"]["final"]["low"] == pytest.approx(.7 - half, abs=1e-3)
    assert table["OPD"]["final"]["high"] == pytest.approx(.7 + half, abs=1e-3)


def test_a_run_that_never_gets_there_counts_with_all_it_spent(capsys):
    runs = kept(a=("OPD", "a", [0, .5, .9]), b=("bad", "a", [0, .1, .1]))
    table = sweep.tabulate(runs, target=0.8, at=[])
    assert table["bad"]["step"]["mean"] == 2 and table["bad"]["reached"]["mean"] == 0
    sweep.print_tables(runs, table, [])
    assert "| bad | 0 of 1, 0.800 | >= 2.0 | >= 20 + 10 |" in capsys.readouterr().out


def test_both_figures(tmp_path):
    rows = kept(a=("OPD", "a", [0, .5]), b=("ours", "a", [0, .6]))
    rates = kept(a=("lr=1e-3 OPD", "a", [0, .5]), b=("lr=1e-2 OPD", "b", [0, .6]))
    for runs in (rows, rates):
        for i, run in enumerate(runs["runs"].values()):
            run["settings"] = dict(lr=str(i))
        sweep.draw(runs, sweep.tabulate(runs, 0.5, []), tmp_path / "figure.png", "")
        assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_stopped_it_goes_on_and_other_settings_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "sweep"
    words = ["method=opd seed=0:2", "--out_dir", str(out), *TOY]
    words += ["--cache_dir", str(tmp_path / "cache")]
    first = subprocess.Popen([sys.executable, "-m", "extras.sweep", *words], start_new_session=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (out / "sweep.json").exists():
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)                      # before its first run has ended
    with pytest.raises(SystemExit):
        sweep.main([*words, "--lr", "3"])
    assert "name another --out_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        sweep.main(words)
    assert done.value.code == 0
    printed = capsys.readouterr().out.splitlines()[:-1]
    data = json.loads((out / "sweep.json").read_text())
    assert len(data["runs"]) == 2 and str(tmp_path) not in json.dumps(data)
    assert not list(out.glob("*/checkpoints"))                # of finished runs
    with pytest.raises(SystemExit):
        sweep.main(["--redraw", str(out / "sweep.json")])
    assert capsys.readouterr().out.splitlines()[:-1] == printed


def test_other_directions_have_the_updates_norm_and_top_and_tail_are_its_parts():
    delta = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    U, sigma, Vh = torch.linalg.svd(delta, full_matrices=False)
    for kind, kept_sigma in (("top", sigma[:2]), ("tail", sigma[2:])):
        other = controls.redirect(delta, kind)
        assert other.norm() == pytest.approx(delta.norm().item(), rel=1e-5)
        found = torch.linalg.svdvals(other)[:len(kept_sigma)]
        torch.testing.assert_close(found, kept_sigma * (delta.norm() / kept_sigma.norm()),
                                   rtol=1e-4, atol=1e-4)
    other = controls.redirect(delta, "random")
    assert other.norm() == pytest.approx(delta.norm().item(), rel=1e-5)
    assert abs((other * delta).sum() / delta.norm() ** 2) < 0.2
    vector = torch.ones(3)
    assert controls.redirect(vector, "top") is vector


def test_every_control_runs_and_is_not_run_twice(tmp_path, capsys):
    pytest.importorskip("prodigyopt")
    words = ["--seeds", "1", "--out_dir", str(tmp_path / "c"), *TOY]
    words += ["--cache_dir", str(tmp_path / "cache")]
    controls.main(words)
    data = json.loads((tmp_path / "c" / "sweep.json").read_text())
    assert list(data["runs"]) == [f"{name} 0" for name in controls.controls()]
    assert len(data["runs"]["first 0"]["searches"]) == 2      # the second kept nothing
    assert data["runs"]["first 0"]["searches"][1][1] == 0
    before = (tmp_path / "c" / "sweep.json").stat().st_mtime_ns
    controls.main(words)
    assert (tmp_path / "c" / "sweep.json").stat().st_mtime_ns == before
