"""Distil a teacher into a student on the student's own answers: plain OPD against EffOPD, from the same start.

    python train.py                                    # the race: OPD and two EffOPD searches, minutes on a laptop
    python train.py --method effopd --device cuda      # one run, on a GPU
    python train.py --preset gpu                       # a 25 M student on longer chains, for a GPU of 8 GB
    python train.py --method opd --lr 1e-3             # OPD at its best learning rate
    python train.py --method rl --lr 3e-4              # reinforcement learning (GRPO) on right or wrong; also sft
    python train.py --sweep "lr=1e-4,1e-3 method=opd,effopd seed=0:5"      # a grid of runs: a table with intervals
    python train.py --gap skill                        # a student that lacks the skill: where foresight fails
    python train.py --help                             # every setting

The task is built in: chains of arithmetic modulo 10, worked out step by step.

    prompt 7+5-3*4=      response 7+5=2;2-3=9;9*4=6;#6 <end>

The base student knows the method but slips on one step in five; the teacher is the same model, trained further
without slips. OPD teaches the student, on its own answers, not to slip. Graded on what follows the #.

Departures from arXiv:2605.11739, beside those of effopd.py:
  - a 0.3 M parameter student on arithmetic instead of 1.5-14 B on mathematics; all settings scaled to it.
  - the full-vocabulary reverse KL is the default loss (--loss sampled is the paper's); same gradient on average.
  - no weight decay; gradients clipped to norm 1.
"""

import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

# Before torch is imported: OpenMP's threads wait for each other by spinning, which makes small operations four times
# slower when anything else runs on the cores. Giving up early costs about a tenth on an idle machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import HfArgumentParser

from effopd import EffOPD, group_advantages, policy_gradient, reverse_kl, reverse_kl_sampled, reverse_kl_top_k
from model import GPT, GPTConfig


# ----------------------------------------------------------------------------------------------------------------
# Settings. A field here is an option of the command line; the groups are those of --help.

def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Run:
    _argument_group_name = "the run"
    method: Literal["race", "opd", "effopd", "rl", "sft"] = setting(
        "race", "opd, effopd, rl (GRPO, rewarded for right answers) and sft (cross-entropy on the teacher's answers) "
        "are single runs; race: OPD, then EffOPD as in the paper (accuracy on 50 problems, 2k, 5 candidates), then "
        "EffOPD by batch KL (doubling, 8 candidates)")
    preset: Literal["laptop", "gpu"] = setting(
        "laptop", "sets the defaults below; gpu: a 25 M student on two-digit chains of 8 operations")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N; auto takes a CUDA GPU where there is one")
    seed: int = setting(0, "of training problems, rollouts and D_v; base, teacher and evaluation do not depend on it")
    out_dir: str = setting("", "the run's directory, must be new; empty: the first free one of runs/METHOD, "
                           "runs/METHOD-2, ...")
    cache_dir: str = setting("cache", "where base and teacher are kept for the next run")


@dataclass
class Models:
    _argument_group_name = "the task and the two models"
    gap: Literal["slip", "skill", "habit"] = setting(
        "slip", "what the student lacks. slip: it knows the method but errs; skill: it is an early checkpoint of the "
        "teacher's own training (changes the defaults of base_steps and teacher_steps); habit: it errs, and the "
        "teacher writes sums and products the other way round")
    num_ops: int = setting(5, "operations in a chain")
    digits: int = setting(1, "digits of the numbers: 1 (modulo 10) or 2 (modulo 100, factors stay below 10)")
    slip: float = setting(0.2, "gap slip: probability that a step of the base's training data is wrong")
    hidden_size: int = setting(96, "width of the model")
    num_hidden_layers: int = setting(3, "layers of the model")
    num_attention_heads: int = setting(4, "attention heads of the model")
    intermediate_size: int = setting(256, "width of the model's MLP")
    base_steps: int = setting(1000, "supervised steps that make the base")
    base_lr: float = setting(3e-3, "peak learning rate of the base's training (gap skill: of the teacher's too)")
    base_batch_size: int = setting(64, "worked examples a step of the base's and the teacher's training")
    teacher_steps: int = setting(150, "further supervised steps, without slips, that make the teacher of the base")
    teacher_lr: float = setting(1e-3, "gap slip: peak learning rate of the teacher's training")
    student: str = setting("", "directory of another student, a Hugging Face checkpoint with this task's vocabulary; "
                           "empty: the built-in base")
    teacher: str = setting("", "directory of another teacher; empty: the built-in one")


@dataclass
class Distillation:
    _argument_group_name = "distillation"
    steps: int = setting(32, "optimiser steps")
    lr: float = setting(1e-4, "learning rate, constant")
    batch_size: int = setting(128, "rollouts a step, one a prompt (--method rl: group_size a prompt)")
    group_size: int = setting(8, "answers to one prompt, compared with each other (--method rl)")
    loss: Literal["full", "sampled", "sequence", "top_k"] = setting(
        "full", "the reverse KL. full: over the whole vocabulary; sampled: on the sampled tokens, discount 0 (the "
        "paper's); sequence: likewise, discount 1; top_k: over the student's top k and a bucket for the rest")
    top_k: int = setting(4, "k of --loss top_k")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    eval_every: int = setting(2, "steps between evaluations, which do not count towards a run's seconds")
    eval_size: int = setting(500, "problems in an evaluation, one sampled answer each")


@dataclass
class Search:
    _argument_group_name = "EffOPD's search, for --method effopd"
    score: Literal["accuracy", "rollout_kl", "batch_kl"] = setting(
        "accuracy", "of a candidate. accuracy: on D_v (the paper's); rollout_kl: -KL to the teacher on fresh answers "
        "to D_v; batch_kl: -KL on the batch just trained on")
    candidates: Literal["linear", "doubling", "line"] = setting(
        "linear", "W_t + 2kΔ (the paper's); W_t + 2^k Δ; line: doubling, or back towards W_prev where further is worse")
    num_candidates: int = setting(5, "candidates at most")
    dv_size: int = setting(50, "problems in D_v")
    accept: Literal["gt", "ge", "always"] = setting(
        "gt", "a candidate must score higher (gt), not lower (ge), than the last kept; always: whatever it scores")
    direction: Literal["update", "random", "top", "tail"] = setting(
        "update", "candidates lie along Δ or, of its norm in every matrix, a random direction, the leading tenth of "
        "its singular directions, or the other nine")
    scope: Literal["attention+mlp", "mlp", "all"] = setting("attention+mlp", "what a jump moves")
    first_trigger: int = setting(1, "the first search follows this step, the next ones its doublings")
    search_every: int = setting(0, "search also at every multiple of this step (0: off)")
    reset_moments: bool = setting(False, "forget Adam's moments of the moved weights after a jump")
    utility_gate: bool = setting(False, "leave out of a jump the matrices whose first-order utility is not positive")
    alignment_gate: float = setting(-1.0, "no search where cos(Δ, the last search's Δ) is below this (-1: off)")


@dataclass
class Sweep:
    _argument_group_name = "a grid of runs"
    sweep: str = setting(
        "", "settings and their values: \"lr=1e-5,1e-4 method=opd,effopd seed=0:5\" is 2 x 2 x 5 runs; a:b counts from "
        "a to b - 1; a value may bring others along, as in effopd+score=batch_kl. Goes on where it was stopped. Its "
        "out_dir, empty: runs/sweep")
    target: float = setting(0.0, "accuracy that the sweep's costs are counted to (0: what the grid's OPD ends with, "
                            "seed by seed; .8 if it has none)")
    jobs: int = setting(0, "runs at a time (0: two, or one on a single core)")


@dataclass
class Config(Sweep, Search, Distillation, Models, Run):
    """Everything a run depends on. ValueError, in one line, for a value that cannot work."""

    def __post_init__(self):
        for name in ("num_ops", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                     "base_steps", "base_lr", "base_batch_size", "teacher_steps", "teacher_lr", "steps", "lr",
                     "batch_size", "group_size", "top_k", "max_grad_norm", "eval_every", "eval_size", "num_candidates",
                     "dv_size", "first_trigger"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} must be greater than 0, got {getattr(self, name)}")
        if self.digits not in (1, 2):
            raise ValueError(f"--digits must be 1 or 2, got {self.digits}")
        if not 0 <= self.slip < 1:
            raise ValueError(f"--slip is a probability below 1, got {self.slip}")
        if self.method == "rl" and (self.group_size == 1 or self.batch_size % self.group_size):
            raise ValueError(f"--group_size must be 2 or more and divide --batch_size ({self.batch_size}), "
                             f"got {self.group_size}")
        if not -1 <= self.alignment_gate <= 1:
            raise ValueError(f"--alignment_gate is a cosine, -1 (off) to 1, got {self.alignment_gate}")
        if self.search_every < 0:
            raise ValueError(f"--search_every must be 0 (off) or more, got {self.search_every}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(f"--hidden_size must be a multiple of 2 x num_attention_heads = "
                             f"{2 * self.num_attention_heads}, got {self.hidden_size}")
        space = 10 ** self.digits * (2 * 10 ** self.digits + 10) ** self.num_ops
        if self.eval_size > space // 10:
            raise ValueError(f"--eval_size {self.eval_size}: there are {space:,} chains of {self.num_ops} operations, "
                             f"and at most a tenth of them may be held out")
        for name in ("student", "teacher"):
            if getattr(self, name) and not Path(getattr(self, name)).is_dir():
                raise ValueError(f"--{name}: there is no directory {getattr(self, name)}")
        device = str(pick_device(self.device))
        if self.preset == "gpu" and self.device == "auto" and device == "cpu":
            raise ValueError("--preset gpu: this torch sees no CUDA GPU; --device cpu trains it on the CPU, for days")
        self.device = device


PRESETS = {  # defaults by preset and gap
    ("laptop", "slip"): {},
    ("laptop", "skill"): dict(base_steps=250, teacher_steps=350),
    ("laptop", "habit"): dict(teacher_steps=400, teacher_lr=3e-3),
}
GPU = dict(  # a guess, sized by arithmetic: no GPU has tried it
    num_ops=8, digits=2, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408,
    base_lr=6e-4, base_batch_size=128, teacher_lr=2e-4, lr=2e-5)
PRESETS["gpu", "slip"] = GPU | dict(base_steps=2000, teacher_steps=200)
PRESETS["gpu", "habit"] = GPU | dict(base_steps=2000, teacher_steps=500, teacher_lr=6e-4)
PRESETS["gpu", "skill"] = GPU | dict(base_steps=600, teacher_steps=1400)

RACE = {  # name: (directory, how it differs from the others)
    "OPD": ("opd", dict(method="opd")),
    "EffOPD, paper": ("effopd", dict(method="effopd", score="accuracy", candidates="linear", num_candidates=5)),
    "EffOPD, batch KL": ("effopd-batch-kl", dict(method="effopd", score="batch_kl", candidates="doubling",
                                                 num_candidates=8)),
}


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this torch sees {torch.cuda.device_count()} CUDA GPUs; use --device cpu")
    return device


GROUPS = [Run, Models, Distillation, Search, Sweep]
OWNERS = {f.name: ("effopd",) for f in fields(Search)} | {   # settings that only these methods have a use for
    "group_size": ("rl",), "loss": ("race", "opd", "effopd"), "top_k": ("race", "opd", "effopd")}


def parse_config(args=None) -> Config:
    first = HfArgumentParser(GROUPS, add_help=False, allow_abbrev=False)
    parser = HfArgumentParser(GROUPS, description=__doc__.split("\n\n")[0], allow_abbrev=False,
                              usage="python train.py [--SETTING VALUE ...]")
    first.error = parser.error = stop
    chosen = first.parse_known_args(args)[0]
    parser.set_defaults(**PRESETS[chosen.preset, chosen.gap])
    config = vars(parser.parse_args(args))
    method = config["method"]
    for f in (*fields(Search), *fields(Distillation)):
        if method not in OWNERS.get(f.name, (method,)) and config[f.name] != f.default:
            stop(f"--{f.name} is a setting of --method {OWNERS[f.name][-1]}; --method {method} has no use for it")
    try:
        return Config(**config)
    except ValueError as error:
        stop(error)


def stop(message):
    """One line, and a status that says something went wrong."""
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


# ----------------------------------------------------------------------------------------------------------------
# The task.

class Chains:
    """Chains of arithmetic modulo 10 or 100, worked out from left to right."""

    def __init__(self, num_ops: int, digits: int):
        self.num_ops, self.modulus = num_ops, 10 ** digits
        ranks = {c.encode(): i for i, c in enumerate("0123456789+-*=;#")}
        self.encoding = tiktoken.Encoding("chains", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                          special_tokens={"<end>": len(ranks)})
        self.end = len(ranks)
        self.vocab_size = self.encoding.n_vocab
        self.max_prompt = (num_ops + 1) * (digits + 1)
        self.max_response = num_ops * (3 * digits + 3) + digits + 2           # a=b... steps, #answer, <end>

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

    def solve(self, problem: str, slip: float = 0.0, rng: random.Random | None = None, swap: bool = False) -> str:
        """The worked answer. Each result is wrong with probability slip, and the chain goes on from it.

        swap: sums and products are written the other way round, 5+7=2 for 7+5=2.
        """
        numbers = problem[:-1].replace("-", "+").replace("*", "+").split("+")
        ops = [c for c in problem if c in "+-*"]
        value, steps = int(numbers[0]), []
        for op, number in zip(ops, map(int, numbers[1:])):
            result = (value + number if op == "+" else value - number if op == "-" else value * number) % self.modulus
            if slip and rng.random() < slip:
                result = (result + rng.randrange(1, self.modulus)) % self.modulus
            steps.append(f"{number}{op}{value}={result};" if swap and op != "-" else f"{value}{op}{number}={result};")
            value = result
        return "".join(steps) + f"#{value}"

    def is_correct(self, problem: str, answer: str) -> bool:
        return answer.rpartition("#")[2] == self.solve(problem).rpartition("#")[2] and "#" in answer

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens: list[int]) -> str:
        return self.encoding.decode([t for t in tokens if t != self.end])


# ----------------------------------------------------------------------------------------------------------------
# Base and teacher: supervised training, once, then kept on disk.

class Batch(NamedTuple):
    """Prompts with their answers, padded on the right. Logits of ids[:, :-1] predict ids[:, 1:]."""
    ids: torch.Tensor      # (B, T) int64
    mask: torch.Tensor     # (B, T - 1) bool: ids[:, 1:] is a token of the answer


def pack(prompts, answers, device) -> Batch:
    """Lists of token ids, an answer to each prompt -> Batch."""
    ids = pad_sequence([torch.tensor(p + a) for p, a in zip(prompts, answers)], batch_first=True)        # (B, T)
    starts = torch.tensor([len(p) for p in prompts])[:, None]
    ends = starts + torch.tensor([len(a) for a in answers])[:, None]
    columns = torch.arange(1, ids.shape[1])
    return Batch(ids.to(device), ((columns >= starts) & (columns < ends)).to(device))


def fit(model, task, config, steps, lr, slip, rng, exclude, label, snapshot=(0, None), swap=False):
    """Supervised training on worked examples (`Chains.solve`): 30 steps of warm-up, then linear to 5%.

    snapshot: (step, directory) saves the model as it is after that step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for step in tqdm(range(1, steps + 1), desc=label, unit="step", dynamic_ncols=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / 30, 1 - 0.95 * step / steps)
        problems = task.problems(config.base_batch_size, rng, exclude)
        batch = pack([task.encode(p) for p in problems],
                     [task.encode(task.solve(p, slip, rng, swap)) + [task.end] for p in problems], model.device)
        logits = model(batch.ids[:, :-1])                                                  # (B, T-1, V)
        loss = F.cross_entropy(logits[batch.mask], batch.ids[:, 1:][batch.mask])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == snapshot[0]:
            model.save_pretrained(snapshot[1])


def make_base_and_teacher(config: Config, task: Chains, directory: Path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(task.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
                          config.num_attention_heads, eos_token_id=task.end)).to(config.device)
    rng, exclude = random.Random("base and teacher"), set(evaluation_problems(config, task))
    if config.gap in ("slip", "habit"):
        fit(model, task, config, config.base_steps, config.base_lr, config.slip, rng, exclude, "base")
        model.save_pretrained(directory / "base")
        fit(model, task, config, config.teacher_steps, config.teacher_lr, 0.0, rng, exclude, "teacher",
            swap=config.gap == "habit")
    else:                                                     # one clean run; the base is what it was early on
        fit(model, task, config, config.base_steps + config.teacher_steps, config.base_lr, 0.0, rng, exclude,
            "base and teacher", snapshot=(config.base_steps, directory / "base"))
    model.save_pretrained(directory / "teacher")


def load_models(config: Config, task: Chains) -> tuple[GPT, GPT]:
    """The student to start from and its teacher: from the cache, made first if they are not there yet."""
    recipe = {name: getattr(config, name) for name in (
        "gap", "num_ops", "digits", "slip", "hidden_size", "num_hidden_layers", "num_attention_heads", "eval_size",
        "intermediate_size", "base_steps", "base_lr", "base_batch_size", "teacher_steps", "teacher_lr")}
    recipe["version"] = 1                                     # to be raised when the training above changes
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:10]
    home = Path(config.cache_dir) / f"{config.gap}-{key}"
    if not (config.student and config.teacher) and not home.exists():
        Path(config.cache_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=config.cache_dir, prefix="unfinished-") as scratch:
            made = Path(scratch) / "models"
            make_base_and_teacher(config, task, made)
            write_json(made / "recipe.json", recipe)
            try:
                made.rename(home)                             # all or nothing: no half-made model is ever read
            except OSError:
                if not home.exists():                         # else another process was first, with the same
                    raise
    models = []
    for option, built_in in (("student", "base"), ("teacher", "teacher")):
        directory = getattr(config, option) or home / built_in
        model = GPT.from_pretrained(directory).to(config.device)
        if model.config.vocab_size != task.vocab_size:
            raise ValueError(f"--{option}: this model has {model.config.vocab_size} tokens, the task {task.vocab_size}")
        if model.config.max_position_embeddings < task.max_prompt + task.max_response:
            raise ValueError(f"--{option}: a context of {model.config.max_position_embeddings} tokens is too short for "
                             f"problems and answers of up to {task.max_prompt + task.max_response}")
        models.append(model)
    return models[0], models[1].requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------
# Rollouts, evaluation, and the scores that a search can go by.

def answer(model, task, problems, generator=None) -> list[list[int]]:
    """One sampled answer (T = 1) to each problem: token ids, the end token included."""
    rollout = model.generate([task.encode(p) for p in problems], task.max_response, generator=generator,
                             eos_token_id=task.end)
    return [tokens[:n] for tokens, n in zip(rollout.tokens.tolist(), rollout.mask.sum(1).tolist())]


def accuracy(task, problems, answers) -> float:
    return sum(task.is_correct(p, task.decode(a)) for p, a in zip(problems, answers)) / len(problems)


def evaluation_problems(config, task) -> list[str]:
    """The same for every run; neither training nor D_v contains any of them."""
    return task.problems(config.eval_size, random.Random("evaluation"))


def evaluate(model, task, problems) -> tuple[float, list[list[int]]]:
    """Accuracy of one sampled answer to each problem, always under the same random numbers; and the answers."""
    generator, answers = torch.Generator(model.device), []
    for i in range(0, len(problems), 500):
        answers += answer(model, task, problems[i:i + 500], generator.manual_seed(i))
    return accuracy(task, problems, answers), answers


class Score:
    """validate(model) for EffOPD, higher is better, and a count of the response tokens that it ran through the student.

    To add a score of your own, add a case to __call__ and its name to Search.score.
    """

    def __init__(self, config, task, teacher, problems):
        self.kind, self.task, self.teacher, self.problems = config.score, task, teacher, problems
        self.last_batch = None     # (Batch, teacher logits) of the training step just taken, for batch_kl
        self.tokens = 0

    def __call__(self, model) -> float:
        if self.kind == "batch_kl":                           # answers and teacher logits are at hand: one forward pass
            batch, teacher_logits = self.last_batch
        else:                                                 # fresh answers, seeded alike for all candidates
            answers = answer(model, self.task, self.problems)
            if self.kind == "accuracy":
                self.tokens += sum(map(len, answers))
                return accuracy(self.task, self.problems, answers)
            batch = pack([self.task.encode(p) for p in self.problems], answers, model.device)
            teacher_logits = self.teacher(batch.ids[:, :-1])
        self.tokens += int(batch.mask.sum())
        return -reverse_kl(model(batch.ids[:, :-1]), teacher_logits, batch.mask).item()


# ----------------------------------------------------------------------------------------------------------------
# The training loop.

def loss_of(config, student_logits, teacher_logits, batch, rewards):
    """What --method and --loss minimise. rewards (B,): 1.0 for a right answer, else 0.0."""
    if config.method == "rl":
        advantages = group_advantages(rewards, config.group_size)                          # (B,)
        return policy_gradient(student_logits, batch.ids[:, 1:], advantages, batch.mask)
    if config.method == "sft":                                # forward KL(π* || π) up to a constant, one sample
        return F.cross_entropy(student_logits[batch.mask], batch.ids[:, 1:][batch.mask])
    if config.loss == "full":
        return reverse_kl(student_logits, teacher_logits, batch.mask)
    if config.loss == "top_k":
        return reverse_kl_top_k(student_logits, teacher_logits, batch.mask, config.top_k)
    return reverse_kl_sampled(student_logits, teacher_logits, batch.ids[:, 1:], batch.mask,
                              discount=1.0 if config.loss == "sequence" else 0.0)


def train_step(config, task, student, teacher, optimizer, problems, generator):
    """One step on these problems. Returns the batch, the teacher's logits and what the log has of the step.

    The gradients are left where they are: zero them before the next step.
    """
    if config.method == "rl":                                 # neighbours are a group
        problems = [p for p in problems for _ in range(config.group_size)]
    answers = answer(teacher if config.method == "sft" else student, task, problems, generator)    # y ~ π (sft: π*)
    batch = pack([task.encode(p) for p in problems], answers, student.device)
    with torch.no_grad():
        teacher_logits = teacher(batch.ids[:, :-1])           # (B, T-1, V); rl and sft: only for the kl in the log
    student_logits = student(batch.ids[:, :-1])                                            # (B, T-1, V)
    rewards = torch.tensor([float(task.is_correct(p, task.decode(a))) for p, a in zip(problems, answers)])  # (B,)
    loss = loss_of(config, student_logits, teacher_logits, batch, rewards.to(student.device))
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()}; try a lower --lr")
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
    optimizer.step()
    kl = reverse_kl(student_logits.detach(), teacher_logits, batch.mask)
    return batch, teacher_logits, dict(loss=loss.item(), kl=kl.item(), reward=rewards.mean().item(),
                                       grad_norm=grad_norm.item(), lr=config.lr)


def make_optimizer(config, student):
    return torch.optim.AdamW(student.parameters(), lr=config.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def distil(config: Config, task: Chains, student: GPT, teacher: GPT, out_dir: Path, label: str) -> dict:
    """Train the student in place, keep the run in out_dir, return its summary."""
    held_out = evaluation_problems(config, task)
    exclude, rng = set(held_out), random.Random(f"training {config.seed}")
    generator = torch.Generator(config.device).manual_seed(config.seed)
    optimizer = make_optimizer(config, student)
    score = Score(config, task, teacher, task.problems(config.dv_size, random.Random(f"D_v {config.seed}"), exclude))
    effopd = None
    if config.method == "effopd":
        effopd = EffOPD(student, score, accept=config.accept, candidates=config.candidates, scope=config.scope,
                        direction=config.direction, num_candidates=config.num_candidates, seed=config.seed,
                        first_trigger=config.first_trigger, every=config.search_every,
                        optimizer=optimizer if config.reset_moments else None, utility_gate=config.utility_gate,
                        alignment_gate=config.alignment_gate if config.alignment_gate > -1 else None)
    write_json(out_dir / "config.json", asdict(config) | {"versions": versions(config.device)})
    save_checkpoint(student, out_dir / "checkpoints" / "step_000000")

    student_tokens, seconds, searches = 0, 0.0, []
    first_accuracy, before = evaluate(student, task, held_out)
    curve = [dict(step=0, accuracy=first_accuracy, tokens=0, seconds=0.0)]
    bar = tqdm(range(1, config.steps + 1), desc=label, unit="step", dynamic_ncols=True)
    for step in bar:
        start = time.perf_counter()
        problems = task.problems(config.batch_size // (config.group_size if config.method == "rl" else 1), rng, exclude)
        try:
            batch, teacher_logits, line = train_step(config, task, student, teacher, optimizer, problems, generator)
        except FloatingPointError as error:
            raise ValueError(f"step {step}: {error}. The run so far is in {out_dir}") from None
        seconds += time.perf_counter() - start

        if step.bit_count() == 1:                             # 1, 2, 4, 8, ...: before a jump
            save_checkpoint(student, out_dir / "checkpoints" / f"step_{step:06d}")
        if effopd is not None:
            start, tokens_before = time.perf_counter(), score.tokens
            score.last_batch = batch, teacher_logits
            search = effopd.step(step)
            seconds += time.perf_counter() - start
            if search is not None:
                searches.append(search | {"tokens": score.tokens - tokens_before})
                append_json(out_dir / "search.jsonl", searches[-1])
        optimizer.zero_grad()                                 # after the search, which reads the gradients

        student_tokens += int(batch.mask.sum())
        line = dict(step=step, **line, student_tokens=student_tokens, validation_tokens=score.tokens, seconds=seconds)
        if step % config.eval_every == 0 or step == config.steps:
            line["accuracy"], after = evaluate(student, task, held_out)
            curve.append(dict(step=step, accuracy=line["accuracy"], tokens=student_tokens + score.tokens,
                              seconds=seconds))
        append_json(out_dir / "log.jsonl", line)
        bar.set_postfix(kl=f"{line['kl']:.3f}", accuracy=f"{curve[-1]['accuracy']:.3f}")

    save_checkpoint(student, out_dir / "checkpoints" / "final")
    summary = dict(label=label, method=config.method, seed=config.seed, lr=config.lr, steps=config.steps,
                   final_accuracy=fmean(point["accuracy"] for point in curve[1:][-3:]),
                   tokens=student_tokens + score.tokens, validation_tokens=score.tokens, seconds=seconds,
                   searches=[{k: s[k] for k in ("step", "accepted", "multiple", "seconds")} for s in searches],
                   curve=curve, examples=examples(task, held_out, before, after))
    write_json(out_dir / "summary.json", summary)
    return summary


def examples(task, problems, before, after, n=3) -> list[dict]:
    """The first n problems that the student got wrong before training, with its answers before and after."""
    rows = [dict(problem=p, before=task.decode(b), after=task.decode(a), right=task.is_correct(p, task.decode(a)))
            for p, b, a in zip(problems, before, after) if not task.is_correct(p, task.decode(b))]
    return rows[:n]


# ----------------------------------------------------------------------------------------------------------------
# The race: the same start, seed and problems for each method; then who got where at what cost.

def race(config: Config, task: Chains, student: GPT, teacher: GPT, out_dir: Path) -> dict:
    rehearsal = copy.deepcopy(student)                        # the first step ever is slow, and should be nobody's
    train_step(config, task, rehearsal, teacher, make_optimizer(config, rehearsal),
               task.problems(config.batch_size, random.Random(0)), None)
    runs = {}
    for name, (directory, settings) in RACE.items():
        (out_dir / directory).mkdir()
        runs[name] = distil(Config(**asdict(config) | settings), task, copy.deepcopy(student), teacher,
                            out_dir / directory, name)
    summary = dict(config=asdict(config) | {"versions": versions(config.device)}, **compare(runs))
    write_json(out_dir / "summary.json", summary)
    return summary


def first_at(curve, target) -> dict | None:
    """The first point of an evaluation curve, step 0 aside, that is at the target accuracy."""
    return next((point for point in curve[1:] if point["accuracy"] >= target - 1e-9), None)


def compare(runs: dict) -> dict:
    """What each run took, validation included, to the target: the accuracy that OPD ends with."""
    target, methods = runs["OPD"]["final_accuracy"], {}
    opd = first_at(runs["OPD"]["curve"], target)
    for name, run in runs.items():
        own = first_at(run["curve"], target)
        methods[name] = {key: run[key] for key in ("final_accuracy", "searches", "curve", "examples")} | {
            "reached": own, "speed_up": own and {unit: opd[unit] / own[unit] for unit in ("step", "tokens", "seconds")}}
    return dict(target=target, methods=methods)


def print_run(summary):
    print(f"\nAccuracy {summary['curve'][0]['accuracy']:.3f} before, {summary['final_accuracy']:.3f} after "
          f"{summary['steps']} steps, {summary['tokens']:,} student tokens, {summary['seconds']:.1f} s\n")
    for target in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        point = first_at(summary["curve"], target)
        print(f"  to accuracy {target:.2f}: " + (f"{point['step']} steps, {point['tokens']:,} student tokens, "
                                               f"{point['seconds']:.1f} s" if point else "not reached"))


def print_race(summary):
    print(f"\nTo the accuracy that OPD ends with ({summary['target']:.3f}), validation counted:\n\n"
          f"{'':18}{'final':>9}{'steps':>9}{'tokens':>10}{'seconds':>9}"
          f"{'speed-up in steps':>20}{'tokens':>9}{'seconds':>9}")
    for name, method in summary["methods"].items():
        row, point, speed_up = f"{name:18}{method['final_accuracy']:9.3f}", method["reached"], method["speed_up"]
        if point is None:
            print(row + "  did not reach it")
        else:
            print(row + f"{point['step']:9}{point['tokens']:10,}{point['seconds']:9.1f}"
                  f"{speed_up['step']:19.1f}x{speed_up['tokens']:8.1f}x{speed_up['seconds']:8.1f}x")


def print_examples(label, examples):
    print(f"\nProblems that the student got wrong before, and its answers after {label}:\n")
    for e in examples:
        print(f"  {e['problem']}\n    before  {e['before']}  wrong\n    after   {e['after']}  "
              f"{'right' if e['right'] else 'wrong'}")


def draw_race(summary, path):
    """Accuracy against steps and against seconds; a dot where a search accepted a jump."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, unit, title in zip(panels, ("step", "seconds"), ("optimiser steps", "seconds, validation included")):
        for i, (name, m) in enumerate(summary["methods"].items()):
            at = {point["step"]: point for point in m["curve"]}
            axis.plot([p[unit] for p in m["curve"]], [p["accuracy"] for p in m["curve"]], color=f"C{i}", label=name)
            jumps = [at[min(s for s in at if s >= search["step"])] for search in m["searches"] if search["accepted"]]
            axis.plot([p[unit] for p in jumps], [p["accuracy"] for p in jumps], "o", color=f"C{i}")
        axis.axhline(summary["target"], color="grey", linestyle=":", label="where OPD ends")
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (one sampled answer a problem)")
    panels[0].legend(loc="lower right")
    figure.suptitle("One student, one teacher, three ways to distil (dots: where a search accepted a jump)")
    figure.savefig(path, dpi=120)


# ----------------------------------------------------------------------------------------------------------------
# Files.

def versions(device) -> dict:
    import transformers
    return {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
            "numpy": np.__version__, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if str(device).startswith("cuda") else "cpu"}


def write_json(path: Path, value, indent=1):
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(value, indent=indent))
    scratch.replace(path)                                     # never a half-written file under the real name


def append_json(path: Path, line: dict):
    with open(path, "a") as f:
        f.write(json.dumps(line) + "\n")


def save_checkpoint(model, directory: Path):
    scratch = directory.with_name(directory.name + ".part")
    model.save_pretrained(scratch)
    scratch.rename(directory)


def claim_directory(config) -> Path:
    """Make --out_dir, or the first of runs/METHOD, runs/METHOD-2, ... that is free: no run overwrites another."""
    if config.out_dir:
        Path(config.out_dir).mkdir(parents=True)
        return Path(config.out_dir)
    Path("runs").mkdir(exist_ok=True)
    for n in range(1, sys.maxsize):
        directory = Path("runs") / (f"{config.method}-{n}" if n > 1 else config.method)
        try:
            directory.mkdir()
            return directory
        except FileExistsError:
            continue


# ----------------------------------------------------------------------------------------------------------------
# The sweep: a grid of runs, each of them this script in a process of its own; then the table and the figure.

def given(args=None) -> dict:
    """The settings that a command line names itself: {name: value}."""
    parser = HfArgumentParser(GROUPS, add_help=False, allow_abbrev=False)
    parser.error = stop
    unset = argparse.Namespace(**dict.fromkeys(f.name for f in fields(Config)))
    return {name: v for name, v in vars(parser.parse_known_args(args, unset)[0]).items() if v is not None}


def useful(run: dict) -> dict:
    """Without the settings that the run's method has no use for."""
    return {name: value for name, value in run.items() if run["method"] in OWNERS.get(name, (run["method"],))}


def name_of(run: dict) -> str:
    return ",".join(f"{name}={value}" for name, value in run.items())


def grid(text: str) -> dict:
    """"lr=1e-5,1e-4 method=opd seed=0:2" -> {a run's name: (its settings, the name of the OPD run beside it)}.

    The first axis is the slowest. What a method has no use for is left out; runs that then are the same are one. The
    OPD beside a run has its values on all axes, but not what these bring along. ValueError for a text that is no grid.
    """
    axes, runs = {}, {}
    allowed = {f.name for f in fields(Config)} - {f.name for f in fields(Sweep)} - {"out_dir", "cache_dir"}
    for word in text.split():
        axis, _, values = word.partition("=")
        span = re.fullmatch(r"(\d+):(\d+)", values)
        values = map(str, range(int(span[1]), int(span[2]))) if span else values.split(",")
        axes[axis] = [dict(pair.split("=", 1) for pair in re.split(r"\+(?=\w+=)", f"{axis}={v}")) for v in values]
        if not axes[axis] or not all(v.keys() <= allowed and "" not in v.values() for v in axes[axis]):
            raise ValueError(f"--sweep: cannot read {word!r}; wanted SETTING=VALUE,VALUE,... or SETTING=FIRST:END")
    for values in itertools.product(*axes.values()):
        run = {name: value for part in values for name, value in part.items()}
        if run.get("method", "race") == "race":
            raise ValueError("--sweep needs the methods of single runs, as in method=opd,effopd")
        opd = useful({axis: run[axis] for axis in axes} | {"method": "opd"})
        runs[name_of(useful(run))] = useful(run), name_of(opd)
    return runs


def sweep(args) -> int:
    """Do the runs that are not in sweep.json yet, then print the table and draw the figure: the exit status."""
    settings = given(args)
    runs, target, jobs = grid(settings.pop("sweep")), settings.pop("target", 0.0), settings.pop("jobs", 0)
    out_dir, where = Path(settings.pop("out_dir", "runs/sweep")), {"cache_dir": settings.pop("cache_dir", "cache")}
    file, jobs = out_dir / "sweep.json", jobs or min(2, os.cpu_count())
    done = json.loads(file.read_text()) if file.exists() else dict(settings=settings, runs={})
    if done["settings"] != settings:
        raise ValueError(f"{out_dir} has runs with {done['settings'] or 'default settings'}, not with "
                         f"{settings or 'these'}; name another --out_dir")

    def command(run):
        return [word for pair in (useful(settings | run) | where).items() for word in (f"--{pair[0]}", str(pair[1]))]

    configs = {name: parse_config(command(run)) for name, (run, _) in runs.items()}   # a wrong value ends it here
    todo = [name for name in runs if name not in done["runs"]]
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in todo:                                         # base and teacher, before two runs both make them
        load_models(configs[name], Chains(configs[name].num_ops, configs[name].digits))

    def finish(name):
        """Do one run; the last line it complained with, if it failed."""
        if (out_dir / name / "summary.json").exists():
            return None
        shutil.rmtree(out_dir / name, ignore_errors=True)     # stopped half-way: from its start again
        threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
        job = subprocess.run([sys.executable, __file__, *command(runs[name][0]), "--out_dir", str(out_dir / name)],
                             capture_output=True, text=True, env=threads | os.environ)
        said = [f"exit status {job.returncode}"] + [line for line in re.split("[\r\n]", job.stderr) if line.strip()]
        return said[-1] if job.returncode else None

    failed = {}
    with ThreadPoolExecutor(jobs) as pool:                    # threads that wait for their processes
        for error, name in zip(tqdm(pool.map(finish, todo), total=len(todo), desc="sweep", unit="run"), todo):
            if error is not None:
                failed[name] = error
                continue
            summary = json.loads((out_dir / name / "summary.json").read_text())
            done["versions"] = json.loads((out_dir / name / "config.json").read_text())["versions"]
            done["runs"][name] = {key: summary[key] for key in ("final_accuracy", "tokens", "seconds")} | dict(
                curve=[[p["step"], p["accuracy"], p["tokens"], round(p["seconds"], 2)] for p in summary["curve"]],
                searches=[[s["step"], s["accepted"], s["multiple"]] for s in summary["searches"]])
            write_json(file, done, indent=None)
    groups = tabulate({name: run for name, run in runs.items() if name in done["runs"]}, done["runs"], target)
    if groups:
        print_sweep(groups)
        draw_sweep(groups, out_dir / "sweep.png")
        print(f"\nAll curves are in {file}, the picture is {out_dir / 'sweep.png'}")
    for name, error in failed.items():
        print(f"train.py: {name} failed: {error}", file=sys.stderr)
    return 1 if failed else 0


def bootstrap(values, resamples=10_000) -> dict:
    """{mean, low, high: 95% percentile bootstrap interval of the mean (None of one value), n}.

    Of five values such an interval covers the true mean less often than 95 times in 100, nearer to 85.
    """
    values = np.asarray(values, dtype=float)                                     # (n,)
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5)).tolist() if len(values) > 1 else (None, None)
    return dict(mean=float(values.mean()), low=low, high=high, n=len(values))


UNITS = ("step", "tokens", "seconds")


def tabulate(runs: dict, results: dict, target: float) -> list[dict]:
    """A row for each setting but the seed: final accuracy, cost to the target, and how many times less than OPD's.

    A run that never gets there counts with all it spent, so that the mean is a bound from below; `reached` counts the
    others. times: of the seeds in which the run and the OPD beside it both get there, {} if not all do.
    """
    rows = {}
    for name, (run, opd) in runs.items():
        goal = target or (results[opd]["final_accuracy"] if opd in results else 0.8)
        curve, beside = ([dict(zip(("step", "accuracy", "tokens", "seconds"), point)) for point in results[n]["curve"]]
                         for n in (name, opd if opd in results else name))
        own, other = first_at(curve, goal), first_at(beside, goal)
        row = rows.setdefault(name_of({n: v for n, v in run.items() if n != "seed"}), dict(
            settings={n: v for n, v in run.items() if n != "seed"}, final=[], goal=[], reached=0,
            cost={unit: [] for unit in UNITS}, times={unit: [] for unit in UNITS}))
        row["final"].append(results[name]["final_accuracy"])
        row["goal"].append(goal)
        row["reached"] += own is not None
        for unit in UNITS:
            row["cost"][unit].append((own or curve[-1])[unit])
            row["times"][unit] += [other[unit] / own[unit]] if own and other and opd in results else []
    for row in rows.values():
        n, row["goal"] = len(row["final"]), fmean(row["goal"])
        row["final"], row["cost"] = bootstrap(row["final"]), {u: bootstrap(v) for u, v in row["cost"].items()}
        row["times"] = {u: bootstrap(v) for u, v in row["times"].items() if len(v) == n}
    return list(rows.values())


def print_sweep(rows):
    """A Markdown table: mean [95% bootstrap interval]."""
    def say(stats, form):
        span = "" if stats["low"] is None else f" [{stats['low']:{form}}, {stats['high']:{form}}]"
        return f"{stats['mean']:{form}}{span}"

    print("\n| settings | n | final accuracy | to accuracy | reached | steps | student tokens | seconds | "
          "times fewer than OPD: steps | tokens | seconds |\n|" + "---|" * 11)
    for row in rows:
        n, bound = row["final"]["n"], "" if row["reached"] == row["final"]["n"] else "≥ "
        costs = [bound + say(row["cost"][unit], form) for unit, form in zip(UNITS, (".1f", ",.0f", ".1f"))]
        times = [say(row["times"][unit], ".2f") if row["times"] else "-" for unit in UNITS]
        cells = [name_of(row["settings"]).replace(",", " "), str(n), say(row["final"], ".3f"), f"{row['goal']:.3f}"]
        print("| " + " | ".join([*cells, f"{row['reached']} of {n}", *costs, *times]) + " |")


def draw_sweep(rows, path):
    """Steps and seconds to the target against the first axis, a line for every other setting; hollow: a lower bound."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    axis, lines = next(iter(rows[0]["settings"])), {}
    for row in rows:
        rest = " ".join(f"{n}={v}" for n, v in row["settings"].items() if n != axis)
        lines.setdefault(rest, []).append(row)
    names = list(dict.fromkeys(row["settings"].get(axis, "-") for row in rows))
    try:
        place, numeric = {name: float(name) for name in names}, True
    except ValueError:
        place, numeric = {name: i for i, name in enumerate(names)}, False
    figure, panels = plt.subplots(1, 2, figsize=(10, 4 + 0.2 * len(lines)), layout="constrained")
    for panel, unit, title in zip(panels, ("step", "seconds"), ("optimiser steps", "seconds, validation included")):
        for i, (label, of) in enumerate(lines.items()):
            xs, stats = [place[row["settings"].get(axis, "-")] for row in of], [row["cost"][unit] for row in of]
            ys = [s["mean"] for s in stats]
            bars = [[0 if s["low"] is None else abs(s["mean"] - s[end]) for s in stats] for end in ("low", "high")]
            panel.errorbar(xs, ys, bars, color=f"C{i}", capsize=3, label=label, linestyle="-" if numeric else "none")
            for x, y, row in zip(xs, ys, of):
                full = row["reached"] == row["final"]["n"]
                panel.plot(x, y, "o", color=f"C{i}", markerfacecolor=f"C{i}" if full else "white")
        panel.set(xlabel=axis, ylabel=f"{title}, to the target", yscale="log")
        if numeric and min(place.values()) > 0:
            panel.set_xscale("log")
        if not numeric:
            panel.set_xticks(range(len(names)), names, rotation=20, ha="right")
        panel.grid(alpha=0.3, which="both")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    figure.suptitle("Mean and 95% bootstrap interval over seeds (hollow: not every seed got there, a lower bound)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args=None):
    if given(args).get("sweep"):
        try:
            sys.exit(sweep(args))
        except (ValueError, OSError) as error:
            stop(error)
    config = parse_config(args)
    if config.out_dir and Path(config.out_dir).exists():      # said now, not after base and teacher were made
        stop(f"--out_dir {config.out_dir} exists already; name a new directory or remove it")
    if config.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")            # TF32 on tensor cores
    task = Chains(config.num_ops, config.digits)
    try:
        student, teacher = load_models(config, task)
        problems = evaluation_problems(config, task)
        print(f"Accuracy on {len(problems)} held-out problems: student {evaluate(student, task, problems)[0]:.3f}, "
              f"teacher {evaluate(teacher, task, problems)[0]:.3f}")
        out_dir = claim_directory(config)
        if config.method == "race":
            summary = race(config, task, student, teacher, out_dir)
            draw_race(summary, out_dir / "race.png")
            label = list(RACE)[-1]
            print_examples(label, summary["methods"][label]["examples"])
            print_race(summary)
            print(f"\nThe picture is {out_dir / 'race.png'}; everything else is in {out_dir}")
        else:
            summary = distil(config, task, student, teacher, out_dir, config.method)
            print_examples(config.method, summary["examples"])
            print_run(summary)
            print(f"\nEverything is in {out_dir}")
    except (ValueError, OSError) as error:
        stop(error)


if __name__ == "__main__":
    main()
