"""Nothing lost: runs that are killed, interrupted, damaged or out of space, and numbers that are not finite."""

import dataclasses
import errno
import json
import math
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from model import GPT
from train import Config, load_models, main

TOY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_ops=2, base_steps=12,
           teacher_steps=12, base_batch_size=8, batch_size=8, eval_size=12, device="cpu")
RUN = TOY | dict(method="effopd", steps=18, save_every=3, eval_every=2, lr=2e-3, score="batch_kl", candidates="doubling",
                 search_every=5)


@pytest.fixture(autouse=True)
def ctrl_c_counts():
    """A shell's background jobs start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def arguments(settings):
    return [word for name, value in settings.items() for word in
            ((f"--{name}",) if value is True else (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with the cache that all runs share, and one run that nothing disturbed."""
    home = tmp_path_factory.mktemp("resume")
    main(arguments(RUN | dict(cache_dir=home / "cache", out_dir=home / "whole")))
    return home


def outcome(directory):
    """All that a run leaves, but for the seconds it took and the place it is in."""
    def without(value):
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in ("seconds", "out_dir", "resume")}
        return [without(v) for v in value] if isinstance(value, list) else value

    weights = {p.name: load_file(p / "model.safetensors") for p in sorted((directory / "checkpoints").iterdir())}
    lines = [[json.loads(line) for line in path.read_text().splitlines()]
             for path in (directory / "log.jsonl", directory / "search.jsonl") if path.exists()]
    return weights, without(lines), without(json.loads((directory / "summary.json").read_text()))


def same(a, b):
    (weights, *rest), (other_weights, *other_rest) = outcome(a), outcome(b)
    assert rest == other_rest
    assert list(weights) == list(other_weights)
    for name in weights:
        assert all(torch.equal(w, other_weights[name][key]) for key, w in weights[name].items()), name


def child(body):
    """Run body() in a process of its own; returns its id. It shares nothing with this one but what is on disk."""
    pid = os.fork()
    if pid == 0:
        train.tqdm.set_lock(threading.RLock())                # tqdm's own is shared: to be killed with it would hang us
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        status = 1
        try:
            body()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            os._exit(status)
    return pid


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start_or_resume(directory, home, settings=RUN):
    if (directory / "config.json").exists():
        main(["--resume", str(directory)])
    else:
        for left in (directory,):                             # killed before there was anything to go on from
            if left.exists():
                left.rename(left.with_name(f"{left.name}-{time.time_ns()}"))
        main(arguments(settings | dict(cache_dir=home / "cache", out_dir=directory)))


def test_the_run_searches_and_jumps(home):
    _, (log, searches), _ = outcome(home / "whole")
    assert len(log) == 18 and [s["step"] for s in searches] == [1, 2, 4, 5, 8, 10, 15, 16]
    assert sum(s["accepted"] > 0 for s in searches) >= 2      # else the tests below would miss what jumps leave behind


def test_killed_at_ten_random_moments_and_resumed_equals_undisturbed(home, tmp_path):
    rng, begin = random.Random(0), time.perf_counter()
    start_or_resume(tmp_path / "timing", home)
    whole = time.perf_counter() - begin
    steps = []
    for _ in range(10):
        pid = child(lambda: start_or_resume(tmp_path / "run", home))
        time.sleep(rng.uniform(0.05, 0.5) * whole)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        log = tmp_path / "run" / "log.jsonl"
        steps.append(len(log.read_text().splitlines()) if log.exists() else 0)
    assert any(0 < step < 18 for step in steps)               # else no kill hit the training
    start_or_resume(tmp_path / "run", home)
    same(tmp_path / "run", home / "whole")


def test_killed_around_any_file_it_writes_and_resumed_equals_undisturbed(home, tmp_path):
    """SIGKILL just before or just after the n-th file takes its name, in a run that goes on from the kill before."""
    rng, kills = random.Random(1), 0

    def run(n, before):
        replace, count = Path.replace, 0

        def deadly(self, target):
            nonlocal count
            count += 1
            if count == n and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = replace(self, target)
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        Path.replace = deadly
        start_or_resume(tmp_path / "run", home)

    for n in [1, 2, 3, 4, 5, 6] + [rng.randrange(3, 9) for _ in range(6)]:
        kills += status_of(child(lambda: run(n, before=rng.random() < 0.5))) == -signal.SIGKILL
        rng.random()
    assert kills >= 10
    start_or_resume(tmp_path / "run", home)
    same(tmp_path / "run", home / "whole")


@pytest.mark.parametrize("settings", [dict(method="opd"), dict(method="rl", batch_size=8, group_size=4),
                                      dict(score="accuracy", dv_size=5, reset_moments=True, keep_last=2)])
def test_other_methods_resume_too(settings, home, tmp_path):
    settings = {k: v for k, v in RUN.items() if "method" not in settings or k not in (
        "score", "candidates", "search_every")} | dict(steps=7) | settings
    start_or_resume(tmp_path / "whole", home, settings)

    def dies_at(step, directory):
        real = train.save_state

        def save(run, states):
            real(run, states)
            if run.record["step"] == step:
                os.kill(os.getpid(), signal.SIGKILL)

        train.save_state = save
        start_or_resume(directory, home, settings)

    for step in (3, 6):
        assert status_of(child(lambda: dies_at(step, tmp_path / "run"))) == -signal.SIGKILL
    start_or_resume(tmp_path / "run", home, settings)
    same(tmp_path / "run", tmp_path / "whole")
    if "keep_last" in settings:
        assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
            "final", "step_000000", "step_000002", "step_000004"]


def test_random_states_are_restored(home, tmp_path):
    """Python's, NumPy's and torch's, and the rollouts' own."""
    generator = torch.Generator().manual_seed(3)

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item(), torch.rand((), generator=generator).item()

    states = train.random_states(generator)
    first = draw()
    torch.save(states, tmp_path / "states.pt")                # through the file, as in a resume
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    train.set_random_states(states, generator)
    assert draw() == first


def test_a_race_goes_on_where_it_stopped(home, tmp_path):
    settings = TOY | dict(num_ops=2, steps=4, cache_dir=home / "cache")

    def dies():
        real, calls = train.distil, []

        def second(*args):
            calls.append(args)
            if len(calls) == 2:
                train.backward = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        train.distil = second
        main(arguments(settings | dict(out_dir=tmp_path / "race")))

    assert status_of(child(dies)) == -signal.SIGKILL
    finished = (tmp_path / "race" / "opd" / "log.jsonl").read_text()
    main(["--resume", str(tmp_path / "race")])
    assert (tmp_path / "race" / "opd" / "log.jsonl").read_text() == finished
    main(arguments(settings | dict(out_dir=tmp_path / "whole")))
    for method in ("opd", "effopd", "effopd-batch-kl"):
        same(tmp_path / "race" / method, tmp_path / "whole" / method)
    assert (tmp_path / "race" / "race.png").exists()


# Signals.

def interrupted(home, directory, monkeypatch, capsys, moment, signals):
    """Run until the n-th call of a function of train.py, send the signals there; returns the exit status and stderr."""
    name, n = moment
    real, calls = getattr(train, name), []

    def call(*args, **kwargs):
        calls.append(0)
        if len(calls) == n:
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.01)                              # Python handles a signal a moment after it came
        return real(*args, **kwargs)

    monkeypatch.setattr(train, name, call)
    with pytest.raises(SystemExit) as end:
        main(arguments(RUN | dict(cache_dir=home / "cache", out_dir=directory)))
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return end.value.code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_finishes_the_step_and_says_how_to_go_on(number, home, tmp_path, monkeypatch, capsys):
    status, said = interrupted(home, tmp_path / "run", monkeypatch, capsys, ("backward", 7), [number])
    assert status == 128 + number
    assert said.endswith(f"stopped after step 7; to go on: python train.py --resume {tmp_path / 'run'}")
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 7
    main(["--resume", str(tmp_path / "run")])
    same(tmp_path / "run", home / "whole")


@pytest.mark.parametrize("moment, lines", [(("backward", 7), 6), (("answer", 12), None), (("kl_of", 12), None),
                                           (("evaluate", 6), None), (("loss_of", 10), 9)])
def test_two_signals_stop_at_once_and_lose_at_most_the_step(moment, lines, home, tmp_path, monkeypatch, capsys):
    """In a rollout, in a loss, in a search, in an evaluation: what is resumed equals what nobody interrupted."""
    status, said = interrupted(home, tmp_path / "run", monkeypatch, capsys, moment, [signal.SIGINT, signal.SIGINT])
    assert status == 130 and "stopped in step" in said
    step = int(said.split("stopped in step ")[1].split(";")[0])
    logged = len((tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert logged == step - 1 and (lines is None or logged == lines)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["record"]["step"] == step - 1
    main(["--resume", str(tmp_path / "run")])
    same(tmp_path / "run", home / "whole")


def test_a_checkpoint_from_before_a_jump_stays_one(home, tmp_path, monkeypatch, capsys):
    """Stopped in the evaluation after a search that accepted something, at a step whose checkpoint is kept."""
    _, (_, searches), _ = outcome(home / "whole")
    step = next(s["step"] for s in searches if s["accepted"] and s["step"].bit_count() == 1 and s["step"] % 2 == 0)
    status, said = interrupted(home, tmp_path / "run", monkeypatch, capsys, ("evaluate", 2 + step // 2),
                               [signal.SIGINT, signal.SIGINT])
    assert status == 130 and f"stopped in step {step};" in said
    main(["--resume", str(tmp_path / "run")])
    same(tmp_path / "run", home / "whole")


def test_two_signals_in_the_midst_of_a_search(home, tmp_path, monkeypatch, capsys):
    """At each candidate of a search that accepts some: W_t is what is saved, and the search is made again."""
    for n in (1, 2, 3, 4):
        directory = tmp_path / str(n)
        calls = []
        score = train.Score.__call__

        def call(self, model):
            calls.append(0)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.01)
            return score(self, model)

        monkeypatch.setattr(train.Score, "__call__", call)
        with pytest.raises(SystemExit) as end:
            main(arguments(RUN | dict(cache_dir=home / "cache", out_dir=directory)))
        monkeypatch.setattr(train.Score, "__call__", score)
        assert end.value.code == 143
        assert "pending" in torch.load(directory / "state.pt", weights_only=True)
        main(["--resume", str(directory)])
        same(directory, home / "whole")


def test_a_signal_between_two_runs_of_a_race_says_how_to_go_on_too(home, tmp_path, monkeypatch, capsys):
    real = train.gc.collect
    monkeypatch.setattr(train.gc, "collect", lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(0.01) or real())
    with pytest.raises(SystemExit) as end:
        main(arguments(TOY | dict(steps=2, cache_dir=home / "cache", out_dir=tmp_path / "race")))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 130 and said == f"train.py: stopped; to go on: python train.py --resume {tmp_path / 'race'}"


# Numbers that are not finite.

@pytest.fixture
def toy(home):
    config = Config(**RUN | dict(cache_dir=str(home / "cache"), method="opd", steps=4, score="accuracy",
                                 candidates="linear", search_every=0))
    task = train.Chains(2, 1)
    return config, task, *load_models(config, task)


def poison(monkeypatch, step, where):
    """The loss, or only its gradient, is not finite at one step."""
    real, calls = train.loss_of, []

    def loss_of(*args):
        calls.append(0)
        loss = real(*args)
        if len(calls) != step:
            return loss
        if where == "loss":
            return loss * math.nan
        return loss + 0 * (args[4] - args[4].detach()).abs().sqrt().sum()      # its value 0, its slope inf * 0

    monkeypatch.setattr(train, "loss_of", loss_of)


@pytest.mark.parametrize("where, words", [("loss", "step 3: the loss is nan"), ("gradient", "step 3: the gradient's norm is nan, the loss ")])
def test_a_number_that_is_not_finite_stops_the_run(where, words, toy, tmp_path, monkeypatch):
    config, task, student, teacher = toy
    poison(monkeypatch, 3, where)
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError) as error:
        train.distil(config, task, student, teacher, tmp_path / "run", "")
    assert words in str(error.value) and str(tmp_path / "run" / "checkpoints" / "step_000002") in str(error.value)
    assert ("not finite in model." in str(error.value)) == (where == "gradient")
    assert all(p.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_or_is_skipped_and_counted(where, toy, tmp_path, monkeypatch):
    config, task, student, teacher = toy
    poison(monkeypatch, 2, where)
    (tmp_path / "run").mkdir()
    config = dataclasses.replace(config, skip_nonfinite=True, method="effopd", score="batch_kl")
    summary = train.distil(config, task, student, teacher, tmp_path / "run", "")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert summary["skipped"] == 1 and [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ["skipped" in line for line in lines] == [False, True, False, False] and lines[1]["loss"] is None
    assert [s["step"] for s in map(json.loads, (tmp_path / "run" / "search.jsonl").read_text().splitlines())] == [1, 4]
    before, after = (load_file(tmp_path / "run" / "checkpoints" / name / "model.safetensors")
                     for name in ("step_000002", "final"))
    assert all(p.isfinite().all() for p in student.parameters()) and any(not torch.equal(before[k], after[k]) for k in after)


# Files that are damaged.

GARBAGE = [b"", b"\0" * 100, b"{", "half"]


def damage(path, how):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2] if how == "half" else how)


@pytest.fixture(scope="module")
def stopped(home):
    """A run that was killed after step 12 of 18."""
    def dies():
        real = train.save_state

        def save(run, states):
            real(run, states)
            if run.record["step"] == 12:
                os.kill(os.getpid(), signal.SIGKILL)

        train.save_state = save
        main(arguments(RUN | dict(cache_dir=home / "cache", out_dir=home / "stopped")))

    assert status_of(child(dies)) == -signal.SIGKILL
    return home / "stopped"


def copy_of(directory, target):
    train.shutil.copytree(directory, target)
    return target


@pytest.mark.parametrize("how", GARBAGE)
@pytest.mark.parametrize("name, words", [
    ("state.pt", "is damaged"), ("log.jsonl", None), ("search.jsonl", None),
    ("checkpoints/step_000004/model.safetensors", "step_000004 is damaged")])
def test_a_damaged_file_is_named_and_done_without(name, words, how, stopped, home, tmp_path, capsys):
    run = copy_of(stopped, tmp_path / "run")
    damage(run / name, how)
    main(["--resume", str(run)])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(str(run))]
    assert [words in line for line in said] == ([] if words is None else [True])
    if "checkpoints" in name:                                 # that one is lost; all else is as if nothing had been
        damaged = run / "checkpoints" / "step_000004" / "model.safetensors"
        train.shutil.copy(home / "whole" / "checkpoints" / "step_000004" / "model.safetensors", damaged)
    same(run, home / "whole")


def test_both_states_damaged_is_one_line(stopped, tmp_path, capsys):
    run = copy_of(stopped, tmp_path / "run")
    for name in ("state.pt", "state_previous.pt"):
        damage(run / name, b"not a state")
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit):
        main(["--resume", str(run)])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no state that can be read" in said and f"--student {run / 'checkpoints' / 'step_000008'}" in said
    assert files == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}             # nothing was touched


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"steps": "many"}', '{"method": "opd", "lerning_rate": 3}'])
def test_damaged_settings_are_one_line(text, stopped, tmp_path, capsys):
    run = copy_of(stopped, tmp_path / "run")
    (run / "config.json").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["--resume", str(run)])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and len(said.splitlines()) == 1 and f"{run / 'config.json'} is damaged" in said


def test_settings_that_do_not_work_here_are_not_called_damaged(stopped, tmp_path, capsys):
    run = copy_of(stopped, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | dict(device="cuda:99")))
    with pytest.raises(SystemExit):
        main(["--resume", str(run)])
    said = capsys.readouterr().err.strip()
    assert "config.json: --device cuda:99: this torch sees" in said and "damaged" not in said


def test_a_state_with_code_in_it_is_not_run(stopped, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    run = copy_of(stopped, tmp_path / "run")
    for name in ("state.pt", "state_previous.pt"):
        torch.save(dict(record=Bomb(), student={}, optimizer={}, effopd={}, random={}), run / name)
    with pytest.raises(SystemExit):
        main(["--resume", str(run)])
    assert not (tmp_path / "boom").exists()


def test_a_finished_run_is_finished(home, tmp_path, capsys):
    run = copy_of(home / "whole", tmp_path / "run")
    damage(run / "summary.json", b"")                         # made again from the state
    main(["--resume", str(run)])
    same(run, home / "whole")


@pytest.mark.parametrize("args, words", [
    (["--resume", "nowhere"], "there is no nowhere/config.json"),
    (["--resume", "nowhere", "--lr", "1", "--seed=3"], "leave out --lr, --seed")])
def test_bad_resumes_are_one_line(args, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("how", GARBAGE)
@pytest.mark.parametrize("name", ["base/model.safetensors", "base/config.json", "teacher/model.safetensors"])
def test_a_damaged_cache_says_what_to_remove(name, how, home, tmp_path, capsys):
    cache = copy_of(home / "cache", tmp_path / "cache")
    damage(next(cache.glob(f"*/{name}")), how)
    with pytest.raises(SystemExit):
        main(arguments(RUN | dict(cache_dir=cache, out_dir=tmp_path / "run")))
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "remove it and it will be made again" in said[0] and str(cache) in said[0]
    assert not (tmp_path / "run").exists()


def test_two_processes_may_make_the_cache_at_once(home, tmp_path):
    def run(n):
        main(arguments(RUN | dict(steps=1, cache_dir=tmp_path / "cache", out_dir=tmp_path / str(n))))

    assert [status_of(pid) for pid in [child(lambda: run(n)) for n in range(2)]] == [0, 0]
    same(tmp_path / "0", tmp_path / "1")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_cache_survives_a_kill_at_any_moment(home, tmp_path):
    def run():
        main(arguments(RUN | dict(steps=1, cache_dir=tmp_path / "cache", out_dir=tmp_path / f"run-{time.time_ns()}")))

    rng = random.Random(0)
    for _ in range(4):
        pid = child(run)
        time.sleep(rng.uniform(0.02, 0.4))
        os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)
    run()
    made = [p for p in (tmp_path / "cache").iterdir() if not p.name.startswith("unfinished")]
    assert len(made) == 1
    ours, theirs = (load_file(next(p.glob("*/teacher/model.safetensors"))) for p in (tmp_path / "cache", home / "cache"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


# The disk.

def test_a_full_disk_ends_in_one_line_and_leaves_what_was_there(home, tmp_path, monkeypatch, capsys):
    real, saves = torch.save, []

    def save(state, f):
        saves.append(0)
        if len(saves) == 4:                                   # at steps 0, 1, 2 it went well
            f.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(state, f)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit) as end:
        main(arguments(RUN | dict(cache_dir=home / "cache", out_dir=tmp_path / "run")))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and "state.pt could not be written: [Errno 28] No space left on device" in said
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    main(["--resume", str(tmp_path / "run")])
    same(tmp_path / "run", home / "whole")


def test_too_little_space_is_said_before_training(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: train.shutil._ntuple_diskusage(10 ** 6, 10 ** 6, 1000))
    monkeypatch.setattr(train, "distil", lambda *_: pytest.fail("there is no room for it"))
    with pytest.raises(SystemExit):
        main(arguments(RUN | dict(cache_dir=home / "cache", out_dir=tmp_path / "run")))
    assert "0.0 GB free" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_made_is_said_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load", lambda _: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        main(arguments(TOY | dict(out_dir=tmp_path / "file" / "run")))
    assert end.value.code == 2 and "file/run" in capsys.readouterr().err


def test_a_file_is_all_or_nothing(tmp_path):
    path = tmp_path / "value.json"
    train.write_json(path, [1])
    with pytest.raises(TypeError):
        train.write_json(path, [2, object()])
    with pytest.raises(OSError, match="value.json could not be written: why"):
        with train.replacing(path) as scratch:
            scratch.write_text("[3")
            raise OSError("why")
    assert json.loads(path.read_text()) == [1]


# The same again.

def test_the_same_seed_gives_the_same_run_bit_for_bit(home, tmp_path):
    main(arguments(RUN | dict(cache_dir=home / "cache", out_dir=tmp_path / "again")))
    same(tmp_path / "again", home / "whole")
    assert GPT.from_pretrained(tmp_path / "again" / "checkpoints" / "final") is not None
