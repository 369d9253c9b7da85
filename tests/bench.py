"""How fast this code is against what one would use instead: both in one process, in turn, on the same weights.

    python tests/bench.py                                     # rollout, step, search, loss, svd; some 20 minutes
    python tests/bench.py --only rollout,step --model DIR     # a Hugging Face checkpoint too (SmolLM2-135M)
    python tests/bench.py --only default                      # the default job from a cold cache, and where it goes
    python tests/bench.py --only scaling                      # how cost grows: scaling.png
    python tests/bench.py --only rollout,step,loss --device cuda

On a machine that others use too: OMP_NUM_THREADS=1 python tests/bench.py --clock cpu --only rollout,step,loss,svd

A table on the screen and bench.json, to which each part adds its rows. Every row: median of ours, median of theirs, and
the median and range of their ratio, pair by pair, since on a shared machine the seconds wander and the ratio less so.
The part `step` needs trl (pip install trl==1.16.0).
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from types import SimpleNamespace

if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")                # no bars; read when train imports tqdm
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train                                                  # before torch: it sets how OpenMP's threads wait

import torch
import torch.nn.functional as F

from effopd import EffOPD, chunked, reverse_kl, spectral_metrics
from model import GPT, GPTConfig

SMOL = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            max_position_embeddings=8192)                     # SmolLM2-135M, with V = 49,152


# ----------------------------------------------------------------------------------------------------------------
# Measuring.

clock = time.perf_counter                                     # --clock cpu: time.process_time


def seconds_of(f, device="cpu") -> float:
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    start = clock()
    f()
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - start


def in_turn(ours, theirs, repeats, device="cpu"):
    """Seconds of both, in turn, after a warm-up of each."""
    pairs = [(seconds_of(ours, device), seconds_of(theirs, device)) for _ in range(repeats + 1)][1:]
    return [a for a, _ in pairs], [b for _, b in pairs]


def row(what, goal, ours, theirs, unit, ratios, note="") -> dict:
    """A line of the table. ours and theirs: lists, of which the median is shown; ratios: the higher the better."""
    return dict(what=what, goal=goal, ours=median(ours), theirs=median(theirs), unit=unit, ratio=median(ratios),
                low=min(ratios), high=max(ratios), n=len(ratios), note=note)


def built_in(device="cpu") -> GPT:
    """The built-in student's shape. The weights are random: nothing that is timed with it depends on them."""
    torch.manual_seed(0)
    c = train.Config(device=str(device))
    return GPT(GPTConfig(17, c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads)).to(device)


def as_transformers(model: GPT):
    """The same weights in transformers."""
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=model.dtype)
    theirs.generation_config.eos_token_id = None              # no early stop
    return theirs.to(model.device)


def models_of(args):
    """(name, our model, task, batch size, new tokens) of each model asked for. No answer of these tasks ends early."""
    sizes = [(4, 4), (2, 4)] if args.toy else [(128, 48), (8, 64)]
    low = torch.bfloat16 if args.device != "cpu" else torch.float32
    chains = train.Chains(5, 1)
    chains.end, chains.max_response = None, sizes[0][1]
    yield "built-in, 0.3 M", built_in(args.device).to(low), chains, *sizes[0]
    if args.model:
        from transformers import AutoTokenizer
        model = GPT.from_pretrained(args.model, low).to(args.device)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        batch = 64 if args.device != "cpu" else sizes[1][0]
        texts = [f"A train leaves at {i % 9 + 1} and goes {i % 7 + 2}0 miles an hour. How far is it at noon?"
                 for i in range(batch)]
        task = SimpleNamespace(end=None, max_response=sizes[1][1], rollout_batch_size=512, compile=False,
                               tokenizer=tokenizer, problems=lambda n, rng, exclude=(): texts[:n],
                               encode=lambda p: tokenizer(p).input_ids, decode=tokenizer.decode,
                               is_correct=lambda problem, answer: False)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        yield f"{Path(args.model).name}, {size:.0f} M", model, task, batch, sizes[1][1]


# ----------------------------------------------------------------------------------------------------------------
# The parts. Each returns its rows.

def rollout(args):
    """Sampled tokens a second, T = 1, no early stop, against transformers' generate."""
    rows = []
    for name, model, task, batch, new in models_of(args):
        prompts = [task.encode(p) for p in task.problems(batch, train.random.Random(0))]
        theirs = as_transformers(model)
        width = max(map(len, prompts))                        # left padding, where lengths differ
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=args.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=args.device)
        options = dict(max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
        a, b = in_turn(lambda: model.generate(prompts, new),
                       lambda: theirs.generate(ids, attention_mask=mask, **options), args.repeats, args.device)
        goal = "5x" if args.device != "cpu" else "4x" if model.config.hidden_size < 200 else "1.5x"
        rows.append(row(f"{name}: {batch} x {new} tokens", goal, [batch * new / s for s in a],
                        [batch * new / s for s in b], "tokens/s", [y / x for x, y in zip(a, b)]))
    return rows


def step(args):
    """One OPD step (rollout, teacher, full reverse KL, backward, AdamW) against TRL's DistillationTrainer.

    Ours runs between TRL's steps, in its on_step_end. Same prompts, lengths, loss and precision; no checkpointing.
    """
    rows = []
    for name, model, task, batch, new in models_of(args):
        if args.device != "cpu":
            model = model.float()
        torch.manual_seed(1)
        teacher = GPT(model.config).to(args.device).requires_grad_(False)
        config = train.Config(device=args.device, batch_size=batch)
        optimizer, problems = train.make_optimizer(config, model), task.problems(batch, train.random.Random(0))
        generator = torch.Generator(args.device).manual_seed(0)

        def ours():
            train.backward(config, task, model, teacher, problems, generator)
            optimizer.step()
            optimizer.zero_grad()

        try:
            a, b = between_trl_s_steps(ours, model, teacher, task, problems, new, args)
        except ImportError:
            a, b = [seconds_of(ours, args.device) for _ in range(args.repeats + 1)][1:], None
        goal = "2.5x" if model.config.hidden_size < 200 else "1.5x"
        what = f"{name}: {batch} x {new} tokens"
        rows.append(row(what, goal, a, b, "s", [y / x for x, y in zip(a, b)]) if b else
                    row(what, goal, a, [float("nan")], "s", [float("nan")], "trl is not installed"))
    return rows


def between_trl_s_steps(ours, model, teacher, task, problems, new, args):
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer
    tokenizer = getattr(task, "tokenizer", None) or character_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<never>", "pad_token": "<never>"})         # so no answer ends early
    a, b = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = clock()

        def on_step_end(self, *_, **__):
            if args.device != "cpu":
                torch.cuda.synchronize()
            b.append(clock() - self.start)
            a.append(seconds_of(ours, args.device))

    with tempfile.TemporaryDirectory() as directory:
        settings = DistillationConfig(
            directory, per_device_train_batch_size=len(problems), max_steps=args.repeats + 1, learning_rate=1e-4,
            max_completion_length=new, beta=1.0, temperature=1.0, weight_decay=0.0, max_grad_norm=1.0, bf16=False,
            gradient_checkpointing=False, use_cpu=args.device == "cpu", shuffle_dataset=False, save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, optim="adamw_torch_fused",
            lr_scheduler_type="constant")
        dataset = Dataset.from_dict({"prompt": problems * (args.repeats + 1)})
        DistillationTrainer(as_transformers(model), as_transformers(teacher), settings, dataset,
                            processing_class=tokenizer, callbacks=[Clock()]).train()
    return a[1:], b[1:]


def character_tokenizer():
    """The built-in task's characters, under the same ids, in transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*"0123456789+-*=;#", "<end>"])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def search(args):
    """Seconds of the searches over seconds of a run at the defaults (evaluation aside), a run for each repeat."""
    toy = dict(steps=2, batch_size=4, eval_size=4, dv_size=2, base_steps=2, teacher_steps=2) if args.toy else {}
    rows, goal_kl = [], .20 if args.device == "cpu" else .05
    scores = [("accuracy", "linear", 5, .15), ("batch_kl", "doubling", 8, goal_kl)]
    runs = {score: [] for score, *_ in scores}
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(args.repeats):
            for score, candidates, n, _ in scores:
                config = train.Config(method="effopd", score=score, candidates=candidates, num_candidates=n, seed=seed,
                                      eval_every=10 ** 6, cache_dir=args.cache_dir, device=args.device, **toy)
                task, student, teacher = train.load(config)
                out_dir = Path(directory) / f"{score}-{seed}"
                out_dir.mkdir()
                run = train.distil(config, task, student, teacher, out_dir, score)
                runs[score].append((sum(s["seconds"] for s in run["searches"]), run["seconds"]))
    for score, _, n, goal in scores:
        rows.append(row(f"{score}, {n} candidates: share of a run", f"<= {goal:.0%}", [s for s, _ in runs[score]],
                        [t for _, t in runs[score]], "s", [s / t for s, t in runs[score]], "ratio is the share"))
    return rows


def loss(args):
    """Peak memory and time of the loss over chunks of positions against all logits at once, each in its own process."""
    vocabulary, width = (500, 8) if args.toy else (151_936, 1024)
    positions = 16 if args.toy else args.positions
    needed, free = 4 * vocabulary * positions * 9, free_memory(args.device)
    few = [positions // 8, positions // 4] if needed > 0.8 * free else [positions]
    if 4 * vocabulary * few[-1] * 9 > 0.8 * free:
        raise ValueError(f"--only loss: {few[-1]} positions need {4 * vocabulary * few[-1] * 9 / 1e9:.0f} GB, and "
                         f"{free / 1e9:.0f} GB are free; choose fewer --positions")
    measured = {}
    for n in dict.fromkeys((*few, positions)):
        for i in range(args.repeats if n == few[-1] else 1):
            for form in ("chunked", "whole") if n in few else ("chunked",):
                code = (f"import bench, time; bench.clock = time.{clock.__name__}; "
                        f"bench.measure_loss({form!r}, {n}, {vocabulary}, {width}, {args.device!r})")
                out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True,
                                     capture_output=True, text=True).stdout
                measured.setdefault((form, n), []).append(json.loads(out.splitlines()[-1]))
    memory = {key: median(m["memory"] for m in runs) / 2 ** 30 for key, runs in measured.items()}
    whole = memory.get(("whole", positions))
    if whole is None:                                         # linear in the positions, from two points
        small, large = (memory["whole", n] for n in few)
        whole = large + (large - small) / (few[1] - few[0]) * (positions - few[1])
    shape = f"V = {vocabulary:,}, C = {width}"
    times = [[m["seconds"] for m in measured[form, few[-1]]] for form in ("chunked", "whole")]
    return [row(f"memory, {positions} positions, {shape}", "1/8", [memory["chunked", positions]], [whole], "GB",
                [whole / memory["chunked", positions]], "" if few == [positions] else
                f"the whole form extrapolated from {few[0]} and {few[1]} positions"),
            row(f"time, {few[-1]} positions, {shape}", "<= 1.2x", *times, "s", [a / b for a, b in zip(*times)],
                "ratio is ours / theirs")]


def measure_loss(form, positions, vocabulary, width, device):
    """Prints the seconds of a reverse KL and its gradients, and the bytes at their peak beyond the inputs."""
    torch.manual_seed(0)
    hidden, target = (torch.randn(positions, width, device=device) for _ in range(2))      # (N, C)
    head, teacher_head = (torch.randn(vocabulary, width, device=device) * width ** -0.5 for _ in range(2))
    hidden.requires_grad_(), head.requires_grad_()

    def kl(logits, target):
        return reverse_kl(logits, F.linear(target, teacher_head), torch.ones(len(target), device=device), positions)

    def run(hidden, target):
        (chunked(kl, hidden, head, target) if form == "chunked" else kl(F.linear(hidden, head), target)).backward()

    run(hidden[:1], target[:1])                               # warm-up
    hidden.grad = head.grad = None
    before = memory_now(device)
    seconds = seconds_of(lambda: run(hidden, target), device)
    print(json.dumps(dict(seconds=seconds, memory=memory_now(device, peak=True) - before)))


def memory_now(device, peak=False) -> int:
    """Bytes in use, or at most in use since the last call without peak."""
    if device != "cpu":
        if not peak:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if not peak:
        with suppress(OSError):                               # not allowed in some containers
            Path("/proc/self/clear_refs").write_text("5")     # forget the peak so far
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def free_memory(device) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    info = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(info["MemAvailable"].split()[0]) * 1024


def svd(args):
    """The metrics of every matrix of SmolLM2-135M against those from torch.linalg.svd, a layer for each repeat.

    Every other layer's updates are Gaussian; the rest have rank 16 and a thousandth of noise.
    """
    shapes = [(6, 6), (2, 6), (6, 16)] if args.toy else [
        (576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    torch.manual_seed(0)
    times, difference = ([], [], []), 0.0                     # ours, ours with a matrix on each core, SVD
    threads = torch.get_num_threads()
    for layer in range(3 if args.toy else 31):                # the first is the warm-up
        deltas = [torch.randn(shape) for shape in shapes]
        if layer % 2:
            deltas = [torch.randn(m, 16) @ torch.randn(16, n) + 1e-3 * d for d in deltas for m, n in [d.shape]]
        ours, theirs = [], []
        times[0].append(seconds_of(lambda: ours.extend(map(spectral_metrics, deltas))))
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            times[1].append(seconds_of(lambda: list(pool.map(spectral_metrics, deltas))))
        torch.set_num_threads(threads)                        # some of it is one setting for the whole process
        times[2].append(seconds_of(lambda: theirs.extend(
            spectral_metrics(torch.linalg.svd(d, full_matrices=False).S) for d in deltas)))
        difference = max(difference, *(abs(x[key] / y[key] - 1) for x, y in zip(ours, theirs) for key in x))
    what = f"{sum(m * n for m, n in shapes) * 30 / 1e6:.0f} M in 30 layers, s a layer"
    return [row(what + how, "3x", own[1:], times[2][1:], "s", [y / x for x, y in zip(own[1:], times[2][1:])], note)
            for how, own, note in [("", times[0], f"largest relative difference {difference:.0e}"),
                                   (f", {threads} at a time", times[1], "")]]


def default(args):
    """`python train.py` from a cold cache, and the seconds of its parts."""
    spent = {}

    def clocked(owner, name, label):
        original = getattr(owner, name)

        def timed(*positional, **named):
            start = clock()
            result = original(*positional, **named)
            spent[label] = spent.get(label, 0.0) + clock() - start
            return result
        setattr(owner, name, timed)
        return owner, name, original

    with tempfile.TemporaryDirectory() as directory:
        originals = [clocked(*which) for which in [
            (train, "make_base_and_teacher", "base and teacher"), (train, "evaluate", "evaluation"),
            (train, "backward", "OPD steps"), (EffOPD, "step", "searches"), (train, "save_state", "files"),
            (train, "save_checkpoint", "files"), (train, "draw_race", "picture")]]
        start = clock()
        try:
            toy = "--steps 2 --batch_size 4 --eval_size 4 --base_steps 2 --teacher_steps 2".split()
            train.main(["--out_dir", f"{directory}/run", "--cache_dir", f"{directory}/cache", "--device", args.device,
                        *(toy if args.toy else [])])
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)
        total = clock() - start
    spent["rest"] = total - sum(spent.values())
    profile = ", ".join(f"{label} {s:.0f} s" for label, s in sorted(spent.items(), key=lambda item: -item[1]))
    return [row("the default job, cold cache", "<= 300 s", [total], [300.0], "s", [300 / total], profile)]


# ----------------------------------------------------------------------------------------------------------------
# How cost grows, and the two bounds that explain it: arithmetic / (peak of a matrix product), bytes / bandwidth.

def scaling(args):
    """Tokens a second against batch and context, a step against the model's size; scaling.png beside --out."""
    sizes = {"0.3 M": (17, {}), "2 M": (17, dict(hidden_size=192, intermediate_size=512, num_hidden_layers=5)),
             "11 M": (17, dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=6)),
             "38 M": (17, dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=12)),
             "135 M": (49_152, SMOL)}
    points, peak = [], peak_arithmetic(args.device)
    for name, (vocabulary, shape) in list(sizes.items())[:1 if args.toy else None]:
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocabulary, **{"max_position_embeddings": 4096, **shape})).to(args.device)
        c, P = model.config, sum(p.numel() for p in model.parameters())

        def decoding(batch, context):
            """Operations and bytes of one new token for each row."""
            return (batch * (2 * P + 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * context),
                    4 * (P + batch * context * c.num_hidden_layers * 2 * c.num_key_value_heads * c.head_dim))

        def add(kind, batch, context, seconds, operations, moved, at_once=None):
            speed = bandwidth(at_once or moved, args.device)  # of the cache, where all of it fits into that
            points.append(dict(kind=kind, model=name, batch=batch, context=context, parameters=P, seconds=seconds,
                               arithmetic=operations / peak, bandwidth=moved / speed))

        if name in ("0.3 M", "135 M"):
            new, few = (24, 8) if name == "0.3 M" else (8, 1)
            for batch in (1, 2) if args.toy else [2 ** i for i in range(10 if name == "0.3 M" else 8)]:
                add("batch", batch, 64, decoding_seconds(model, batch, 64, new), *decoding(batch, 64))
            for context in (8, 16) if args.toy else (64, 128, 256, 512, 1024, 2048):
                add("context", few, context, decoding_seconds(model, few, context, new), *decoding(few, context))

        batch, new = (2, 4) if args.toy else (8, 64)
        task, config = train.Chains(5, 1), train.Config(batch_size=batch, device=args.device)
        task.end, task.max_response, task.decode = None, new, lambda tokens: ""
        problems, optimizer = task.problems(batch, train.random.Random(0)), train.make_optimizer(config, model)
        teacher = copy.deepcopy(model).requires_grad_(False)

        def one_step():
            train.backward(config, task, model, teacher, problems, None)
            optimizer.step()
            optimizer.zero_grad()

        seconds = median([seconds_of(one_step, args.device) for _ in range(args.repeats + 1)][1:])
        each, rows = [decoding(batch, 12 + n) for n in range(new)], batch * (12 + new)
        add("step", batch, 12 + new, seconds, sum(o for o, _ in each) + (2 + 6) * P * rows,  # teacher: 1 pass, we: 3
            sum(b for _, b in each) + 4 * P * (1 + 3 + 7), each[-1][1])    # AdamW reads 4 numbers a weight, writes 3
        print(f"{name}: a step of {batch} x {new} tokens {seconds:.2f} s", file=sys.stderr)
    draw_scaling(points, peak, Path(args.out).with_name("scaling.png"))
    return points


def peak_arithmetic(device) -> float:
    """Operations a second of a large matrix product."""
    n = 1024 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device)
    return 2 * n ** 3 / min(seconds_of(lambda: a @ a, device) for _ in range(6))


def bandwidth(size, device) -> float:
    """Bytes a second at which a block of so many bytes is read, again and again."""
    block = torch.zeros(size // 4, device=device)
    return size / min(seconds_of(block.sum, device) for _ in range(30))


def decoding_seconds(model, batch, context, new) -> float:
    """Seconds of one step of decoding with so many tokens in the cache; the prompt's own pass is not in it."""
    ticks = []

    def tick(*_):
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        ticks.append(clock())

    hook = model.model.register_forward_pre_hook(tick)
    model.generate([[i % 17 for i in range(context)]] * batch, new + 2)
    hook.remove()
    return median(after - before for before, after in zip(ticks[1:], ticks[2:]))


def draw_scaling(points, peak, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, kind, x in zip(axes, ("batch", "context", "step"), ("batch", "context", "parameters")):
        rows = [p for p in points if p["kind"] == kind]
        for i, model in enumerate(["all"] if kind == "step" else dict.fromkeys(p["model"] for p in rows)):
            own = [p for p in rows if kind == "step" or p["model"] == model]
            for what, style in (("seconds", "o-"), ("arithmetic", "--"), ("bandwidth", ":")):
                y = [p[what] if kind == "step" else p["batch"] / p[what] for p in own]
                axis.plot([p[x] for p in own], y, style, color="k" if kind == "step" else f"C{i}",
                          label=model if (what, kind) == ("seconds", "batch") else None)
        axis.set(xscale="log", yscale="log", ylabel="seconds a step" if kind == "step" else "sampled tokens a second",
                 xlabel={"batch": "batch, context of 64 tokens",
                         "context": "context in tokens, batch 8 (0.3 M) or 1 (135 M)",
                         "step": f"parameters, {rows[0]['batch']} answers of {rows[0]['context'] - 12} tokens"}[kind])
        axis.grid(alpha=0.3)
    axes[0].plot([], [], "k--", label=f"arithmetic, {peak / 1e9:.0f} GFlop/s")
    axes[0].plot([], [], "k:", label="bandwidth")
    figure.legend(loc="outside right upper")
    figure.suptitle("How cost grows (dots), and the bounds that arithmetic and bandwidth set (lines)")
    figure.savefig(path, dpi=120)


# ----------------------------------------------------------------------------------------------------------------

PARTS = dict(rollout=rollout, step=step, search=search, loss=loss, svd=svd, default=default, scaling=scaling)


def show(rows, head):
    print(f"\n{head}\n\n{'':58}{'ours':>10}{'theirs':>10}  {'':9}{'ratio':>7}  {'range':15}{'n':>3}  goal")
    for part, r in rows:
        print(f"{part + ': ' + r['what']:58}{r['ours']:10.4g}{r['theirs']:10.4g}  {r['unit']:9}{r['ratio']:7.2f}  "
              f"{r['low']:.2f} to {r['high']:<8.2f}{r['n']:3}  {r['goal']}")
        if r["note"]:
            print("    " + r["note"])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage="python tests/bench.py [--only PARTS]")
    parser.add_argument("--only", default="rollout,step,search,loss,svd", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--model", default="", help="a Hugging Face checkpoint, beside the built-in student")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: the process's own "
                        "seconds, for a machine that others use too, with OMP_NUM_THREADS=1; not for search")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements, after one to warm up")
    parser.add_argument("--positions", type=int, default=4096, help="of the loss")
    parser.add_argument("--cache_dir", default="cache", help="train.py's, with base and teacher for the searches")
    parser.add_argument("--out", default="bench.json", help="what it holds of other parts is kept")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: to see that the benchmark runs")
    args = parser.parse_args(arguments)
    wrong = [part for part in args.only.split(",") if part not in PARTS]
    if wrong:
        parser.error(f"--only takes {', '.join(PARTS)}, separated by commas; got {wrong[0]!r}")
    if args.repeats < 1:
        parser.error("--repeats must be 1 or more")
    global clock
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    machine, out = train.versions(args.device) | {"clock": args.clock}, Path(args.out)
    results, rows = json.loads(out.read_text()) if out.exists() else {}, []
    for part in args.only.split(","):
        try:
            found = PARTS[part](args)
        except (ValueError, OSError) as error:                # OSError: no /proc to read the memory from, for one
            sys.exit(f"bench.py: {error}")
        results[part] = dict(machine=machine, rows=found)
        rows += [(part, r) for r in found if part != "scaling"]
        out.write_text(json.dumps(results, indent=1))
    show(rows, ", ".join(f"{name} {value}" for name, value in machine.items()))
    return rows


if __name__ == "__main__":
    main()
