"""Whatever is typed or fed: the command line's entry ends well or in one line of ours, and harms no run."""

import copy
import dataclasses
import random
import signal
from pathlib import Path

import pytest

import train
from test_real import make_checkpoint, write_problems
from train import Config, main

TOY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_ops=1, base_steps=1,
           teacher_steps=1, base_batch_size=2, steps=2, batch_size=4, eval_size=6, device="cpu")
WORDS = ["", "0", "1", "2", "3", "-1", "7", "0.5", "1e-3", "1e3", "nan", "inf", "-inf", "1e999", "true", "False", "None",
         "ünï", "cpu", "cuda:7", "opd", "rl", "sft", "effopd", "gpu", "skill", "batch_kl", "doubling", "all", "ge", "mlp",
         "../..", "/", "/dev/null", "*", "; ls", "$(ls)", "a b", "\n", "--", "-", "[]", "{}", "0x10", "1_0", "１"]


@pytest.fixture(autouse=True)
def no_hang():
    """Twenty seconds of computing for each entry, then a traceback. (SIGALRM is taken: math-verify's own limit.)"""
    def hung(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGVTALRM, hung)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0), signal.signal(signal.SIGVTALRM, before)


def entry(args, capsys, stages):
    """main(args): True if it ran to its end, False if it ended in one line of ours; anything else raises."""
    signal.setitimer(signal.ITIMER_VIRTUAL, 20)
    capsys.readouterr()
    try:
        main(args)
    except SystemExit as end:
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
        assert end.code == 2 and len(said) == 1 and len(said[0]) < 1000, (args, said)
        stages.append(False)
    else:
        stages.append(True)


def snapshot(directory):
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_random_settings(tmp_path, monkeypatch, capsys):
    """200 command lines: one to three settings each, with sensible, odd and absurd values."""
    monkeypatch.chdir(tmp_path)
    main([*words(TOY), "--method", "opd", "--out_dir", "kept"])
    kept, rng, ended = snapshot(tmp_path / "kept"), random.Random(0), []
    sensible = {f.name: str(f.default) for f in dataclasses.fields(Config)} | {"seed": "3", "lr": "0.01", "eval_every": "1"}
    names = [f.name for f in dataclasses.fields(Config) if f.name not in {*TOY, "compile"}] + ["steps", "batch_size", "nonsense"]
    distil = train.distil                                     # limits on what a random number can ask of this machine
    monkeypatch.setattr(train, "distil", lambda config, *a: distil(dataclasses.replace(
        config, steps=min(config.steps, 2), batch_size=min(config.batch_size, 64), dv_size=min(config.dv_size, 64),
        num_candidates=min(config.num_candidates, 3)), *a))
    for n in range(200):
        chosen = {name: rng.choice([rng.choice(WORDS), sensible.get(name, "1"), sensible.get(name, "1")])
                  for name in rng.sample(names, rng.randrange(1, 4))}
        for name in ("steps", "batch_size", "save_every"):
            if chosen.get(name) in ("1e3", "１"):
                chosen[name] = "5"
        if "resume" in chosen and rng.random() < 0.5:
            chosen = {"resume": rng.choice(["kept", "kept/checkpoints", "nowhere"])}
            entry(words(chosen), capsys, ended)
            continue
        method = {} if "method" in chosen else {"method": rng.choice(["opd", "effopd", "rl", "sft"])}
        out = {} if "out_dir" in chosen else {"out_dir": f"run-{n}"}
        entry(words(TOY | method | out | chosen), capsys, ended)
    assert snapshot(tmp_path / "kept") == kept
    assert 20 < sum(ended) < 180                              # both ends were reached, many times


def words(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def mangle(rng, text: bytes) -> bytes:
    """One to three of the things that happen to files."""
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text) + 1) if text else 0
        text = rng.choice([
            lambda: text[:at],
            lambda: text[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))) + text[at:],
            lambda: text[:at] + text[at + rng.randrange(1, 40):],
            lambda: text.replace(b"question", rng.choice([b"problem", b"", b"Question"]), rng.randrange(1, 9)),
            lambda: text.replace(b'"', b"'", rng.randrange(1, 9)),
            lambda: text.replace(b"\n", rng.choice([b"\r\n", b"", b"\n\n", b"\0", b"\r"])),
            lambda: b"\xef\xbb\xbf" + text,
            lambda: text + rng.choice([b"null", b"[[[[", b'{"question": 1}', b'{"question": "x", "answer": {}}', b"NaN",
                                       b'{"question": "x", "answer": NaN}', b'{"question": "x", "answer": 1e999}',
                                       b'{"question": "\\ud800", "answer": "1"}', b'"' * 9, b"1" * 5000,
                                       b'{"question": "x", "answer": "' + b"9" * 5000 + b'"}',
                                       b'{"question": "x", "answer": "9^9^9^9"}',
                                       b'{"question": "$(rm -rf .)", "answer": "\\\\input{/etc/passwd}"}']) + b"\n",
            lambda: text.replace(b"####", b"", rng.randrange(1, 9)),
            lambda: text.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-8", "latin-1"]), "replace"),
        ])()
    return text


def test_mangled_problem_files(tmp_path, monkeypatch, capsys):
    """200 files; those that can still be read are read and graded, and train as they should."""
    monkeypatch.chdir(tmp_path)
    student = make_checkpoint(tmp_path / "student")
    good, rng, ended = write_problems(tmp_path / "good.jsonl", n=14).read_bytes(), random.Random(0), []
    args = dict(student=student, teacher=student, data="mangled.jsonl", method="opd", steps=1, batch_size=2, eval_size=2,
                dv_size=2, max_new_tokens=3, device="cpu")
    main(words(args | dict(data="good.jsonl", out_dir="kept")))
    kept = snapshot(tmp_path / "kept")
    model = train.GPT.from_pretrained(student)                # the files are what is tried here, not the loading
    tokenizer = train.tokenizer_of(model)
    monkeypatch.setattr(train, "tokenizer_of", lambda _: tokenizer)
    monkeypatch.setattr(train.GPT, "from_pretrained", lambda *a: copy.deepcopy(model))
    for n in range(200):
        Path("mangled.jsonl").write_bytes(mangle(rng, good))
        entry(words(args | dict(out_dir=f"run-{n}")), capsys, ended)
        assert Path(f"run-{n}").exists() == ended[-1]         # nothing is left of a run that never began
    assert snapshot(tmp_path / "kept") == kept and sorted(p.name for p in tmp_path.iterdir() if "run" not in p.name) == [
        "good.jsonl", "kept", "mangled.jsonl", "student"]
    assert 20 < sum(ended) < 180
