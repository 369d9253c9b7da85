"""Nothing is lost: runs that are killed, stopped or out of space, and files that are damaged."""

import errno
import json
import os
import random
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import train
from conftest import TOY, arguments, read_lines
from train import main

RUN = TOY | dict(method="effopd", steps=18, save_every=3, eval_every=2, lr=2e-3, score="batch_kl",
                 candidates="line", search_every=5, optimizer="muon", move_lr=True)


@pytest.fixture(autouse=True)
def ctrl_c_counts():
    """A shell's background jobs start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(cache_dir, tmp_path_factory):
    """The directory of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    begin(directory, cache_dir)
    return directory


def begin(directory, cache_dir, **settings):
    main(arguments(RUN | settings | dict(cache_dir=cache_dir, out_dir=directory)))


def begin_or_resume(directory, cache_dir, **settings):
    if (directory / "config.json").exists():
        main(["--resume", str(directory)])
    else:                                                     # killed before there was anything
        shutil.rmtree(directory, ignore_errors=True)
        begin(directory, cache_dir, **settings)


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(v) for key, v in value.items() if key != "seconds"}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def assert_same(directory, other):
    """All that the runs leave is equal, but for the seconds that they took."""
    for name in ("log.jsonl", "search.jsonl"):
        lines, other_lines = read_lines(directory / name), read_lines(other / name)
        assert without_seconds(lines) == without_seconds(other_lines)
    summary = json.loads((directory / "summary.json").read_text())
    assert without_seconds(summary) == without_seconds(
        json.loads((other / "summary.json").read_text()))
    weights = {path.relative_to(other): path.read_bytes() for path in other.rglob("*.safetensors")}
    assert weights == {path.relative_to(directory): path.read_bytes()
                       for path in directory.rglob("*.safetensors")}
    assert not (directory / "state.pt").exists()


def child(body) -> int:
    """Run body() in a process that shares nothing with this one but what is on disk."""
    pid = os.fork()
    if pid == 0:
        train.tqdm.set_lock(threading.RLock())                # the own one is shared by all forks
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
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


def signal_in_step(n, *numbers):
    """METHODS whose n-th step sends these signals to its own process."""
    calls, methods = [], dict(train.METHODS)

    def step(*args):
        calls.append(1)
        if len(calls) == n:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.01)                              # Python handles it a moment later
        return methods[args[0].method](*args)

    return dict.fromkeys(train.METHODS, step)


def run_killed_in_step(n, directory, cache_dir, **settings):
    def body():
        train.METHODS.update(signal_in_step(n, signal.SIGKILL))
        begin(directory, cache_dir, **settings)

    assert status_of(child(body)) == -signal.SIGKILL


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


# Killed.

def test_the_run_searches_and_jumps(whole):
    searches = read_lines(whole / "search.jsonl")
    assert [s["step"] for s in searches] == [1, 2, 4, 5, 8, 10, 15, 16]
    assert len({s["lr"] for s in searches}) > 2               # else a lost rate would go unseen
    log = read_lines(whole / "log.jsonl")                     # a step has the rate it was taken at
    assert len(log) == 18 and log[0]["lr"] == RUN["lr"]
    assert all(log[s["step"]]["lr"] == s["lr"] for s in searches)


def test_killed_at_ten_random_moments_and_resumed_equals_undisturbed(whole, cache_dir, tmp_path):
    rng, start = random.Random(0), time.perf_counter()
    begin_or_resume(tmp_path / "timing", cache_dir)
    seconds, steps = time.perf_counter() - start, []
    for _ in range(10):
        pid = child(lambda: begin_or_resume(tmp_path / "run", cache_dir))
        time.sleep(rng.uniform(0.1, 0.6) * seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        log = tmp_path / "run" / "log.jsonl"
        steps.append(len(log.read_text().splitlines()) if log.exists() else 0)
    assert any(0 < step < 18 for step in steps)               # else no kill hit the training
    begin_or_resume(tmp_path / "run", cache_dir)
    assert_same(tmp_path / "run", whole)


def test_killed_around_any_file_that_takes_its_name(whole, cache_dir, tmp_path):
    """SIGKILL just before or after the n-th one, in a run that goes on from the kill before."""
    def run(n, before):
        replace, calls = Path.replace, []

        def deadly(self, target):
            calls.append(1)
            if len(calls) < n or not before:
                replace(self, target)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)

        Path.replace = deadly
        begin_or_resume(tmp_path / "run", cache_dir)

    moments = [(1, True), (1, False), (3, True), (4, False), (6, True),       # no state yet
               (6, False), (2, True), (2, False), (3, False), (3, True), (2, False), (4, False)]
    for moment in moments:
        assert status_of(child(lambda: run(*moment))) == -signal.SIGKILL
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["own"]["step"] == 12
    assert status_of(child(lambda: run(6, before=False))) == -signal.SIGKILL    # of summary.json
    begin_or_resume(tmp_path / "run", cache_dir)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("settings", [
    dict(method="opd"), dict(method="rl", group_size=4), dict(method="sft"),
    dict(score="accuracy", candidates="linear", optimizer="adamw", move_lr=False, scope="all"),
    dict(score="rollout_kl", rollout_batch_size=7, accept="ge", alignment_gate=0.1)])
def test_other_settings_resume_too(settings, cache_dir, tmp_path):
    begin(tmp_path / "whole", cache_dir, **settings)
    run_killed_in_step(9, tmp_path / "run", cache_dir, **settings)    # its state is of step 6
    main(["--resume", str(tmp_path / "run")])
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_race_goes_on_where_it_stopped(cache_dir, tmp_path):
    settings = dict(method="race", steps=4, save_every=2, optimizer="adamw")
    run_killed_in_step(8, tmp_path / "race", cache_dir, **settings)    # the second run's last
    finished = (tmp_path / "race" / "opd" / "log.jsonl").read_text()
    main(["--resume", str(tmp_path / "race")])
    assert (tmp_path / "race" / "opd" / "log.jsonl").read_text() == finished
    begin(tmp_path / "whole", cache_dir, **settings)
    for directory, _ in train.RACE.values():
        assert_same(tmp_path / "race" / directory, tmp_path / "whole" / directory)
    assert (tmp_path / "race" / "race.png").exists()


# Signals.

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_after_the_step_and_says_how_to_go_on(
        number, whole, cache_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        for name, step in signal_in_step(7, number).items():
            patch.setitem(train.METHODS, name, step)
        with pytest.raises(SystemExit) as end:
            begin("a run", cache_dir)
    said = last_line(capsys)
    assert end.value.code == 128 + number
    assert said == "train.py: stopped after step 7; to go on: python train.py --resume 'a run'"
    state = torch.load(tmp_path / "a run" / "state.pt", weights_only=True)
    assert state["own"]["step"] == len(read_lines(tmp_path / "a run" / "log.jsonl")) == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    main(shlex.split(said.partition("python train.py ")[2]))
    assert_same(tmp_path / "a run", whole)


def test_a_second_signal_stops_at_once_and_loses_nothing(
        whole, cache_dir, tmp_path, monkeypatch, capsys):
    """In a step; and in each candidate of a search that keeps one: W_t is what is gone on from."""
    def body(number):
        train.METHODS.update(signal_in_step(7, number, number))
        begin(tmp_path / "step", cache_dir)

    assert status_of(child(lambda: body(signal.SIGTERM))) == -signal.SIGTERM
    assert len(read_lines(tmp_path / "step" / "log.jsonl")) == 6
    main(["--resume", str(tmp_path / "step")])
    assert_same(tmp_path / "step", whole)

    assert read_lines(whole / "search.jsonl")[0]["multiple"]
    for n in (1, 2, 3):
        calls, directory = [], tmp_path / f"search {n}"

        def score(judge, model):
            calls.append(1)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            return train.batch_kl(judge, model)

        with monkeypatch.context() as patch:
            patch.setitem(train.SCORES, "batch_kl", score)
            with pytest.raises(SystemExit) as end:
                begin(directory, cache_dir)
        said = last_line(capsys)
        assert end.value.code == 130 and len(calls) == n
        assert said == f"train.py: stopped; to go on: python train.py --resume '{directory}'"
        main(["--resume", str(directory)])
        assert_same(directory, whole)


# Damaged, refused, finished.

@pytest.fixture(scope="module")
def stopped(cache_dir, tmp_path_factory):
    """The directory of a run that was killed in step 14, its state from step 12."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    run_killed_in_step(14, directory, cache_dir)
    return directory


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Bomb:
    """A pickle of it makes a directory where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["", "\0" * 100, "{", "half", "code", "other"])
def test_a_damaged_state_is_one_line(how, stopped, tmp_path, capsys):
    state = shutil.copytree(stopped, tmp_path / "run") / "state.pt"
    if how == "half":
        state.write_bytes(state.read_bytes()[:state.stat().st_size // 2])
    elif how in ("code", "other"):
        torch.save({"student": Bomb(tmp_path / "boom") if how == "code" else {}}, state)
    else:
        state.write_text(how)
    before = contents(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        main(["--resume", str(tmp_path / "run")])
    said = last_line(capsys)
    assert end.value.code == 2 and f"{state} is damaged" in said and "remove it" in said
    assert contents(tmp_path / "run").keys() == before.keys() and not (tmp_path / "boom").exists()
    assert state.read_bytes() == before[state]


def test_without_its_state_a_run_begins_again(stopped, whole, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "state.pt").unlink()
    main(["--resume", str(run)])
    assert_same(run, whole)


@pytest.mark.parametrize("text, words", [
    ("", "holds no settings"), ("{", "holds no settings"), ("[]", "holds no settings"),
    ("null", "holds no settings"), ('{"versions": 1, "steps": "many"}', "holds no settings"),
    ('{"versions": 1, "lerning_rate": 3}', "holds no settings"),
    ('{"versions": 1, "device": "cuda:99"}', "--device cuda:99: torch sees")])
def test_damaged_settings_are_one_line(text, words, stopped, tmp_path, capsys):
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "config.json").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["--resume", str(run)])
    said = last_line(capsys)
    assert end.value.code == 2 and said.startswith("train.py: --resume: ")
    assert str(run / "config.json") in said and words in said
    assert contents(run)[run / "state.pt"] == (stopped / "state.pt").read_bytes()


def test_a_resume_takes_no_other_settings(stopped, capsys):
    before = contents(stopped)
    for words in (["--lr", "1"], ["--seed=3"]):
        with pytest.raises(SystemExit) as end:
            main(["--resume", str(stopped), *words])
        assert end.value.code == 2 and "leave the others out" in last_line(capsys)
    assert contents(stopped) == before


def test_a_finished_run_is_not_trained_again(whole, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    before = contents(run)
    monkeypatch.setitem(train.METHODS, "effopd", lambda *_: pytest.fail("it is trained again"))
    main(["--resume", str(run)])
    assert "after 18 steps" in capsys.readouterr().out
    after = contents(run)
    assert all(after[path] == before[path] for path in before if path.name != "config.json")


@pytest.mark.parametrize("name", ["base/model.safetensors", "base/config.json",
                                  "teacher/model.safetensors", "control.json"])
def test_a_damaged_cache_says_what_to_remove(name, whole, cache_dir, tmp_path, capsys):
    cache = shutil.copytree(cache_dir, tmp_path / "cache")
    for path in cache.glob(f"*/{name}"):
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(SystemExit) as end:
        begin(tmp_path / "run", cache)
    said = last_line(capsys)
    assert end.value.code == 2 and str(cache) in said and "is damaged" in said and "remove" in said


def test_a_full_disk_is_one_line_and_leaves_the_old_state(
        whole, cache_dir, tmp_path, monkeypatch, capsys):
    save, saves = torch.save, []

    def full(state, path):
        saves.append(1)
        if len(saves) == 3:                                   # those of steps 3 and 6 went well
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(SystemExit) as end:
            begin(tmp_path / "run", cache_dir)
    said = last_line(capsys)
    assert end.value.code == 2 and "state.pt could not be written: [Errno 28] No space left" in said
    assert not list(tmp_path.rglob("*.part"))
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["own"]["step"] == 6
    main(["--resume", str(tmp_path / "run")])
    assert_same(tmp_path / "run", whole)
