"""How fast this code is beside what one would use instead, on the same weights, in turn.

    python -m extras.bench                                    # all parts, the built-in shape
    python -m extras.bench --only rollout,step --shapes built-in,135m
    python -m extras.bench --device cuda --shapes built-in,25m,135m,0.6b

    rollout    sampling against transformers' generate, and on CUDA against the memory's bandwidth;
               how far the decoder's log-probabilities are from the whole forward's
    step       a step of distillation (rollout, teacher, full reverse KL, AdamW) against TRL's
               DistillationTrainer, where trl is installed
    search     a search by batch KL with two scores against a step
    default    `python train.py` from an empty cache
    loss       the loss with its gradient, in chunks against all logits at once

Prints a table and writes it to bench.json, where the rows of other parts stay. Seconds wander on a
machine that others use; the ratios, taken pair by pair, less so: above 1 we are better in tokens a
second, below 1 in seconds and memory. Weights and prompts are random.
"""

import argparse
import gc
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import NamedTuple

import train                                                  # before torch, see there

import torch
import torch.nn.functional as F

from effopd import EffOPD, chunked, reverse_kl, token_log_probs
from model import GPT, GPTConfig, config_to_hf

ROOT = Path(__file__).resolve().parents[1]


class Shape(NamedTuple):
    """A model's shape, and the batch that it is measured with."""
    config: dict
    rows: int                # prompts in a batch
    prompt: int              # tokens of each
    new: int                 # tokens sampled after each
    micro: int               # rows in a forward and backward pass
    mixed: bool = False      # computes in bfloat16, with weights in float32


SHAPES = {
    "toy": Shape(dict(vocab_size=17, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                      num_attention_heads=2), 4, 4, 4, 2),
    "built-in": Shape(dict(vocab_size=17), 128, 12, 48, 128),
    "25m": Shape(dict(vocab_size=17, hidden_size=512, intermediate_size=1365, num_hidden_layers=8,
                      num_attention_heads=8), 128, 28, 80, 128),
    "135m": Shape(dict(vocab_size=49_152, hidden_size=576, intermediate_size=1536,
                       num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3),
                  64, 64, 64, 64, mixed=True),                # SmolLM2-135M's
    "0.6b": Shape(dict(vocab_size=151_936, hidden_size=1024, intermediate_size=3072,
                       num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                       head_dim=128, qk_norm=True), 64, 64, 64, 16, mixed=True),    # Qwen3's
}


def shape_of(name, args) -> Shape:
    shape = SHAPES[name]
    if shape.mixed and args.device == "cpu":                  # 64 rows would take an hour
        return shape._replace(rows=8, micro=8, mixed=False)
    return shape


# ------------------------------------------------------------------------------------------------
# Measuring.

def seconds_of(f, device) -> float:
    synchronize(device)
    start = time.perf_counter()
    f()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize()


def in_turn(ours, theirs, args):
    """Seconds of both, in turn, after one of each to warm up."""
    pairs = []
    for _ in range(args.repeats + 1):
        pairs.append((seconds_of(ours, args.device), seconds_of(theirs, args.device)))
    return zip(*pairs[1:])


def peak_memory(f, device) -> float:
    """GB in use at most while f() runs."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")         # Linux: a new peak begins
        f()
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(peak[1]) * 1024 / 1e9
    torch.cuda.reset_peak_memory_stats()
    f()
    return torch.cuda.max_memory_allocated() / 1e9


def row(what, unit, ours, theirs=(), note="") -> dict:
    """A line of the table: medians of ours and theirs, and of ours / theirs, pair by pair."""
    ratios = [a / b for a, b in zip(ours, theirs)]
    found = dict(what=what, unit=unit, n=len(ours), ours=median(ours), note=note)
    if ratios:
        found |= dict(theirs=median(theirs), ratio=median(ratios))
        found |= dict(low=min(ratios), high=max(ratios))
    return found


# ------------------------------------------------------------------------------------------------
# Models, prompts, and the same in transformers.

class Words:
    """A task for `train` whose answers never end. A problem is its token ids, as a text."""
    end = None

    def __init__(self, shape: Shape):
        self.max_response = shape.new
        self.rollout_batch_size = shape.rows

    def encode(self, problem) -> list[int]:
        return [int(word) for word in problem.split()]

    def decode(self, tokens) -> str:
        return " ".join(map(str, tokens))

    def is_correct(self, problem, answer) -> bool:
        return False


def build(name, args, seed=0):
    """Model, task and problems of a shape: random weights, made on the device."""
    shape = shape_of(name, args)
    torch.manual_seed(seed)
    with torch.device(args.device):
        model = GPT(GPTConfig(**shape.config))
    model.precision = torch.bfloat16 if shape.mixed else None
    task = Words(shape)
    tokens = range(model.config.vocab_size)
    rng = random.Random(0)
    prompts = [rng.choices(tokens, k=shape.prompt) for _ in range(shape.rows)]
    return model, task, [task.decode(prompt) for prompt in prompts]


def as_transformers(model: GPT, dtype=torch.float32):
    """The same weights in transformers, on the same device; no answer ends early."""
    from transformers import AutoModelForCausalLM
    with torch.device(model.device):
        theirs = AutoModelForCausalLM.from_config(config_to_hf(model.config), dtype=dtype)
    theirs.load_state_dict(model.state_dict())
    theirs.generation_config.eos_token_id = None
    return theirs


def tokenizer_of(vocab_size):
    """The words under their ids in transformers, and one more for an end that never comes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<never>", pad_token="<never>")


# ------------------------------------------------------------------------------------------------
# The parts. Each yields its rows for one shape.

def rollout(name, args):
    model, task, problems = build(name, args)
    prompts = [task.encode(problem) for problem in problems]
    new, tokens = task.max_response, len(prompts) * task.max_response
    theirs = as_transformers(model, model.dtype)
    ids = torch.tensor(prompts, device=args.device)                              # (B, P)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=True,
                   temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    seconds, their_seconds = in_turn(lambda: model.generate(prompts, new),
                                     lambda: theirs.generate(ids, **options), args)
    what = f"{name}, {len(prompts)} x {new} tokens"
    yield row(f"{what}: transformers", "tokens/s", [tokens / s for s in seconds],
              [tokens / s for s in their_seconds])
    if args.device != "cpu":
        weights = sum(p.numel() for p in model.parameters()) * model.dtype.itemsize / 1e9    # GB
        block = torch.zeros(2 ** 28, device=args.device)                                # 1.07 GB
        fastest = min(seconds_of(block.sum, args.device) for _ in range(10))
        yield row(f"{what}: bandwidth, weights read once a token", "GB/s",
                  [weights * new / s for s in seconds],
                  [block.nbytes / 1e9 / fastest] * len(seconds))
    for precision in (None, torch.bfloat16):
        model.precision = precision
        yield gap(model, prompts[:8], new, f"{name}, {str(model.dtype).removeprefix('torch.')}")


def gap(model, prompts, new, what) -> dict:
    """Log-probabilities of the decoder against those of the forward that training goes through."""
    answers = model.generate(prompts, new)
    ids = torch.cat((torch.tensor(prompts, device=model.device), answers.tokens), dim=1)
    with torch.no_grad():
        logits = model(ids[:, :-1])[:, -new:]                                    # (B, R, V)
    gaps = (answers.log_probs - token_log_probs(logits, answers.tokens)).abs()   # (B, R)
    return row(f"{what}: log-probabilities, largest gap to the forward", "nats",
               [gaps.max().item()], note=f"mean {gaps.mean().item():.1e}")


class Step:
    """Our step of distillation, taken by calling it; `parts` are what the last one trained on."""

    def __init__(self, name, args):
        self.student, self.task, self.problems = build(name, args)
        self.teacher = build(name, args, seed=1)[0].requires_grad_(False)
        self.shape = shape_of(name, args)
        self.config = train.Config(device=args.device, micro_batch_size=self.shape.micro)
        self.optimizers = train.make_optimizers(self.config, self.student)
        self.generator = torch.Generator(args.device).manual_seed(0)
        self.what = f"{name}, {self.shape.rows} x ({self.shape.prompt} + {self.shape.new}) tokens"

    def __call__(self):
        self.student.zero_grad()
        self.parts, _ = train.opd_step(self.config, self.task, self.student, self.teacher,
                                       self.problems, self.generator)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()


def step(name, args):
    ours = Step(name, args)
    if args.device != "cpu":
        ours()                                                # AdamW's moments are there then
        yield row(f"{ours.what}: peak memory", "GB", [peak_memory(ours, args.device)])
    try:
        yield row(f"{ours.what}: TRL", "s", *between_trl_s_steps(ours, args))
    except ImportError:
        seconds, _ = in_turn(ours, lambda: None, args)
        yield row(ours.what, "s", seconds, note="trl is not installed")


def between_trl_s_steps(ours: Step, args):
    """Seconds of our steps and of TRL's; ours run between theirs, on the same prompts."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer
    shape, pairs = ours.shape, []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            synchronize(args.device)
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            synchronize(args.device)
            seconds = time.perf_counter() - self.start
            pairs.append((seconds_of(ours, args.device), seconds))

    with tempfile.TemporaryDirectory() as directory, redirect_stdout(sys.stderr):
        settings = DistillationConfig(
            directory, per_device_train_batch_size=shape.micro, max_steps=args.repeats + 1,
            gradient_accumulation_steps=shape.rows // shape.micro, max_completion_length=shape.new,
            learning_rate=1e-4, beta=1.0, weight_decay=0.0, max_grad_norm=1.0,
            gradient_checkpointing=False, bf16=ours.student.precision is not None,
            use_cpu=args.device == "cpu", shuffle_dataset=False, save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, optim="adamw_torch_fused",
            lr_scheduler_type="constant")
        trainer = DistillationTrainer(
            as_transformers(ours.student), as_transformers(ours.teacher), settings,
            Dataset.from_dict({"prompt": ours.problems * settings.max_steps}),
            processing_class=tokenizer_of(ours.student.config.vocab_size), callbacks=[Clock()])
        trainer.train()
    return zip(*pairs[1:])


def search(name, args):
    ours = Step(name, args)
    judge = train.Judge(train.batch_kl, ours.task, ours.teacher, [])
    effopd = EffOPD(ours.student, judge, accept=lambda new, old: False, num_candidates=1,
                    scope="all")                              # keeps W_t: all searches start alike

    def one_search():
        judge.parts, judge.num_tokens = ours.parts, ours.shape.rows * ours.shape.new
        effopd.step(1)

    step_seconds, search_seconds = in_turn(ours, one_search, args)
    yield row(f"{ours.what}: a step", "s", search_seconds, step_seconds)


def loss(name, args):
    config = GPTConfig(**shape_of(name, args).config)
    N, V, C = 2048, config.vocab_size, config.hidden_size
    if V < 1000:                                              # one chunk holds all
        return
    hidden, target = torch.randn(2, N, C, device=args.device)                    # (N, C)
    head, teacher_head = torch.randn(2, V, C, device=args.device) / C ** 0.5     # (V, C)
    hidden.requires_grad_()
    head.requires_grad_()

    def kl(logits, target):
        return reverse_kl(logits, F.linear(target, teacher_head), num_tokens=N)

    def in_chunks():
        chunked(kl, hidden, head, target).backward()
        hidden.grad = head.grad = None

    def at_once():
        kl(F.linear(hidden, head), target).backward()
        hidden.grad = head.grad = None

    inputs = peak_memory(lambda: None, args.device)
    seconds = in_turn(in_chunks, at_once, args)
    peaks = [peak_memory(f, args.device) - inputs for f in (in_chunks, at_once)]
    what = f"{name}, {N} positions, V = {V:,}, C = {C}: all at once"
    yield row(f"{what}, time", "s", *seconds)
    yield row(f"{what}, memory", "GB", peaks[:1], peaks[1:])


def default(name, args):
    """Once, whatever --repeats: in a process of its own, its imports included."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "train.py", "--device", args.device, "--out_dir",
                   f"{directory}/run", "--cache_dir", f"{directory}/cache"]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        methods = json.loads(Path(directory, "run", "summary.json").read_text())["methods"]
    accuracies = [f"{label} {method['final_accuracy']:.3f}" for label, method in methods.items()]
    yield row("python train.py", "s", [seconds], note="accuracy: " + "; ".join(accuracies))


# ------------------------------------------------------------------------------------------------

PARTS = dict(rollout=rollout, step=step, search=search, default=default, loss=loss)
HEAD = """
| part | against | ours | theirs | unit | ours / theirs | from | to | n | |
|---|---|---|---|---|---|---|---|---|---|"""


def measure(part, name, args) -> list[dict]:
    """The rows of a part. One that failed is a row too: the others are not lost with it."""
    rows = []
    try:
        for found in PARTS[part](name, args):
            rows.append(found)
    except Exception as error:
        rows.append(dict(what=name, note=f"FAILED: {train.first_line(error)}"))
    gc.collect()                                              # what a trainer still holds
    if args.device != "cpu":
        torch.cuda.empty_cache()
    return rows


def show(part, found):
    """A row of a Markdown table."""
    cells = [part]
    for key in ("what", "ours", "theirs", "unit", "ratio", "low", "high", "n", "note"):
        value = found.get(key, "")
        if isinstance(value, float):
            value = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        cells.append(str(value))
    print("|", " | ".join(cells), "|", flush=True)


def chosen(option, names, allowed) -> list[str]:
    for name in names.split(","):
        if name not in allowed:
            sys.exit(f"bench.py: --{option} takes {','.join(allowed)}; got {name!r}")
    return names.split(",")


def main(arguments=None) -> int:
    """0, or 1 if a part failed."""
    parser = argparse.ArgumentParser("bench.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--shapes", default="built-in", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--repeats", type=int, default=5, help="pairs, after one to warm up")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(arguments)
    parts = chosen("only", args.only, PARTS)
    shapes = chosen("shapes", args.shapes, SHAPES)
    if args.device != "cpu":
        torch.set_float32_matmul_precision("high")            # as train.py does
    out = Path("bench.json")
    machine = train.versions()
    failed = False
    results = json.loads(out.read_text()) if out.exists() else {}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(HEAD)
    for part in parts:
        rows = []
        for name in ["train.py"] if part == "default" else shapes:
            for found in measure(part, name, args):
                show(part, found)
                rows.append(found)
                failed |= found["note"].startswith("FAILED")
        results[part] = dict(machine=machine, rows=rows)
        train.write_json(out, results)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
