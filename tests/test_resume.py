"""Nothing is lost: runs that are killed, stopped or out of space, and files that are damaged."""

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


def begin_or_resume(directory, cache_dir):
    if (directory / "config.json").exists():
        main(["--resume", str(directory)])
    else:                                                     # killed before there was anything
        shutil.rmtree(directory, ignore_errors=True)
        begin(directory, cache_dir)


def refusal(capsys, call, *args) -> tuple[int, str]:
    """The exit status of a command, and the last line that it says."""
    with pytest.raises(SystemExit) as end:
        call(*args)
    return end.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(v) for key, v in value.items() if key != "seconds"}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def results(directory):
    """All that a run leaves, but for the seconds that it took."""
    summary = json.loads((directory / "summary.json").read_text())
    logs = [read_lines(directory / name) for name in train.LOGS]
    weights = {path.relative_to(directory): path.read_bytes()
               for path in directory.rglob("*.safetensors")}
    return without_seconds(summary), without_seconds(logs), weights


def at_call(n, function, action):
    """The function, but its n-th call begins with action()."""
    calls = []

    def changed(*args):
        calls.append(1)
        if len(calls) == n:
            action()
        return function(*args)

    return changed


def send(*numbers):
    """Signals, to this process itself."""
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.01)                                      # Python handles it a moment later


def child(body) -> int:
    """Run body() in a process that shares nothing with this one but what is on disk."""
    pid = os.fork()
    if pid == 0:
        train.tqdm.set_lock(threading.RLock())                # the own one is shared by all forks
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            body()
        finally:
            os._exit(0)
    return pid


def is_killed(body) -> bool:
    """Whether body(), which sends itself SIGKILL, came to that."""
    return os.waitpid(child(body), 0)[1] == signal.SIGKILL


def is_killed_in_step(n, directory, cache_dir, **settings) -> bool:
    def body():
        for name, step in list(train.METHODS.items()):
            train.METHODS[name] = at_call(n, step, lambda: send(signal.SIGKILL))
        begin(directory, cache_dir, **settings)

    return is_killed(body)


# Killed.

def test_killed_at_ten_random_moments_and_resumed_equals_undisturbed(whole, cache_dir, tmp_path):
    assert [s["step"] for s in read_lines(whole / "search.jsonl")] == [1, 2, 4, 5, 8, 10, 15, 16]
    assert len({entry["lr"] for entry in read_lines(whole / "log.jsonl")}) > 2    # and they jump
    rng, start = random.Random(0), time.perf_counter()
    begin(tmp_path / "timing", cache_dir)
    seconds, steps = time.perf_counter() - start, []
    for _ in range(10):
        pid = child(lambda: begin_or_resume(tmp_path / "run", cache_dir))
        time.sleep(rng.uniform(0.1, 0.6) * seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        log = tmp_path / "run" / "log.jsonl"
        steps.append(len(read_lines(log)) if log.exists() else 0)
    assert any(0 < step < 18 for step in steps)               # else no kill hit the training
    begin_or_resume(tmp_path / "run", cache_dir)
    assert results(tmp_path / "run") == results(whole)


def test_killed_before_any_file_takes_its_name(whole, cache_dir, tmp_path):
    """SIGKILL before the n-th one, in a run that goes on from the kill before."""
    def run():
        Path.replace = at_call(n, Path.replace, lambda: send(signal.SIGKILL))
        begin_or_resume(tmp_path / "run", cache_dir)

    for n in (1, 3, 6, 7, 3, 4, 8, 3):                        # the first four: no state yet
        assert is_killed(run)
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["own"]["step"] == 18
    begin_or_resume(tmp_path / "run", cache_dir)
    assert results(tmp_path / "run") == results(whole)


@pytest.mark.parametrize("settings", [
    dict(method="opd"), dict(method="rl", group_size=4), dict(method="sft"),
    dict(score="accuracy", candidates="linear", optimizer="adamw", move_lr=False, scope="all"),
    dict(score="rollout_kl", rollout_batch_size=7, accept="ge", alignment_gate=0.1)])
def test_other_settings_resume_too(settings, cache_dir, tmp_path):
    settings = settings | dict(steps=9, checkpoints=False)
    begin(tmp_path / "whole", cache_dir, **settings)
    assert is_killed_in_step(6, tmp_path / "run", cache_dir, **settings)     # its state: of step 3
    main(["--resume", str(tmp_path / "run")])
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_a_race_goes_on_where_it_stopped(cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_race", lambda *_: None)  # takes a second
    settings = dict(method="race", steps=4, save_every=2, optimizer="adamw")
    assert is_killed_in_step(6, tmp_path / "race", cache_dir, **settings)    # of all runs
    finished = (tmp_path / "race" / "opd" / "log.jsonl").read_text()
    main(["--resume", str(tmp_path / "race")])
    assert (tmp_path / "race" / "opd" / "log.jsonl").read_text() == finished
    begin(tmp_path / "whole", cache_dir, **settings)
    for directory, _ in train.RACE.values():
        assert results(tmp_path / "race" / directory) == results(tmp_path / "whole" / directory)


# Signals.

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_after_the_step_and_says_how_to_go_on(
        number, whole, cache_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(train.METHODS, "effopd", at_call(7, train.opd_step, lambda: send(number)))
        status, said = refusal(capsys, begin, "a run", cache_dir)
    assert status == 128 + number
    assert said == "train.py: stopped after step 7; to go on: python train.py --resume 'a run'"
    assert torch.load("a run/state.pt", weights_only=True)["own"]["step"] == 7
    main(shlex.split(said.partition("python train.py ")[2]))
    assert results(tmp_path / "a run") == results(whole)


def test_a_second_signal_stops_a_search_at_once_and_loses_nothing(
        whole, cache_dir, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    twice = at_call(2, train.batch_kl, lambda: send(signal.SIGINT, signal.SIGINT))
    with monkeypatch.context() as patch:
        patch.setitem(train.SCORES, "batch_kl", twice)
        status, said = refusal(capsys, begin, directory, cache_dir)
    assert status == 130 and read_lines(directory / "search.jsonl") == []
    assert said == f"train.py: stopped; to go on: python train.py --resume {directory}"
    main(["--resume", str(directory)])
    assert results(directory) == results(whole)


# Damaged, refused, finished.

@pytest.fixture
def stopped(whole, cache_dir, tmp_path):
    """The directory of a run that was killed in step 5, its state from step 3."""
    assert is_killed_in_step(5, tmp_path / "run", cache_dir)
    return tmp_path / "run"


@pytest.mark.parametrize("how", ["empty", "half", "other"])
def test_a_damaged_state_is_one_line(how, stopped, capsys):
    state = stopped / "state.pt"
    if how == "other":
        torch.save({"student": {}}, state)
    else:
        state.write_bytes(state.read_bytes()[:state.stat().st_size // 2 if how == "half" else 0])
    damaged = state.read_bytes()
    status, said = refusal(capsys, main, ["--resume", str(stopped)])
    assert status == 2 and f"{state} is damaged" in said and "remove it" in said
    assert state.read_bytes() == damaged and len(read_lines(stopped / "log.jsonl")) == 4


@pytest.mark.parametrize("text, words", [
    ("{", "holds no settings"), ("[]", "holds no settings"),
    ('{"versions": 1, "steps": "many"}', "holds no settings"),
    ('{"versions": 1, "lerning_rate": 3}', "holds no settings"),
    ('{"versions": 1, "device": "cuda:99"}', "--device cuda:99: torch sees")])
def test_damaged_settings_are_one_line(text, words, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    status, said = refusal(capsys, main, ["--resume", str(tmp_path)])
    assert status == 2 and said.startswith(f"train.py: --resume: {tmp_path}") and words in said


def test_a_finished_run_is_not_trained_again(whole, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "state.pt").write_text("left by a kill")
    monkeypatch.setitem(train.METHODS, "effopd", lambda *_: pytest.fail("it is trained again"))
    main(["--resume", str(run)])
    assert "after 18 steps" in capsys.readouterr().out
    assert results(run) == results(whole) and not (run / "state.pt").exists()


@pytest.mark.parametrize("name", ["base/model.safetensors", "teacher/config.json", "control.json"])
def test_a_damaged_cache_says_what_to_remove(name, whole, cache_dir, tmp_path, capsys):
    cache = shutil.copytree(cache_dir, tmp_path / "cache")
    for path in cache.glob(f"*/{name}"):
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    status, said = refusal(capsys, begin, tmp_path / "run", cache)
    assert status == 2 and str(cache) in said and "is damaged" in said and "remove" in said


def test_a_full_disk_is_one_line_and_leaves_the_old_state(
        whole, cache_dir, tmp_path, monkeypatch, capsys):
    def fill():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", at_call(3, torch.save, fill))
        status, said = refusal(capsys, begin, tmp_path / "run", cache_dir)
    assert status == 2 and "state.pt could not be written: [Errno 28] No space left" in said
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["own"]["step"] == 6
    main(["--resume", str(tmp_path / "run")])
    assert results(tmp_path / "run") == results(whole)
