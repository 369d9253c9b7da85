"""How fast this code is beside what one would use instead, on the same weights, in turn.

    python -m extras.bench                                    # all parts, the built-in shape
    python -m extras.bench --only rollout,step --shapes built-in,135m --smollm2 DIR
    python -m extras.bench --device cuda --shapes built-in,25m,135m,0.6b

    rollout    sampling against transformers' generate; how far the decoder's log-probabilities are
               from the whole forward's. On CUDA also against the same step without a graph, and
               against the memory's bandwidth
    step       a step of distillation (rollout, teacher, full reverse KL, AdamW) against TRL's
               DistillationTrainer, where trl is installed
    search     a search by batch KL with two scores against a step
    loss       the loss with its gradient, in chunks against all logits at once
    svd        the singular values of one layer's update against torch.linalg.svd
    default    `python train.py` from an empty cache

Prints a table and writes it to bench.json, where the rows of other parts stay. Seconds wander on a
machine that others use; the ratios, taken pair by pair, less so: above 1 we are better in tokens a
second, below 1 in seconds and memory. Weights and prompts are random, but for --smollm2's weights.
"""

import argparse
import copy
import gc
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import NamedTuple

os.environ.setdefault("TQDM_DISABLE", "1")                    # read when train imports tqdm
import train                                                  # before torch, see there

import torch
import torch.nn.functional as F

from effopd import EffOPD, chunked, reverse_kl, singular_values, token_log_probs
from model import GPT, GPTConfig, config_to_hf

ROOT = Path(__file__).resolve().parents[1]
TOY_JOB = ("--num_ops 1 --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --steps 2 "
           "--base_steps 5 --teacher_steps 5 --batch_size 4 --eval_size 5 --dv_size 2")


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
    shape = SHAPES["135m" if name == "smollm2" else name]
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
    """A task for `train`: random prompts of one length, answers without end."""

    def __init__(self, shape: Shape, vocab_size: int):
        self.prompt, self.vocab_size, self.max_response = shape.prompt, vocab_size, shape.new
        self.end, self.rollout_batch_size = None, shape.rows

    def problems(self, n, rng) -> list[str]:
        tokens = range(self.vocab_size)
        return [self.decode(rng.choices(tokens, k=self.prompt)) for _ in range(n)]

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
    if name == "smollm2":
        model = GPT.from_pretrained(args.smollm2).to(args.device)
    else:
        with torch.device(args.device):
            model = GPT(GPTConfig(**shape.config))
    model.precision = torch.bfloat16 if shape.mixed else None
    task = Words(shape, model.config.vocab_size)
    return model, task, task.problems(shape.rows, train.random.Random(0))


def as_transformers(model: GPT, dtype=torch.float32):
    """The same weights in transformers, on the same device; no answer ends early."""
    from transformers import AutoModelForCausalLM
    config = model.hf_config or config_to_hf(model.config)
    with torch.device(model.device):
        theirs = AutoModelForCausalLM.from_config(config, dtype=dtype)
    theirs.load_state_dict(model.state_dict())
    theirs.generation_config.eos_token_id = None
    return theirs


# ------------------------------------------------------------------------------------------------
# The parts. Each yields its rows for one shape.

def rollout(name, args):
    model, task, problems = build(name, args)
    prompts, new = [task.encode(problem) for problem in problems], task.max_response
    theirs = as_transformers(model, model.dtype)
    ids = torch.tensor(prompts, device=args.device)                              # (B, P)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=True,
                   temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    what, tokens = f"{name}, {len(prompts)} x {new} tokens", len(prompts) * new

    def compare(what, theirs):
        seconds = in_turn(lambda: model.generate(prompts, new), theirs, args)
        return row(what, "tokens/s", *([tokens / s for s in both] for both in seconds))

    yield compare(f"{what}: transformers", lambda: theirs.generate(ids, **options))
    if args.device != "cpu":
        yield from on_cuda(model, prompts, new, what, args)
    for precision in (None, torch.bfloat16):
        own = copy.deepcopy(model)
        own.precision = precision
        yield gap(own, prompts[:8], new, f"{name}, {str(own.dtype).removeprefix('torch.')}")


def on_cuda(model, prompts, new, what, args):
    """The decoder's graph against the same step without it, and against reading the weights."""
    decoder, = model.decoders.values()
    graph = decoder.graph

    def generate(graph):
        decoder.graph = graph
        model.generate(prompts, new)

    with_graph, without = in_turn(lambda: generate(graph), lambda: generate(None), args)
    yield row(f"{what}: without the graph", "s", with_graph, without)
    weights = sum(p.numel() for p in model.parameters()) * model.dtype.itemsize / 1e9   # GB
    block = torch.zeros(2 ** 28, device=args.device)                                    # 1.07 GB
    fastest = min(seconds_of(block.sum, args.device) for _ in range(10))
    yield row(f"{what}: bandwidth, weights read once a token", "GB/s",
              [weights * new / s for s in with_graph],
              [block.nbytes / 1e9 / fastest] * args.repeats)


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
        ours()
        memory(args.device)                                   # a new peak begins
        ours()
        yield row(f"{ours.what}: peak memory", "GB", [memory(args.device, peak=True) / 1e9])
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
            processing_class=tokenizer_of(ours.task), callbacks=[Clock()])
        trainer.train()
    return zip(*pairs[1:])


def tokenizer_of(task: Words):
    """The words under their ids in transformers, and one more for an end that never comes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({str(i): i for i in range(task.vocab_size)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<never>", pad_token="<never>")


def search(name, args):
    ours = Step(name, args)
    judge = train.Judge(train.batch_kl, ours.task, ours.teacher, [])

    def two_scores(score_at, improves, last):
        score_at(0)
        score_at(2)
        return 0                                              # W_t: all searches start alike

    effopd = EffOPD(ours.student, judge, candidates=two_scores, scope="all", every=1)
    steps = itertools.count(1)

    def one_search():
        judge.parts, judge.num_tokens = ours.parts, ours.shape.rows * ours.shape.new
        effopd.step(next(steps))

    step_seconds, search_seconds = in_turn(ours, one_search, args)
    yield row(f"{ours.what}: a step", "s", search_seconds, step_seconds)


def loss(name, args):
    """Nothing for a vocabulary so small that one chunk holds all."""
    config = GPTConfig(**shape_of(name, args).config)
    sizes = (2048, config.vocab_size, config.hidden_size)
    if sizes[0] * sizes[1] <= 2 ** 25:
        return
    costs = []
    for form in ("chunked", "whole"):
        if args.device == "cpu":                              # where a process has but one peak
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                costs.append(process.submit(loss_cost, form, *sizes, args).result())
        else:
            costs.append(loss_cost(form, *sizes, args))
    what = "{} positions, V = {:,}, C = {}: all at once".format(*sizes)
    (seconds, peak), (whole_seconds, whole_peak) = costs
    yield row(f"{what}, memory", "GB", [peak], [whole_peak])
    yield row(f"{what}, time", "s", seconds, whole_seconds)


def loss_cost(form, positions, vocab_size, hidden_size, args):
    """Seconds of a reverse KL with its gradients, and the GB at their peak beyond the inputs."""
    hidden, target = torch.randn(2, positions, hidden_size, device=args.device)  # (N, C)
    heads = torch.randn(2, vocab_size, hidden_size, device=args.device) / hidden_size ** 0.5
    head, teacher_head = heads                                                   # (V, C)
    hidden.requires_grad_()
    head.requires_grad_()

    def kl(logits, target):
        return reverse_kl(logits, F.linear(target, teacher_head), num_tokens=positions)

    def run(n=positions):
        hidden.grad = head.grad = None
        if form == "chunked":
            chunked(kl, hidden[:n], head, target[:n]).backward()
        else:
            kl(F.linear(hidden[:n], head), target[:n]).backward()

    run(1)                                                    # warm up
    before = memory(args.device)
    run()
    extra = memory(args.device, peak=True) - before
    return [seconds_of(run, args.device) for _ in range(args.repeats)], extra / 1e9


def memory(device, peak=False) -> int:
    """Bytes in use, or at most in use (on CUDA: since the last call without peak)."""
    if device == "cpu":
        lines = Path("/proc/self/status").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines)["VmHWM" if peak else "VmRSS"]
        return 1024 * int(found.split()[0])
    if not peak:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def svd(name, args):
    matrices = [p for p in build(name, args)[0].model.layers[0].parameters() if p.ndim == 2]
    decays = [torch.logspace(0, -3, p.shape[1], device=args.device) for p in matrices]
    updates = [torch.randn_like(p) * decay for p, decay in zip(matrices, decays)]
    seconds = in_turn(lambda: [singular_values(update) for update in updates],
                      lambda: [torch.linalg.svd(update, full_matrices=False) for update in updates],
                      args)
    yield row(f"{name}, {len(updates)} matrices: torch.linalg.svd", "s", *seconds)


def default(name, args):
    """Once, whatever --repeats: in a process of its own, its imports included."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "train.py", "--device", args.device, "--out_dir",
                   f"{directory}/run", "--cache_dir", f"{directory}/cache"]
        start = time.perf_counter()
        subprocess.run(command + TOY_JOB.split() * args.toy, cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        methods = json.loads(Path(directory, "run", "summary.json").read_text())["methods"]
    accuracies = [f"{label} {method['final_accuracy']:.3f}" for label, method in methods.items()]
    yield row("python train.py", "s", [seconds], note="accuracy: " + "; ".join(accuracies))


# ------------------------------------------------------------------------------------------------

PARTS = dict(rollout=rollout, step=step, search=search, default=default, loss=loss, svd=svd)


def measure(part, name, args) -> list[dict]:
    """The rows of a part. One that failed is a row too: the others are not lost with it."""
    rows = []
    try:
        for found in PARTS[part](name, args):
            rows.append(found)
    except Exception as error:
        rows.append(dict(what=name, failed=train.first_line(error)))
    gc.collect()
    if args.device != "cpu":
        torch.cuda.empty_cache()
    return rows


HEAD = """\
| part | against | ours | theirs | unit | ours / theirs | from | to | n | |
|---|---|---|---|---|---|---|---|---|---|"""


def show(part, found):
    """A row of a Markdown table."""
    cells = [part]
    for key in ("what", "ours", "theirs", "unit", "ratio", "low", "high", "n", "note"):
        value = found.get(key, "")
        if isinstance(value, float):
            value = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        cells.append(str(value))
    cells[-1] += f"FAILED: {found['failed']}" if "failed" in found else ""
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
    parser.add_argument("--smollm2", default="", help="directory of the checkpoint, one more shape")
    parser.add_argument("--repeats", type=int, default=5, help="pairs, after one to warm up")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args(arguments)
    parts = chosen("only", args.only, PARTS)
    shapes = ["toy"] if args.toy else chosen("shapes", args.shapes, SHAPES)
    shapes += ["smollm2"] if args.smollm2 else []
    args.repeats = max(args.repeats, 1)
    if args.device != "cpu":
        torch.set_float32_matmul_precision("high")            # as train.py does
    machine, out, failed = train.versions(), Path("bench.json"), False
    results = json.loads(out.read_text()) if out.exists() else {}
    print(", ".join(f"{name} {value}" for name, value in machine.items()), HEAD, sep="\n\n")
    for part in parts:
        rows = []
        for name in shapes if part != "default" else ["train.py"]:
            for found in measure(part, name, args):
                show(part, found)
                rows.append(found)
                failed |= "failed" in found
        results[part] = dict(machine=machine, rows=rows)
        train.write_json(out, results)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
