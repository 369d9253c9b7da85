"""Distillation of your own models on your own problems: train.py's loop, with other inputs.

    python -m extras.real --student DIR --teacher DIR --data problems.jsonl           # the finder
    python -m extras.real --method opd --student DIR --teacher DIR --data problems.jsonl
    python -m extras.real --method rl --student DIR --data problems.jsonl             # no teacher
    python -m extras.real --method sft --student DIR --data problems.jsonl            # on the file
    python -m extras.real --resume runs/effopd

A model is a directory in Hugging Face's format with its tokenizer, or a repository id: Llama, Qwen2
or Qwen3. Student and teacher share a vocabulary. The data are a JSON object a line, a problem and
its answer; extras/grading.py says how answers are read, extras/word_problems.py makes such a file.
The trained student is runs/effopd/checkpoints/final, for transformers.

Memory in bytes, for a student of P parameters, with --dtype mixed:
    16 P    weights, gradients and AdamW's moments
     8 P    EffOPD's W_prev and last Δ, 16 P during a search (4 P with --offload)
     2 P'   the teacher's P' parameters
    micro_batch_size x tokens x layers x (30 hidden_size + 10 intermediate_size)
            what the backward pass needs (half as much again in float32), or with
            --gradient_checkpointing one layer of it and 4 hidden_size for each of the others
The last is 1 MB a token at 135 M parameters, 2.3 MB at 1 B. So 16 rows of 512 tokens, the default
of micro_batch_size, take 8 GB and 19 GB. Fewer micro-batches are faster: raise it where there is
room. N x V logits are never in memory at once (effopd.chunked).
"""

import argparse
import hashlib
import json
import math
import random
import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
import torch.nn.functional as F

import train
from effopd import (EffOPD, chunked, group_advantages, policy_gradient, reverse_kl,
                    reverse_kl_sampled, reverse_kl_top_k, token_log_probs)
from extras.grading import grade
from model import GPT, end_tokens, read_json
from train import Part, evaluate, first_line, pack, rewards_of, sample_answers, setting


@dataclass
class RealConfig(train.Config):
    """train.py's settings with other defaults, and further ones. ValueError, likewise."""

    method: Literal["opd", "effopd", "rl", "sft"] = setting(
        "effopd", "opd, effopd, rl (GRPO on right or wrong), or sft (on the teacher's answers; "
        "without --teacher on the file's own)")
    student: str = setting("", "checkpoint to train: a directory or a repository id")
    teacher: str = setting("", "checkpoint that scores, likewise")
    data: str = setting("", "problems and answers, a JSON object a line")
    prompt_field: str = setting("question", "field of the problem's text (MATH: problem)")
    answer_field: str = setting("answer", "field of the answer (MATH: solution)")
    system: str = setting("", "system message of the chat; empty: none")
    no_chat_template: bool = setting(False, "the problem's text is the whole prompt")
    template: str = setting("", "chat template, in Jinja; empty: the student's. The run keeps it, "
                            "with today's date where it asks for one")
    max_new_tokens: int = setting(384, "tokens of an answer at most")
    dtype: Literal["auto", "float32", "mixed"] = setting(
        "auto", "mixed: computes in bfloat16, the student's weights stay in float32, the teacher's "
        "do not. auto: mixed on a GPU, else float32")
    gradient_checkpointing: bool = setting(False, "run layers again in the backward pass")
    offload: bool = setting(False, "keep EffOPD's copies of the weights in CPU memory")
    control: bool = setting(False, "also measure the untrained student at six temperatures: a gap "
                            "that one of them closes is no test of distillation")
    data_sha256: str = setting("", argparse.SUPPRESS)         # the run's own

    # Other defaults. The search is the finder, once: see docs/real-models.md.
    steps: int = setting(64, "optimiser steps")
    lr: float = setting(1e-5, "learning rate (of effopd: before its search)")
    score: str = setting("batch_kl", "as in train.py (the paper's: accuracy)")
    candidates: str = setting("line", "as in train.py (the paper's: linear)")
    num_candidates: int = setting(14, "candidates at most, in each direction (the paper's: 5)")
    scope: Literal["attention+mlp", "mlp", "all"] = setting(
        "all", "what a jump moves (the paper's: attention+mlp)")
    searches: int = setting(1, "searches in all, at most (0: no limit, the paper's)")
    move_lr: bool = setting(True, "a search that keeps multiple m also multiplies lr by 1 + m")
    batch_size: int = setting(64, "answers a step")
    micro_batch_size: int = setting(16, "rows in a forward and backward pass (0: all)")
    rollout_batch_size: int = setting(256, "answers sampled at once")
    eval_every: int = setting(8, "steps between evaluations, which do not count in a run's seconds")
    eval_size: int = setting(200, "problems in an evaluation, one sampled answer each")
    save_every: int = setting(0, "steps between states to resume from (0: only when stopped)")
    checkpoints: bool = setting(False, "keep the student at steps 0, 1, 2, 4, 8, ... too, for "
                                "analyze.py, not only the final one")

    def __post_init__(self):
        super().__post_init__()
        if self.resume and not self.data:                     # the run's own settings will follow
            return
        if not (self.student and self.data):
            raise ValueError("--student, a checkpoint, and --data, a file of problems, are needed")
        if self.method in ("opd", "effopd") and not self.teacher:
            raise ValueError(f"--method {self.method} needs --teacher, a checkpoint")
        if not Path(self.data).is_file():
            raise ValueError(f"--data: there is no file {self.data}")
        if self.dtype == "auto":
            self.dtype = "float32" if self.device == "cpu" else "mixed"


# ------------------------------------------------------------------------------------------------
# One step of each method, as in train.py, but from hidden states: logits exist a chunk at a time.
# A part's target is the teacher's hidden states at the answers' N tokens.

def states(model, part: Part):
    """Hidden states (N, C) that predict the N tokens of the answers, row after row."""
    return model.hidden_states(part.inputs)[part.mask]


def kl_of(student, teacher, hidden, target, num_tokens, top_k=0):
    """Σ of KL(π || π*) at N tokens, hidden (N, C) and target (N, teacher's C), over num_tokens."""
    def kl(logits, target):                                   # (n, V), (n, teacher's C)
        teacher_logits = F.linear(target, teacher.head)                          # (n, V)
        if top_k:
            return reverse_kl_top_k(logits, teacher_logits, None, top_k, num_tokens)
        return reverse_kl(logits, teacher_logits, None, num_tokens)
    return chunked(kl, hidden, student.head, target)


def sampled_kl_of(student, teacher, part, hidden, num_tokens, discount):
    """`reverse_kl_sampled` of the part's N tokens. With a discount an answer is not cut up."""
    def kl(logits, target, tokens):                           # (n, V), (n, teacher's C), (n,)
        teacher_logits = F.linear(target, teacher.head)                          # (n, V)
        return reverse_kl_sampled(logits[None], teacher_logits[None], tokens[None],
                                  torch.ones_like(tokens[None]), discount, num_tokens)

    tokens = part.tokens[part.mask]                                              # (N,)
    if not discount:
        return chunked(kl, hidden, student.head, part.target, tokens)
    lengths = part.mask.sum(1).tolist()
    answers = zip(hidden.split(lengths), part.target.split(lengths), tokens.split(lengths))
    return sum(chunked(kl, h, student.head, target, y, chunk_size=len(y))
               for h, target, y in answers)


def opd_step(config, task, student, teacher, problems, generator):
    answers = sample_answers(student, task, problems, generator)                       # y ~ π(·|x)
    parts, num_tokens = pack(task, problems, answers, student.device, config.micro_batch_size)
    loss_sum, kl_sum = 0.0, 0.0
    for part in parts:
        with torch.no_grad():
            part.target = states(teacher, part)                                  # (N, teacher's C)
        hidden = states(student, part)                                           # (N, C)
        if config.loss in ("full", "top_k"):
            top_k = config.top_k if config.loss == "top_k" else 0
            loss = kl_of(student, teacher, hidden, part.target, num_tokens, top_k)
        else:
            discount = 1.0 if config.loss == "sequence" else 0.0
            loss = sampled_kl_of(student, teacher, part, hidden, num_tokens, discount)
        loss.backward()
        loss_sum += loss.detach()
        kl = loss.detach()
        if config.loss != "full":                             # for the log
            kl = kl_of(student, teacher, hidden.detach(), part.target, num_tokens).detach()
        kl_sum += kl
    rewards = rewards_of(task, problems, answers)
    return parts, dict(loss=loss_sum, kl=kl_sum, reward=fmean(rewards), num_tokens=num_tokens)


def rl_step(config, task, student, teacher, problems, generator):
    problems = [problem for problem in problems for _ in range(config.group_size)]     # neighbours
    answers = sample_answers(student, task, problems, generator)                       # y ~ π(·|x)
    rewards = torch.tensor(rewards_of(task, problems, answers))                  # (B,)
    advantages = group_advantages(rewards, config.group_size)                    # (B,)
    return weighted_step(config, task, student, problems, answers, rewards, advantages)


def sft_step(config, task, student, teacher, problems, generator):
    if teacher is None:
        answers = [task.encode_answer(task.solve(problem)) for problem in problems]
    else:
        answers = sample_answers(teacher, task, problems, generator)                   # y ~ π*(·|x)
    rewards = torch.tensor(rewards_of(task, problems, answers))                  # (B,)
    ones = torch.ones(len(answers))
    return weighted_step(config, task, student, problems, answers, rewards, ones)


def weighted_step(config, task, student, problems, answers, rewards, advantages):
    """RL's policy gradient; cross-entropy where all advantages (B,) are 1."""
    def policy_loss(logits, tokens, advantages):        # (n, V), (n,), (n,)
        return policy_gradient(logits, tokens, advantages, None, num_tokens)

    parts, num_tokens = pack(task, problems, answers, student.device, config.micro_batch_size)
    advantages = advantages.to(student.device)[:, None]                          # (B, 1)
    loss_sum = 0.0
    for part, advantage in zip(parts, advantages.split(len(parts[0].ids))):
        of_tokens = advantage.expand(part.mask.shape)[part.mask]                 # (N,)
        tokens = part.tokens[part.mask]                                          # (N,)
        loss = chunked(policy_loss, states(student, part), student.head, tokens, of_tokens)
        loss.backward()
        loss_sum += loss.detach()
    return parts, dict(loss=loss_sum, reward=rewards.mean().item(), num_tokens=num_tokens)


METHODS = {"opd": opd_step, "effopd": opd_step, "rl": rl_step, "sft": sft_step}


@contextmanager
def in_float32(model):
    """With all digits: what a step at lr 1e-6 changes drowns in bfloat16 or TF32 rounding."""
    precision, tf32 = model.precision, torch.get_float32_matmul_precision()
    model.precision = None
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        model.precision = precision
        torch.set_float32_matmul_precision(tf32)


def batch_kl(judge, model):
    """-KL(π || π*) on the batch just trained on."""
    judge.scored += judge.num_tokens
    with in_float32(model):
        return -sum(kl_of(model, judge.teacher, states(model, part), part.target, judge.num_tokens)
                    for part in judge.parts)


def rollout_kl(judge, model):
    """-KL(π || π*) on the candidate's own answers to D_v."""
    _, answers = evaluate(model, judge.task, judge.problems, torch.initial_seed())
    rows = len(judge.parts[0].ids)
    parts, num_tokens = pack(judge.task, judge.problems, answers, model.device, rows)
    judge.sampled += num_tokens
    return -sum(kl_of(model, judge.teacher, states(model, part), states(judge.teacher, part),
                      num_tokens) for part in parts)


SCORES = train.SCORES | {"batch_kl": batch_kl, "rollout_kl": rollout_kl}


# ------------------------------------------------------------------------------------------------
# --offload: EffOPD with its copies in CPU memory.

class OnDevice(dict):
    """Tensors of CPU memory by name, each moved to the device while somebody looks at it."""

    def __init__(self, tensors, device):
        super().__init__(tensors)
        self.device = device

    def __getitem__(self, name):
        return super().__getitem__(name).to(self.device, non_blocking=True)


class OffloadedEffOPD(EffOPD):
    """EffOPD, but W_prev, W_t and Δ are in CPU memory, pinned where there is a GPU."""

    def copy_weights(self) -> dict:
        return {name: torch.empty_like(p, device="cpu", pin_memory=p.is_cuda).copy_(p.detach())
                for name, p in self.parameters.items()}

    def on_device(self, tensors):
        return tensors and OnDevice(tensors, next(iter(self.parameters.values())).device)

    def look_at(self, delta) -> dict:
        last = self.delta
        self.delta = self.on_device(last)
        if next(iter(self.parameters.values())).is_cuda:
            delta.update({name: d.pin_memory() for name, d in delta.items()})
        record = super().look_at(self.on_device(delta))
        self.delta = last
        return record

    def place(self, current, delta, multiple):
        super().place(self.on_device(current), self.on_device(delta), multiple)


def make_search(student, judge, **settings) -> EffOPD:
    cls = OffloadedEffOPD if judge.task.config.offload else EffOPD
    return cls(student, judge, **settings)


# ------------------------------------------------------------------------------------------------
# The two models.

def load_real(config: RealConfig):
    """The task, student, teacher (or None), and accuracies to compare results with.

    ValueError where the models, their tokenizers or the data do not go together.
    """
    student, tokenizer, ends = load_model("student", config)
    student.gradient_checkpointing = config.gradient_checkpointing
    student.precision = torch.bfloat16 if config.dtype == "mixed" else None
    if emulates_bfloat16(config.device):
        if config.dtype == "mixed":
            print("Slow        this CPU has no bfloat16 arithmetic: --dtype float32 will be faster",
                  flush=True)
        if config.optimizer == "muon":
            print("Slow        torch's Muon computes in bfloat16, and this CPU has no such "
                  "arithmetic: minutes a step at 135 M parameters", flush=True)
    student.tokens_in_use = max(tokenizer.get_vocab().values()) + 1    # other rows are padding
    student.config.eos_token_id = ends
    context = student.config.max_position_embeddings
    if not config.teacher or config.method == "rl":
        return WordProblems(config, tokenizer, ends, context), student, None, {}
    teacher, teacher_tokenizer, teacher_ends = load_model("teacher", config)
    teacher.requires_grad_(False)
    teacher.tokens_in_use = student.tokens_in_use
    same_vocabulary(tokenizer, teacher_tokenizer)
    ends = end_tokens(ends, teacher_ends)                     # any of them ends an answer
    student.config.eos_token_id = ends                        # and is saved with the student
    context = min(context, teacher.config.max_position_embeddings)
    task = WordProblems(config, tokenizer, ends, context)
    canary(config, task, teacher)
    problems = train.evaluation_problems(config, task)
    if config.control:
        return task, student, teacher, train.measure_control(task, student, teacher, problems)
    return task, student, teacher, {"teacher": evaluate(teacher, task, problems)[0]}


def emulates_bfloat16(device: str) -> bool:
    """x86 does without AVX512_BF16 or AMX, some six times slower than it computes in float32."""
    cpu = torch.cpu.get_capabilities()
    has = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return device == "cpu" and cpu["architecture"] == "x86_64" and not has


def load_model(role: str, config) -> tuple:
    """Model, tokenizer, and the tokens that end its answers: the first is what SFT teaches."""
    from transformers import AutoTokenizer
    name = getattr(config, role)
    print(f"Loading     {role} {name}", flush=True)
    low = config.dtype == "mixed" and role == "teacher"
    model = GPT.from_pretrained(name, torch.bfloat16 if low else torch.float32).to(config.device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.source)
        generation = read_json(model.source / "generation_config.json")
        ends = end_tokens(tokenizer.eos_token_id, model.config.eos_token_id,
                          generation.get("eos_token_id"))
    except Exception as error:                                # a broken file can raise anything
        raise ValueError(f"{model.source}: its tokenizer or generation_config.json cannot be read: "
                         f"{first_line(error)}") from None
    if max(tokenizer.get_vocab().values()) >= model.config.vocab_size:
        raise ValueError(f"{model.source}: the tokenizer has {len(tokenizer)} tokens, the model "
                         f"only {model.config.vocab_size}")
    if not ends:
        raise ValueError(f"{model.source} names no end token, so an answer would never end")
    return model, tokenizer, ends


def same_vocabulary(student, teacher):
    """ValueError unless every token has the same id in both: equal sizes prove nothing."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    different = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
    if different:
        token = different[0]
        raise ValueError(
            f"student and teacher have different vocabularies ({len(different):,} tokens differ; "
            f"{token!r} is {ours.get(token, 'absent')} and {theirs.get(token, 'absent')}): they "
            "are compared token by token, so take two models of one family")


def canary(config, task, teacher):
    """ValueError for a teacher that finds its own most probable answers improbable."""
    problems = task.problems(4, random.Random("canary"))
    answers = sample_answers(teacher, task, problems, None, temperature=0)
    answers = [answer[:32] for answer in answers]             # (N, V) logits stay small
    (part,), _ = pack(task, problems, answers, teacher.device)
    with torch.no_grad():
        logits = F.linear(states(teacher, part), teacher.head)                   # (N, V)
    mean = token_log_probs(logits, part.tokens[part.mask]).mean().item()
    uniform = -math.log(teacher.tokens_in_use)
    print(f"Teacher     begins an answer with {task.decode(answers[0])!r}\n            mean "
          f"log-probability of such {mean:.2f} a token (of guessing: {uniform:.2f})", flush=True)
    if not mean > uniform / 2:
        raise ValueError(f"--teacher {config.teacher}: its own greedy answers have a mean "
                         f"log-probability of {mean:.2f} a token, and guessing has {uniform:.2f}: "
                         "it is untrained, or was loaded wrongly")


# ------------------------------------------------------------------------------------------------
# Problems from a file.

class WordProblems:
    """A task (see train.Chains) of problems from a file, asked through a tokenizer.

    Lines that cannot be used are left out, counted, and the first of them is named: no answer that
    can be read with certainty, the same problem with another answer, too long for the context.
    ValueError for a file that is no such file, and where too few problems are left.
    """

    def __init__(self, config: RealConfig, tokenizer, end: list[int], context: int):
        self.config, self.tokenizer, self.end, self.context = config, tokenizer, end, context
        self.max_response = config.max_new_tokens
        self.rollout_batch_size = config.rollout_batch_size
        self.solutions, self.prompts = {}, {}                 # by problem: a text, token ids
        self.unchanged()
        if not config.no_chat_template:
            self.fix_template()
        refused = []
        for number, problem, solution in read_jsonl(config):
            try:
                self.add(problem, solution)
            except ValueError as error:
                refused.append(f"line {number}: {error}")
        left_out = f"; {len(refused):,} lines left out, the first: {refused[0]}" if refused else ""
        groups = config.group_size if config.method == "rl" else 1
        needed = config.eval_size + config.dv_size + config.batch_size // groups
        if len(self.prompts) < needed:
            raise ValueError(f"{config.data} has {len(self.prompts)} different problems, and "
                             f"--eval_size, --dv_size and a batch need {needed}{left_out}")
        shortest = min(self.prompts.values(), key=len)
        print(f"Data        {len(self.prompts):,} problems: {config.eval_size} for evaluation, "
              f"{config.dv_size} for D_v, the rest to train on{left_out}\n"
              f"Prompt      {tokenizer.decode(shortest)!r}", flush=True)

    def unchanged(self):
        """ValueError if the data file is not what the run began with."""
        with open(self.config.data, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if self.config.data_sha256 not in ("", found):
            raise ValueError(f"{self.config.data} has changed since this run began, so that what "
                             "was held out would be trained on: begin a new run")
        self.config.data_sha256 = found

    def fix_template(self):
        """Use, and keep with the run, the chat template, as it is today."""
        try:
            template = self.config.template or self.tokenizer.get_chat_template()
        except Exception:
            raise ValueError("the student's tokenizer has no chat template; --no_chat_template "
                             "asks without one") from None
        now = datetime.now()
        self.config.template = re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)",
                                      lambda match: repr(now.strftime(match[2])), template)
        self.tokenizer.chat_template = self.config.template

    def add(self, problem: str, solution: str):
        """ValueError for a problem that cannot be used."""
        if solution != self.solutions.get(problem, solution):
            raise ValueError("the same problem as in a line before, with another answer")
        if not grade(solution, solution):
            raise ValueError(f"its own answer is not graded right: {solution[-60:]!r}")
        prompt = self.prompt_of(problem)
        length = len(prompt) + self.max_response
        if self.config.method == "sft" and not self.config.teacher:
            length = max(length, len(prompt) + len(self.encode_answer(solution)))
        if length > self.context:
            raise ValueError(f"prompt and answer of {length} tokens (--max_new_tokens "
                             f"{self.max_response}) exceed the context of {self.context}")
        self.solutions[problem], self.prompts[problem] = solution, prompt

    def prompt_of(self, problem: str) -> list[int]:
        config = self.config
        if config.no_chat_template:
            tokens = self.tokenizer(problem).input_ids
            return tokens[:-1] if tokens[-1] in self.end else tokens    # some append their end
        chat = [{"role": "system", "content": config.system}] if config.system else []
        chat.append({"role": "user", "content": problem})
        try:
            return self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=False,
                enable_thinking=False)                        # for Qwen3's; others ignore it
        except Exception as error:                            # a template can raise anything
            raise ValueError(f"the chat template fails: {first_line(error)}; --no_chat_template "
                             "does without it") from None

    def problems(self, n: int, rng: random.Random, exclude=frozenset()) -> list[str]:
        """n different problems, none of them in exclude."""
        return rng.sample([problem for problem in self.prompts if problem not in exclude], n)

    def batches(self, n: int, rng: random.Random, exclude):
        """Training problems, n at a time: each once before any comes again."""
        deck = []
        while True:
            while len(deck) < n:
                deck += self.problems(len(self.prompts) - len(exclude), rng, exclude)
            yield deck[:n]
            deck = deck[n:]

    def solve(self, problem: str) -> str:
        """The file's own answer."""
        return self.solutions[problem]

    def is_correct(self, problem: str, answer: str) -> bool:
        return grade(self.solutions[problem], answer)

    def encode(self, problem: str) -> list[int]:
        return self.prompts[problem]

    def encode_answer(self, answer: str) -> list[int]:
        return self.tokenizer(answer, add_special_tokens=False).input_ids + self.end[:1]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def read_jsonl(config):
    """Yields (line number, problem, answer), both texts. ValueError names a line that is wrong."""
    names = (config.prompt_field, config.answer_field)
    with open(config.data, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{config.data}, line {number}"
            if not line.strip():
                continue
            try:
                row = dict(json.loads(line))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{where} is not a JSON object: {first_line(error)}") from None
            for name in names:
                if type(row.get(name)) not in (str, int, float):
                    raise ValueError(f"{where} has no text or number {name!r} but "
                                     f"{', '.join(row)[:200]}; choose with --prompt_field and "
                                     "--answer_field")
            yield number, *(str(row[name]) for name in names)


def main(args=None):
    train.main(args, config_class=RealConfig, load=load_real, command="python -m extras.real",
               methods=METHODS, scores=SCORES, cls=make_search)


if __name__ == "__main__":
    main()
