"""train.py: the task, the batches, the loop, the race and the command line, at toy size."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import train
from effopd import reverse_kl
from model import GPT, GPTConfig
from train import Chains, Config, Score, compare, evaluate, load_models, main, pack, parse_config

TOY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_ops=2, base_steps=4,
           teacher_steps=2, base_batch_size=8, steps=4, batch_size=6, eval_size=10, device="cpu")
ROOT = Path(train.__file__).parent


def as_args(settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def distil(config, task, student, teacher, directory, label="toy"):
    directory.mkdir(parents=True)
    return train.distil(config, task, student, teacher, directory, label)


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def toy(tmp_path):
    """A toy config, its task, an untrained student and a different teacher."""
    config = Config(**TOY, dv_size=5, lr=1e-2, cache_dir=str(tmp_path / "cache"))
    task = Chains(2, 1)
    torch.manual_seed(0)
    student, teacher = (GPT(GPTConfig(task.vocab_size, 16, 24, 1, 2)) for _ in range(2))
    return config, task, student, teacher.requires_grad_(False)


# The task.

def test_a_chain_by_hand():
    task = Chains(3, 1)
    assert task.solve("7+5-3*4=") == "7+5=2;2-3=9;9*4=6;#6"
    assert task.is_correct("7+5-3*4=", "7+5=2;2-3=9;9*4=6;#6") and task.is_correct("7+5-3*4=", "#6")
    assert not any(task.is_correct("7+5-3*4=", a) for a in ("", "6", "#", "#66", "7+5=2;2-3=9;9*4=6;", "#5"))
    assert Chains(2, 2).solve("37+85*4=") == "37+85=22;22*4=88;#88"


@pytest.mark.parametrize("digits", [1, 2])
def test_chains_are_worked_out_as_python_would(digits):
    task, rng = Chains(6, digits), random.Random(0)
    for problem in task.problems(200, rng):
        value, text = None, problem[:-1].replace("+", " + ").replace("-", " - ").replace("*", " * ").split()
        value = int(text[0])
        for op, number in zip(text[1::2], text[2::2]):
            value = eval(f"({value} {op} {number}) % {10 ** digits}")
        answer = task.solve(problem)
        assert answer.endswith(f"#{value}") and answer.count(";") == 6
        assert task.decode(task.encode(answer) + [task.end]) == answer
        assert len(task.encode(problem)) <= task.max_prompt and len(task.encode(answer)) + 1 <= task.max_response


def test_slips_come_at_their_rate_and_are_carried_on():
    task, rng = Chains(5, 1), random.Random(0)
    wrong = steps = 0
    for problem in task.problems(2000, rng):
        answer = task.solve(problem, 0.2, rng)
        for step in answer.split(";")[:-1]:
            question, result = step.split("=")
            wrong += eval(question) % 10 != int(result)
            steps += 1
        chain = [step.split("=")[1] for step in answer.split(";")[:-1]]
        assert all(step[0] == previous for step, previous in zip(answer.split(";")[1:-1], chain))
    assert abs(wrong / steps - 0.2) < 0.015


def test_no_evaluation_problem_is_trained_on(toy, monkeypatch, tmp_path):
    config, task, student, teacher = toy
    everything = [f"{a}{p}{b}{q}{c}=" for a in range(10) for b in range(10) for c in range(10)
                  for p in "+-*" for q in "+-*"]
    held_out, used = set(everything[:8500]), []               # leaves 500 of 9,000
    monkeypatch.setattr(train, "evaluation_problems", lambda *_: everything[:8500])
    monkeypatch.setattr(train, "evaluate", lambda *_: (0.5, []))
    real = Chains.encode
    monkeypatch.setattr(Chains, "encode", lambda self, text: used.append(text) or real(self, text))
    load_models(config, task)
    assert len(used) == 2 * (4 + 2) * 8 and not held_out & set(used)                     # base and teacher
    used.clear()
    distil(dataclasses.replace(config, method="effopd"), task, student, teacher, tmp_path / "run")
    assert len(used) > 4 * 6 * 2 and not held_out & set(used)                            # training and D_v


# Alignment.

def test_packed_logits_are_those_that_chose_the_answers(toy):
    """Off by one, a lost last token or shifted padding would all show: pitfalls 1 to 3."""
    _, task, student, _ = toy
    prompts = [task.encode(p) for p in ("1+2=", "1+2*3-4=", "9*9+1=")]
    rollout = student.generate(prompts, 20, generator=torch.Generator().manual_seed(3), eos_token_id=task.end)
    lengths = rollout.mask.sum(1).tolist()
    assert len(set(lengths)) > 1 and min(lengths) < 20        # ragged, and some rows ended with <end>
    batch = pack(prompts, [t[:n] for t, n in zip(rollout.tokens.tolist(), lengths)], "cpu")
    log_p = F.log_softmax(student(batch.ids[:, :-1]), -1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(log_p[batch.mask], rollout.log_probs[rollout.mask], atol=1e-5, rtol=0)


def test_end_token_carries_loss_and_padding_does_not():
    end = 9
    batch = pack([[1, 2], [3]], [[5, end], [6, 7, 8, end]], "cpu")
    assert batch.ids.tolist() == [[1, 2, 5, end, 0], [3, 6, 7, 8, end]]
    assert batch.mask.tolist() == [[False, True, True, False], [True, True, True, True]]
    assert batch.ids[:, 1:][batch.mask].tolist() == [5, end, 6, 7, 8, end]


def test_answers_that_are_empty_or_end_at_once():
    batch = pack([[1, 2], [3], [4, 4, 4]], [[], [9], [5]], "cpu")
    assert batch.mask.tolist() == [[False, False, False], [True, False, False], [False, False, True]]
    assert pack([[1, 2]], [[]], "cpu").mask.tolist() == [[False]]


def test_a_teacher_equal_to_the_student_teaches_nothing(toy):
    _, task, student, _ = toy
    for answers in ([[5], [6]], [[5, 6, 7, task.end], [task.end]]):
        batch = pack([task.encode("1+2="), task.encode("3*4-5=")], answers, "cpu")
        logits = student(batch.ids[:, :-1])
        position_kl = [reverse_kl(logits, logits, batch.mask & (torch.arange(batch.mask.shape[1]) == t)).item()
                       for t in range(batch.mask.shape[1])]
        assert max(map(abs, position_kl)) < 1e-6


# Base, teacher, scores.

def test_base_and_teacher_are_made_once(tmp_path, monkeypatch):
    config = Config(**TOY, cache_dir=str(tmp_path))
    task = Chains(2, 1)
    student, teacher = load_models(config, task)
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters()))
    assert all(p.requires_grad for p in student.parameters()) and not any(p.requires_grad for p in teacher.parameters())
    monkeypatch.setattr(train, "fit", lambda *args, **kwargs: pytest.fail("trained again"))
    again, _ = load_models(config, task)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters()))
    (home,) = tmp_path.iterdir()                              # and no scratch directory is left
    assert sorted(p.name for p in home.iterdir()) == ["base", "recipe.json", "teacher"]
    with pytest.raises(pytest.fail.Exception):
        load_models(dataclasses.replace(config, slip=0.3), task)


def test_an_interrupted_first_use_leaves_nothing_that_is_taken_for_a_model(tmp_path, monkeypatch):
    config, task, calls = Config(**TOY, cache_dir=str(tmp_path)), Chains(2, 1), []
    real = train.fit

    def killed_in_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    monkeypatch.setattr(train, "fit", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        load_models(config, task)
    load_models(config, task)                                 # trains again from the start
    assert len(calls) == 4


def test_gap_skill_takes_the_base_from_the_teachers_own_run(tmp_path):
    """Base and teacher are two moments of one clean run: stopping that run early gives the same base."""
    task = Chains(2, 1)
    weights = []
    for base_steps, teacher_steps in ((3, 3), (5, 1)):
        config = Config(**TOY | dict(base_steps=base_steps, teacher_steps=teacher_steps), gap="skill", slip=0.9,
                        cache_dir=str(tmp_path / str(base_steps)))
        base, teacher = load_models(config, task)
        weights.append((base.lm_head.weight, teacher.lm_head.weight))
    assert torch.equal(weights[0][1], weights[1][1])          # the same run
    assert not torch.equal(weights[0][0], weights[1][0]) and not torch.equal(weights[0][0], weights[0][1])


def test_scores(toy, monkeypatch):
    config, task, student, teacher = toy
    problems = task.problems(5, random.Random(1))
    accuracy = Score(config, task, teacher, problems)
    torch.manual_seed(0)
    value = accuracy(student)
    torch.manual_seed(0)
    answers = train.answer(student, task, problems)
    assert value == train.accuracy(task, problems, answers) and accuracy.tokens == sum(map(len, answers))

    rollout_kl = Score(dataclasses.replace(config, score="rollout_kl"), task, teacher, problems)
    torch.manual_seed(0)
    value = rollout_kl(student)
    batch = pack([task.encode(p) for p in problems], answers, "cpu")
    expected = -reverse_kl(student(batch.ids[:, :-1]), teacher(batch.ids[:, :-1]), batch.mask).item()
    assert value == pytest.approx(expected, abs=1e-6) and rollout_kl.tokens == sum(map(len, answers))
    assert rollout_kl(teacher) == pytest.approx(0, abs=1e-6)

    batch_kl = Score(dataclasses.replace(config, score="batch_kl"), task, teacher, problems)
    batch_kl.last_batch = batch, [train.states(teacher, batch)]
    monkeypatch.setattr(GPT, "generate", lambda *a, **k: pytest.fail("batch_kl needs no generation"))
    assert batch_kl(student) == pytest.approx(expected, abs=1e-6) and batch_kl.tokens == int(batch.mask.sum())


# The loop.

def test_a_search_that_accepts_nothing_is_plain_opd_bit_for_bit(toy, tmp_path, monkeypatch):
    config, task, student, teacher = toy
    optimizers, ends = [], {}
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: optimizers.append(adamw(*a, **k)) or optimizers[-1])
    real = Score.__call__
    monkeypatch.setattr(Score, "__call__", lambda self, model: real(self, model) * 0)      # works, likes nothing
    for method in ("opd", "effopd"):
        torch.manual_seed(0)
        mine = GPT(student.config)
        own = dataclasses.replace(config, method=method, score="rollout_kl", search_every=3)
        distil(own, task, mine, teacher, tmp_path / method, method)
        moments = [v for s in optimizers[-1].state_dict()["state"].values() for v in s.values()]
        ends[method] = [*mine.parameters(), *moments, torch.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(ends["opd"], ends["effopd"], strict=True))
    logs = [[{k: v for k, v in line.items() if k not in ("seconds", "validation_tokens")}
             for line in read_lines(tmp_path / method / "log.jsonl")] for method in ("opd", "effopd")]
    assert logs[0] == logs[1] and len(logs[0]) == config.steps
    searches = read_lines(tmp_path / "effopd" / "search.jsonl")
    assert [s["step"] for s in searches] == [1, 2, 3, 4]
    assert all(s["accepted"] == 0 and s["tokens"] > 0 for s in searches)


@pytest.mark.parametrize("loss", ["full", "sampled", "sequence", "top_k"])
def test_every_loss_brings_the_student_to_the_teacher(loss, toy, tmp_path):
    config, task, student, teacher = toy
    with torch.no_grad():                                     # a teacher that says one thing, clearly
        teacher.lm_head.weight.mul_(3)
    own = dataclasses.replace(config, method="opd", loss=loss, steps=40, eval_every=40, batch_size=256, lr=1e-2)
    distil(own, task, student, teacher, tmp_path / "run", loss)
    log = read_lines(tmp_path / "run" / "log.jsonl")
    tokens = [b["student_tokens"] - a["student_tokens"] for a, b in zip([{"student_tokens": 0}, *log], log)]
    # Per answer, not per token: the sequence gradient also lowers the sum by ending sooner, and the mean may rise.
    kl = [line["kl"] * n if loss == "sequence" else line["kl"] for line, n in zip(log, tokens)]
    assert sum(kl[-5:]) < 0.5 * sum(kl[:5])


def test_rl_compares_answers_to_one_prompt_and_sft_asks_the_teacher(toy, tmp_path, monkeypatch):
    config, task, student, teacher = toy
    asked, real = [], train.answer
    monkeypatch.setattr(train, "answer", lambda m, t, p, g=None: asked.append((m, p)) or real(m, t, p, g))
    for method, size, model in (("rl", 3, student), ("sft", 1, teacher), ("opd", 1, student)):
        asked.clear()
        own = dataclasses.replace(config, method=method, group_size=3, steps=1)
        distil(own, task, student, teacher, tmp_path / method, method)
        (rollouts,) = [(m, p) for m, p in asked if len(p) == config.batch_size]
        assert rollouts[0] is model
        groups = [rollouts[1][i:i + size] for i in range(0, 6, size)]
        assert all(len(set(group)) == 1 for group in groups) and len(set(map(tuple, groups))) == 6 // size


@pytest.mark.parametrize("method", ["rl", "sft"])
def test_rl_is_rewarded_more_and_sft_comes_nearer_to_the_teacher(method, toy, tmp_path, monkeypatch):
    config, task, student, teacher = toy
    monkeypatch.setattr(Chains, "is_correct", lambda self, problem, answer: answer.startswith("7"))  # easily learnt
    with torch.no_grad():
        teacher.lm_head.weight.mul_(3)
    own = dataclasses.replace(config, method=method, steps=30, eval_every=30, batch_size=64, group_size=16, lr=1e-2)
    distil(own, task, student, teacher, tmp_path / "run", method)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    mean = lambda key, lines: sum(line[key] for line in lines) / len(lines)
    if method == "rl":
        assert mean("reward", log[-5:]) > mean("reward", log[:5]) + 0.3
    else:
        assert mean("loss", log[-5:]) < mean("loss", log[:5]) - 0.1


def test_searches_log_utility_and_alignment_and_the_gates_act(toy, tmp_path):
    config, task, student, teacher = toy
    for name, settings in (("off", {}), ("utility", dict(utility_gate=True)), ("alignment", dict(alignment_gate=1.0))):
        torch.manual_seed(0)
        own = dataclasses.replace(config, method="effopd", score="batch_kl", **settings)
        distil(own, task, GPT(student.config), teacher, tmp_path / name, "toy")
    read = lambda name: [json.loads(line) for line in (tmp_path / name / "search.jsonl").read_text().splitlines()]
    first, second = read("off")[:2]
    assert len(first["utility"]) == 7 and any(first["utility"].values())         # the gradients were still there
    assert first["alignment"] is None and -1 <= second["alignment"] <= 1
    assert [r["stopped"] == "alignment below the gate" for r in read("alignment")] == [False, True, True]
    assert [r["step"] for r in read("utility")] == [1, 2, 4]


def test_checkpoints_are_from_before_the_jump_and_load_in_transformers(toy, tmp_path):
    config, task, student, teacher = toy
    own = dataclasses.replace(config, method="effopd", score="batch_kl", candidates="doubling", lr=1e-3)
    start = student.lm_head.weight.detach().clone()
    distil(own, task, student, teacher, tmp_path / "run", "toy")
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["final", *(f"step_00000{i}" for i in (0, 1, 2, 4))]
    assert torch.equal(GPT.from_pretrained(folder / "step_000000").lm_head.weight, start)
    first = read_lines(tmp_path / "run" / "search.jsonl")[0]
    assert first["accepted"] > 0
    base, after = (GPT.from_pretrained(folder / f"step_00000{i}") for i in (0, 1))
    delta = sum((a - b).square().sum() for (name, a), b in zip(after.named_parameters(), base.parameters())
                if "attn" in name or "mlp" in name).sqrt()
    assert delta.item() == pytest.approx(first["delta_norm"], rel=1e-4)                  # Δ alone, no jump in it
    theirs = AutoModelForCausalLM.from_pretrained(folder / "final")
    ids = torch.tensor([task.encode("1+2=")])
    torch.testing.assert_close(theirs(ids).logits, student(ids), atol=1e-4, rtol=0)


def test_evaluation_repeats_itself_and_takes_nothing_from_the_global_random_state(toy):
    _, task, student, _ = toy
    problems, state = task.problems(12, random.Random(0)), torch.get_rng_state()
    assert evaluate(student, task, problems) == evaluate(student, task, problems)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluations_of_two_models_share_their_random_numbers(toy, monkeypatch):
    """Also after the first 500 problems, however many numbers the answers to those took."""
    _, task, student, _ = toy
    problems = task.problems(510, random.Random(0))
    _, answers = evaluate(student, task, problems)
    real = train.answer

    def first_chunk_takes_more(model, task, problems, generator):
        if len(problems) == 500:
            torch.rand(99, generator=generator)
        return real(model, task, problems, generator)

    monkeypatch.setattr(train, "answer", first_chunk_takes_more)
    _, others = evaluate(student, task, problems)
    assert others[500:] == answers[500:] and others[:500] != answers[:500]


def test_the_final_accuracy_is_of_trained_models_only(toy, tmp_path, monkeypatch):
    config, task, student, teacher = toy
    values = iter([0.1, 0.9])
    monkeypatch.setattr(train, "evaluate", lambda m, t, problems: (next(values), [[1]] * len(problems)))
    own = dataclasses.replace(config, method="opd", eval_every=100)
    summary = distil(own, task, student, teacher, tmp_path / "run")
    assert summary["final_accuracy"] == 0.9 and len(summary["curve"]) == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(toy, tmp_path):
    config, task, student, teacher = toy
    with torch.no_grad():
        teacher.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="step 1: the loss is nan.*step_000000.*Try a lower --lr"):
        distil(dataclasses.replace(config, method="opd"), task, student, teacher, tmp_path / "run")


def test_settings_reach_the_search(toy, tmp_path, monkeypatch):
    config, task, student, teacher = toy
    given = {}
    monkeypatch.setattr(train, "EffOPD", lambda model, score, **settings: given.update(settings) or sys.exit())
    settings = dict(accept="ge", candidates="doubling", num_candidates=3, scope="all", first_trigger=4, seed=11,
                    direction="top", utility_gate=True, alignment_gate=0.5)
    own = dataclasses.replace(config, method="effopd", search_every=7, reset_moments=True, **settings)
    with pytest.raises(SystemExit):
        distil(own, task, student, teacher, tmp_path / "run")
    assert isinstance(given.pop("optimizer"), torch.optim.AdamW)
    assert given == settings | dict(every=7, offload=False)


def a_run(final, *points):
    keys = ("step", "accuracy", "tokens", "seconds")
    return dict(final_accuracy=final, searches=[], examples=[], curve=[dict(zip(keys, p)) for p in points])


def test_speed_ups_by_hand():
    result = compare({"OPD": a_run(0.7, (0, 0.4, 0, 0.0), (8, 0.6, 800, 4.0), (16, 0.71, 1600, 8.0)),
                      "fast": a_run(0.9, (0, 0.9, 0, 0.0), (4, 0.7, 800, 2.5), (8, 0.9, 1600, 5.0)),
                      "slow": a_run(0.5, (0, 0.4, 0, 0.0), (16, 0.5, 3200, 9.0))})
    methods = result["methods"]
    assert result["target"] == 0.7 and methods["OPD"]["speed_up"] == dict(step=1, tokens=1, seconds=1)
    assert methods["fast"]["speed_up"] == dict(step=4, tokens=2, seconds=3.2)            # and not at step 0
    assert methods["slow"]["reached"] is None and methods["slow"]["speed_up"] is None


def test_a_flat_curve_reaches_its_own_mean(capsys):
    """Σ/3 of three equal numbers can exceed the number."""
    for k in range(1001):
        flat = a_run(train.fmean([k / 1000] * 3), *((step, k / 1000, step, step) for step in range(4)))
        result = compare({"OPD": flat, "slow": a_run(0.0, (0, 0, 0, 0), (1, -1, 1, 1))})
        assert result["methods"]["OPD"]["reached"]["step"] == 1
    train.print_race(result)
    assert "did not reach it" in capsys.readouterr().out


# The command line.

def test_the_race_from_the_command_line(tmp_path, monkeypatch):
    """The real thing, once, at toy size: a new directory, all its files, and a second run beside the first."""
    command = [sys.executable, str(ROOT / "train.py"), *as_args(TOY | dict(num_ops=1, eval_every=1))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout and "race.png" in done.stdout and "before" in done.stdout
    race = tmp_path / "runs" / "race"
    assert (race / "race.png").stat().st_size > 10_000
    summary = json.loads((race / "summary.json").read_text())
    assert list(summary["methods"]) == ["OPD", "EffOPD, paper", "EffOPD, batch KL"]
    firsts = []
    for directory in ("opd", "effopd", "effopd-batch-kl"):
        lines = read_lines(race / directory / "log.jsonl")
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert {"loss", "kl", "grad_norm", "lr", "student_tokens", "validation_tokens", "seconds",
                "accuracy"} <= set(lines[0])
        assert json.loads((race / directory / "config.json").read_text())["versions"]["torch"] == torch.__version__
        own = json.loads((race / directory / "summary.json").read_text())
        last = lines[-1]
        assert own["curve"][-1]["tokens"] == last["student_tokens"] + last["validation_tokens"] == own["tokens"]
        assert (lines[-1]["validation_tokens"] > 0) == (directory != "opd")
        firsts.append((lines[0]["kl"], lines[0]["student_tokens"], own["curve"][0]["accuracy"],
                       (race / directory / "checkpoints" / "step_000000" / "model.safetensors").read_bytes()))
    assert firsts[0] == firsts[1] == firsts[2]                # the same start and the same problems
    settings = json.loads((race / "effopd-batch-kl" / "config.json").read_text())
    assert (settings["score"], settings["candidates"], settings["num_candidates"]) == ("batch_kl", "doubling", 8)
    assert "EffOPD" in done.stderr and "base" in done.stderr  # progress bars
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "fit", lambda *a, **k: pytest.fail("base and teacher are in the cache"))
    main([*command[2:], "--method", "opd", "--steps", "1"])
    assert (tmp_path / "runs" / "opd").is_dir()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_race_on_a_gpu(tmp_path, capsys):
    main(as_args(TOY | dict(device="cuda", cache_dir=tmp_path / "cache", out_dir=tmp_path / "race")))
    assert "speed-up" in capsys.readouterr().out


@pytest.mark.parametrize("args, words", [
    (["--lr", "abc"], "invalid float value: 'abc'"), (["--lr", "nan"], "--lr must be"), (["--lr", "inf"], "--lr must be"),
    (["--method", "foo"], "'foo'"), (["--preset", "huge"], "huge"),
    (["--steps", "0"], "--steps must be"), (["--batch_size", "0"], "--batch_size must be"),
    (["--device", "abacus"], "--device must be"), (["--device", "cuda:99"], "CUDA GPUs"),
    (["--student", "nowhere"], "no directory nowhere"), (["--teacher", "nowhere"], "no directory nowhere"),
    (["--digits", "3"], "--digits must be"), (["--slip", "1"], "--slip is"), (["--search_every", "-1"], "--search_every"),
    (["--hidden_size", "90"], "--hidden_size must be"), (["--num_ops", "1"], "at most a tenth"),
    (["--score", "batch_kl"], "--method effopd"), (["--method", "opd", "--accept", "ge"], "no use for it"),
    (["--method", "opd", "--group_size", "4"], "opd has no use"), (["--method", "sft", "--loss", "top_k"], "--loss is"),
    (["--method", "rl", "--batch_size", "100"], "divide --batch_size (100)"), (["--nonsense", "1"], "--nonsense"),
    (["--method", "rl", "--group_size", "1"], "--group_size must be"),
    (["--method", "effopd", "--alignment_gate", "2"], "is a cosine"), (["--seed", "-1"], "--seed must be 0 or more"),
    (["--gap", "skill", "--slip", "0.1"], "skill has no use"), (["--method", "opd", "--top_k", "8"], "--loss top_k"),
])
def test_bad_settings_end_in_one_line(args, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    said = capsys.readouterr().err.strip()
    assert stopped.value.code not in (0, None) and "\n" not in said and words in said


def test_the_rehearsal_of_a_race_leaves_bad_numbers_to_its_runs(tmp_path, monkeypatch):
    """Which report the step, or leave it out."""
    def fail(*args):
        raise FloatingPointError("the loss is nan")
    monkeypatch.setattr(train, "backward", fail)
    monkeypatch.setattr(train, "distil", lambda config, task, student, *args: pytest.skip("reached"))
    model = GPT(GPTConfig(17, 16, 24, 1, 2))
    with pytest.raises(pytest.skip.Exception, match="reached"):
        train.race(Config(device="cpu"), train.Chains(2, 1), model, model, tmp_path)


def test_the_gpu_preset_does_not_start_on_a_cpu_unasked(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--preset", "gpu"])
    assert "no CUDA GPU" in capsys.readouterr().err


def test_bad_directories_end_in_one_line(tmp_path, capsys):
    """A directory that is taken, one that holds no model, one whose model has another vocabulary."""
    GPT(GPTConfig(33, 16, 24, 1, 2)).save_pretrained(tmp_path / "other")
    GPT(GPTConfig(17, 16, 24, 1, 2, max_position_embeddings=8)).save_pretrained(tmp_path / "short")
    (tmp_path / "file").write_text("")
    toy = as_args(TOY | dict(cache_dir=tmp_path / "cache", method="opd"))
    for args, words in [(["--out_dir", str(tmp_path)], "exists already"),
                        (["--student", str(tmp_path)], "no config.json"),
                        (["--student", str(tmp_path / "other")], "33 tokens, the task 17"),
                        (["--teacher", str(tmp_path / "short")], "too short"),
                        (["--cache_dir", str(tmp_path / "file")], "File exists")]:
        with pytest.raises(SystemExit) as stopped:
            main([*toy, "--out_dir", str(tmp_path / "out"), *args])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code not in (0, None) and words in said and said.startswith("train.py: ")
    assert not (tmp_path / "out").exists()


def test_a_students_own_checkpoint_is_a_student(tmp_path, monkeypatch):
    GPT(GPTConfig(17, 16, 24, 1, 2)).save_pretrained(tmp_path / "mine")
    monkeypatch.setattr(train, "fit", lambda *a, **k: pytest.fail("both models were given"))
    main([*as_args(TOY | dict(method="opd", student=tmp_path / "mine", teacher=tmp_path / "mine",
                              out_dir=tmp_path / "out"))])
    assert abs(read_lines(tmp_path / "out" / "log.jsonl")[0]["kl"]) < 1e-6


def test_presets_are_defaults_that_options_overrule():
    gpu = ["--preset", "gpu", "--device", "cpu"]
    assert parse_config(gpu).num_hidden_layers == 8 and parse_config([]).num_hidden_layers == 3
    assert parse_config([*gpu, "--num_hidden_layers", "4"]).num_hidden_layers == 4
    assert parse_config(["--gap", "skill"]).base_steps < parse_config([]).base_steps
    assert parse_config([*gpu, "--gap", "skill"]).base_steps < parse_config(gpu).base_steps
    c = parse_config(gpu)
    model = GPT(GPTConfig(17, c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads))
    assert 24e6 < sum(p.numel() for p in model.parameters()) < 27e6


def test_a_directory_is_claimed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(train.claim_directory(Config(**TOY))) for _ in range(3)]
    assert names == ["runs/race", "runs/race-2", "runs/race-3"]


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(f"--{field.name}" in text and field.metadata["help"] for field in dataclasses.fields(Config))
    with pytest.raises(SystemExit):
        main(["--gap", "skill", "--help"])
    assert "(default: 250)" in capsys.readouterr().out and "(default: 250)" not in text
