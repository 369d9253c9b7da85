"""train.py: the task, the batches, the scores, the loop, the race and the command line."""

import copy
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import TOY, arguments, read_lines
from effopd import undisturbed
from model import GPT
from train import Chains, Config, Judge, evaluate, pack


ROOT = Path(__file__).resolve().parents[1]


def run(config, task, student, teacher, directory, **options):
    directory.mkdir(parents=True)
    return train.train(config, task, student, teacher, directory, "toy", **options)


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


# The task.

def test_a_chain_by_hand():
    task = Chains(Config(num_ops=3))
    assert task.solve("7+5-3*4=") == "7+5=2;2-3=9;9*4=6;#6"
    assert task.solve("7+5-3*4=", habit=True) == "7+5=2;2-3=1;1*4=4;#4"
    assert task.is_correct("7+5-3*4=", "7+5=2;2-3=9;9*4=6;#6") and task.is_correct("7+5-3*4=", "#6")
    for answer in ("", "6", "#", "#66", "#5", "#6#"):
        assert not task.is_correct("7+5-3*4=", answer)


@pytest.mark.parametrize("digits", [1, 2])
def test_chains_are_worked_out_as_python_would(digits):
    task = Chains(Config(num_ops=6, digits=digits))
    for problem in task.problems(200, random.Random(0)):
        value, *operations = re.findall(r"[-+*]?\d+", problem)
        for operation in operations:
            value = eval(f"({value} {operation}) % {10 ** digits}")
        answer = task.solve(problem)
        assert answer.endswith(f"#{value}") and answer.count(";") == 6
        tokens = task.encode_answer(answer)
        assert task.decode(tokens) == answer and tokens[-1] == task.end
        assert len(tokens) <= task.max_response


def test_flaws_come_at_their_rates():
    """slip: a step in five is wrong, and what is wrong is carried on. habit: six answers in ten
    have all subtractions the wrong way round, and a step in twenty slips.
    """
    task, rng, n = Chains(Config(num_ops=2)), random.Random(0), 5000
    answers = Counter(task.flawed("7+5-3=", "slip", rng) for _ in range(n))
    carried = [f"7+5={x};{x}-3={(x - 3) % 10};#{(x - 3) % 10}" for x in range(10) if x != 2]
    assert answers["7+5=2;2-3=9;#9"] / n == pytest.approx(0.8 ** 2, abs=0.02)
    assert sum(answers[text] for text in carried) / n == pytest.approx(0.2 * 0.8, abs=0.02)
    assert min(answers[text] for text in carried) > 50        # each wrong result as often: 89
    answers = Counter(task.flawed("9-2-4=", "habit", rng) for _ in range(n))
    assert answers["9-2=3;3-4=1;#1"] / n == pytest.approx(0.6 * 0.95 ** 2, abs=0.02)
    assert answers["9-2=7;7-4=3;#3"] / n == pytest.approx(0.4 * 0.95 ** 2, abs=0.02)


def test_no_problem_of_the_evaluation_or_of_d_v_is_trained_on(toy, tmp_path, monkeypatch):
    config, task, student, teacher = toy
    trained, dv = set(), set()

    def noted(task, problems, *args):
        trained.update(problems)
        return pack(task, problems, *args)

    monkeypatch.setattr(train, "pack", noted)
    config = replace(config, method="effopd", score="dv", dv_size=60, steps=30,
                     cache_dir=str(tmp_path))
    train.load(config)
    held_out = set(train.evaluation_problems(config, task))
    assert not held_out & trained and len(held_out | trained) == 300     # all the others
    trained.clear()
    run(config, task, student, teacher, tmp_path / "run",
        scores={"dv": lambda judge, model: dv.update(judge.problems) or 0.0})
    assert not held_out & dv and not (held_out | dv) & trained
    assert len(held_out) > 15 and len(dv) > 40 and len(trained) > 120    # shared ones would show


# Alignment of prompts, answers and masks.

def test_the_end_token_carries_loss_and_padding_does_not(toy):
    task = toy[1]
    one, two, end = *task.encode("12"), task.end
    (part,), num_tokens = pack(task, ["12", "1"], [[5, end], [6, 7, 8, end]], "cpu")
    assert part.ids.tolist() == [[one, two, 5, end, 0], [one, 6, 7, 8, end]]
    assert part.mask.tolist() == [[False, True, True, False], [True, True, True, True]]
    assert num_tokens == 6
    parts, num_tokens = pack(task, ["1", "1", "111"], [[], [5, end], [end]], "cpu", 2)
    assert [part.mask.tolist() for part in parts] == [[[False, False], [True, True]],
                                                      [[False, False, True]]]
    assert num_tokens == 3 and not pack(task, ["12"], [[]], "cpu")[0][0].mask.any()


def gradients(take_step, config, task, student, teacher):
    student.zero_grad()
    problems = task.problems(8, random.Random(0))
    generator = torch.Generator().manual_seed(0)
    parts, entry = take_step(config, task, student, teacher, problems, generator)
    return [p.grad for p in student.parameters()], parts, entry


LEARNING = [("opd", "full"), ("opd", "top_k"), ("opd", "sampled"), ("opd", "sequence"),
            ("rl", "full"), ("sft", "full")]


@pytest.mark.parametrize("method, loss", LEARNING)
def test_micro_batches_give_the_whole_batchs_gradient(method, loss, toy, monkeypatch):
    config, *models = toy
    monkeypatch.setattr(Chains, "is_correct", lambda self, problem, answer: len(answer) % 2 == 0)
    config = replace(config, loss=loss, group_size=4)
    whole, _, entry = gradients(train.METHODS[method], config, *models)
    config = replace(config, micro_batch_size=3)
    pieces, parts, other_entry = gradients(train.METHODS[method], config, *models)
    assert len(parts) > 2 and max(g.abs().max() for g in whole) > 1e-3
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-4)
    assert {k: float(v) for k, v in other_entry.items()} == pytest.approx(
        {k: float(v) for k, v in entry.items()}, abs=1e-5)


@pytest.mark.parametrize("loss", ["full", "sampled", "sequence", "top_k"])
def test_a_teacher_equal_to_the_student_teaches_nothing(loss, toy):
    config, task, student, _ = toy
    found, _, entry = gradients(train.opd_step, replace(config, loss=loss), task, student,
                                copy.deepcopy(student))
    assert abs(entry["kl"]) < 1e-6 and max(g.abs().max() for g in found) < 1e-6


# Scores.

def kl_by_hand(task, student, teacher, problems, answers):
    """Mean over answer tokens of Σ π (log π - log π*), one answer at a time."""
    total = 0.0
    for problem, answer in zip(problems, answers):
        ids = torch.tensor([task.encode(problem) + answer])
        logits = [model(ids)[0, -len(answer) - 1:-1].double() for model in (student, teacher)]
        p, q = (F.softmax(z, -1) for z in logits)
        total += (p * (p / q).log()).sum().item()
    return total / sum(map(len, answers))


@pytest.mark.parametrize("name", train.SCORES)
def test_scores_are_what_they_say_and_count_their_tokens(name, toy, monkeypatch):
    _, task, student, teacher = toy
    monkeypatch.setattr(Chains, "is_correct", lambda self, problem, answer: problem[0] in answer)
    problems = ["1+2=", "1+2*3-4=", "9*9+1="] * 4             # ragged, as the answers are
    right, answers = evaluate(student, task, problems, seed=7)
    parts, tokens = pack(task, problems, answers, "cpu", 5)
    for part in parts:
        part.target = teacher(part.inputs)
    kl = kl_by_hand(task, student, teacher, problems, answers)
    assert 0 < right < 1 and kl > 0.1
    judge = Judge(train.SCORES[name], task, teacher, problems, parts, tokens)
    with undisturbed(student, seed=7):
        assert judge(student) == pytest.approx(right if name == "accuracy" else -kl, abs=1e-5)
        counts = (0, tokens) if name == "batch_kl" else (tokens, 0)
        assert (judge.sampled, judge.scored) == counts
        if name != "accuracy":
            assert judge(teacher) == pytest.approx(0, abs=1e-5)


def test_candidates_share_their_random_numbers_over_all_of_d_v(toy):
    """D_v of three rollout batches; to the first, one candidate gives answers of a single token."""
    config, _, student, _ = toy
    task, other = Chains(replace(config, rollout_batch_size=4)), copy.deepcopy(student)
    problems = task.problems(12, random.Random(1))
    first = [task.encode(problem) for problem in problems[:4]]

    def shorter_at_first(prompts, n, temperature, generator, end):
        end = range(17) if prompts == first else end
        return student.generate(prompts, n, temperature, generator, end)

    other.generate = shorter_at_first
    answers, others = (evaluate(model, task, problems, seed=5)[1] for model in (student, other))
    assert answers[:4] != others[:4] and answers[4:] == others[4:]


def test_the_control_tries_temperatures(toy):
    _, task, student, teacher = toy
    problems, colder = task.problems(20, random.Random(1)), copy.deepcopy(student)
    with torch.no_grad():
        colder.lm_head.weight.mul_(5)                         # T divides all logits
    assert evaluate(student, task, problems, temperature=0.2) == evaluate(colder, task, problems)
    control = train.measure_control(task, student, teacher, problems)
    best, _ = evaluate(student, task, problems, temperature=control["best_temperature"])
    assert best == control["student_at_best_temperature"] >= control["student"]


# The loop.

def test_muon_moves_the_matrices_of_the_blocks_as_far_as_adamw_would(toy):
    config, _, student, _ = toy
    muon, adamw = train.make_optimizers(replace(config, optimizer="muon", lr=1.0), student)
    names = {id(p): name for name, p in student.named_parameters()}
    hidden = {names[id(p)] for p in muon.param_groups[0]["params"]}
    rest = {names[id(p)] for p in adamw.param_groups[0]["params"]}
    assert hidden | rest == set(names.values()) and not hidden & rest
    assert len(hidden) == 7 and all(".layers.0." in name and "norm" not in name for name in hidden)
    before = dict(zip(names.values(), weights_of(student)))
    for p in student.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    muon.step()
    for name, p in student.named_parameters():
        rms = (p - before[name]).square().mean().sqrt().item()
        assert rms == pytest.approx(0.2 if name in hidden else 0.0, rel=0.25)    # torch: 0.2 lr


def test_a_search_that_accepts_nothing_is_plain_opd_bit_for_bit(toy, tmp_path):
    config, task, student, teacher = toy
    ends, logs = [], []
    for method in ("opd", "effopd"):
        mine = copy.deepcopy(student)
        torch.manual_seed(0)
        own = replace(config, method=method, score="rollout_kl", search_every=3, move_lr=True,
                      optimizer="muon", steps=6)
        run(own, task, mine, teacher, tmp_path / method, accept=lambda new, old: False)
        ends.append([*weights_of(mine), torch.get_rng_state()])
        lines = read_lines(tmp_path / method / "log.jsonl")
        logs.append([[line[key] for key in ("loss", "kl", "grad_norm", "lr")] for line in lines])
    assert equal(*ends) and logs[0] == logs[1] and len(logs[0]) == 6
    searches = read_lines(tmp_path / "effopd" / "search.jsonl")
    assert [s["step"] for s in searches] == [1, 2, 3, 4, 6]
    assert all(s["multiple"] == 0 and len(s["scores"]) == 2 for s in searches)


@pytest.mark.parametrize("method, loss", LEARNING)
def test_every_method_and_loss_learns(method, loss, toy, tmp_path, monkeypatch):
    config, *models = toy
    monkeypatch.setattr(Chains, "is_correct", lambda self, problem, answer: answer[:1] == "7")
    own = replace(config, method=method, loss=loss, top_k=8, steps=40, eval_every=40, batch_size=64)
    run(own, *models, tmp_path / "run")
    log = read_lines(tmp_path / "run" / "log.jsonl")
    before = [0] + [line["sampled"] for line in log]
    if method == "opd":                                       # per answer: some losses shorten them
        values = [line["kl"] * (line["sampled"] - n) for line, n in zip(log, before)]
    else:
        values = [1 - line["reward"] if method == "rl" else line["loss"] for line in log]
    assert fmean(values[-5:]) < (0.95 if method == "sft" else 0.6) * fmean(values[:5])


def test_checkpoints_are_from_before_the_jump(toy, tmp_path):
    config, *models = toy
    own = replace(config, method="effopd", score="batch_kl", candidates="doubling", lr=1e-3)
    run(own, *models, tmp_path / "run")
    home = tmp_path / "run" / "checkpoints"
    names = [f"step_00000{i}" for i in (0, 1, 2, 4)]
    assert sorted(path.name for path in home.iterdir()) == ["final", *names]
    start, after = (GPT.from_pretrained(home / name).model.layers for name in names[:2])
    delta = [q - p for p, q in zip(start.parameters(), after.parameters()) if p.ndim == 2]
    search = read_lines(tmp_path / "run" / "search.jsonl")[0]
    norm = torch.cat([d.flatten() for d in delta]).norm().item()
    assert search["multiple"] > 0 and search["delta_norm"] == pytest.approx(norm, rel=1e-4)
    assert len(search["utility"]) == 7 and any(search["utility"].values())    # gradients were there


@pytest.mark.parametrize("where, words", [("loss", "step 1: the loss is nan"),
                                          ("gradient", "the gradient's norm nan")])
def test_a_number_that_is_not_finite_stops_the_run_before_the_weights(where, words, toy, tmp_path):
    def step(config, task, student, *rest):
        parts, entry = train.opd_step(config, task, student, *rest)
        if where == "loss":
            entry["loss"] *= math.nan
        else:
            student.lm_head.weight.grad[0, 0] = math.nan
        return parts, entry

    config, task, student, teacher = toy
    before = weights_of(student)
    with pytest.raises(ValueError, match=words):
        run(replace(config, method="opd"), task, student, teacher, tmp_path / "run",
            methods={"opd": step})
    assert equal(before, student.parameters())


# Base and teacher.

def test_base_and_teacher_are_made_once_for_what_makes_them(tmp_path, monkeypatch):
    config = Config(**TOY, cache_dir=str(tmp_path))
    _, student, teacher, control = train.load(config)
    assert not equal(student.parameters(), teacher.parameters())
    with monkeypatch.context() as patch:                      # two processes begin at once
        exists = iter([False])
        patch.setattr(Path, "exists", lambda path: next(exists, True))
        train.load(config)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(train, "fit", lambda *args, **kwargs: pytest.fail("made again"))
    same = dict(seed=5, lr=1.0, method="opd", steps=9, batch_size=3, dv_size=5, loss="sampled")
    _, again, _, known = train.load(replace(config, **same))
    assert equal(again.parameters(), student.parameters()) and known == control
    for setting in (dict(gap="slip"), dict(num_ops=2), dict(digits=2), dict(hidden_size=32),
                    dict(base_steps=31), dict(teacher_lr=3e-3), dict(eval_size=21)):
        with pytest.raises(pytest.fail.Exception):
            train.load(replace(config, **setting))


def test_the_base_of_gap_skill_is_an_early_moment_of_the_teachers_training(tmp_path):
    models = []
    for base_steps, teacher_steps in ((9, 9), (15, 3)):
        settings = TOY | dict(base_steps=base_steps, teacher_steps=teacher_steps, gap="skill")
        models.append(train.load(Config(**settings, cache_dir=str(tmp_path)))[1:3])
    (base, teacher), (later, same_teacher) = models
    assert equal(teacher.parameters(), same_teacher.parameters())
    assert not equal(base.parameters(), later.parameters())


def test_zero_steps_are_those_of_the_gap():
    assert Config(gap="slip") == Config(gap="slip", base_steps=1000, teacher_steps=150)


# The race and the command line.

def a_run(final, *points):
    keys = ("step", "accuracy", "tokens", "seconds")
    curve = [dict(zip(keys, point)) for point in points]
    return dict(final_accuracy=final, searches=[], examples=[], curve=curve)


def test_speed_ups_by_hand():
    summary = train.compare({
        "OPD": a_run(0.7, (0, 0.4, 0, 0.0), (8, 0.6, 800, 4.0), (16, 0.71, 1600, 8.0)),
        "fast": a_run(0.9, (0, 0.9, 0, 0.0), (4, 0.7, 800, 2.5), (8, 0.9, 1600, 5.0)),
        "slow": a_run(0.5, (0, 0.4, 0, 0.0), (16, 0.5, 3200, 9.0))})
    methods = summary["methods"]
    assert summary["target"] == 0.7
    assert methods["OPD"]["speed_up"] == dict(step=1, tokens=1, seconds=1)
    assert methods["fast"]["speed_up"] == dict(step=4, tokens=2, seconds=3.2)    # not at step 0
    assert methods["slow"]["reached"] is None and methods["slow"]["speed_up"] is None


def test_the_race_from_the_command_line(tmp_path, cache_dir):
    """The real command, once: its directory, its files, its words."""
    command = [sys.executable, train.__file__, *arguments(TOY | dict(eval_every=1)),
               "--cache_dir", str(cache_dir)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in ("times fewer steps", "race.png", "before"))
    race, starts = tmp_path / "runs" / "race", set()
    assert (race / "race.png").read_bytes()[:4] == b"\x89PNG"
    summary = json.loads((race / "summary.json").read_text())
    for name, (directory, settings) in train.RACE.items():
        home = race / directory
        config = json.loads((home / "config.json").read_text())
        assert config.items() >= settings.items()
        log, own = read_lines(home / "log.jsonl"), json.loads((home / "summary.json").read_text())
        assert [line["step"] for line in log] == [1, 2, 3, 4]
        curve = own["curve"]
        assert curve == summary["methods"][name]["curve"] and len(curve) == 5
        assert own["final_accuracy"] == fmean(point["accuracy"] for point in curve[-3:])
        assert curve[-1]["tokens"] == log[-1]["tokens"] == log[-1]["sampled"] + log[-1]["scored"]
        assert not (home / "state.pt").exists()
        start = (home / "checkpoints/step_000000/model.safetensors").read_bytes()
        starts.add((log[0]["kl"], curve[0]["accuracy"], start))
    assert len(starts) == 1                                   # one start, and the same problems
    (search,) = read_lines(race / "recommended" / "search.jsonl")     # --searches 1
    assert log[-1]["lr"] == search["lr"] == log[0]["lr"] * (1 + search["multiple"])


def test_a_run_says_how_far_it_jumped_and_its_rate(tmp_path, cache_dir, capsys):
    finder = train.RACE["EffOPD, recommended"][1]
    train.main(arguments(TOY | finder | dict(cache_dir=cache_dir, out_dir=tmp_path / "run")))
    (search,) = read_lines(tmp_path / "run" / "search.jsonl")
    words = f"After step 1: W_t + {search['multiple']:g} Δ kept, learning rate {search['lr']:.2g}"
    assert search["multiple"] and words in capsys.readouterr().out


@pytest.mark.parametrize("words, said", [
    ("--lr abc", "invalid float value: 'abc'"), ("--lr nan", "--lr must be above 0"),
    ("--lr inf", "--lr must be"), ("--gap foo", "'foo'"), ("--seed -1", "--seed must be 0 or"),
    ("--seed 99999999999999999999", "below 2^63"),
    ("--device cuda:99", "CUDA GPUs"), ("--step 3", "--step"),
    ("--hidden_size 90", "head_dim must be even"), ("--eval_size 31", "at most a tenth"),
    ("--dv_size 251", "nine in all"),
    ("--method rl --batch_size 100", "divide --batch_size (100)"),
    ("--task abacus", "--task must be chains or MODULE"), ("--score os:luck", "no attribute"),
    ("--candidates my.search:f", "No module named"), ("--cache_dir file", "File exists"),
    ("--out_dir .", "--out_dir . exists"), ("--resume nowhere", "nowhere/config.json"),
    ("--resume nowhere --lr 1", "takes every setting from the run")])
def test_bad_settings_end_in_one_line(words, said, tmp_path, monkeypatch, capsys, cache_dir):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    settings = [] if "--resume" in words else arguments(
        TOY | dict(method="effopd", steps=1, cache_dir=cache_dir))
    with pytest.raises(SystemExit) as stopped:
        train.main([*settings, *words.split()])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("train.py: ") and said in error


def test_help_is_printed_on_an_ascii_terminal(monkeypatch):   # also: a % in a help text breaks it
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as done:
        train.main(["--help"])
    terminal.flush()
    assert done.value.code == 0 and b"--move_lr" in terminal.buffer.getvalue()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_race_on_a_gpu(tmp_path, capsys):
    settings = TOY | dict(device="cuda", cache_dir=tmp_path / "cache", out_dir=tmp_path / "race")
    train.main(arguments(settings))
    assert "times fewer steps" in capsys.readouterr().out
