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


@pytest.mark.parametrize("words, complaint", [
    ([""], "give a grid"), (["lr=1e-4"], "needs the methods"), (["method=race"], "single runs"),
    (["lr method=opd"], "cannot read 'lr'"), (["lr=,1 method=opd"], "cannot read 'lr=,1'"),
    (["color=red method=opd"], "'color=red'"), (["out_dir=x method=opd"], "'out_dir=x'"),
    (["seed=3:3 method=opd"], "'seed=3:3'"), (["lr=1,2 method=opd+lr=3"], "set the same"),
    (["label=a,b label=c method=opd"], "set the same"), (["method=opd lr=-1"], "--lr must"),
    (["method=opd", "--color", "red"], "--color"), (["method=opd seed=0.5"], "'0.5'"),
    (["label=a+method=opd+lr=1,a+method=opd+lr=2"], "'a' names both"),
    (["method=opd", "--at", "8;9"], "--at"), (["method=opd", "--target", "80"], "0 to 1"),
    (["method=opd", "--module", "extras.real"], "--student"),
    (["--redraw", "nowhere.json"], "nowhere.json"), (["--redraw", "a.json", "x"], "leave out x"),
    (["--redraw", "a.json"], "not what a sweep keeps")])
def test_bad_input_is_one_line_and_begins_nothing(words, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text("{}")
    toy = [] if "--redraw" in words else TOY
    with pytest.raises(SystemExit) as stopped:
        sweep.main([*words, *toy])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and complaint in said
    assert os.listdir() == ["a.json"]


def test_a_table_by_hand():
    runs = kept(a0=("OPD", "a0", [0, .2, .4, .6]), a1=("OPD", "a1", [0, .4, .6, .8]),
                b0=("ours", "a0", [0, .6, .6, .6]), b1=("ours", "a1", [0, .8, .8, .8]))
    table = sweep.tabulate(runs, target=0.0, at=[1])
    assert table["OPD"]["step"]["mean"] == 3 and table["ours"]["step"]["mean"] == 1
    assert table["ours"]["goal"]["mean"] == pytest.approx(.7)     # what OPD ends with, seed by seed
    assert table["ours"]["fewer steps"] == dict(mean=3.0, low=3.0, high=3.0, n=2)
    assert table["ours"]["fewer tokens"] == table["ours"]["fewer steps"]
    assert table["OPD"]["at 1"]["mean"] == pytest.approx(.3)
    half = 12.706 * .1                                        # t(1) x standard error
    assert table["OPD"]["final"]["low"] == pytest.approx(.7 - half, abs=1e-3)
    assert table["OPD"]["final"]["high"] == pytest.approx(.7 + half, abs=1e-3)


def test_ratios_are_taken_seed_by_seed():
    runs = kept(a0=("OPD", "a0", [0, 0, .6]), a1=("OPD", "a1", [0, .1, .2, .3, .4, .5, .6]),
                b0=("ours", "a0", [0, 0, .6]), b1=("ours", "a1", [0, .1, .6]))
    assert sweep.tabulate(runs, 0.6, [])["ours"]["fewer steps"]["mean"] == (2 / 2 + 6 / 2) / 2


def test_differences_are_taken_seed_by_seed():
    runs = kept(a0=("OPD", "a0", [0, .2]), a1=("OPD", "a1", [0, .6]),
                b0=("ours", "a0", [0, .3]), b1=("ours", "a1", [0, .7]), c=("alone", None, [0, .9]))
    table = sweep.tabulate(runs, target=0.5, at=[])
    rows = {row[0]: row[-1] for row in sweep.accuracy_table(table, [])}
    assert rows == {"": "above reference", "---": "---", "OPD": "+0.000 [+0.000, +0.000]",
                    "ours": "+0.100 [+0.100, +0.100]", "alone": "-"}
    del table["ours"]                                         # then it would say nothing
    assert sweep.accuracy_table(table, [])[0] == ["", "n", "final"]


def test_no_ratio_where_some_of_the_references_never_get_there():
    runs = kept(a0=("OPD", "a0", [0, .6, .9]), a1=("OPD", "a1", [0, .1, .1]),
                b0=("ours", "a0", [0, .9]), b1=("ours", "a1", [0, .9]))
    ours = sweep.cost_table(sweep.tabulate(runs, target=0.8, at=[]))[-1]
    assert ours[0] == "ours" and ours[1].startswith("2 of 2") and ours[-2:] == ["-", "-"]


def test_a_run_that_never_gets_there_counts_with_all_it_spent(capsys):
    runs = kept(a=("OPD", "a", [0, .5, .9]), b=("bad", "a", [0, .1, .1]))
    table = sweep.tabulate(runs, target=0.8, at=[7])
    assert table["bad"]["step"]["mean"] == 2 and table["bad"]["reached"]["mean"] == 0
    sweep.print_tables(runs, table, [7])
    said = capsys.readouterr().out
    assert "| bad | 0 of 1, 0.800 | >= 2.0 | >= 20 + 10 | - | - |" in said
    assert "| bad | 1 | 0.100 | - |" in said                  # no evaluation after step 7


def test_without_its_reference_a_run_has_no_costs(tmp_path, capsys):
    runs = kept(a=("OPD", "a", [0, .9]), b=("ours", "a", [0, .9]), c=("ours", "gone", [0, .9]))
    table = sweep.tabulate(runs, target=0.0, at=[])
    assert table["ours"]["step"]["n"] == 1 and table["ours"]["goal"]["mean"] == 0.9
    assert table["ours"]["final"]["n"] == 2
    del runs["runs"]["a"], runs["runs"]["b"]
    runs["control"] = dict(teacher=.9)                        # all that extras.real has
    table = sweep.tabulate(runs, target=0.0, at=[])
    sweep.print_tables(runs, table, [])
    assert "| ours | 0 of 0, - | - | - + - | - | - |" in capsys.readouterr().out
    sweep.draw(runs, table, tmp_path / "figure.png", "")


@pytest.mark.parametrize("names, axis, lines", [
    (["OPD", "ours"], "", {}), (["lr=1e-3", "base lr=1"], "lr", None), (["lr=1e-3"], "", {}),
    (["lr=1e-3 a=2", "lr=.01 a=2"], "lr", {"a=2": [1e-3, 1e-2]}),
    (["dv size=50", "dv size=200"], "dv size", {"": [50, 200]}),
    (["lr=2 OPD", "lr=1 finder", "lr=1 OPD"], "lr", {"OPD": [2, 1], "finder": [1]})])
def test_which_figure(names, axis, lines, tmp_path):
    runs = kept(**{name: (name, None, [0, .5, .6]) for name in names})
    runs["control"] = dict(student_at_best_temperature=.3, teacher=.9)
    table = sweep.tabulate(runs, target=.5, at=[])
    if lines is None:                                         # two settings: rows
        axis, lines = "", {}
    found = {name: [x for x, _ in points] for name, points in sweep.lines_of(table)[1].items()}
    assert sweep.lines_of(table)[0] == axis and found == lines
    sweep.draw(runs, table, tmp_path / "figure.png", "")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_run_is_begun_gone_on_with_or_left_alone(tmp_path, monkeypatch):
    commands = []

    def run(command, **how):
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, 1, stderr="a warning\nwhat was wrong\n")
    monkeypatch.setattr(sweep.subprocess, "run", run)
    args, shared = sweep.parse_args(["method=opd", "--out_dir", str(tmp_path), "--lr", "3"])
    home, settings = tmp_path / "name", dict(label="a", method="opd", lr="1")

    (home / "checkpoints").mkdir(parents=True)                # it was stopped before it began
    assert sweep.run_one("name", settings, shared, args) == "what was wrong"
    own = ["--method", "opd", "--lr", "1"]                    # after the shared: they count
    assert commands.pop() == ["train.py", "--lr", "3", *own, "--out_dir", str(home)]
    assert not home.exists()

    home.mkdir()
    (home / "config.json").write_text("{}")
    sweep.run_one("name", settings, shared, args)
    assert commands.pop() == ["train.py", "--resume", str(home)]

    (home / "summary.json").write_text("{}")
    assert sweep.run_one("name", settings, shared, args) is None and not commands


@pytest.mark.parametrize("words, pairs", [
    ("--steps=6 --move_lr", [["--steps", "6"], ["--move_lr", "True"]]),
    ("--move_lr --cache_dir x --steps 6", [["--move_lr", "True"], ["--steps", "6"]])])
def test_settings_of_all_runs_in_any_form(words, pairs):
    assert sweep.settings_of(words.split()) == pairs


def test_stopped_it_goes_on_and_other_settings_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "sweep"
    words = ["label=a+method=opd+steps=3,b+method=opd+lr=1e18 seed=1:2", "--out_dir", str(out),
             *TOY, "--cache_dir", str(tmp_path / "cache")]
    ctrl_c_counts = signal.signal(signal.SIGINT, signal.default_int_handler)
    first = subprocess.Popen([sys.executable, "-m", "extras.sweep", *words], start_new_session=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, ctrl_c_counts)
    while first.poll() is None and not (out / "sweep.json").exists():
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)                       # before its first run has ended
    assert first.stderr.read().endswith("sweep: stopped; the same command goes on\n")
    assert first.wait() == 130
    for others in (["--lr", "3"], ["--move_lr"]):
        with pytest.raises(SystemExit):
            sweep.main([*words, *others])
        assert "name another --out_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        sweep.main(words)
    printed = capsys.readouterr()
    assert done.value.code == 1
    assert "label=b,method=opd,lr=1e18,seed=1 failed: train.py: step 2: the loss" in printed.err
    data = json.loads((out / "sweep.json").read_text())
    (name, run), = data["runs"].items()
    summary = json.loads((out / name / "summary.json").read_text())
    assert [point[0] for point in run["curve"]] == [0, 1, 2, 3]       # not TOY's 2 steps
    assert run["curve"][-1][1] == summary["curve"][-1]["accuracy"]
    assert data["control"] == summary["control"] and str(tmp_path) not in json.dumps(data)
    assert not (out / name / "checkpoints").exists()          # it has finished
    with pytest.raises(SystemExit):
        sweep.main(["--redraw", str(out)])
    assert capsys.readouterr().out.splitlines()[:-1] == printed.out.splitlines()[:-1]


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
    assert len(data["runs"]["range_test 0"]["searches"]) == 1
    before = (tmp_path / "c" / "sweep.json").stat().st_mtime_ns
    controls.main(words)
    assert (tmp_path / "c" / "sweep.json").stat().st_mtime_ns == before
