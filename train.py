"""Distil a teacher into a student on the student's own answers: plain OPD beside EffOPD.

    python train.py                                    # the race: four runs from one start
    python train.py --method opd --lr 1.5e-3           # one run
    python train.py --method effopd --gap slip         # EffOPD as in the paper, another task
    python train.py --method rl --lr 3e-4              # reinforcement learning (GRPO); also sft
    python train.py --resume runs/opd                  # go on with a run that was stopped
    python train.py --help                             # every setting

The task is built in: chains of arithmetic modulo 10, worked out step by step, graded by the result.

    prompt 7+5-3*4=      response 7+5=2;2-3=9;9*4=6;#6 <end>

The student was trained on flawed answers, the teacher further on right ones. Three gaps (--gap):

    slip    confidence: one step in five was wrong at random, so the student is merely unsure
    habit   a wrong habit: in six of ten answers all subtractions were the wrong way round, b - a
            (and one step in twenty slips)
    skill   missing knowledge: the student is an early checkpoint of the teacher's own training

Departures from arXiv:2605.11739 and its official code, beside those listed in effopd.py:
  - a 0.3 M parameter student on arithmetic instead of 1.5-14 B on mathematics, all settings scaled;
    extras/real.py has models and problems of your own.
  - the full-vocabulary reverse KL is the default loss (--loss sampled is the paper's).
  - distillation has no weight decay and clips gradients to norm 1.
"""

import copy
import hashlib
import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Callable, Literal

# Before torch is imported: OpenMP's threads spin while they wait, which makes small operations four
# times slower when anything else runs on the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import tiktoken
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import HfArgumentParser

from effopd import (SEARCHES, EffOPD, group_advantages, masked_mean, policy_gradient, reverse_kl,
                    reverse_kl_sampled, reverse_kl_top_k, token_log_probs)
from model import GPT, GPTConfig


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting; each is a command-line option. ValueError for values that cannot work."""

    # the run
    method: Literal["race", "opd", "effopd", "rl", "sft"] = setting(
        "race", "opd, effopd, rl (GRPO on right or wrong), sft (cross-entropy on the teacher's "
        "answers), or the race: four runs, see RACE")
    seed: int = setting(0, "of training problems, rollouts and D_v (not of student and teacher)")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N; auto takes a GPU where there is one")
    out_dir: str = setting("", "a new directory for the run; empty: runs/METHOD, METHOD-2, ...")
    resume: str = setting("", "directory of a stopped run: goes on, with the settings that it has")
    save_every: int = setting(10, "steps between states to resume from (0: only when stopped)")
    checkpoints: bool = setting(True, "keep the student at steps 0, 1, 2, 4, 8, ... for analyze.py")
    cache_dir: str = setting("cache", "where base and teacher are kept for the next run")

    # the task, the student and its teacher
    task: str = setting("chains", "chains, or MODULE:CLASS, a task of your own (see `Chains`)")
    gap: Literal["slip", "habit", "skill"] = setting(
        "habit", "what the student lacks: slip, confidence; habit, it has a wrong one; skill, "
        "knowledge")
    num_ops: int = setting(5, "operations in a chain")
    digits: int = setting(1, "digits of the numbers: 1 (modulo 10), 2 (modulo 100), ...")
    hidden_size: int = setting(96, "width of the model (of its MLP: 8/3 of that)")
    num_hidden_layers: int = setting(3, "layers of the model")
    num_attention_heads: int = setting(4, "attention heads of the model")
    base_steps: int = setting(0, "supervised steps that make the student (0: by gap, GAP_STEPS)")
    teacher_steps: int = setting(0, "further ones that make the teacher (0: by gap, GAP_STEPS)")
    base_lr: float = setting(3e-3, "peak learning rate of the student's training")
    teacher_lr: float = setting(1e-3, "of the teacher's (gap skill: one training, at base_lr)")

    # distillation
    steps: int = setting(30, "optimiser steps")
    lr: float = setting(1e-4, "learning rate")
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "muon: for the blocks' matrices; AdamW for the rest, with steps of the same size")
    batch_size: int = setting(128, "answers a step")
    micro_batch_size: int = setting(0, "rows in a forward and backward pass (0: all)")
    rollout_batch_size: int = setting(500, "answers sampled at once")
    group_size: int = setting(8, "answers to one prompt (method rl)")
    loss: Literal["full", "sampled", "sequence", "top_k"] = setting(
        "full", "the reverse KL: over the whole vocabulary; on sampled tokens with discount 0 (the "
        "paper's) or 1; over the student's top k and a bucket for the rest")
    top_k: int = setting(4, "k of --loss top_k")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    eval_every: int = setting(5, "steps between evaluations, which do not count in a run's seconds")
    eval_size: int = setting(500, "problems in an evaluation, one sampled answer each")

    # the search, method effopd
    score: str = setting(
        "accuracy", "of a candidate: accuracy (on D_v, the paper's), rollout_kl (-KL on answers to "
        "D_v), batch_kl (-KL on the batch just trained on), or MODULE:FUNCTION")
    dv_size: int = setting(50, "problems in D_v")
    candidates: str = setting(
        "linear", "W_t + 2kΔ (the paper's); doubling: W_t + 2^k Δ; line: doubling, and back where "
        "that fails; or MODULE:FUNCTION")
    num_candidates: int = setting(5, "candidates at most (line: in each direction)")
    accept: Literal["gt", "ge"] = setting("gt", "a candidate must score higher, or not lower")
    scope: Literal["attention+mlp", "mlp", "all"] = setting("attention+mlp", "what a jump moves")
    first_trigger: int = setting(1, "the first search follows this step, the next its doublings")
    search_every: int = setting(0, "search also at every multiple of this step (0: off)")
    searches: int = setting(0, "searches in all, at most (0: no limit)")
    move_lr: bool = setting(False, "a search that keeps multiple m also multiplies lr by 1 + m")
    utility_gate: bool = setting(False, "a jump leaves out parameters of no first-order utility")
    alignment_gate: float = setting(0.0, "no search where Δ aligns less with the last one (0: off)")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if type(f.default) not in (int, float) or (value == 0 and f.name in MAY_BE_0):
                continue
            if not 0 < value < 2 ** 63:
                least = "0 or more" if f.name in MAY_BE_0 else "above 0"
                raise ValueError(f"--{f.name} must be {least} and below 2^63, got {value}")
        if self.method == "rl" and (self.group_size < 2 or self.batch_size % self.group_size):
            raise ValueError(f"--group_size must be 2 or more and divide --batch_size "
                             f"({self.batch_size}), got {self.group_size}")
        base_steps, teacher_steps = GAP_STEPS[self.gap]
        self.base_steps = self.base_steps or base_steps
        self.teacher_steps = self.teacher_steps or teacher_steps
        self.device = pick_device(self.device)


GAP_STEPS = {"slip": (1000, 150), "habit": (1000, 250), "skill": (250, 350)}   # base, teacher
MAY_BE_0 = {"seed", "save_every", "base_steps", "teacher_steps", "micro_batch_size", "search_every",
            "searches", "alignment_gate"}


def pick_device(name: str) -> str:
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if name not in ("cpu", *gpus) and not (name == "cuda" and gpus):
        raise ValueError(f"--device {name}: torch sees {len(gpus)} CUDA GPUs here; auto, cpu, cuda "
                         "and cuda:N are known")
    return name


def pick(option: str, name: str, table: dict):
    """table[name]; for MODULE:NAME, something of your own."""
    if name in table:
        return table[name]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--{option} must be {', '.join(table)} or MODULE:NAME of your own, got "
                         f"{name!r} ({first_line(error)})") from None


# ------------------------------------------------------------------------------------------------
# The task.

class Chains:
    """Chains of arithmetic modulo 10 to the power of `digits`, worked out from left to right.

    A task of your own has what this class has: end, max_response, vocab_size, rollout_batch_size,
    problems, batches, encode, encode_answer, decode, solve, is_correct; `flawed` for the gaps slip
    and habit. A problem and an answer are texts.
    """

    def __init__(self, config: Config):
        self.num_ops, self.modulus = config.num_ops, 10 ** config.digits
        characters = {c.encode(): i for i, c in enumerate("0123456789+-*=;#")}
        self.end = len(characters)                            # id of the token that ends an answer
        self.encoding = tiktoken.Encoding("chains", pat_str=r"[\s\S]", mergeable_ranks=characters,
                                          special_tokens={"<end>": self.end})
        self.vocab_size = self.encoding.n_vocab
        self.max_response = config.num_ops * (3 * config.digits + 3) + config.digits + 2   # tokens
        self.rollout_batch_size = config.rollout_batch_size
        space = self.modulus * (2 * self.modulus + 10) ** config.num_ops
        if config.eval_size > space // 10 or config.eval_size + config.dv_size > space // 10 * 9:
            raise ValueError(f"--eval_size {config.eval_size}, --dv_size {config.dv_size}: there "
                             f"are {space:,} chains of {config.num_ops} operations; at most a "
                             "tenth may be held out to evaluate, nine in all")

    def problem(self, rng: random.Random) -> str:
        text = str(rng.randrange(self.modulus))
        for _ in range(self.num_ops):
            op = rng.choice("+-*")
            text += op + str(rng.randrange(10 if op == "*" else self.modulus))
        return text + "="

    def problems(self, n: int, rng: random.Random, exclude=frozenset()) -> list[str]:
        """n problems, none of them in exclude."""
        found = []
        while len(found) < n:
            problem = self.problem(rng)
            if problem not in exclude:
                found.append(problem)
        return found

    def batches(self, n: int, rng: random.Random, exclude):
        """Training problems, n at a time, without end."""
        while True:
            yield self.problems(n, rng, exclude)

    def solve(self, problem: str, slip=0.0, habit=False, rng: random.Random | None = None) -> str:
        """The worked answer. slip: each result is wrong with this probability, and carried on.

        habit: subtractions are done the wrong way round, b - a for a - b.
        """
        numbers = [int(number) for number in re.findall(r"\d+", problem)]
        ops = re.findall(r"[-+*]", problem)
        value, steps = numbers[0], ""
        for op, number in zip(ops, numbers[1:]):
            result = {"+": value + number, "*": value * number,
                      "-": number - value if habit else value - number}[op]
            if slip and rng.random() < slip:
                result += rng.randrange(1, self.modulus)
            steps += f"{value}{op}{number}={result % self.modulus};"
            value = result % self.modulus
        return f"{steps}#{value}"

    def flawed(self, problem: str, gap: str, rng: random.Random) -> str:
        """What the student was trained on."""
        if gap == "slip":
            return self.solve(problem, slip=0.2, rng=rng)
        return self.solve(problem, slip=0.05, habit=rng.random() < 0.6, rng=rng)

    def is_correct(self, problem: str, answer: str) -> bool:
        return "#" in answer and answer.rpartition("#")[2] == self.solve(problem).rpartition("#")[2]

    def encode(self, problem: str) -> list[int]:
        return self.encoding.encode_ordinary(problem)

    def encode_answer(self, answer: str) -> list[int]:
        return self.encoding.encode_ordinary(answer) + [self.end]

    def decode(self, tokens: list[int]) -> str:
        return self.encoding.decode([token for token in tokens if token != self.end])


TASKS = {"chains": Chains}


# ------------------------------------------------------------------------------------------------
# Answers, and how good they are.

@dataclass
class Part:
    """A micro-batch of prompts with answers, padded on the right. inputs predict tokens."""
    ids: torch.Tensor                        # (b, T + 1) int64
    mask: torch.Tensor                       # (b, T) bool: ids[:, 1:] is a token of the answer
    target: torch.Tensor | None = None       # (b, T, V): the teacher's logits, once it was asked

    @property
    def inputs(self):
        return self.ids[:, :-1]                                                  # (b, T)

    @property
    def tokens(self):
        return self.ids[:, 1:]                                                   # (b, T)


def pack(task, problems, answers, device, micro_batch_size=0) -> tuple[list[Part], int]:
    """Micro-batches of answers (lists of token ids), and how many tokens they have in all."""
    prompts = [task.encode(problem) for problem in problems]
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers)]
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]          # (B, 1)
    ends = torch.tensor([len(row) for row in rows])[:, None]                     # (B, 1)
    size, parts = micro_batch_size or len(rows), []
    for i in range(0, len(rows), size):
        ids = pad_sequence(rows[i:i + size], batch_first=True)                   # (b, T + 1)
        columns = torch.arange(1, ids.shape[1])
        mask = (columns >= starts[i:i + size]) & (columns < ends[i:i + size])    # (b, T)
        parts.append(Part(ids.to(device), mask.to(device)))
    return parts, sum(map(len, answers))


def sample_answers(model, task, problems, generator, temperature=1.0) -> list[list[int]]:
    """One sampled answer to each problem: token ids, the end token included."""
    answers = []
    for i in range(0, len(problems), task.rollout_batch_size):
        prompts = [task.encode(problem) for problem in problems[i:i + task.rollout_batch_size]]
        rollout = model.generate(prompts, task.max_response, temperature, generator, task.end)
        lengths = rollout.mask.sum(1).tolist()
        answers += [row[:n] for row, n in zip(rollout.tokens.tolist(), lengths)]
    return answers


def evaluate(model, task, problems, seed=0, temperature=1.0) -> tuple[float, list[list[int]]]:
    """Accuracy of one sampled answer to each problem, and the answers.

    One rollout batch at a time, with a seed of its own: models that are compared share their random
    numbers over all problems, however long the answers before were.
    """
    answers, rows = [], task.rollout_batch_size
    for i in range(0, len(problems), rows):
        generator = torch.Generator(model.device).manual_seed(seed + i)
        answers += sample_answers(model, task, problems[i:i + rows], generator, temperature)
    return fmean(rewards_of(task, problems, answers)), answers


def rewards_of(task, problems, answers) -> list[float]:
    """1.0 for each right answer."""
    return [float(task.is_correct(problem, task.decode(answer)))
            for problem, answer in zip(problems, answers)]


def evaluation_problems(config, task) -> list[str]:
    """The same for every run; neither training nor D_v contains any of them."""
    return task.problems(config.eval_size, random.Random("evaluation"))


TEMPERATURES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)             # as it was trained first; greedy last


def measure_control(task, student, teacher, problems) -> dict:
    """What results are to be compared with: the teacher, and the student, merely sampled colder.

    A gap that one temperature closes is no test of distillation.
    """
    by_temperature = {T: evaluate(student, task, problems, temperature=T)[0] for T in TEMPERATURES}
    best = max(by_temperature, key=by_temperature.get)
    return dict(student=by_temperature[1.0], greedy=by_temperature[0.0], best_temperature=best,
                student_at_best_temperature=by_temperature[best],
                teacher=evaluate(teacher, task, problems)[0])


def in_words(control: dict) -> str:
    """ "student 0.416, greedy 0.394, at its best temperature (0.6) 0.490, teacher 1.000" """
    words = [f"{name} {control[name]:.3f}" for name in ("student", "greedy") if name in control]
    if "best_temperature" in control:
        words.append(f"at its best temperature ({control['best_temperature']:g}) "
                     f"{control['student_at_best_temperature']:.3f}")
    return ", ".join([*words, f"teacher {control['teacher']:.3f}"])


# ------------------------------------------------------------------------------------------------
# One step of each method: answers, loss, gradient. It returns the micro-batches that it trained on,
# and what is logged; loss and kl (nats a token) as tensors, so that nothing waits for a GPU.

def opd_step(config, task, student, teacher, problems, generator):
    """On-policy distillation: the student's own answers, scored token by token by the teacher."""
    answers = sample_answers(student, task, problems, generator)                       # y ~ π(·|x)
    parts, num_tokens = pack(task, problems, answers, student.device, config.micro_batch_size)
    loss_sum, kl_sum = 0.0, 0.0
    for part in parts:
        with torch.no_grad():
            part.target = teacher(part.inputs)                                   # (b, T, V)
        logits = student(part.inputs)                                            # (b, T, V)
        if config.loss == "full":
            loss = reverse_kl(logits, part.target, part.mask, num_tokens)
        elif config.loss == "top_k":
            loss = reverse_kl_top_k(logits, part.target, part.mask, config.top_k, num_tokens)
        else:
            discount = 1.0 if config.loss == "sequence" else 0.0
            loss = reverse_kl_sampled(logits, part.target, part.tokens, part.mask, discount,
                                      num_tokens)
        loss.backward()
        loss_sum += loss.detach()
        kl = loss.detach()
        if config.loss != "full":                             # for the log
            kl = reverse_kl(logits.detach(), part.target, part.mask, num_tokens)
        kl_sum += kl
    rewards = rewards_of(task, problems, answers)
    return parts, dict(loss=loss_sum, kl=kl_sum, reward=fmean(rewards), num_tokens=num_tokens)


def rl_step(config, task, student, teacher, problems, generator):
    """Reinforcement learning: several answers to a problem, the better ones made more probable."""
    problems = [problem for problem in problems for _ in range(config.group_size)]     # neighbours
    answers = sample_answers(student, task, problems, generator)                       # y ~ π(·|x)
    parts, num_tokens = pack(task, problems, answers, student.device, config.micro_batch_size)
    rewards = torch.tensor(rewards_of(task, problems, answers))                  # (B,)
    advantages = group_advantages(rewards, config.group_size).to(student.device)[:, None]  # (B, 1)
    loss_sum = 0.0
    for part, advantage in zip(parts, advantages.split(len(parts[0].ids))):
        logits = student(part.inputs)                                            # (b, T, V)
        loss = policy_gradient(logits, part.tokens, advantage, part.mask, num_tokens)
        loss.backward()
        loss_sum += loss.detach()
    return parts, dict(loss=loss_sum, reward=rewards.mean().item(), num_tokens=num_tokens)


def sft_step(config, task, student, teacher, problems, generator):
    """Supervised (off-policy) distillation: cross-entropy on answers that the teacher samples."""
    answers = sample_answers(teacher, task, problems, generator)                       # y ~ π*(·|x)
    parts, num_tokens = pack(task, problems, answers, student.device, config.micro_batch_size)
    loss_sum = 0.0
    for part in parts:
        logits = student(part.inputs)                                            # (b, T, V)
        loss = masked_mean(-token_log_probs(logits, part.tokens), part.mask, num_tokens)
        loss.backward()
        loss_sum += loss.detach()
    rewards = rewards_of(task, problems, answers)
    return parts, dict(loss=loss_sum, reward=fmean(rewards), num_tokens=num_tokens)


METHODS = {"opd": opd_step, "effopd": opd_step, "rl": rl_step, "sft": sft_step}


# ------------------------------------------------------------------------------------------------
# Scores that a search can go by.

@dataclass
class Judge:
    """validate(model) of EffOPD. A score is a function of this and a model; higher is better."""
    score: Callable
    task: Any
    teacher: GPT
    problems: list                           # D_v
    parts: list[Part] = ()                   # the batch just trained on, with the teacher's logits
    num_tokens: int = 0                      # its answers' tokens
    sampled: int = 0                         # tokens sampled so far, to score and to train on,
    scored: int = 0                          # and those that scores only ran through the model

    def __call__(self, model) -> float:
        return float(self.score(self, model))


def accuracy(judge, model):
    """The paper's: the share of D_v that one sampled answer each solves."""
    seed = torch.initial_seed()                               # the search's: all candidates alike
    score, answers = evaluate(model, judge.task, judge.problems, seed)
    judge.sampled += sum(map(len, answers))
    return score


def batch_kl(judge, model):
    """-KL(π || π*) on the batch just trained on: answers and teacher's logits are there already."""
    judge.scored += judge.num_tokens
    return -sum(reverse_kl(model(part.inputs), part.target, part.mask, judge.num_tokens)
                for part in judge.parts)


def rollout_kl(judge, model):
    """-KL(π || π*) on the candidate's own answers to D_v."""
    _, answers = evaluate(model, judge.task, judge.problems, torch.initial_seed())
    rows = len(judge.parts[0].ids)                            # of a micro-batch
    parts, num_tokens = pack(judge.task, judge.problems, answers, model.device, rows)
    judge.sampled += num_tokens
    return -sum(reverse_kl(model(part.inputs), judge.teacher(part.inputs), part.mask, num_tokens)
                for part in parts)


SCORES = {"accuracy": accuracy, "batch_kl": batch_kl, "rollout_kl": rollout_kl}


# ------------------------------------------------------------------------------------------------
# The training loop.

def train(config: Config, task, student: GPT, teacher: GPT | None, out_dir: Path, label: str,
          methods=METHODS, scores=SCORES, **search_options) -> dict:
    """Train the student in place, keep the run in out_dir, return its summary.

    Goes on from out_dir/state.pt if there is one. search_options: further arguments of EffOPD.
    Stopped if a signal asked for it; ValueError for a loss or a gradient that is not finite.
    """
    if (out_dir / "summary.json").exists():                   # it is finished
        (out_dir / "state.pt").unlink(missing_ok=True)
        return json.loads((out_dir / "summary.json").read_text())
    held_out = evaluation_problems(config, task)
    dv = task.problems(config.dv_size, random.Random(f"D_v {config.seed}"), set(held_out))
    num_problems = config.batch_size // (config.group_size if config.method == "rl" else 1)
    batches = task.batches(num_problems, random.Random(f"training {config.seed}"), {*held_out, *dv})
    generator = torch.Generator(config.device).manual_seed(config.seed)
    take_step = methods[config.method]
    optimizers = make_optimizers(config, student)
    judge = Judge(pick("score", config.score, scores), task, teacher, dv)
    effopd = make_effopd(config, student, judge, optimizers, **search_options)
    stateful = [student, *optimizers, effopd] if effopd else [student, *optimizers]
    run = Run(config, task, student, stateful, judge, generator, out_dir)
    run.restore_or_begin()
    for _ in range(run.step):
        next(batches)                                         # were used before the run was stopped
    with stop_requests() as asked:
        for step in tqdm(range(run.step + 1, config.steps + 1), label, config.steps, unit="step",
                         initial=run.step, dynamic_ncols=True):
            start = time.perf_counter()
            parts, entry = take_step(config, task, student, teacher, next(batches), generator)
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
            entry = all_finite(step, entry | {"grad_norm": norm})     # else the run stops here
            for optimizer in optimizers:
                optimizer.step()                              # W_t
            run.seconds += time.perf_counter() - start
            if step.bit_count() == 1:
                run.save_checkpoint(f"step_{step:06d}")       # before a jump
            judge.parts, judge.num_tokens = parts, entry["num_tokens"]
            entry["lr"] = optimizers[0].param_groups[0]["lr"]
            record = effopd and effopd.step(step)             # jumps, if it is time for a search
            student.zero_grad()
            run.finish_step(step, entry, record)
            if asked:
                run.save_state()
                raise Stopped(step, asked[0])
    return run.finish(label)


def all_finite(step, entry) -> dict:
    """The entry with its tensors as floats. ValueError if one of them is not finite."""
    tensors = {name: value for name, value in entry.items() if torch.is_tensor(value)}
    numbers = torch.stack([value.detach().float() for value in tensors.values()]).tolist()
    entry = entry | dict(zip(tensors, numbers))               # one wait for a GPU, not one each
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"step {step}: the loss is {entry['loss']:.3g} and the gradient's norm "
                         f"{entry['grad_norm']:.3g}. The step was not taken; try a lower --lr")
    return entry


def make_optimizers(config, student) -> list:
    """AdamW; with --optimizer muon, Muon for the matrices of the blocks and AdamW for the rest."""
    rest, optimizers = dict(student.named_parameters()), []
    if config.optimizer == "muon":
        hidden = [name for name, p in rest.items() if p.ndim == 2 and ".layers." in name]
        optimizers.append(torch.optim.Muon(
            [rest.pop(name) for name in hidden], config.lr, weight_decay=0.0, momentum=0.9,
            adjust_lr_fn="match_rms_adamw"))                  # an update as large as AdamW's
    optimizers.append(torch.optim.AdamW(rest.values(), config.lr, weight_decay=0.0, fused=True))
    return optimizers


def make_effopd(config, student, judge, optimizers, cls=EffOPD, **options) -> EffOPD | None:
    if config.method != "effopd":
        return None
    candidates = config.candidates
    if candidates not in SEARCHES:                            # EffOPD knows its own by name
        candidates = pick("candidates", candidates, SEARCHES)
    settings = dict(
        accept=config.accept, candidates=candidates, num_candidates=config.num_candidates,
        scope=config.scope, first_trigger=config.first_trigger, every=config.search_every,
        searches=config.searches, optimizer=optimizers, move_lr=config.move_lr,
        utility_gate=config.utility_gate, alignment_gate=config.alignment_gate, seed=config.seed)
    return cls(student, judge, **settings | options)


# ------------------------------------------------------------------------------------------------
# What a run keeps: its files, and the state that it goes on from.

LOGS = ("log.jsonl", "search.jsonl")


class Run:
    """A run's files and its numbers so far: `OWN`, and the tokens that the judge counts."""

    OWN = ("step", "seconds", "curve", "examples", "searches")

    def __init__(self, config, task, student, stateful, judge, generator, directory):
        self.config, self.task, self.directory = config, task, directory
        self.student, self.stateful, self.judge = student, stateful, judge
        self.generator, self.held_out = generator, evaluation_problems(config, task)
        self.step, self.seconds = 0, 0.0
        self.curve, self.examples, self.searches = [], [], []

    def restore_or_begin(self):
        if (self.directory / "state.pt").exists():
            return self.restore()
        write_json(self.directory / "config.json", asdict(self.config) | {"versions": versions()})
        for name in LOGS:
            (self.directory / name).write_text("")
        self.save_checkpoint("step_000000")
        wrong = [pair for pair in self.evaluate() if not self.task.is_correct(*pair)]
        self.examples = [dict(problem=problem, before=answer) for problem, answer in wrong[:3]]

    def evaluate(self) -> list:
        """Add a point to the curve. Returns [(problem, answer)] of the held-out problems."""
        score, answers = evaluate(self.student, self.task, self.held_out)
        point = dict(step=self.step, accuracy=score, seconds=self.seconds)
        self.curve.append(point | self.token_counts())
        return [(problem, self.task.decode(ids)) for problem, ids in zip(self.held_out, answers)]

    def token_counts(self) -> dict:
        sampled, scored = self.judge.sampled, self.judge.scored
        return dict(tokens=sampled + scored, sampled=sampled, scored=scored)

    def finish_step(self, step, entry, record):
        """Count, evaluate, log, save. record: of a search, or None."""
        self.step = step
        self.judge.sampled += entry.pop("num_tokens")
        if record:
            self.seconds += record["seconds"]
            self.searches.append({key: record[key] for key in ("step", "multiple", "lr")})
            append_json(self.directory / "search.jsonl", record | self.token_counts())
        if step % self.config.eval_every == 0 or step == self.config.steps:
            answers = dict(self.evaluate())
            entry["accuracy"] = self.curve[-1]["accuracy"]
            for example in self.examples:
                example["after"] = answers[example["problem"]]
        entry["seconds"] = self.seconds
        append_json(self.directory / "log.jsonl", dict(step=step) | entry | self.token_counts())
        if self.config.save_every and step % self.config.save_every == 0:
            self.save_state()

    def finish(self, label) -> dict:
        self.save_checkpoint("final")
        last = [point["accuracy"] for point in self.curve[1:][-3:]]    # one alone is noisy
        summary = {name: getattr(self.config, name) for name in ("method", "seed", "lr", "steps")}
        summary |= dict(label=label, final_accuracy=fmean(last), seconds=self.seconds)
        summary |= self.token_counts()
        summary |= dict(searches=self.searches, curve=self.curve, examples=self.examples)
        write_json(self.directory / "summary.json", summary)
        (self.directory / "state.pt").unlink(missing_ok=True)  # nothing is left to go on with
        return summary

    def save_checkpoint(self, name):
        home = self.directory / "checkpoints"
        if self.config.checkpoints or name == "final":
            home.mkdir(exist_ok=True)
            with replacing(home / name) as scratch:
                self.student.save_pretrained(scratch)

    def save_state(self):
        state = dict(
            own={name: getattr(self, name) for name in self.OWN},
            tokens=(self.judge.sampled, self.judge.scored),
            logs={name: (self.directory / name).stat().st_size for name in LOGS},
            states=[each.state_dict() for each in self.stateful],
            random=(random.getstate(), torch.get_rng_state(), self.generator.get_state()))
        with replacing(self.directory / "state.pt") as scratch:
            torch.save(state, scratch)

    def restore(self):
        path = self.directory / "state.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for each, saved in zip(self.stateful, state["states"], strict=True):
                each.load_state_dict(saved)
            for name in self.OWN:
                setattr(self, name, state["own"][name])
            self.judge.sampled, self.judge.scored = state["tokens"]
            python_state, torch_state, generator_state = state["random"]
            random.setstate(python_state)
            torch.set_rng_state(torch_state)
            self.generator.set_state(generator_state)
            for name, size in state["logs"].items():
                if (self.directory / name).stat().st_size < size:
                    raise ValueError(f"{name} has lost lines since it was written")
                os.truncate(self.directory / name, size)      # lines from after the state
        except Exception as error:                            # a broken file can raise anything
            raise ValueError(f"{path} is damaged ({first_line(error)}); remove it, and --resume "
                             "begins this run again") from None


class Stopped(Exception):
    """A signal stopped a run, and its state is saved: (after which step, the signal's number)."""


@contextmanager
def stop_requests():
    """[number of a Ctrl-C or SIGTERM]: the step can be finished; a second one stops at once."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nStopping after this step; once more stops at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def versions() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(python=sys.version.split()[0], torch=torch.__version__, gpu=gpu,
                threads=torch.get_num_threads())


def write_json(path: Path, value):
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(value, indent=1))


def append_json(path: Path, line: dict):
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def replacing(path: Path):
    """A path beside `path`, which takes its place when the block ends without an error."""
    scratch = path.with_name(path.name + ".part")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        yield scratch
        if path.is_dir():
            shutil.rmtree(path)
        scratch.replace(path)
    except (OSError, RuntimeError) as error:                  # torch's writer raises the latter
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {first_line(error)}") from None


def first_line(error) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ------------------------------------------------------------------------------------------------
# Student and teacher: supervised training, once, then kept on disk.

def fit(model, task, steps, lr, worked, rng, exclude, label, snapshot=(0, None)):
    """Supervised training on the answers that worked(problem) gives; warm-up, then linear to 5%.

    snapshot: (a step, the directory to save the model in after that step).
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    for step in tqdm(range(1, steps + 1), label, unit="step", dynamic_ncols=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / 30, 1 - 0.95 * step / steps)
        problems = task.problems(64, rng, exclude)
        answers = [task.encode_answer(worked(problem)) for problem in problems]
        (part,), _ = pack(task, problems, answers, model.device)
        logits = model(part.inputs)                                              # (B, T, V)
        F.cross_entropy(logits[part.mask], part.tokens[part.mask]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == snapshot[0]:
            model.save_pretrained(snapshot[1])


def make_base_and_teacher(config: Config, task, recipe: dict, directory: Path):
    torch.manual_seed(0)
    mlp_size = math.ceil(config.hidden_size / 3) * 8
    model = GPT(GPTConfig(task.vocab_size, config.hidden_size, mlp_size, config.num_hidden_layers,
                          config.num_attention_heads, eos_token_id=task.end)).to(config.device)
    rng, exclude = random.Random("base and teacher"), set(evaluation_problems(config, task))
    base_steps, teacher_steps = recipe["steps"]
    if config.gap == "skill":                                 # the student is the teacher, early on
        fit(model, task, base_steps + teacher_steps, config.base_lr, task.solve, rng, exclude,
            "base and teacher", snapshot=(base_steps, directory / "base"))
    else:
        fit(model, task, base_steps, config.base_lr,
            lambda problem: task.flawed(problem, config.gap, rng), rng, exclude, "base")
        model.save_pretrained(directory / "base")
        fit(model, task, teacher_steps, config.teacher_lr, task.solve, rng, exclude, "teacher")
    model.save_pretrained(directory / "teacher")
    student = GPT.from_pretrained(directory / "base").to(config.device)
    control = measure_control(task, student, model, evaluation_problems(config, task))
    write_json(directory / "control.json", control)


def load(config: Config):
    """The task, student and teacher from the cache (made if they are not there), `control`."""
    task = pick("task", config.task, TASKS)(config)
    recipe = recipe_of(config, task)
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:10]
    home = Path(config.cache_dir) / f"{config.gap}-{key}"
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix="unfinished-") as scratch:
            made = Path(scratch) / "models"
            make_base_and_teacher(config, task, recipe, made)
            if not home.exists():                             # else another process was first
                made.rename(home)                             # all or nothing: never half a model
    try:
        student, teacher = (GPT.from_pretrained(home / name) for name in ("base", "teacher"))
        control = json.loads((home / "control.json").read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{home} is damaged ({first_line(error)}): remove it and start again")
    teacher.requires_grad_(False)
    return task, student.to(config.device), teacher.to(config.device), control


def recipe_of(config, task) -> dict:
    """All that makes student and teacher: settings, and problems that show the task's rules."""
    names = ("task", "gap", "hidden_size", "num_hidden_layers", "num_attention_heads", "base_lr",
             "teacher_lr", "eval_size")
    recipe = {name: getattr(config, name) for name in names}
    recipe["steps"] = [config.base_steps, config.teacher_steps]
    rng = random.Random("recipe")
    problems = task.problems(20, rng)
    recipe["tokens"] = [task.encode(problem) for problem in problems]
    recipe["answers"] = [task.solve(problem) for problem in problems]
    if config.gap != "skill":
        recipe["flawed"] = [task.flawed(problem, config.gap, rng) for problem in problems]
    return recipe


# ------------------------------------------------------------------------------------------------
# The race: one start, one seed, the same problems, and four ways to distil.

RACE = {  # name: (directory, settings)
    "OPD": ("opd", dict(method="opd")),
    "OPD, lr 1.5e-3": ("tuned", dict(method="opd", lr=1.5e-3)),   # about its best on each gap
    "EffOPD, paper": ("effopd", dict(method="effopd")),
    "EffOPD, recommended": ("recommended", dict(
        method="effopd", score="batch_kl", candidates="line", num_candidates=14, scope="all",
        move_lr=True, searches=1)),                           # it sets the rate, after step 1
}


def race(config: Config, task, student, teacher, out_dir: Path, control: dict) -> dict:
    runs = {}
    for name, (directory, settings) in RACE.items():
        home = out_dir / directory
        home.mkdir(exist_ok=True)
        own = replace(config, **settings)
        runs[name] = train(own, task, copy.deepcopy(student), teacher, home, name)
    summary = dict(config=asdict(config) | {"versions": versions()}, control=control)
    summary |= compare(runs)
    write_json(out_dir / "summary.json", summary)
    return summary


def first_at(curve, target) -> dict | None:
    """The first point of an evaluation curve, step 0 aside, that is at the target accuracy."""
    return next((point for point in curve[1:] if point["accuracy"] >= target - 1e-9), None)


def compare(runs: dict) -> dict:
    """What each run took, searches included, to OPD's final accuracy. speed_up: OPD's / its own."""
    target = runs["OPD"]["final_accuracy"]
    opd, methods = first_at(runs["OPD"]["curve"], target), {}
    for name, run in runs.items():
        own = first_at(run["curve"], target)
        speed_up = own and {unit: opd[unit] / own[unit] for unit in ("step", "tokens", "seconds")}
        methods[name] = run | dict(reached=own, speed_up=speed_up)
    return dict(target=target, methods=methods)


def print_race(summary):
    print(f"\nTo the accuracy that OPD ends with ({summary['target']:.3f}), searches included:\n\n"
          f"{'':20}{'final':>8}{'steps':>7}{'tokens':>10}{'seconds':>9}"
          f"{'times fewer steps':>20}{'tokens':>8}{'seconds':>9}")
    for name, method in summary["methods"].items():
        row = f"{name:20}{method['final_accuracy']:8.3f}"
        reached, times = method["reached"], method["speed_up"]
        if reached:
            row += f"{reached['step']:7}{reached['tokens']:10,}{reached['seconds']:9.1f}"
            row += f"{times['step']:20.1f}{times['tokens']:8.1f}{times['seconds']:9.1f}"
        else:
            row += "  did not reach it"
        print(row)


def print_examples(label, examples):
    print(f"\nProblems that the student got wrong before, and its answers after {label}:")
    for example in examples:
        print(f"  {example['problem']}")
        print(f"    before  {example['before']}")
        print(f"    after   {example['after']}")


def draw_race(summary, path):
    """Accuracy against steps and against tokens."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    titles = {"step": "optimiser steps", "tokens": "answers' tokens, searches included"}
    for axis, (unit, title) in zip(panels, titles.items()):
        for name, method in summary["methods"].items():
            spent = [point[unit] for point in method["curve"]]
            axis.plot(spent, [point["accuracy"] for point in method["curve"]], label=name)
        control = summary["control"]
        axis.axhline(control["teacher"], color="black", linewidth=0.8, label="teacher")
        axis.axhline(control["student_at_best_temperature"], color="grey", linestyle=":",
                     label="not distilled, at its best temperature")
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (one sampled answer a problem)")
    panels[0].legend(fontsize=8)
    figure.suptitle("One student, one teacher, four ways to distil")
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


# ------------------------------------------------------------------------------------------------
# The command.

def parse(args=None, config_class=Config) -> Config:
    parser = HfArgumentParser(config_class, usage="%(prog)s [--SETTING VALUE ...]",
                              allow_abbrev=False)
    parser.error = stop
    config, = parser.parse_args_into_dataclasses(args)
    if not config.resume:
        return config
    words = sys.argv[1:] if args is None else args
    if any(word.startswith("--") and not word.startswith("--resume") for word in words):
        stop("--resume takes every setting from the run; leave the others out")
    path = Path(config.resume) / "config.json"
    try:
        saved = dict(json.loads(path.read_text()))
        del saved["versions"]
        return config_class(**saved | dict(resume=config.resume, out_dir=config.resume))
    except (OSError, ValueError, TypeError, KeyError) as error:
        stop(f"--resume: {path} holds no settings that work here ({first_line(error)})")


def claim_directory(config) -> Path:
    """Make --out_dir, or the first of runs/METHOD, runs/METHOD-2, ... that is free."""
    if config.resume:
        return Path(config.resume)
    directory = Path(config.out_dir or f"runs/{config.method}")
    if config.out_dir and directory.exists():
        raise ValueError(f"--out_dir {directory} exists; name a new directory, or go on with "
                         f"--resume {shlex.quote(config.out_dir)}")
    n = 1
    while directory.exists():
        n += 1
        directory = Path(f"runs/{config.method}-{n}")
    directory.mkdir(parents=True)
    return directory


def run_one(config: Config, out_dir: Path, load, **options):
    """Load, train; then say and draw what came of it. options: of `train`."""
    write_json(out_dir / "config.json", asdict(config) | {"versions": versions()})
    task, student, teacher, control = load(config)
    if control:
        print(f"Accuracy on {config.eval_size} held-out problems: {in_words(control)}")
    if config.method == "race":
        summary = race(config, task, student, teacher, out_dir, control)
        draw_race(summary, out_dir / "race.png")
        last = list(RACE)[-1]
        print_examples(last, summary["methods"][last]["examples"])
        print_race(summary)
        print(f"\nThe picture is {out_dir / 'race.png'}")
    else:
        summary = train(config, task, student, teacher, out_dir, config.method, **options)
        write_json(out_dir / "summary.json", summary | {"control": control})
        print_examples(config.method, summary["examples"])
        for search in summary["searches"]:
            if search["multiple"]:
                print(f"After step {search['step']}: W_t + {search['multiple']:g} Δ kept, learning "
                      f"rate {search['lr']:.2g}")
        print(f"\nAccuracy {summary['curve'][0]['accuracy']:.3f} before, "
              f"{summary['final_accuracy']:.3f} after {summary['steps']} steps (mean of the last "
              f"three evaluations), {summary['tokens']:,} tokens, {summary['seconds']:.1f} s")
    print(f"\nEverything is in {out_dir}")


def stop(message, status=2):
    """One line, and a status that says something went wrong."""
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(status)


def main(args=None, config_class=Config, load=load, command="python train.py", **options):
    """The command line; extras/real.py gives it settings, a loader and steps of its own."""
    for stream in (sys.stdout, sys.stderr):                   # no Δ on an ASCII terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    hint = ""
    try:
        config = parse(args, config_class)
        if config.device != "cpu":
            torch.set_float32_matmul_precision("high")        # TF32 on tensor cores
        pick("score", config.score, options.get("scores", SCORES))
        pick("candidates", config.candidates, SEARCHES)
        pick("task", config.task, TASKS)                      # before any work is done
        out_dir = claim_directory(config)
        config.out_dir = str(out_dir)
        hint = f"to go on: {command} --resume {shlex.quote(str(out_dir))}"
        run_one(config, out_dir, load, **options)
    except Stopped as stopped:
        step, number = stopped.args
        stop(f"stopped after step {step}; {hint}", 128 + number)
    except KeyboardInterrupt:
        stop(f"stopped; {hint}", 130)
    except torch.OutOfMemoryError as error:
        stop(f"{first_line(error)} Try a smaller --micro_batch_size or --rollout_batch_size")
    except (ValueError, OSError) as error:
        stop(error)


if __name__ == "__main__":
    main()
