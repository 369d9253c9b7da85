"""Distil a teacher into a student on the student's own answers: plain OPD against EffOPD, from the same start.

    python train.py                                    # the race: OPD and two EffOPD searches, minutes on a laptop
    python train.py --method effopd --device cuda      # one run, on a GPU
    python train.py --preset gpu                       # a 25 M student on longer chains, for a GPU of 8 GB
    python train.py --method rl --lr 3e-4              # reinforcement learning (GRPO) on right or wrong; also sft
    python train.py --sweep "lr=1e-4,1e-3 method=opd,effopd seed=0:5"      # a grid of runs: a table with intervals
    python train.py --gap skill                        # a student that lacks the skill: where foresight fails
    python train.py --method effopd --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-1.7B --data gsm8k.jsonl
    python train.py --help                             # every setting

The default task is built in: chains of arithmetic modulo 10, worked out step by step.

    prompt 7+5-3*4=      response 7+5=2;2-3=9;9*4=6;#6 <end>

The base student knows the method but slips on one step in five; the teacher is the same model, trained further
without slips. OPD teaches the student, on its own answers, not to slip. Graded on what follows the #.

The appendix has the other settings, checkpoints and problems of your own, resuming, files, the sweep.

Departures from arXiv:2605.11739, beside those of effopd.py:
  - a 0.3 M parameter student on arithmetic instead of 1.5-14 B on mathematics; all settings scaled to it.
  - the full-vocabulary reverse KL is the default loss (--loss sampled is the paper's); same gradient on average.
  - distillation has no weight decay; gradients are clipped to norm 1.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

# Before torch is imported: OpenMP's threads spin while they wait, which makes small operations four times slower when
# anything else runs on the cores. Giving up early costs a tenth on an idle machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import HfArgumentParser

from effopd import (EffOPD, chunked, group_advantages, policy_gradient, reverse_kl, reverse_kl_top_k, rows_at_once,
                    token_log_probs)
from model import GPT, GPTConfig


# ----------------------------------------------------------------------------------------------------------------
# Settings: what the loop and the search read. A field is an option of the command line. `config` in what follows is all
# of them in one; the others (run, models, data, sweep) are in the appendix.

def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Distillation:
    _argument_group_name = "distillation"                    # in --help
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
        "linear", "W_t + 2kΔ (the paper's); W_t + 2^k Δ; line: doubling, from half of what the last search kept, or "
        "the other way where that is no better, down to 2Δ and back towards W_prev")
    num_candidates: int = setting(5, "candidates at most (line: so many further out, and as many the other way)")
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


# ----------------------------------------------------------------------------------------------------------------
# The task.

class Chains:
    """Chains of arithmetic modulo 10 or 100, worked out from left to right."""

    def __init__(self, num_ops: int, digits: int, rollout_batch_size: int = 500, compile: bool = False):
        self.num_ops, self.modulus = num_ops, 10 ** digits
        ranks = {c.encode(): i for i, c in enumerate("0123456789+-*=;#")}
        self.encoding = tiktoken.Encoding("chains", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                          special_tokens={"<end>": len(ranks)})
        self.end = len(ranks)
        self.vocab_size = self.encoding.n_vocab
        self.rollout_batch_size, self.compile = rollout_batch_size, compile
        self.max_prompt = (num_ops + 1) * (digits + 1)
        self.max_response = num_ops * (3 * digits + 3) + digits + 2           # steps 7+5=2; then #answer<end>

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
        while True:
            yield self.problems(n, rng, exclude)

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

    def encode_answer(self, text: str) -> list[int]:
        return self.encode(text) + [self.end]

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
                     [task.encode_answer(task.solve(p, slip, rng, swap)) for p in problems], model.device)
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
    # gap, what the student lacks. slip: it errs; skill: it is early in training; habit: the teacher writes otherwise
    if config.gap in ("slip", "habit"):
        fit(model, task, config, config.base_steps, config.base_lr, config.slip, rng, exclude, "base")
        model.save_pretrained(directory / "base")
        fit(model, task, config, config.teacher_steps, config.teacher_lr, 0.0, rng, exclude, "teacher",
            swap=config.gap == "habit")
    else:                                                     # one clean run; the base is what it was early on
        fit(model, task, config, config.base_steps + config.teacher_steps, config.base_lr, 0.0, rng, exclude,
            "base and teacher", snapshot=(config.base_steps, directory / "base"))
    model.save_pretrained(directory / "teacher")


# ----------------------------------------------------------------------------------------------------------------
# Rollouts and evaluation.

def answer(model, task, problems, generator=None) -> list[list[int]]:
    """One sampled answer (temperature 1) to each problem: token ids, the end token included."""
    answers = []
    for i in range(0, len(problems), task.rollout_batch_size):
        prompts = [task.encode(p) for p in problems[i:i + task.rollout_batch_size]]
        answers += trim(model.generate(prompts, task.max_response, generator=generator, eos_token_id=task.end,
                                       compile=task.compile))
    return answers


def trim(rollout) -> list[list[int]]:
    """The real tokens of each row."""
    return [tokens[:n] for tokens, n in zip(rollout.tokens.tolist(), rollout.mask.sum(1).tolist())]


def accuracy(task, problems, answers) -> float:
    return sum(task.is_correct(p, task.decode(a)) for p, a in zip(problems, answers)) / len(problems)


def evaluation_problems(config, task) -> list[str]:
    """The same for every run; neither training nor D_v contains any of them."""
    return task.problems(config.eval_size, random.Random("evaluation"))


def evaluate(model, task, problems, seed=0) -> tuple[float, list[list[int]]]:
    """Accuracy of one sampled answer to each problem, and the answers. Each rollout_batch_size of them has its seed."""
    generator, answers = torch.Generator(model.device), []
    for i in range(0, len(problems), task.rollout_batch_size):
        answers += answer(model, task, problems[i:i + task.rollout_batch_size], generator.manual_seed(seed + i))
    return accuracy(task, problems, answers), answers


# ----------------------------------------------------------------------------------------------------------------
# Losses, and the scores that a search can go by.

def split(batch: Batch, rows: int) -> list[Batch]:
    """Micro-batches of so many rows (0: all in one), each as wide as its own longest row."""
    parts = zip(batch.ids.split(rows or len(batch.ids)), batch.mask.split(rows or len(batch.ids)))
    widths = [(ids, mask, int(mask.any(0).nonzero().max()) + 1 if mask.any() else 1) for ids, mask in parts]
    return [Batch(ids[:, :width + 1], mask[:, :width]) for ids, mask, width in widths]


def states(model, batch: Batch):
    """Hidden states (N, C) that predict the N answer tokens, row after row."""
    return model.hidden_states(batch.ids[:, :-1])[batch.mask]


def kl_of(student, teacher, hidden, target, num_tokens, top_k=0):
    """Σ of the reverse KL at N tokens / num_tokens, from hidden states of student (N, C) and teacher (N, its own C).

    `chunked` makes logits of some rows at a time: N x V of them never exist at once.
    """
    teacher_head = teacher.head

    def kl(logits, target):                                   # (n, V), (n, teacher's C)
        teacher_logits = F.linear(target, teacher_head)
        if top_k:
            return reverse_kl_top_k(logits, teacher_logits, None, top_k, num_tokens)
        return reverse_kl(logits, teacher_logits, None, num_tokens)
    return chunked(kl, hidden, student.head, target)


def log_prob_of(model, hidden, tokens):
    """log π of the tokens (N,) at hidden states (N, C), without a gradient: (N,)."""
    head = model.head
    rows = rows_at_once(head)
    with torch.no_grad():
        return torch.cat([token_log_probs(F.linear(h, head), y)
                          for h, y in zip(hidden.split(rows), tokens.split(rows))])


def loss_of(config, student, teacher, batch, hidden, target, advantages, num_tokens):
    """What --method and --loss minimise, for one micro-batch; sums over its tokens / num_tokens of the whole batch.

    hidden (N, C) and target (N, teacher's C): states of student and teacher at the answers' tokens. advantages (B,).
    """
    tokens = batch.ids[:, 1:][batch.mask]                                                  # (N,)
    if config.method == "sft":                                # cross-entropy on the answers given
        return chunked(lambda z, y: F.cross_entropy(z.float(), y, reduction="sum") / num_tokens,
                       hidden, student.head, tokens)
    if config.method == "rl":
        weights = advantages[:, None].expand(batch.mask.shape)[batch.mask]                 # (N,)
    elif config.loss in ("full", "top_k"):
        return kl_of(student, teacher, hidden, target, num_tokens, config.top_k if config.loss == "top_k" else 0)
    else:                                                     # `reverse_kl_sampled`, from hidden states
        log_ratio = log_prob_of(student, hidden, tokens) - log_prob_of(teacher, target, tokens)            # (N,)
        weights = -log_ratio
        if config.loss == "sequence":                         # discount 1: Σ over t' >= t
            whole = log_ratio.new_zeros(batch.mask.shape).masked_scatter(batch.mask, log_ratio)            # (B, T-1)
            weights = -whole.flip(1).cumsum(1).flip(1)[batch.mask]
    return chunked(lambda z, y, w: policy_gradient(z, y, w, num_tokens=num_tokens),
                   hidden, student.head, tokens, weights)


class Score:
    """validate(model) for EffOPD, higher is better. tokens: how many response tokens it ran through the student.

    Add a score of your own as a case of __call__ and its name to Search.score.
    """

    def __init__(self, config, task, teacher, problems):
        self.kind, self.task, self.teacher, self.problems = config.score, task, teacher, problems
        self.rows = config.micro_batch_size
        self.last_batch = None     # (Batch, teacher's states, a tensor a micro-batch) of the step just taken: batch_kl
        self.tokens = 0

    def __call__(self, model) -> float:
        if self.kind == "batch_kl":                           # answers and teacher's states are there: one forward pass
            batch, targets = self.last_batch
        else:                                                 # on fresh answers, seeded alike for all candidates
            answers = answer(model, self.task, self.problems)
            if self.kind == "accuracy":
                self.tokens += sum(map(len, answers))
                return accuracy(self.task, self.problems, answers)
            batch = pack([self.task.encode(p) for p in self.problems], answers, model.device)
            targets = [states(self.teacher, part) for part in split(batch, self.rows)]
        num_tokens = int(batch.mask.sum())
        self.tokens += num_tokens
        return -sum(kl_of(model, self.teacher, states(model, part), target, num_tokens).item()
                    for part, target in zip(split(batch, self.rows), targets))


# ----------------------------------------------------------------------------------------------------------------
# The training loop.

def rollouts(config, task, student, teacher, problems, generator) -> tuple[Batch, torch.Tensor]:
    """An answer to each problem, and its reward: 1.0 if it is right (B,)."""
    if teacher is None:                                       # sft on a file's own answers
        answers = [task.encode_answer(task.solve(p)) for p in problems]
    else:
        answers = answer(teacher if config.method == "sft" else student, task, problems, generator)        # y ~ π (π*)
    rewards = torch.tensor([float(task.is_correct(p, task.decode(a))) for p, a in zip(problems, answers)])
    return pack([task.encode(p) for p in problems], answers, student.device), rewards


def backward(config, task, student, teacher, problems, generator):
    """Rollouts, teacher's scores, loss and gradients, clipped. Returns the batch, the teacher's states, the log's line.

    FloatingPointError for a loss or a gradient that is not finite.
    """
    if config.method == "rl":                                 # neighbours are a group
        problems = [p for p in problems for _ in range(config.group_size)]
    batch, rewards = rollouts(config, task, student, teacher, problems, generator)
    advantages = group_advantages(rewards, config.group_size) if config.method == "rl" else rewards      # only rl's
    num_tokens, loss, kl, targets = int(batch.mask.sum()), 0.0, 0.0, []
    parts = split(batch, config.micro_batch_size)
    for part, part_advantages in zip(parts, advantages.to(student.device).split(len(parts[0].ids))):
        with torch.no_grad():
            targets.append(None if teacher is None else states(teacher, part))             # (N, teacher's C)
        hidden = states(student, part)                                                     # (N, C)
        piece = loss_of(config, student, teacher, part, hidden, targets[-1], part_advantages, num_tokens)
        if not math.isfinite(piece.item()):
            raise FloatingPointError(f"the loss is {piece.item()}")
        piece.backward()
        loss += piece.item()
        if config.method in ("opd", "effopd") and config.loss == "full":
            kl += piece.item()
        elif teacher is not None:                             # for the log only
            with torch.no_grad():
                kl += kl_of(student, teacher, hidden, targets[-1], num_tokens).item()
    return batch, targets, dict(loss=loss, kl=None if teacher is None else kl, reward=rewards.mean().item(),
                                grad_norm=clip(student, config.max_grad_norm, loss), lr=config.lr)


def clip(model, max_norm, loss) -> float:
    """Clip the gradients to this norm; returns the norm that they had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    if not math.isfinite(norm):
        where = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        raise FloatingPointError(f"the gradient's norm is {norm}, the loss {loss:.3g}; not finite in "
                                 f"{', '.join(where[:2]) or 'the sum of squares'}{' and others' * (len(where) > 2)}")
    return norm


def make_optimizer(config, student):
    return torch.optim.AdamW(student.parameters(), lr=config.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def make_effopd(config, student, validate, optimizer):
    return EffOPD(student, validate, accept=config.accept, candidates=config.candidates, scope=config.scope,
                  direction=config.direction, num_candidates=config.num_candidates, seed=config.seed,
                  first_trigger=config.first_trigger, every=config.search_every, offload=config.offload,
                  optimizer=optimizer if config.reset_moments else None, utility_gate=config.utility_gate,
                  alignment_gate=config.alignment_gate if config.alignment_gate > -1 else None)


class Training:
    """A run: what it trains, what it has done so far (`record`), and what state.pt needs to go on from any step."""

    def __init__(self, config: Config, task, student: GPT, teacher: GPT | None, out_dir: Path):
        self.config, self.task, self.student, self.teacher, self.out_dir = config, task, student, teacher, out_dir
        self.held_out = evaluation_problems(config, task)
        dv = task.problems(config.dv_size, random.Random(f"D_v {config.seed}"), set(self.held_out))
        self.batches = task.batches(config.batch_size // (config.group_size if config.method == "rl" else 1),
                                    random.Random(f"training {config.seed}"), {*self.held_out, *dv})
        self.generator = torch.Generator(config.device).manual_seed(config.seed)
        self.optimizer, self.signals = make_optimizer(config, student), Signals()
        self.score, self.effopd = Score(config, task, teacher, dv), None
        if config.method == "effopd":
            self.effopd = make_effopd(config, student, self.validate, self.optimizer)
        self.record = dict(step=0, student_tokens=0, validation_tokens=0, seconds=0.0, skipped=0, log=[], searches=[],
                           curve=[], examples=[])
        self.batch = self.targets = self.line = None          # of a step that was taken but is not finished

    def validate(self, model) -> float:
        with self.signals.may_interrupt():
            return self.score(model)

    def start(self, evaluated=None):
        """evaluated: what `evaluate` says of the student, if that is known."""
        accuracy, answers = evaluated or evaluate(self.student, self.task, self.held_out)
        self.record["curve"].append(dict(step=0, accuracy=accuracy, tokens=0, seconds=0.0))
        self.record["examples"] = wrong_answers(self.task, self.held_out, answers)
        write_json(self.out_dir / "config.json", with_versions(self.config))
        save_checkpoint(self.student, self.out_dir, "step_000000", self.config.keep_last)
        save_state(self, random_states(self.generator))

    def take_step(self, step: int):
        """Rollouts, loss, gradients, optimiser. ValueError for numbers that are not finite, unless they are skipped."""
        start, problems = time.perf_counter(), next(self.batches)
        try:
            with self.signals.may_interrupt():
                self.batch, self.targets, line = backward(self.config, self.task, self.student, self.teacher, problems,
                                                          self.generator)
            self.optimizer.step()
        except FloatingPointError as error:
            if not self.config.skip_nonfinite:
                raise ValueError(f"step {step}: {error}. It changed nothing; the last good checkpoint is "
                                 f"{last_checkpoint(self.out_dir)}. Try a lower --lr, or --skip_nonfinite") from None
            self.record["skipped"] += 1
            line = dict(loss=None, kl=None, skipped=str(error))
        self.line = line | dict(seconds=self.record["seconds"] + time.perf_counter() - start)    # the step is taken

    def search(self, step: int):
        done = any(search["step"] == step for search in self.record["searches"][-1:])      # before a resume
        if self.effopd is None or self.batch is None or done:
            return
        start, self.score.last_batch = time.perf_counter(), (self.batch, self.targets)
        search = self.effopd.step(step)
        self.line["seconds"] += time.perf_counter() - start
        if search is not None:
            self.record["searches"].append(search | {"tokens": self.score.tokens - self.record["validation_tokens"]})
            self.record["validation_tokens"] = self.score.tokens
            append_json(self.out_dir / "search.jsonl", self.record["searches"][-1])

    def evaluate(self):
        with self.signals.may_interrupt():
            self.line["accuracy"], answers = evaluate(self.student, self.task, self.held_out)
        look_again(self.task, self.record["examples"], dict(zip(self.held_out, answers)))

    def finish_step(self, step: int):
        record, tokens = self.record, 0 if self.batch is None else int(self.batch.mask.sum())
        self.optimizer.zero_grad()                            # after the search
        record |= dict(step=step, seconds=self.line["seconds"], student_tokens=record["student_tokens"] + tokens)
        line = dict(step=step) | self.line | {k: record[k] for k in ("student_tokens", "validation_tokens")}
        if "accuracy" in line:
            record["curve"].append(dict(step=step, accuracy=line["accuracy"], seconds=line["seconds"],
                                        tokens=record["student_tokens"] + record["validation_tokens"]))
        record["log"].append(line)
        append_json(self.out_dir / "log.jsonl", line)
        self.batch = self.targets = self.line = None

    def summary(self, label: str) -> dict:
        record, config = self.record, self.config
        searches = [{k: s[k] for k in ("step", "accepted", "multiple", "seconds")} for s in record["searches"]]
        return dict(label=label, method=config.method, seed=config.seed, lr=config.lr, steps=config.steps,
                    final_accuracy=fmean(point["accuracy"] for point in record["curve"][1:][-3:]),       # of the last 3
                    tokens=record["student_tokens"] + record["validation_tokens"], skipped=record["skipped"],
                    validation_tokens=record["validation_tokens"], seconds=record["seconds"],
                    searches=searches, curve=record["curve"], examples=record["examples"])


def distil(config: Config, task, student: GPT, teacher: GPT | None, out_dir: Path, label: str, evaluated=None) -> dict:
    """Train the student in place, keep the run in out_dir, return its summary. Goes on from out_dir/state.pt, if any.

    Interrupted: a signal asked for it, and the state is saved.
    """
    run, state = Training(config, task, student, teacher, out_dir), load_state(out_dir)
    run.start(evaluated) if state is None else restore(run, state)
    del state                                                 # it is as large as five copies of the weights
    done = run.record["step"]
    bar = tqdm(range(done + 1, config.steps + 1), desc=label, unit="step", dynamic_ncols=True, initial=done,
               total=config.steps)
    with run.signals:
        for step in bar:
            before, power_of_2 = random_states(run.generator), step.bit_count() == 1
            try:
                if run.line is None:                          # else it was taken before a resume
                    run.take_step(step)
                    if power_of_2:                            # before a jump
                        save_checkpoint(student, out_dir, f"step_{step:06d}", config.keep_last)
                run.search(step)
                if step % config.eval_every == 0 or step == config.steps:
                    run.evaluate()
            except KeyboardInterrupt:                         # asked twice: not even to the end of the step
                save_state(run, before if run.line is None else random_states(run.generator))
                raise Interrupted(f"in step {step}", run.signals.asked) from None
            run.finish_step(step)
            if power_of_2 or step % config.save_every == 0 or step == config.steps or run.signals.asked:
                save_state(run, random_states(run.generator))
            if run.signals.asked:
                raise Interrupted(f"after step {step}", run.signals.asked)
            loss = run.record["log"][-1]["loss"]
            bar.set_postfix(loss="{:.3f}".format(math.nan if loss is None else loss),
                            accuracy=f"{run.record['curve'][-1]['accuracy']:.3f}")
    save_checkpoint(student, out_dir, "final", config.keep_last)
    summary = run.summary(label)
    write_json(out_dir / "summary.json", summary)
    return summary


# ----------------------------------------------------------------------------------------------------------------
# The race: the same start, seed and problems for each method.

RACE = {  # name: (directory, how it differs from the others)
    "OPD": ("opd", dict(method="opd")),
    "EffOPD, paper": ("effopd", dict(method="effopd", score="accuracy", candidates="linear", num_candidates=5)),
    "EffOPD, batch KL": ("effopd-batch-kl", dict(method="effopd", score="batch_kl", candidates="doubling",
                                                 num_candidates=8)),
}


def race(config: Config, task, student: GPT, teacher: GPT, out_dir: Path, evaluated=None) -> dict:
    rehearsal = copy.deepcopy(student)                        # the first step ever is slow, and should be nobody's
    with suppress(FloatingPointError):                        # the runs themselves will say so, or skip it
        backward(config, task, rehearsal, teacher, task.problems(config.batch_size, random.Random(0)), None)
    make_optimizer(config, rehearsal).step()
    del rehearsal
    write_json(out_dir / "config.json", with_versions(config))
    runs = {}
    for name, (directory, settings) in RACE.items():
        (out_dir / directory).mkdir(exist_ok=True)
        runs[name] = distil(Config(**asdict(config) | settings), task, copy.deepcopy(student), teacher,
                            out_dir / directory, name, evaluated)
        gc.collect()                                          # a run and its search refer to each other
    summary = dict(config=with_versions(config), **compare(runs))
    write_json(out_dir / "summary.json", summary)
    return summary


def first_at(curve, target) -> dict | None:
    """The first point of an evaluation curve, step 0 aside, that is at the target accuracy."""
    return next((point for point in curve[1:] if point["accuracy"] >= target - 1e-9), None)


def compare(runs: dict) -> dict:
    """What each run took, validation included, to the target, OPD's final accuracy. speed_up: OPD's cost / its own."""
    target, methods = runs["OPD"]["final_accuracy"], {}
    opd = first_at(runs["OPD"]["curve"], target)
    for name, run in runs.items():
        own = first_at(run["curve"], target)
        methods[name] = {key: run[key] for key in ("final_accuracy", "searches", "curve", "examples")} | {
            "reached": own, "speed_up": own and {unit: opd[unit] / own[unit] for unit in ("step", "tokens", "seconds")}}
    return dict(target=target, methods=methods)


# ================================================================================================================
# Appendix. The story ends here; what follows is to look things up in.
# ================================================================================================================


# ----------------------------------------------------------------------------------------------------------------
# What a run shows: problems before and after, tables, the picture.

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


def wrong_answers(task, problems, answers) -> list[dict]:
    """The first three problems that the student gets wrong before training, with its answers."""
    texts = ((p, task.decode(a)) for p, a in zip(problems, answers))
    return [dict(problem=p, before=text) for p, text in texts if not task.is_correct(p, text)][:3]


def look_again(task, rows, answers):
    """Put the answers that they get now into the rows of `wrong_answers`."""
    for row in rows:
        row["after"] = task.decode(answers[row["problem"]])
        row["right"] = task.is_correct(row["problem"], row["after"])


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
    figure.savefig(path, dpi=120, format="png")


# ----------------------------------------------------------------------------------------------------------------
# The command line, and the other settings.

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
    resume: str = setting("", "the directory of a run that stopped: goes on from there, with the settings that it has")
    save_every: int = setting(50, "steps between states to resume from; also saved at 1, 2, 4, 8, ... and at the end")
    keep_last: int = setting(0, "keep only so many checkpoints beside the first and the final one (0: all)")
    skip_nonfinite: bool = setting(False, "go on after a step whose loss or gradient is not finite, without taking it")
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


@dataclass
class Real:
    _argument_group_name = "models and data of your own"
    student: str = setting("", "a Hugging Face checkpoint (Llama, Qwen2, Qwen3): a directory, or with --data a "
                           "repository id too; empty: the built-in base")
    teacher: str = setting("", "likewise; empty: the built-in one (--method sft with --data: none, the student is "
                           "trained on the file's own answers)")
    data: str = setting("", "problems, a JSON object a line; empty: the built-in task")
    prompt_field: str = setting("question", "field of the problem's text (MATH: problem)")
    answer_field: str = setting("answer", "field of the answer: a number, LaTeX, or a solution ending in #### 72 or "
                                "with a \\boxed{72}")
    system: str = setting("", "system message of the chat; empty: none")
    no_chat_template: bool = setting(False, "the problem's text is the prompt, without the tokenizer's chat template")
    thinking: bool = setting(False, "let templates that know of thinking (Qwen3) open with it")
    max_new_tokens: int = setting(384, "tokens of an answer at most")
    dtype: Literal["auto", "float32", "mixed", "bfloat16"] = setting(
        "auto", "mixed: bfloat16 arithmetic, the student's weights and optimiser in float32; bfloat16: the student's "
        "weights too, so small updates round away for good; the teacher is bfloat16 in both. auto: mixed for --data on "
        "a GPU, else float32")
    compile: bool = setting(False, "decode through torch.compile, with static shapes (CUDA graphs on a GPU); the first "
                            "rollout takes minutes")
    micro_batch_size: int = setting(0, "rows of a training step's forward and backward pass at once; same gradient "
                                    "(0: all)")
    rollout_batch_size: int = setting(500, "answers sampled at once; at least dv_size for --score accuracy, whose "
                                      "candidates share random numbers within the first such batch only")
    gradient_checkpointing: bool = setting(False, "compute each block again in the backward pass, to save memory")
    offload: bool = setting(False, "keep EffOPD's copies of the weights on the CPU")


@dataclass
class Sweep:
    _argument_group_name = "a grid of runs"
    sweep: str = setting(
        "", "settings and their values: \"lr=1e-5,1e-4 method=opd,effopd seed=0:5\" is 2 x 2 x 5 runs; a:b counts from "
        "a to b - 1; a value may bring others along, as in effopd+score=batch_kl. Goes on where it was stopped. Its "
        "out_dir, empty: runs/sweep")
    target: float = setting(0.0, "accuracy that the sweep's costs are counted to (0: what the grid's OPD ends with, "
                            "seed by seed; .8 if it has none)")
    jobs: int = setting(0, "runs at a time (0: two, or one on a single core or a GPU)")


@dataclass
class Config(Sweep, Search, Distillation, Real, Models, Run):
    """Everything a run depends on. ValueError, in one line, for a value that cannot work."""

    def __post_init__(self):
        check(self)


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
REAL = dict(  # defaults with --data, for models of 1 B on 24 GB: a guess too; the learning rate is the paper's
    steps=64, lr=1e-6, batch_size=64, micro_batch_size=4, rollout_batch_size=64, eval_every=8, eval_size=200,
    offload=True)


def check(config: Config):
    """ValueError for a value that cannot work. Settles --device auto and --dtype auto."""
    for f in fields(config):                                  # a default of 0 says that 0 may be
        value, off = getattr(config, f.name), f.default == 0
        if type(f.default) in (int, float) and f.name not in ("slip", "alignment_gate"):
            if not (0 < value < math.inf or off and value == 0):
                raise ValueError(f"--{f.name} must be {'0 or more' if off else 'greater than 0'}, got {value}")
    if config.digits not in (1, 2):
        raise ValueError(f"--digits must be 1 or 2, got {config.digits}")
    if not 0 <= config.slip < 1:
        raise ValueError(f"--slip is a probability below 1, got {config.slip}")
    if config.method == "rl" and (config.group_size == 1 or config.batch_size % config.group_size):
        raise ValueError(f"--group_size must be 2 or more and divide --batch_size ({config.batch_size}), "
                         f"got {config.group_size}")
    if not -1 <= config.alignment_gate <= 1:
        raise ValueError(f"--alignment_gate is a cosine, -1 (off) to 1, got {config.alignment_gate}")
    if config.hidden_size % (2 * config.num_attention_heads):
        raise ValueError(f"--hidden_size must be a multiple of 2 x num_attention_heads = "
                         f"{2 * config.num_attention_heads}, got {config.hidden_size}")
    space = 10 ** config.digits * (2 * 10 ** config.digits + 10) ** config.num_ops
    if not config.data and config.eval_size > space // 10:
        raise ValueError(f"--eval_size {config.eval_size}: there are {space:,} chains of {config.num_ops} operations, "
                         f"and at most a tenth of them may be held out")
    for name in ("student", "teacher"):
        if not config.data and getattr(config, name) and not Path(getattr(config, name)).is_dir():
            raise ValueError(f"--{name}: there is no directory {getattr(config, name)}")
        if config.data and not getattr(config, name) and (name, config.method) != ("teacher", "sft"):
            raise ValueError(f"--data needs --{name}, a Hugging Face checkpoint")
    if config.data and not Path(config.data).is_file():
        raise ValueError(f"--data: there is no file {config.data}")
    device = str(pick_device(config.device))
    if config.dtype == "auto":
        config.dtype = "mixed" if config.data and device != "cpu" else "float32"
    if config.preset == "gpu" and config.device == "auto" and device == "cpu":
        raise ValueError("--preset gpu: this torch sees no CUDA GPU; --device cpu trains it on the CPU, for days")
    config.device = device


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


GROUPS = [Run, Models, Real, Distillation, Search, Sweep]
OWNERS = {f.name: ("effopd",) for f in fields(Search)} | {   # settings that only these methods let you choose
    "group_size": ("rl",), "offload": ("race", "effopd"),
    "loss": ("race", "opd", "effopd"), "top_k": ("race", "opd", "effopd")}


def has_use(method: str, name: str, data) -> bool:
    """Whether a method has a use for a setting. D_v is split off a file's problems, so its size is everybody's."""
    return method in OWNERS.get(name, (method,)) or bool(data) and name == "dv_size"


def make_parser(**options):
    parser = HfArgumentParser(GROUPS, allow_abbrev=False, **options)
    parser.error = stop
    return parser


def given(args=None) -> dict:
    """The settings that a command line names itself: {name: value}."""
    unset = argparse.Namespace(**dict.fromkeys(f.name for f in fields(Config)))
    chosen = vars(make_parser(add_help=False).parse_known_args(args, unset)[0])
    for name, value in chosen.items():
        if isinstance(value, list):                           # what argparse makes of --lr=--
            stop(f"--{name} needs a value")
    return {name: value for name, value in chosen.items() if value is not None}


def parse_config(args=None) -> Config:
    chosen = given(args)
    if "resume" in chosen:
        return resumed(chosen["resume"], sys.argv[1:] if args is None else args)
    parser = make_parser(description=__doc__.split("\n\n")[0], usage="python train.py [--SETTING VALUE ...]")
    preset = PRESETS[chosen.get("preset", Config.preset), chosen.get("gap", Config.gap)]
    parser.set_defaults(**preset | (REAL if chosen.get("data") else {}))
    config = vars(parser.parse_args(args))
    method = config["method"]
    elsewhere = {f.name: "the built-in task; --data" for f in fields(Models)} if config["data"] else dict.fromkeys(
        ("prompt_field", "answer_field", "system", "no_chat_template", "thinking", "max_new_tokens"),
        "--data; the built-in task")
    elsewhere |= dict.fromkeys(("target", "jobs"), "--sweep; a single run")
    if config["gap"] == "skill":
        elsewhere |= dict.fromkeys(("slip", "teacher_lr"), "the other gaps; --gap skill")
    if config["loss"] != "top_k":
        elsewhere["top_k"] = "--loss top_k; another loss"
    if config["no_chat_template"]:
        elsewhere["thinking"] = "the chat template; --no_chat_template"
    for name, value in config.items():
        if value == parser.get_default(name):
            continue
        if not has_use(method, name, config["data"]):
            stop(f"--{name} is a setting of --method {OWNERS[name][-1]}; --method {method} has no use for it")
        if name in elsewhere:
            stop(f"--{name} is a setting of {elsewhere[name]} has no use for it")
    try:
        return Config(**config)
    except ValueError as error:
        stop(error)


def resumed(directory: str, args) -> Config:
    """The settings of the run in this directory."""
    others = sorted({a.split("=")[0] for a in args if a.startswith("--")} - {"--resume"})
    if others:
        stop(f"--resume takes every setting from the run; leave out {', '.join(others)}")
    path = Path(directory) / "config.json"
    if not path.is_file():
        stop(f"--resume: there is no {path}, so nothing can go on there")
    try:
        saved = json.loads(path.read_text())
        saved = {name: value for name, value in saved.items() if name != "versions"}
        kinds = {f.name: type(f.default) for f in fields(Config)}
        wrong = [name for name, value in saved.items() if type(value) is not kinds.get(name)]
        if wrong:
            raise TypeError(f"cannot read {', '.join(wrong)}")
    except (ValueError, TypeError, AttributeError) as error:
        stop(f"{path} is damaged or of another version ({first_line(error)}); a new run can start from its weights "
             f"with --student {last_checkpoint(path.parent)}")
    try:
        return Config(**saved | dict(out_dir=directory, resume=directory))
    except ValueError as error:                               # the settings are well, but not here and now
        stop(f"{path}: {error}")


def stop(message):
    """One line, and a status that says something went wrong."""
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


# ----------------------------------------------------------------------------------------------------------------
# The models: built-in ones from the cache, or checkpoints.

def load(config: Config):
    """The task, the student to start from and its teacher."""
    if config.data:
        task, student, teacher = load_real(config)
    else:
        task = Chains(config.num_ops, config.digits, config.rollout_batch_size, config.compile)
        student, teacher = load_models(config, task)
    student.gradient_checkpointing = config.gradient_checkpointing
    student.precision = torch.bfloat16 if config.dtype == "mixed" else None
    return task, student, teacher


def load_models(config: Config, task: Chains) -> tuple[GPT, GPT]:
    """From the cache, made first if they are not there yet."""
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
        try:
            model = GPT.from_pretrained(directory, dtype_of(config, option)).to(config.device)
        except (ValueError, OSError) as error:
            raise error if directory != home / built_in else ValueError(
                f"{home} is damaged ({first_line(error)}): remove it and it will be made again") from None
        if model.config.vocab_size != task.vocab_size:
            raise ValueError(f"--{option}: this model has {model.config.vocab_size} tokens, the task {task.vocab_size}")
        if model.config.max_position_embeddings < task.max_prompt + task.max_response:
            raise ValueError(f"--{option}: a context of {model.config.max_position_embeddings} tokens is too short for "
                             f"problems and answers of up to {task.max_prompt + task.max_response}")
        models.append(model)
    return models[0], models[1].requires_grad_(False)


def dtype_of(config, role: str) -> torch.dtype:
    """Of the weights of student or teacher."""
    low = config.dtype == "bfloat16" or config.dtype == "mixed" and role == "teacher"
    return torch.bfloat16 if low else torch.float32


def load_real(config: Config):
    """Hugging Face checkpoints and a file of problems. ValueError where the two models do not go together."""
    student = GPT.from_pretrained(config.student, dtype_of(config, "student")).to(config.device)
    tokenizer, end = tokenizer_of(student)
    teacher, both_end = None, end
    student.tokens_in_use = max(tokenizer.get_vocab().values()) + 1          # the head's other rows are padding
    if config.teacher:
        teacher = GPT.from_pretrained(config.teacher, dtype_of(config, "teacher")).to(config.device)
        teacher.requires_grad_(False)
        teacher_tokenizer, teacher_end = tokenizer_of(teacher)
        both_end = end + [token for token in teacher_end if token not in end]
        same_vocabulary(tokenizer, teacher_tokenizer)
        teacher.tokens_in_use = student.tokens_in_use
    context = min(model.config.max_position_embeddings for model in (student, teacher or student))
    task = WordProblems(config, tokenizer, both_end, context)
    lengths = sorted(map(len, task.prompts.values()))
    print(f"Data        {len(lengths):,} problems: {config.eval_size} for evaluation, {config.dv_size} for D_v, the "
          f"rest to train on; prompts of {lengths[0]} to {lengths[-1]} tokens")
    print(f"Prompt      {tokenizer.decode(min(task.prompts.values(), key=len))!r}")
    print(f"Vocabulary  {len(tokenizer):,} tokens" + (", the same in both" if teacher else "") +
          f"; an answer ends at {', '.join(repr(tokenizer.decode([token])) for token in both_end)}")
    if teacher is not None:
        if teacher_end != end:
            print(f"            the student's own end: {end}, the teacher's: {teacher_end}; either ends an answer")
        if not config.no_chat_template and teacher_tokenizer.chat_template != tokenizer.chat_template:
            print("            the teacher's own chat template is another; both are given the student's")
        canary(config, task, teacher)
    return task, student, teacher


def tokenizer_of(model):
    """The tokenizer that lies beside a checkpoint, and the tokens that end an answer."""
    from transformers import AutoTokenizer, GenerationConfig
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.source)
    except Exception as error:                                # a broken file can raise anything
        raise ValueError(f"{model.source} has no tokenizer that loads: {' '.join(str(error).split())[:200]}") from None
    if max(tokenizer.get_vocab().values()) >= len(model.lm_head.weight):
        raise ValueError(f"{model.source}: the tokenizer has {len(tokenizer)} tokens, the model only "
                         f"{len(model.lm_head.weight)}")
    ends = [tokenizer.eos_token_id, model.config.eos_token_id]                   # the first ends what sft teaches
    if (model.source / "generation_config.json").is_file():
        try:
            ends.append(GenerationConfig.from_pretrained(model.source).eos_token_id)
        except Exception as error:
            raise ValueError(f"{model.source}/generation_config.json cannot be read: {first_line(error)}") from None
    flat = [token for end in ends for token in (end if isinstance(end, list) else [end]) if token is not None]
    if not flat:
        raise ValueError(f"{model.source} names no end token, so an answer would never end")
    return tokenizer, list(dict.fromkeys(flat))


def same_vocabulary(student, teacher):
    """ValueError unless every token has the same id in both: equal sizes prove nothing, and padding rows no harm."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    different = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
    if different:
        token = different[0]
        raise ValueError(
            f"student and teacher have different vocabularies ({len(different):,} tokens differ; {token!r} is "
            f"{ours.get(token, 'absent')} and {theirs.get(token, 'absent')}): on-policy distillation compares them "
            "token by token, so take two models of one family")


@torch.no_grad()
def canary(config, task, teacher):
    """ValueError for a teacher that finds its own most probable answers improbable: not loaded as it was made."""
    problems = task.problems(4, random.Random("canary"))
    prompts = [task.encode(p) for p in problems]
    rollout = teacher.generate(prompts, min(32, task.max_response), temperature=0, eos_token_id=task.end)
    batch = pack(prompts, trim(rollout), teacher.device)
    log_p = log_prob_of(teacher, states(teacher, batch), batch.ids[:, 1:][batch.mask])     # (N,)
    mean, uniform = log_p.mean().item(), -math.log(teacher.tokens_in_use)
    print(f"Teacher     mean log-probability of its own greedy answers {mean:.2f} a token (of guessing: {uniform:.2f})")
    if not mean > uniform / 2:
        raise ValueError(f"--teacher {config.teacher}: its own greedy answers have a mean log-probability of "
                         f"{mean:.2f} a token, and guessing has {uniform:.2f}: it is untrained, or was loaded wrongly")


# ----------------------------------------------------------------------------------------------------------------
# Problems from a file.

class WordProblems:
    """Problems from a file, asked through a Hugging Face tokenizer; answers are graded by math-verify.

    The file has a JSON object on each line. ValueError names the line that cannot be used.
    """

    def __init__(self, config: Config, tokenizer, end: list[int], context: int):
        self.config, self.tokenizer, self.end = config, tokenizer, end
        self.max_response, self.rollout_batch_size = config.max_new_tokens, config.rollout_batch_size
        self.compile = config.compile
        self.solutions, self.gold, self.prompts = {}, {}, {}   # by problem: text, parsed answer, token ids
        if not (config.no_chat_template or tokenizer.chat_template):
            raise ValueError("the student's tokenizer has no chat template; --no_chat_template asks without one")
        if config.system and config.no_chat_template:
            raise ValueError("--system is part of the chat template that --no_chat_template turns off")
        lines = read_jsonl(config.data, config.prompt_field, config.answer_field)
        for where, problem, solution in tqdm(lines, desc="problems", delay=2, dynamic_ncols=True):
            if solution != self.solutions.get(problem, solution):
                raise ValueError(f"{where}: the same problem as in a line before, with another answer")
            self.gold[problem] = parse_answer(solution, gold=True)
            if not self.gold[problem]:
                raise ValueError(f"{where}: no answer can be read from {solution[-60:]!r}")
            self.solutions[problem], self.prompts[problem] = solution, self.prompt_of(problem)
            if len(self.prompts[problem]) + self.max_response > context:
                raise ValueError(f"{where}: a prompt of {len(self.prompts[problem])} tokens and --max_new_tokens "
                                 f"{self.max_response} exceed the context of {context}")
        needed = config.eval_size + config.dv_size + config.batch_size
        if len(self.gold) < needed:
            raise ValueError(f"{config.data} has {len(self.gold)} different problems, and --eval_size, --dv_size and a "
                             f"batch need {needed}")

    def prompt_of(self, problem: str) -> list[int]:
        if self.config.no_chat_template:
            return self.tokenizer(problem).input_ids
        chat = [{"role": "system", "content": self.config.system}] if self.config.system else []
        try:
            return self.tokenizer.apply_chat_template(
                chat + [{"role": "user", "content": problem}], add_generation_prompt=True, tokenize=True,
                return_dict=False, enable_thinking=self.config.thinking)       # which other templates ignore
        except Exception as error:                            # a template can raise anything
            raise ValueError(f"the student's chat template fails: {first_line(error)}; --no_chat_template does without"
                             + " it, no --system perhaps as well" * bool(self.config.system)) from None

    def problems(self, n: int, rng: random.Random, exclude=frozenset()) -> list[str]:
        """n different problems, none of them in exclude."""
        return rng.sample([p for p in self.gold if p not in exclude], n)

    def batches(self, n: int, rng: random.Random, exclude):
        """Training problems, n at a time: each once before any comes again."""
        deck = []
        while True:
            while len(deck) < n:
                deck += self.problems(len(self.gold) - len(exclude), rng, exclude)
            yield deck[:n]
            del deck[:n]

    def solve(self, problem: str) -> str:
        """The file's own answer."""
        return self.solutions[problem]

    def is_correct(self, problem: str, answer: str) -> bool:
        from math_verify import verify
        return verify(self.gold[problem], parse_answer(answer))

    def encode(self, problem: str) -> list[int]:
        return self.prompts[problem]

    def encode_answer(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids + self.end[:1]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def read_jsonl(path: str, prompt_field: str, answer_field: str):
    """Yields ("FILE, line N", problem, answer), texts both. ValueError with the line's number for a bad line."""
    empty = True
    with open(path, "rb") as f:
        for n, line in enumerate(f, start=1):
            where = f"{path}, line {n}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:     # UnicodeDecodeError is a ValueError
                raise ValueError(f"{where} is not JSON: {first_line(error)}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where} is not a JSON object, {{\"{prompt_field}\": ..., \"{answer_field}\": ...}}")
            for option, name, kinds in (("--prompt_field", prompt_field, (str,)),
                                        ("--answer_field", answer_field, (str, int, float))):
                if name not in row:
                    raise ValueError(f"{where} has no field {name!r} but {', '.join(map(repr, row))[:200] or 'none'}; "
                                     f"choose with {option}")
                text = str(row[name]).encode(errors="replace").decode()        # "\\ud800" is JSON, but no text
                if isinstance(row[name], bool) or not isinstance(row[name], kinds) or not text.strip() or (
                        text != str(row[name])):
                    raise ValueError(f"{where}: {name!r} is not a text{' or a number' if float in kinds else ''}")
            empty, answer = False, row[answer_field]
            if isinstance(answer, float):
                if not math.isfinite(answer):
                    raise ValueError(f"{where}: {answer_field!r} is {answer}")
                answer = np.format_float_positional(answer, trim="-")          # 1e-7 would be read as 1 * e - 7
            yield where, row[prompt_field], str(answer)
    if empty:
        raise ValueError(f"{path} is empty")


def parse_answer(text: str, gold=False) -> list:
    """What math-verify reads as the answer: after GSM8K's ####, in a \\boxed{}, or the last expression of the text."""
    from math_verify import parse
    if "####" in text:
        text = text.rpartition("####")[2]
    text = text.replace("\\$", "").strip()                    # dollars
    number = re.fullmatch(r"[-+$]*[\d,]*\.?\d+(\s+[A-Za-z. ]+)?", text)       # perhaps with a unit
    if gold and not number and "boxed" not in text:
        text = f"\\boxed{{{text.strip('$')}}}"
    return parse(text)


# ----------------------------------------------------------------------------------------------------------------
# If it stops: signals, and the state that a run goes on from.

class Interrupted(Exception):
    """A run that a signal stopped: (where, the signal's number). It can be resumed."""


class Signals:
    """Ctrl-C and SIGTERM: the first asks for a stop after the step, the second stops what `may_interrupt` surrounds."""

    def __init__(self):
        self.asked, self.at_once, self.inside = 0, False, False

    def __enter__(self):
        main_thread = threading.current_thread() is threading.main_thread()    # only there can signals be received
        self.previous = {number: signal.signal(number, self.receive)
                         for number in (signal.SIGINT, signal.SIGTERM) if main_thread}

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if not self.asked:
            self.asked = number
            print("\nStopping after this step; once more stops at once", file=sys.stderr)
        else:
            self.at_once = True
            if self.inside:
                raise KeyboardInterrupt

    @contextmanager
    def may_interrupt(self):
        if self.at_once:
            raise KeyboardInterrupt
        self.inside = True
        try:
            yield
        finally:
            self.inside = False


def random_states(generator) -> dict:
    kind, keys, *rest = np.random.get_state()
    return dict(python=random.getstate(), numpy=(kind, keys.tolist(), *rest), torch=torch.get_rng_state(),
                cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
                generator=generator.get_state())


def set_random_states(states, generator):
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    for i, state in enumerate(states["cuda"][:torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, i)
    generator.set_state(states["generator"])


def save_state(run: Training, random_states: dict):
    """Write state.pt; the one before it stays as state_previous.pt."""
    state = dict(record=run.record, student=run.student.state_dict(), optimizer=run.optimizer.state_dict(),
                 effopd=run.effopd and run.effopd.state_dict(), random=random_states)
    if run.line is not None:                                  # then its search is made again, which needs these
        state["pending"] = dict(batch=run.batch and tuple(run.batch), targets=run.targets, line=run.line,
                                gradients={name: p.grad for name, p in run.student.named_parameters()})
    path = run.out_dir / "state.pt"
    with replacing(path) as scratch:
        with open(scratch, "wb") as f:
            torch.save(state, f)
        if path.exists() and run.config.keep_last != 1:
            path.replace(run.out_dir / "state_previous.pt")


def restore(run: Training, state: dict):
    run.record = state["record"]
    run.student.load_state_dict(state["student"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.effopd is not None:
        run.effopd.load_state_dict(state["effopd"])
    set_random_states(state["random"], run.generator)
    run.score.tokens = run.record["validation_tokens"]
    if "pending" in state:
        saved, device = state["pending"], run.student.device
        for name, p in run.student.named_parameters():
            gradient = saved["gradients"][name]
            p.grad = None if gradient is None else gradient.to(device)
        run.batch = saved["batch"] and Batch(*(x.to(device) for x in saved["batch"]))
        run.targets = saved["targets"] and [x if x is None else x.to(device) for x in saved["targets"]]
        run.line = saved["line"]
    taken = run.record["step"] + ("pending" in state)
    for _ in range(taken):
        next(run.batches)                                     # the data's order: draw once more what was used
    tidy(run.out_dir, run.record, last=taken)


def load_state(out_dir) -> dict | None:
    """The newest state of a run that can be read; None if there never was one. ValueError if none is left."""
    paths = [path for path in (out_dir / "state.pt", out_dir / "state_previous.pt") if path.exists()]
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not {"record", "student", "optimizer", "effopd", "random"} <= set(state):
                raise ValueError("it lacks parts")
            return state
        except Exception as error:                            # a broken file can raise anything
            print(f"{path} is damaged ({first_line(error)}); trying the state before it", file=sys.stderr)
    if paths:
        raise ValueError(f"{out_dir} has no state that can be read, so it cannot go on; a new run can start from its "
                         f"weights with --student {last_checkpoint(out_dir)}")


def tidy(out_dir, record, last: int):
    """Take back what was written after the state: log lines, checkpoints of steps after `last`, files half written."""
    for path, lines in ((out_dir / "log.jsonl", record["log"]), (out_dir / "search.jsonl", record["searches"])):
        if not lines:
            path.unlink(missing_ok=True)
            continue
        with replacing(path) as scratch:
            scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in sorted((out_dir / "checkpoints").iterdir()):
        number = path.name.removeprefix("step_")
        if number.isdecimal() and int(number) > last or path.suffix == ".part":
            shutil.rmtree(path)
        else:
            try:
                with safe_open(path / "model.safetensors", "pt"):
                    pass
            except (OSError, SafetensorError) as error:
                print(f"{path} is damaged ({first_line(error)}); the run does without it, analyze.py cannot",
                      file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------
# Files.

def versions(device) -> dict:
    import transformers
    return {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
            "numpy": np.__version__, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if str(device).startswith("cuda") else "cpu"}


def with_versions(config) -> dict:
    return asdict(config) | {"versions": versions(config.device)}


def write_json(path: Path, value, indent=1):
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(value, indent=indent))


def append_json(path: Path, line: dict):
    try:
        with open(path, "a") as f:
            f.write(json.dumps(line) + "\n")
    except OSError as error:
        raise OSError(f"{path} could not be written: {first_line(error)}") from None


def save_checkpoint(model, out_dir: Path, name: str, keep_last: int):
    """out_dir/checkpoints/name. Of those of later steps than 0, only the last keep_last stay (0: all)."""
    home = out_dir / "checkpoints"
    home.mkdir(exist_ok=True)
    with replacing(home / name) as scratch:
        model.save_pretrained(scratch)
    if keep_last:
        for old in sorted(home.glob("step_*[1-9]*"))[:-keep_last]:
            shutil.rmtree(old)


def last_checkpoint(out_dir: Path) -> Path | str:
    return max((out_dir / "checkpoints").glob("step_*[0-9]"), default="(there is none)")


@contextmanager
def replacing(path: Path):
    """A path beside `path`: what is written to it takes path's place when the block ends, all or nothing.

    OSError names the file that could not be written; what was there before is still there.
    """
    scratch = path.with_name(path.name + ".part")
    try:
        if scratch.is_dir():
            shutil.rmtree(scratch)
        yield scratch
        for file in scratch.iterdir() if scratch.is_dir() else [scratch]:
            with open(file, "rb+") as f:
                os.fsync(f.fileno())                          # on the disk before it has the name
        if path.is_dir():
            shutil.rmtree(path)
        scratch.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        shutil.rmtree(scratch, ignore_errors=True) if scratch.is_dir() else scratch.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {first_line(error)}") from None


def first_line(error) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def check_space(config, model, out_dir):
    """ValueError if the disk has too little room for the run's checkpoints and states."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    checkpoints = min(config.steps.bit_length(), config.keep_last or math.inf) + 3      # 0, final, one being written
    copies = 5 if config.method in ("race", "effopd") else 3                            # weights, moments, W_prev, Δ
    states = copies * (3 if config.keep_last != 1 else 2)
    needed = weights * (checkpoints + states) * (len(RACE) if config.method == "race" else 1)
    free = shutil.disk_usage(out_dir).free + sum(p.stat().st_size for p in out_dir.rglob("*") if p.is_file())
    if needed > free:
        raise ValueError(f"{out_dir} is on a disk with {free / 1e9:.1f} GB free, and the run can take "
                         f"{needed / 1e9:.1f} GB; choose another --out_dir, or keep fewer checkpoints "
                         "with --keep_last 1")


def claim_directory(config) -> Path:
    """Make --out_dir, or the first of runs/METHOD, runs/METHOD-2, ... that is free: no run overwrites another."""
    names = (f"runs/{config.method}" + f"-{n}" * (n > 1) for n in itertools.count(1))
    for name in [config.out_dir] if config.out_dir else names:
        try:
            Path(name).mkdir(parents=True)
            return Path(name)
        except FileExistsError:
            if config.out_dir:
                raise ValueError(f"--out_dir {name} exists already; name a new directory or remove it, or go on with "
                                 f"--resume {name}") from None


# ----------------------------------------------------------------------------------------------------------------
# The sweep: a grid of runs, each of them this script in a process of its own; then the table and the figure.

def useful(run: dict, data) -> dict:
    """Without the settings that the run's method has no use for. data: whether the problems come from a file."""
    return {name: value for name, value in run.items() if has_use(run["method"], name, data)}


def name_of(run: dict, between=",") -> str:
    return between.join(f"{name}={value}" for name, value in run.items())


def grid(text: str, data=False) -> dict:
    """"lr=1e-5,1e-4 method=opd seed=0:2" -> {a run's name: (its settings, the name of the OPD run beside it)}.

    The first axis is the slowest. What a method has no use for is left out; runs that then are the same are one. The
    OPD beside a run has its values on all axes, but not what these bring along. ValueError for a text that is no grid.
    """
    axes, runs = {}, {}
    allowed = {f.name for f in fields(Config)} - {f.name for f in fields(Sweep)} - {"out_dir", "cache_dir", "resume"}
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
        from_file = data or "data" in run
        opd = useful({axis: run[axis] for axis in axes} | {"method": "opd"}, from_file)
        run = useful(run, from_file)
        runs[name_of(run)] = run, name_of(opd)
    return runs


def sweep(settings: dict) -> int:
    """Do the runs that are not in sweep.json yet, then print the table and draw the figure: the exit status."""
    target, jobs = settings.pop("target", 0.0), settings.pop("jobs", 0)
    runs = grid(settings.pop("sweep"), bool(settings.get("data")))
    out_dir, where = Path(settings.pop("out_dir", "runs/sweep")), {"cache_dir": settings.pop("cache_dir", "cache")}
    file = out_dir / "sweep.json"
    done = json.loads(file.read_text()) if file.exists() else dict(settings=settings, runs={})
    if done["settings"] != settings:
        raise ValueError(f"{out_dir} has runs with {done['settings'] or 'default settings'}, not with "
                         f"{settings or 'these'}; name another --out_dir")
    commands = {name: command(settings | run, where) for name, (run, _) in runs.items()}
    configs = {name: parse_config(words) for name, words in commands.items()}    # a wrong value ends it here
    todo = {name: words for name, words in commands.items() if name not in done["runs"]}
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in todo:                                         # base and teacher, before two runs both make them
        if not configs[name].data:
            load(configs[name])
    failed = do_runs(todo, jobs or (1 if torch.cuda.is_available() else min(2, os.cpu_count())), file, done)
    groups = tabulate({name: run for name, run in runs.items() if name in done["runs"]}, done["runs"], target)
    if groups:
        print_sweep(groups)
        draw_sweep(groups, out_dir / "sweep.png")
        print(f"\nAll curves are in {file}, the picture is {out_dir / 'sweep.png'}")
    for name, error in failed.items():
        print(f"train.py: {name} failed: {error}", file=sys.stderr)
    return 1 if failed else 0


def command(run: dict, where: dict) -> list[str]:
    """A run's settings as the words of a command line, without those that its method has no use for."""
    settings = useful(run, run.get("data")) | where
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def do_runs(commands: dict, jobs: int, file: Path, done: dict) -> dict:
    """Do these runs, so many at a time, and put each into `done` and `file`: {name: what it said} of what failed."""
    def finish(name):
        return do_run(file.parent / name, commands[name], threads=max(1, os.cpu_count() // jobs))

    failed, pool = {}, ThreadPoolExecutor(jobs)               # threads that wait for their processes
    try:
        bar = tqdm(pool.map(finish, commands), total=len(commands), desc="sweep", unit="run")
        for error, name in zip(bar, commands):
            if error is not None:
                failed[name] = error
                continue
            done["versions"] = json.loads((file.parent / name / "config.json").read_text())["versions"]
            done["runs"][name] = in_short(json.loads((file.parent / name / "summary.json").read_text()))
            write_json(file, done, indent=None)
    finally:
        pool.shutdown(cancel_futures=True)                    # stopped: begin no more runs
    return failed


def do_run(directory: Path, words: list[str], threads: int) -> str | None:
    """Do one run, or the rest of it, in a process of its own; the last line it complained with, if it failed."""
    if (directory / "summary.json").exists():
        return None
    how = ["--resume", str(directory)]
    if not any(directory.glob("state*.pt")):                  # not begun, or stopped before its first step ended
        shutil.rmtree(directory, ignore_errors=True)
        how = [*words, "--out_dir", str(directory)]
    job = subprocess.run([sys.executable, __file__, *how], capture_output=True, text=True,
                         env={"OMP_NUM_THREADS": str(threads)} | os.environ)
    said = [f"exit status {job.returncode}"] + [line for line in re.split("[\r\n]", job.stderr) if line.strip()]
    return said[-1] if job.returncode else None


def in_short(summary: dict) -> dict:
    """What sweep.json keeps of a run's summary."""
    return {key: summary[key] for key in ("final_accuracy", "tokens", "seconds")} | dict(
        curve=[[p["step"], p["accuracy"], p["tokens"], round(p["seconds"], 2)] for p in summary["curve"]],
        searches=[[s["step"], s["accepted"], s["multiple"]] for s in summary["searches"]])


def bootstrap(values) -> dict:
    """{mean, low, high: 95% percentile bootstrap interval of the mean (None of one value), n}.

    Of five values such an interval covers the true mean less often than 95 times in 100, nearer to 85.
    """
    values = np.asarray(values, dtype=float)                                     # (n,)
    drawn = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
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


def spread(stats, form) -> str:
    """mean [low, high] of a `bootstrap`, each in this format; of one value the mean alone."""
    span = "" if stats["low"] is None else f" [{stats['low']:{form}}, {stats['high']:{form}}]"
    return f"{stats['mean']:{form}}{span}"


def print_sweep(rows):
    """A Markdown table: mean [95% bootstrap interval]."""
    print("\n| settings | n | final accuracy | to accuracy | reached | steps | student tokens | seconds | "
          "times fewer than OPD: steps | tokens | seconds |\n|" + "---|" * 11)
    for row in rows:
        n, bound = row["final"]["n"], "" if row["reached"] == row["final"]["n"] else "≥ "
        costs = [bound + spread(row["cost"][unit], form) for unit, form in zip(UNITS, (".1f", ",.0f", ".1f"))]
        times = [spread(row["times"][unit], ".2f") if row["times"] else "-" for unit in UNITS]
        cells = [name_of(row["settings"], " "), str(n), spread(row["final"], ".3f"), f"{row['goal']:.3f}"]
        print("| " + " | ".join([*cells, f"{row['reached']} of {n}", *costs, *times]) + " |")


def draw_sweep(rows, path):
    """Steps and seconds to the target: against the first axis, if that is numbers, with a line for every other setting;
    else a row for each setting.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    axis, lines = next(iter(rows[0]["settings"])), {}
    try:
        for row in rows:
            rest = " ".join(f"{name}={value}" for name, value in row["settings"].items() if name != axis)
            lines.setdefault(rest, []).append((float(row["settings"][axis]), row))
    except (ValueError, KeyError):                            # words, or a setting that not every method has
        axis, lines = "", {"": list(enumerate(rows))}
    goal = "–".join(dict.fromkeys(f"{f(row['goal'] for row in rows):.2f}" for f in (min, max)))
    figure, panels = plt.subplots(1, 2, figsize=(10, 4 + 0.2 * len(lines) if axis else 1.5 + 0.25 * len(rows)),
                                  layout="constrained", sharey=not axis)
    for panel, unit, title in zip(panels, ("step", "seconds"), ("optimiser steps", "seconds, validation included")):
        for i, (label, points) in enumerate(lines.items()):
            draw_costs(panel, points, unit, f"C{i}", label, upright=bool(axis))
        cost, costs = f"{title},\nto accuracy {goal}", panel.yaxis if axis else panel.xaxis
        panel.set(xlabel=axis, ylabel=cost, yscale="log") if axis else panel.set(xlabel=cost, xscale="log")
        costs.set_major_formatter("{x:g}")
        costs.set_minor_formatter("{x:g}")
        if axis and min(x for points in lines.values() for x, _ in points) > 0:
            panel.set_xscale("log")
        panel.grid(alpha=0.3, which="both")
    if axis:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    else:
        panels[0].set_yticks(range(len(rows)), [name_of(row["settings"], " ") for row in rows], fontsize=8)
        panels[0].invert_yaxis()
    figure.suptitle("Mean and 95% bootstrap interval over seeds (hollow: not every seed got there, a lower bound)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_costs(panel, points, unit, color, label, upright):
    """Of points (x, row) the mean cost and its interval, along y if upright, else along x."""
    xs, stats = [x for x, _ in points], [row["cost"][unit] for _, row in points]
    ys = [s["mean"] for s in stats]
    bars = [[0 if s["low"] is None else abs(s["mean"] - s[end]) for s in stats] for end in ("low", "high")]
    if upright:
        panel.errorbar(xs, ys, bars, color=color, capsize=3, label=label)
    else:
        panel.errorbar(ys, xs, xerr=bars, color=color, capsize=3, linestyle="none")
    for x, y, (_, row) in zip(xs, ys, points):
        full = row["reached"] == row["final"]["n"]
        panel.plot(*((x, y) if upright else (y, x)), "o", color=color, markerfacecolor=color if full else "white")


# ----------------------------------------------------------------------------------------------------------------
# The command.

def run_one(config: Config, out_dir: Path):
    """Load, evaluate, train; then say and draw what came of it."""
    task, student, teacher = load(config)
    check_space(config, student, out_dir)
    problems, evaluated = evaluation_problems(config, task), None
    if not config.resume:
        evaluated = evaluate(student, task, problems)
        print(f"Accuracy on {len(problems)} held-out problems: student {evaluated[0]:.3f}" +
              (f", teacher {evaluate(teacher, task, problems)[0]:.3f}" if teacher else ""))
    if config.method == "race":
        summary = race(config, task, student, teacher, out_dir, evaluated)
        with replacing(out_dir / "race.png") as scratch:
            draw_race(summary, scratch)
        label = list(RACE)[-1]
        print_examples(label, summary["methods"][label]["examples"])
        print_race(summary)
        print(f"\nThe picture is {out_dir / 'race.png'}; everything else is in {out_dir}")
    else:
        summary = distil(config, task, student, teacher, out_dir, config.method, evaluated)
        print_examples(config.method, summary["examples"])
        print_run(summary)
        print(f"\nEverything is in {out_dir}")


def main(args=None):
    settings = given(args)
    if settings.get("sweep"):
        try:
            sys.exit(sweep(settings))
        except (ValueError, OSError) as error:
            stop(error)
        except KeyboardInterrupt:
            stop("stopped; the same command goes on")
    config = parse_config(args)
    if config.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")            # TF32 on tensor cores
    out_dir = None
    try:
        out_dir = Path(config.resume) if config.resume else claim_directory(config)        # before any long work
        run_one(config, out_dir)
    except Interrupted as stopped:
        where, number = stopped.args
        print(f"train.py: stopped {where}; to go on: python train.py --resume {out_dir}", file=sys.stderr)
        sys.exit(128 + number)
    except KeyboardInterrupt:
        begun = out_dir and any(out_dir.rglob("config.json"))
        print(f"train.py: stopped{f'; to go on: python train.py --resume {out_dir}' if begun else ''}", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        stop(f"{first_line(error)} Try a smaller --micro_batch_size or --rollout_batch_size, --gradient_checkpointing, "
             "--offload")
    except (ValueError, OSError) as error:
        stop(error)
    finally:
        if out_dir and not config.resume and out_dir.is_dir() and not any(out_dir.iterdir()):
            out_dir.rmdir()                                   # nothing came of it


if __name__ == "__main__":
    main()
