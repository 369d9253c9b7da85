"""train.py: the task, the batches, the scores, the loop, the race and the command line."""

import copy
import dataclasses
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import TOY, arguments, random_model, read_lines
from effopd import EffOPD, undisturbed
from model import GPT
from train import Chains, Config, Judge, evaluate, pack

replace = dataclasses.replace


def run(config, task, student, teacher, directory, **options):
    directory.mkdir(parents=True)
    return train.train(config, task, student, teacher, directory, "toy", **options)


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def steps_of(answer):
    """"7+5=2;2-3=9;#9" -> [(7, "+", 5, 2), (2, "-", 3, 9)]"""
    found = re.findall(r"(\d+)([-+*])(\d+)=(\d+);", answer)
    return [(int(a), op, int(b), int(result)) for a, op, b, result in found]


# The task.

def test_a_chain_by_hand():
    task = Chains(Config(num_ops=3))
    assert task.solve("7+5-3*4=") == "7+5=2;2-3=9;9*4=6;#6"
    assert task.solve("7+5-3*4=", habit=True) == "7+5=2;2-3=1;1*4=4;#4"
    assert task.is_correct("7+5-3*4=", "7+5=2;2-3=9;9*4=6;#6") and task.is_correct("7+5-3*4=", "#6")
    for answer in ("", "6", "#", "#66", "7+5=2;2-3=9;9*4=6;", "#5", "#6#"):
        assert not task.is_correct("7+5-3*4=", answer)
    assert Chains(Config(digits=2)).solve("37+85*4=") == "37+85=22;22*4=88;#88"


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


def test_slips_come_at_their_rate_and_are_carried_on():
    task, rng, wrong = Chains(Config()), random.Random(0), []
    for problem in task.problems(2000, rng):
        steps = steps_of(task.flawed(problem, "slip", rng))
        wrong += [eval(f"{a} {op} {b}") % 10 != result for a, op, b, result in steps]
        assert all(step[0] == before[3] for before, step in zip(steps, steps[1:]))
    assert fmean(wrong) == pytest.approx(0.2, abs=0.015)


def test_the_habit_reverses_all_subtractions_of_six_answers_in_ten():
    task, rng, reversed_in, others = Chains(Config()), random.Random(0), [], []
    for problem in task.problems(4000, rng):
        steps = steps_of(task.flawed(problem, "habit", rng))
        others += [eval(f"{a} {op} {b}") % 10 != result for a, op, b, result in steps if op != "-"]
        kinds = {result == (b - a) % 10 for a, op, b, result in steps
                 if op == "-" and (a - b) % 5 and result in ((a - b) % 10, (b - a) % 10)}
        reversed_in += [fmean(kinds)] if kinds else []        # 0 no, 1 all, 1/2 some: by a slip
    assert reversed_in.count(1) / len(reversed_in) == pytest.approx(0.6, abs=0.025)
    assert reversed_in.count(0.5) / len(reversed_in) < 0.02
    assert fmean(others) == pytest.approx(0.05, abs=0.01)


def test_no_problem_of_the_evaluation_or_of_d_v_is_trained_on(toy, tmp_path, monkeypatch):
    config, _, student, teacher = toy
    held_out, used, dv, encode = set(), [], set(), Chains.encode
    monkeypatch.setattr(Chains, "encode", lambda self, p: used.append(p) or encode(self, p))
    monkeypatch.setattr(train, "evaluate", lambda *args, **options: (0.0, [[1]] * 20))
    config = replace(config, method="effopd", score="dv", dv_size=60, steps=30,
                     cache_dir=str(tmp_path))
    task, *_ = train.load(config)
    held_out.update(train.evaluation_problems(config, task))
    assert len(held_out) > 15 and not held_out & set(used)
    assert len(held_out) + len(set(used)) == 300              # all the others
    used.clear()
    run(config, task, student, teacher, tmp_path / "run",
        scores={"dv": lambda judge, model: dv.update(judge.problems) or 0.0})
    assert len(dv) > 40 and not held_out & dv and not (held_out | dv) & set(used)
    assert len(set(used)) > 120                               # of 240: what was shared would show


# Alignment of prompts, answers and masks.

def test_packed_logits_are_those_that_chose_the_answers(toy):
    """Off by one, a lost last token or shifted padding would all show."""
    _, task, student, _ = toy
    problems = ["1+2=", "1+2*3-4=", "9*9+1="]
    prompts = [task.encode(problem) for problem in problems]
    rollout = student.generate(prompts, 20, 1.0, torch.Generator().manual_seed(4), task.end)
    lengths = rollout.mask.sum(1).tolist()
    assert len(set(lengths)) == 3 and min(lengths) < 20       # ragged, and some ended with <end>
    answers = [row[:n] for row, n in zip(rollout.tokens.tolist(), lengths)]
    (part,), num_tokens = pack(task, problems, answers, "cpu")
    log_p = F.log_softmax(student(part.inputs), -1).gather(-1, part.tokens[..., None])[..., 0]
    torch.testing.assert_close(log_p[part.mask], rollout.log_probs[rollout.mask])
    assert num_tokens == part.mask.sum() == sum(lengths)


def test_the_end_token_carries_loss_and_padding_does_not(toy):
    task = toy[1]
    one, two, end = *task.encode("12"), task.end
    (part,), num_tokens = pack(task, ["12", "1"], [[5, end], [6, 7, 8, end]], "cpu")
    assert part.ids.tolist() == [[one, two, 5, end, 0], [one, 6, 7, 8, end]]
    assert part.mask.tolist() == [[False, True, True, False], [True, True, True, True]]
    assert part.tokens[part.mask].tolist() == [5, end, 6, 7, 8, end] and num_tokens == 6
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


def test_scores_are_what_they_say_and_count_their_tokens(toy, monkeypatch):
    _, task, student, teacher = toy
    monkeypatch.setattr(Chains, "is_correct", lambda self, problem, answer: problem[0] in answer)
    problems = task.problems(12, random.Random(1))
    generator = torch.Generator().manual_seed(7)
    rollout = student.generate([task.encode(p) for p in problems], task.max_response, 1.0,
                               generator, task.end)
    answers = [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.mask)]
    tokens, parts = sum(map(len, answers)), pack(task, problems, answers, "cpu", 5)[0]
    right = [problem[0] in task.decode(answer) for problem, answer in zip(problems, answers)]
    kl = kl_by_hand(task, student, teacher, problems, answers)
    assert 0 < sum(right) < 12 and kl > 0.1

    for name, expected, sampled in [("accuracy", fmean(right), tokens), ("rollout_kl", -kl, tokens),
                                    ("batch_kl", -kl, 0)]:
        for part in parts:
            part.target = teacher(part.inputs)
        judge = Judge(train.SCORES[name], task, teacher, problems, parts, tokens)
        if name == "batch_kl":
            monkeypatch.setattr(GPT, "generate", lambda *_: pytest.fail("nothing is generated"))
        with undisturbed(student, seed=7):
            assert judge(student) == pytest.approx(expected, abs=1e-5)
            assert (judge.sampled, judge.scored) == (sampled, tokens - sampled)
            if name != "accuracy":
                assert judge(teacher) == pytest.approx(0, abs=1e-5)


def test_candidates_share_their_random_numbers_over_all_of_d_v(toy, monkeypatch):
    """D_v of three rollout batches; to the first, one candidate gives answers of a single token."""
    config, _, student, teacher = toy
    task = Chains(replace(config, rollout_batch_size=4))
    other, generate, seen = copy.deepcopy(student), GPT.generate, []
    problems = task.problems(12, random.Random(1))
    monkeypatch.setattr(train, "rewards_of", lambda t, p, answers: seen.append(answers) or [0.0])

    def shorter_at_first(prompts, n, temperature, generator, eos):
        first = prompts == [task.encode(problem) for problem in problems[:4]]
        return generate(other, prompts, n, temperature, generator, range(17) if first else eos)

    other.generate = shorter_at_first
    for score in (train.accuracy, train.rollout_kl):
        seen.clear()
        judge = Judge(score, task, teacher, problems, pack(task, ["1+1="], [[1]], "cpu")[0])
        for model in (student, other):
            with undisturbed(model, seed=5):
                judge(model)
        assert seen[0][:4] != seen[1][:4] and seen[0][4:] == seen[1][4:]
    one_stream = [train.sample_answers(model, task, problems, torch.Generator().manual_seed(5))
                  for model in (student, other)]              # common in the first batch alone
    assert one_stream[0][4:] != one_stream[1][4:]


def test_the_temperature_is_one_scalar_on_the_logits(toy):
    _, task, student, _ = toy
    problems, state = task.problems(20, random.Random(1)), torch.get_rng_state()
    colder = copy.deepcopy(student)
    with torch.no_grad():
        colder.lm_head.weight.mul_(4)
    expected = evaluate(colder, task, problems, seed=3)
    assert evaluate(student, task, problems, seed=3, temperature=0.25) == expected
    assert evaluate(student, task, problems, seed=3) != expected
    assert torch.equal(torch.get_rng_state(), state)          # and the global random state is kept


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
    (only,) = train.make_optimizers(config, student)
    assert len(only.param_groups[0]["params"]) == len(names) and only.defaults["weight_decay"] == 0


def test_a_search_that_accepts_nothing_is_plain_opd_bit_for_bit(toy, tmp_path):
    config, task, student, teacher = toy
    ends, logs = [], []
    for method in ("opd", "effopd"):
        mine = copy.deepcopy(student)
        torch.manual_seed(0)
        own = replace(config, method=method, score="rollout_kl", search_every=3, move_lr=True,
                      optimizer="muon", steps=6)
        summary = run(own, task, mine, teacher, tmp_path / method, accept=lambda new, old: False)
        ends.append([*weights_of(mine), torch.get_rng_state()])
        lines = read_lines(tmp_path / method / "log.jsonl")
        logs.append([[line[key] for key in ("loss", "kl", "grad_norm", "lr")] for line in lines])
    assert equal(*ends) and logs[0] == logs[1] and len(logs[0]) == 6
    searches = read_lines(tmp_path / "effopd" / "search.jsonl")
    assert [s["step"] for s in searches] == [1, 2, 3, 4, 6] == [
        s["step"] for s in summary["searches"]]
    assert all(s["multiple"] == 0 and len(s["scores"]) == 2 for s in searches)
    assert summary["tokens"] > json.loads((tmp_path / "opd/summary.json").read_text())["tokens"]


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


def test_rl_has_groups_of_answers_and_sft_asks_the_teacher(toy, monkeypatch):
    config, task, student, teacher = toy
    asked, sample = [], train.sample_answers
    monkeypatch.setattr(train, "sample_answers", lambda *args: asked.append(args) or sample(*args))
    for method, model, n in [("opd", student, 8), ("sft", teacher, 8), ("rl", student, 64)]:
        gradients(train.METHODS[method], config, task, student, teacher)
        assert asked[-1][0] is model and len(asked[-1][2]) == n
    groups = [asked[-1][2][i:i + 8] for i in range(0, 64, 8)]
    assert all(len(set(group)) == 1 for group in groups) and len(set(map(tuple, groups))) > 4


def test_checkpoints_are_from_before_the_jump(toy, tmp_path):
    config, task, student, teacher = toy
    own = replace(config, method="effopd", score="batch_kl", candidates="doubling", lr=1e-3)
    run(own, task, student, teacher, tmp_path / "run")
    run(replace(own, checkpoints=False), *copy.deepcopy((task, student, teacher)), tmp_path / "few")
    assert [path.name for path in (tmp_path / "few" / "checkpoints").iterdir()] == ["final"]
    home = tmp_path / "run" / "checkpoints"
    names = [f"step_00000{i}" for i in (0, 1, 2, 4)]
    assert sorted(path.name for path in home.iterdir()) == ["final", *names]
    start, after = (dict(GPT.from_pretrained(home / name).named_parameters()) for name in names[:2])
    delta = sum((after[name] - p).square().sum() for name, p in start.items() if ".layers." in name
                and p.ndim == 2).sqrt().item()
    search = read_lines(tmp_path / "run" / "search.jsonl")[0]
    assert search["multiple"] > 0 and delta == pytest.approx(search["delta_norm"], rel=1e-4)
    assert len(search["utility"]) == 7 and any(search["utility"].values())    # gradients were there
    assert equal(GPT.from_pretrained(home / "final").parameters(), student.parameters())


def test_settings_reach_the_search(toy):
    given = {}
    settings = dict(accept="ge", candidates="doubling", num_candidates=3, scope="all", seed=11,
                    first_trigger=4, move_lr=True, utility_gate=True, alignment_gate=0.5)
    config = replace(toy[0], method="effopd", search_every=7, **settings)
    train.make_effopd(config, None, None, ["optimizer"], direction=abs, accept=max,
                      cls=lambda student, judge, **options: given.update(options))
    assert given == settings | dict(every=7, optimizer=["optimizer"], direction=abs, accept=max)
    assert train.make_effopd(replace(config, method="opd"), None, None, []) is None
    assert isinstance(train.make_effopd(replace(toy[0], method="effopd"), toy[2], None, []), EffOPD)


@pytest.mark.parametrize("where, words", [("loss", "step 3: the loss is nan"),
                                          ("gradient", "the gradient's norm nan")])
def test_a_number_that_is_not_finite_stops_the_run_before_the_weights(where, words, toy, tmp_path):
    config, task, student, teacher = toy
    config, calls, before = replace(config, method="opd"), [], []

    def step(*args):
        parts, entry = train.opd_step(*args)
        calls.append(1)
        if len(calls) == 3:
            before.extend(weights_of(student))
            student.lm_head.weight.grad[0, 0] = math.nan if where == "gradient" else 0.0
            entry["loss"] = entry["loss"] * (math.nan if where == "loss" else 1.0)
        return parts, entry

    with pytest.raises(ValueError, match=words):
        run(config, task, student, teacher, tmp_path / "run", methods={"opd": step})
    assert equal(before, student.parameters())
    assert len(read_lines(tmp_path / "run" / "log.jsonl")) == 2


# Base and teacher.

def test_base_and_teacher_are_made_once_for_what_makes_them(tmp_path, monkeypatch):
    config = Config(**TOY, cache_dir=str(tmp_path))
    _, student, teacher, control = train.load(config)
    assert not equal(student.parameters(), teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    (home,) = tmp_path.iterdir()                              # and no scratch directory is left
    assert sorted(path.name for path in home.iterdir()) == ["base", "control.json", "teacher"]
    monkeypatch.setattr(train, "fit", lambda *args, **kwargs: pytest.fail("made again"))
    same = dict(seed=5, lr=1.0, method="opd", steps=9, batch_size=3, dv_size=5, loss="sampled")
    _, again, _, known = train.load(replace(config, **same))
    assert equal(again.parameters(), student.parameters()) and known == control
    for setting in (dict(gap="slip"), dict(num_ops=2), dict(digits=2), dict(hidden_size=32),
                    dict(num_hidden_layers=2), dict(base_steps=31), dict(teacher_steps=31),
                    dict(base_lr=1e-3), dict(teacher_lr=3e-3), dict(eval_size=21)):
        with pytest.raises(pytest.fail.Exception):
            train.load(replace(config, **setting))
    for name, gap in (("flawed", "slip"), ("solve", "skill")):     # other rules, the same settings
        recipe = train.recipe_of(replace(config, gap=gap), Chains(config))
        monkeypatch.setattr(Chains, name, lambda *args, **options: "#1")
        assert train.recipe_of(replace(config, gap=gap), Chains(config)) != recipe


def test_the_base_of_gap_skill_is_an_early_moment_of_the_teachers_training(tmp_path):
    models = []
    for base_steps, teacher_steps in ((9, 9), (15, 3)):
        settings = TOY | dict(base_steps=base_steps, teacher_steps=teacher_steps, gap="skill")
        models.append(train.load(Config(**settings, cache_dir=str(tmp_path)))[1:3])
    (base, teacher), (later, same_teacher) = models
    assert equal(teacher.parameters(), same_teacher.parameters())
    assert not equal(base.parameters(), later.parameters())
    assert not equal(base.parameters(), teacher.parameters())


def test_two_processes_and_a_kill_leave_one_whole_cache(tmp_path, cache_dir):
    def child(lives=1000):
        """A process that makes base and teacher; killed after so many steps of their training."""
        pid = os.fork()
        if pid == 0:
            calls, clip = [], torch.nn.utils.clip_grad_norm_
            torch.nn.utils.clip_grad_norm_ = lambda *args: calls.append(1) or (
                os.kill(os.getpid(), signal.SIGKILL) if len(calls) > lives else clip(*args))
            sys.stderr = open(os.devnull, "w")
            try:
                train.load(config)
            finally:
                os._exit(sys.exc_info()[0] is not None)
        return pid

    config = Config(**TOY, cache_dir=str(tmp_path))
    assert os.waitpid(child(lives=40), 0)[1] == signal.SIGKILL         # the base is made
    assert all(path.name.startswith("unfinished") for path in tmp_path.iterdir())
    assert [os.waitpid(pid, 0)[1] for pid in [child(), child()]] == [0, 0]
    (home,) = [path for path in tmp_path.iterdir() if not path.name.startswith("unfinished")]
    _, _, reference, _ = train.load(Config(**TOY, cache_dir=str(cache_dir)))
    assert equal(reference.parameters(), GPT.from_pretrained(home / "teacher").parameters())


# The race and the command line.

def a_run(final, *points):
    keys = ("step", "accuracy", "tokens", "seconds")
    curve = [dict(zip(keys, point)) for point in points]
    return dict(final_accuracy=final, searches=[], examples=[], curve=curve)


def test_speed_ups_by_hand(capsys):
    summary = train.compare({
        "OPD": a_run(0.7, (0, 0.4, 0, 0.0), (8, 0.6, 800, 4.0), (16, 0.71, 1600, 8.0)),
        "fast": a_run(0.9, (0, 0.9, 0, 0.0), (4, 0.7, 800, 2.5), (8, 0.9, 1600, 5.0)),
        "slow": a_run(0.5, (0, 0.4, 0, 0.0), (16, 0.5, 3200, 9.0))})
    methods = summary["methods"]
    assert summary["target"] == 0.7
    assert methods["OPD"]["speed_up"] == dict(step=1, tokens=1, seconds=1)
    assert methods["fast"]["speed_up"] == dict(step=4, tokens=2, seconds=3.2)    # not at step 0
    assert methods["slow"]["reached"] is None and methods["slow"]["speed_up"] is None
    train.print_race(summary)
    assert "did not reach it" in capsys.readouterr().out
    for k in range(1001):                                     # a mean of three may exceed them all
        curve = a_run(0.0, (0, 0, 0, 0), (1, k / 1000, 1, 1))["curve"]
        assert train.first_at(curve, fmean([k / 1000] * 3))["step"] == 1


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
    assert list(summary["methods"]) == list(train.RACE) and 0 <= summary["control"]["teacher"] <= 1
    for name, (directory, settings) in train.RACE.items():
        home = race / directory
        config = json.loads((home / "config.json").read_text())
        assert {key: config[key] for key in settings} == settings
        assert config["versions"]["torch"] == torch.__version__
        log, own = read_lines(home / "log.jsonl"), json.loads((home / "summary.json").read_text())
        assert [line["step"] for line in log] == [1, 2, 3, 4]
        assert {"loss", "kl", "reward", "grad_norm", "lr", "seconds", "accuracy"} <= set(log[0])
        assert own["curve"] == summary["methods"][name]["curve"] and len(own["curve"]) == 5
        point, last = own["curve"][-1], log[-1]
        assert point["tokens"] == last["tokens"] == last["sampled"] + last["scored"]
        assert not (home / "state.pt").exists()
        final = fmean(point["accuracy"] for point in own["curve"][2:])
        assert own["final_accuracy"] == pytest.approx(final)  # of the last three evaluations
        start = (home / "checkpoints/step_000000/model.safetensors").read_bytes()
        starts.add((log[0]["kl"], own["curve"][0]["accuracy"], start))
    assert len(starts) == 1                                   # one start, and the same problems


def test_a_directory_is_claimed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(train.claim_directory(Config(**TOY))) for _ in range(3)]
    assert names == ["runs/race", "runs/race-2", "runs/race-3"]


@pytest.mark.parametrize("words, said", [
    ("--lr abc", "invalid float value: 'abc'"), ("--lr nan", "--lr must be"),
    ("--lr inf", "--lr must be"), ("--lr 0", "--lr must be above 0"), ("--method foo", "'foo'"),
    ("--gap foo", "'foo'"), ("--steps 0", "--steps must be"), ("--seed -1", "--seed must be 0 or"),
    ("--seed 99999999999999999999", "--seed must be"), ("--device abacus", "--device must be"),
    ("--device cuda:99", "CUDA GPUs"), ("--digits 3", "--digits must be"), ("--digits", "expected"),
    ("--hidden_size 90", "--hidden_size must be"), ("--search_every -1", "--search_every must be"),
    ("--method rl --batch_size 100", "divide --batch_size (100)"), ("--nonsense 1", "--nonsense"),
    ("--method rl --group_size 1", "--group_size must be"), ("--step 3", "--step"),
    ("--eval_size 31", "at most a tenth"), ("--task abacus", "--task must be chains or MODULE"),
    ("--score luck", "--score must be accuracy, batch_kl, rollout_kl or MODULE:NAME"),
    ("--score os:luck", "no attribute 'luck'"), ("--candidates my.search:f", "No module named"),
    ("--out_dir .", "--out_dir . exists"), ("--cache_dir file", "File exists"),
    ("--out_dir file/run", "Not a directory"), ("--resume nowhere", "nowhere/config.json"),
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


def test_help_names_every_setting_also_where_a_terminal_has_only_ascii(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    terminal.flush()
    text = terminal.buffer.getvalue().decode()
    assert stopped.value.code == 0
    for setting in dataclasses.fields(Config):
        assert f"--{setting.name}" in text and setting.metadata["help"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_race_on_a_gpu(tmp_path, capsys):
    settings = TOY | dict(device="cuda", cache_dir=tmp_path / "cache", out_dir=tmp_path / "race")
    train.main(arguments(settings))
    assert "times fewer steps" in capsys.readouterr().out
