"""See the foresight: where an update goes, how concentrated it is, and when its direction settles.

    python analyze.py                                       # the newest run of each method under runs/
    python analyze.py runs/opd-s0 runs/opd-s1 runs/rl-s0    # these; runs of one method are seeds: mean, 95% interval
    python analyze.py --base DIR --checkpoints DIR1 DIR2    # any Hugging Face checkpoints, from their weights alone

Nine questions of "Learning to Foresee" (arXiv:2605.11739, sections 3 and 4), a figure each in analysis/, all numbers in
analysis/analysis.json, and a line each on the screen: what the paper says, what these runs say. With ΔW_t = W_t - W_0
and T the last step, "matrices" being the two-dimensional weights inside the blocks (attention and MLP):

    1 accuracy of W_0 + αΔW_T                              6 alignment of ΔW_t with ΔW_T over training
    2 ||ΔW_T||² by layer and module                        7 leading and trailing singular directions only
    3 utility of a window of layers                        8 an early ΔW_t, scaled to the final norm
    4 the base's embeddings put back                       9 the paths, in their two principal components
    5 spectra of ΔW_T

What the paper leaves out and stands beside it here: a Gaussian matrix of the same shape and norm (5, 7), a random walk
(6, 9), the rest of the way cos(ΔW_t, W_T - W_t) (6), and comparisons at equal accuracy and equal norm (1, 2, 4, 5, 7),
since methods stop at different places. Weights alone answer 2, the cosine of 4, 5, 6 and 9.

In the shapes below: N checkpoints, of all runs together, r = min(m, n) singular values of a matrix (m, n).
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tqdm import tqdm

from effopd import basis_alignment, module_of, reverse_kl, spectral_metrics
from model import GPT
from train import Chains, Config, evaluate, evaluation_problems, make_models, pack, pick_device, write_json

KS = range(1, 21)                                            # alignment: the paper averages over these
ALPHAS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)                      # 1: fractions of the update
PERCENTS = (1, 5, 10, 25, 50, 100)                           # 7: of the singular directions
BETAS = (0.0, 0.4, 0.8, 1.0, 1.2, 1.6)                       # 8: 0 the early update, 1 the final norm
BLOCK = 2 ** 24                                              # numbers read at a time: some 300 MB
METRICS = ("spectral_norm", "spectral_ratio", "effective_rank", "stable_rank", "top1_ratio")
MODULES = ("q", "k", "v", "o", "gate", "up", "down", "norm")


# ----------------------------------------------------------------------------------------------------------------
# Reading.

class Checkpoint:
    """A Hugging Face checkpoint on disk, in one file or several: a tensor's rows are read when they are asked for."""

    def __init__(self, directory):
        self.directory, self.slices = Path(directory), {}
        if not self.directory.is_dir():
            raise ValueError(f"there is no directory {directory}")
        for file in sorted(self.directory.glob("model*.safetensors")):
            f = safe_open(file, framework="pt")              # maps the file, reads nothing yet
            self.slices |= {name: f.get_slice(name) for name in f.keys()}
        if not self.slices:
            raise ValueError(f"{directory} holds no model*.safetensors: not a Hugging Face checkpoint")
        config = self.directory / "config.json"
        if config.is_file() and json.loads(config.read_text()).get("tie_word_embeddings"):
            self.slices.pop("lm_head.weight", None)          # one entry per storage: the embedding is the head
        self.slices = {name: s for name, s in self.slices.items() if s.get_dtype()[0] in "FB" and s.get_shape()}
        self.half = any(s.get_dtype() in ("BF16", "F16") for s in self.slices.values())

    def shape(self, name):
        return tuple(self.slices[name].get_shape())

    def read(self, name, start=0, stop=None):
        """Rows start .. stop - 1 of a tensor, in float32."""
        return self.slices[name][start:stop].float()


class Trajectory(NamedTuple):
    """One run: its checkpoints, the base left out, are points first .. first + len(steps) - 1 of the analysis."""
    label: str                 # the method; runs with one label are seeds of each other
    directory: Path
    steps: tuple[int, ...]
    first: int

    @property
    def points(self):
        return range(self.first, self.first + len(self.steps))

    @property
    def last(self):
        return self.points[-1]


def read_config(directory: Path) -> Config:
    stored = json.loads((directory / "config.json").read_text())
    return Config(**{f.name: stored[f.name] for f in fields(Config) if f.name in stored} | {"device": "cpu"})


def expand(directory: Path) -> list[Path]:
    """A run's directory, or those inside a race's. ValueError if it is neither or the run did not finish."""
    if not directory.is_dir():
        raise ValueError(f"there is no directory {directory}")
    runs = [directory] if (directory / "config.json").is_file() else sorted(p.parent for p in directory.glob("*/config.json"))
    unfinished = [run for run in runs if not (run / "checkpoints" / "final").is_dir()]
    if not runs or unfinished:
        raise ValueError(f"{(unfinished or [directory])[0]} holds no finished run (config.json and checkpoints/final)")
    return runs


def method_of(config) -> str:
    name = {"opd": "OPD", "effopd": "EffOPD", "rl": "RL", "sft": "SFT"}[config.method]
    return name + (f" {config.score}" if config.method == "effopd" and config.score != "accuracy" else "")


def newest_runs(home=Path("runs")) -> list[Path]:
    """The newest finished run of each method under runs/; says what is missing and how to make it."""
    found = [p.parents[1] for p in (*home.glob("*/checkpoints/final"), *home.glob("race*/*/checkpoints/final"))]
    found.sort(key=lambda run: (run / "checkpoints" / "final").stat().st_mtime)
    if not found:
        raise ValueError(f"no finished run under {home}/; python train.py --method opd makes one")
    newest = {method_of(read_config(run)): run for run in found if same_base(run, found[-1])}
    for method, options in [("OPD", ""), ("EffOPD", ""), ("RL", " --lr 3e-4"), ("SFT", "")]:
        if method not in newest:
            print(f"no {method} run from this base under {home}/; to have one: "
                  f"python train.py --method {method.lower()}{options}")
    return list(newest.values())


def same_base(*runs) -> bool:
    return len({(run / "checkpoints" / "step_000000" / "model.safetensors").read_bytes() for run in runs}) == 1


def load_runs(directories):
    """-> base Checkpoint, Checkpoints of all points, Trajectories, methods in the order of the paper, OPD's config."""
    configs = {run: read_config(run) for directory in directories for run in expand(Path(directory))}
    for run in configs:
        if not same_base(run, next(iter(configs))):
            raise ValueError(f"{run} and {next(iter(configs))} start from different weights: not comparable")
    settings = defaultdict(set)                              # runs that differ in these are no seeds of each other
    for c in configs.values():
        settings[method_of(c)].add((c.lr, c.steps))
    trajectories, points = [], []
    order = ["OPD", "EffOPD", "EffOPD batch_kl", "EffOPD rollout_kl", "RL", "SFT"]
    for run, c in sorted(configs.items(), key=lambda item: (order.index(method_of(item[1])), item[1].lr)):
        label = method_of(c) + (f", lr {c.lr:g}, {c.steps} steps" if len(settings[method_of(c)]) > 1 else "")
        steps = sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step_??????"))
        steps = [step for step in steps if 0 < step < c.steps]
        trajectories.append(Trajectory(label, run, (*steps, c.steps), len(points)))
        points += [Checkpoint(run / "checkpoints" / f"step_{step:06d}") for step in steps]
        points.append(Checkpoint(run / "checkpoints" / "final"))
    config = next(iter(configs.values()))
    return Checkpoint(run / "checkpoints" / "step_000000"), points, trajectories, config


# ----------------------------------------------------------------------------------------------------------------
# From the weights alone, one tensor at a time.

class Weights(NamedTuple):
    gram: dict                 # name: (N, N) float64, <ΔW_i, ΔW_j>; norms, cosines and PCA all come from it
    svd: dict                  # matrix name: [(U (m, k), σ (r,), Vᵀ (k, n)) a point], k = 20 (whole where asked for)
    embedding_cosine: list     # a point: mean cosine between base and trained embedding rows, of rows that moved
    shape: dict                # name: shape


def read_weights(base: Checkpoint, points: list[Checkpoint], whole=()) -> Weights:
    """One pass over all tensors; memory for two matrices and an SVD, or 300 MB. whole: points whose SVD is kept whole.

    ValueError where a checkpoint's tensors or shapes are not the base's.
    """
    for point in points:
        for name in sorted(base.slices.keys() | point.slices.keys()):
            shapes = [c.shape(name) if name in c.slices else None for c in (base, point)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{name} is {shapes[0] or 'missing'} in {base.directory} and {shapes[1] or 'missing'} "
                                 f"in {point.directory}")
    if base.half or any(point.half for point in points):
        print("warning: these checkpoints are in half precision: where updates are small, ΔW is mostly rounding; "
              "analyse float32 checkpoints", file=sys.stderr)
    N = len(points)
    weights = Weights({}, {}, None, {name: base.shape(name) for name in base.slices})
    cosine_sum, rows_moved = torch.zeros(N, dtype=torch.float64), torch.zeros(N)
    for name, shape in tqdm(weights.shape.items(), desc="weights", unit="tensor", dynamic_ncols=True):
        gram = torch.zeros(N, N, dtype=torch.float64)
        height = max(1, BLOCK // N // math.prod(shape[1:]))
        for start in range(0, shape[0], height):
            w_0 = base.read(name, start, start + height)
            deltas = torch.stack([c.read(name, start, start + height) - w_0 for c in points])       # (N, rows, ...)
            if module_of(name)[1] == "embedding":
                moved = (deltas != 0).any(-1)                                    # (N, rows): tokens in use
                cosine_sum += (F.cosine_similarity(w_0 + deltas, w_0[None], dim=-1).double() * moved).sum(1)
                rows_moved += moved.sum(1)
            deltas = deltas.flatten(1).double()
            gram += deltas @ deltas.T
        weights.gram[name] = gram
        if is_matrix(name, shape):
            w_0, weights.svd[name] = base.read(name), []
            for i, point in enumerate(points):
                U, sigma, Vh = torch.linalg.svd(point.read(name) - w_0, full_matrices=False)
                k = len(sigma) if i in whole else max(KS)
                weights.svd[name].append((U[:, :k].clone(), sigma, Vh[:k].clone()))      # clones: the rest is freed
    cosines = (cosine_sum / rows_moved.clamp(min=1)).tolist()
    return weights._replace(embedding_cosine=[c if n else 1.0 for c, n in zip(cosines, rows_moved)])


def is_matrix(name, shape) -> bool:
    return len(shape) == 2 and module_of(name)[0] is not None


def part_of(name) -> str:
    return "attention" if "attn" in name or "attention" in name else "mlp"


def norms(weights, i) -> dict:
    """||ΔW_i||_F by name."""
    return {name: gram[i, i].item() ** 0.5 for name, gram in weights.gram.items()}


def norm(weights, i, names=None) -> float:
    return sum(weights.gram[name][i, i].item() for name in names or weights.gram) ** 0.5


def norm_shares(weights, i) -> dict:
    """2: share of ||ΔW_i||² by "layer module", a sum over the tensors of one kind; sums to 1."""
    total, shares = norm(weights, i) ** 2, defaultdict(float)
    for name, n in norms(weights, i).items():
        layer, module = module_of(name)
        shares[module if layer is None else f"{layer} {module}"] += n * n / total
    return dict(shares)


def gaussian_sigma(shape, seed=0):
    """Singular values (r,) of a Gaussian matrix of Frobenius norm 1: what no structure at all looks like."""
    sigma = torch.linalg.svdvals(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return sigma / sigma.norm()


def spectra(weights, i, gaussian) -> dict:
    """5: every metric's mean and standard deviation over matrices, and the mean for Gaussian ones of equal norm."""
    rows, null = [], []
    for name, svds in weights.svd.items():
        if svds[i][1][0] > 0:                                # a frozen matrix has no spectrum
            rows.append(spectral_metrics(svds[i][1]))
            null.append(spectral_metrics(gaussian[weights.shape[name]] * svds[i][1].norm()))
    return {metric: {"mean": float(np.mean([row[metric] for row in rows])),
                     "sd": float(np.std([row[metric] for row in rows])),
                     "gaussian": float(np.mean([row[metric] for row in null]))} for metric in METRICS}


def alignment(weights, i, j):
    """6: subspace alignment of ΔW_i with ΔW_j at k = 1..20, mean over matrices and both sides: (20,)."""
    rows = []
    for svds in weights.svd.values():
        (U_i, s_i, Vh_i), (U_j, s_j, Vh_j) = svds[i], svds[j]
        if s_i[0] > 0 and s_j[0] > 0:
            rows.append([(basis_alignment(U_i, U_j, k) + basis_alignment(Vh_i.T, Vh_j.T, k)) / 2 for k in KS])
    return np.mean(rows, axis=0)


def walk_alignment(weights, steps, seed=0):
    """6: the same for random walks of as many equal Gaussian steps, in place of training: (len(steps), 20)."""
    rng, by_shape, shapes = torch.Generator().manual_seed(seed), {}, [weights.shape[name] for name in weights.svd]
    for shape in dict.fromkeys(shapes):
        at, svds = torch.zeros(shape), []
        for before, now in zip([0, *steps], steps):
            at += torch.randn(shape, generator=rng) * (now - before) ** 0.5
            svds.append(torch.linalg.svd(at, full_matrices=False))
        walk = Weights({}, {shape: svds}, [], {shape: shape})
        by_shape[shape] = [alignment(walk, i, len(steps) - 1) for i in range(len(steps))]
    return np.mean([by_shape[shape] for shape in shapes], axis=0)


def cosines(gram, i, j) -> tuple[float, float]:
    """6: cos(ΔW_i, ΔW_j), which rises by construction, and cos(ΔW_i, W_j - W_i), the way not yet gone; 0 if none is."""
    rest = gram[j, j] - 2 * gram[i, j] + gram[i, i]          # ||W_j - W_i||²
    return ((gram[i, j] / (gram[i, i] * gram[j, j]).sqrt()).item(),
            ((gram[i, j] - gram[i, i]) / (gram[i, i] * rest).sqrt()).item() if rest > 1e-12 * gram[j, j] else 0.0)


def principal_components(gram):
    """9: PCA of points given by their inner products (n, n) -> coordinates (n, n), explained variance (n,)."""
    gram = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()        # as if the points had been centred
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    return vectors * values.sqrt(), values / values.sum()


def with_base(gram):
    """The base is a point of every path too: ΔW_0 = 0."""
    return F.pad(gram, (1, 0, 1, 0))


# ----------------------------------------------------------------------------------------------------------------
# Interventions: weights and updates as dicts of tensors by name.

def add(base, update, alpha=1.0) -> dict:
    """base + α update; what the update does not name stays at the base."""
    return {name: w + alpha * update[name] if name in update else w for name, w in base.items()}


def matrices(update) -> dict:
    return {name: d for name, d in update.items() if is_matrix(name, d.shape)}


def window(update, layer, width, part) -> dict:
    """3: the part ("mlp" or "attention") of the update in layers layer - width .. layer + width."""
    return {name: d for name, d in matrices(update).items()
            if abs(module_of(name)[0] - layer) <= width and part_of(name) == part}


def window_width(num_layers) -> int:
    """The paper's windows have 17 of 28 to 48 layers: here too they span some 45% of the depth."""
    return max(0, round((0.45 * num_layers - 1) / 2))


def low_rank(svds, percent, end) -> dict:
    """7: the leading ("top") or trailing ("bottom") percent of every matrix's singular directions, at least one."""
    kept = {}
    for name, (U, sigma, Vh) in svds.items():
        k = max(1, round(percent / 100 * len(sigma)))
        part = slice(0, k) if end == "top" else slice(len(sigma) - k, None)
        kept[name] = U[:, part] * sigma[part] @ Vh[part]
    return kept


def rescaled(early, final, beta) -> dict:
    """8: ΔW_early · [1 + β (||ΔW_T|| / ||ΔW_early|| - 1)], tensor by tensor."""
    return {name: d * (1 + beta * (final[name].norm() / d.norm() - 1)) if d.any() else d for name, d in early.items()}


def frobenius(update) -> float:
    return sum(d.square().sum().item() for d in update.values()) ** 0.5


def scaled_to(update, size) -> dict:
    return {name: d * (size / frobenius(update)) for name, d in update.items()}


def interventions(base, deltas, svds, steps, common_norm, num_layers) -> dict:
    """{what: function that makes the weights to measure} for one run. deltas: ΔW as a dict, a checkpoint each."""
    final, trained = deltas[-1], add(base, deltas[-1])
    jobs = {("alpha", alpha): lambda alpha=alpha: add(base, final, alpha) for alpha in ALPHAS}
    jobs |= {("step", step): lambda delta=delta: add(base, delta) for step, delta in zip(steps[:-1], deltas)}
    for part in ("mlp", "attention"):
        for layer in range(num_layers):
            piece = window(final, layer, window_width(num_layers), part)
            jobs["inject", part, layer] = lambda piece=piece: add(base, piece)
            jobs["leave out", part, layer] = lambda piece=piece: add(trained, piece, -1.0)
    jobs["embeddings back"] = lambda: {name: base[name] if module_of(name)[1] in ("embedding", "head") else w
                                       for name, w in trained.items()}
    for k in PERCENTS:
        jobs["top", k] = lambda k=k: add(base, scaled_to(low_rank(svds, k, "top"), common_norm))
        jobs["bottom", k] = lambda k=k: add(base, low_rank(svds, k, "bottom"))
    for i in sorted({0, early_index(steps)}):
        for beta in BETAS:
            jobs["early", steps[i], beta] = lambda i=i, beta=beta: add(base, rescaled(deltas[i], final, beta))
    return jobs


def early_index(steps) -> int:
    """The checkpoint nearest to 10% of training."""
    return min(range(len(steps)), key=lambda i: abs(steps[i] - 0.1 * steps[-1]))


def measure_with(model, teacher, task, problems):
    """-> measure(weights) = (accuracy, KL(π || π*) in nats a token), always under the same random numbers."""
    parameters, prompts = dict(model.named_parameters()), [task.encode(p) for p in problems]

    @torch.no_grad()
    def measure(weights):
        for name, p in parameters.items():
            p.copy_(weights[name])
        right, answers = evaluate(model, task, problems)
        batch = pack(prompts, answers, model.device)
        kl = reverse_kl(model(batch.ids[:, :-1]), teacher(batch.ids[:, :-1]), batch.mask)
        return right, kl.item()
    return measure


# ----------------------------------------------------------------------------------------------------------------
# Statistics and drawing.

class Study(NamedTuple):
    """What the nine questions are answered from."""
    weights: Weights
    groups: dict               # label: its Trajectories, one a seed
    measured: dict             # first point of a Trajectory: {intervention: (accuracy, KL)}; empty from weights alone
    base: tuple                # (accuracy, KL) of the base
    picks: dict                # "end", "equal steps", ...: {first point of a Trajectory: the point to compare}
    out_dir: Path

    @property
    def trajectories(self):
        return [t for group in self.groups.values() for t in group]

    def each(self, f) -> dict:
        """{label: mean and 95% interval over seeds of f(trajectory), None where f has no answer}."""
        return {label: interval([f(t) for t in group]) for label, group in self.groups.items()}


T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)    # two-sided quantiles of t, 1 to 9 degrees of freedom


def interval(values):
    """{mean, half: half the 95% t interval of the mean (None for one value), n}; None without values."""
    values = [v for v in values if v is not None]
    if not values:
        return None
    n = len(values)
    half = None if n == 1 else float((T_95[n - 2] if n < 11 else 2.2) * np.std(values, ddof=1) / n ** 0.5)
    return {"mean": float(np.mean(values)), "half": half, "n": n}


def say(stats, form="{:.2f}") -> str:
    def one(s):
        return "-" if s is None else form.format(s["mean"]) + ("" if s["half"] is None else "±" + form.format(s["half"]))
    return ", ".join(f"{label} {one(s)}" for label, s in stats.items())


def canvas(number, title, *panels, height=3.6):
    """A figure of README width (9 inches) and its panels; panels: (title, x label, y label) each."""
    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 8})
    figure, axes = plt.subplots(1, len(panels), figsize=(9, height), layout="constrained", squeeze=False)
    figure.suptitle(f"{number}. {title}", fontsize=10.5, fontweight="bold")
    for axis, (name, x, y) in zip(axes[0], panels):
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
    return figure, axes[0]


def save(figure, study, name):
    figure.savefig(study.out_dir / name, dpi=150)
    plt.close(figure)


def draw(axis, study, f, dashed=False, name=True):
    """f(trajectory) = (xs, ys) of every method: the mean over seeds as a line, its 95% interval as a band."""
    for i, (label, group) in enumerate(study.groups.items()):
        xs, ys = np.mean([f(t)[0] for t in group], axis=0), [interval(column) for column in zip(*(f(t)[1] for t in group))]
        mean = np.array([y["mean"] for y in ys])
        axis.plot(xs, mean, color=f"C{i}", linestyle="--" if dashed else "-", marker=".", label=label if name else None)
        if len(group) > 1:
            half = np.array([y["half"] for y in ys])
            axis.fill_between(xs, mean - half, mean + half, color=f"C{i}", alpha=0.15, linewidth=0)


def bars(axis, study, stats, form="{:.2f}", offset=0.0, width=0.8, **style):
    for i, (label, s) in enumerate(stats.items()):
        if s is not None:
            axis.bar(i + offset, s["mean"], width, yerr=s["half"], color=f"C{i}", capsize=3, **style)
            axis.annotate(form.format(s["mean"]), (i + offset, s["mean"] + (s["half"] or 0)), ha="center", va="bottom",
                          fontsize=8)
    axis.set_xticks(range(len(stats)), [label.replace(", ", "\n") for label in stats])
    axis.margins(y=0.15)


def crossing(xs, ys, target):
    """Where the line through the points first reaches the target; None if it never does."""
    for (x0, y0), (x1, y1) in zip(zip(xs, ys), zip(xs[1:], ys[1:])):
        if y0 < target <= y1:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return None


# ----------------------------------------------------------------------------------------------------------------
# The nine questions. Each draws its figure and returns (numbers, what the paper says, what these runs say).

def norm_scaling(study):
    xs = np.array([0.0, *ALPHAS])

    def curve(t):
        return [study.base[0], *(study.measured[t.first]["alpha", a][0] for a in ALPHAS)]

    def size(t):
        return norm(study.weights, t.last)

    smallest = min(map(size, study.trajectories))
    target = min(s["mean"] for s in study.each(lambda t: curve(t)[-1]).values())
    figure, (left, right) = canvas(1, "Accuracy per unit of update norm: the higher curve on the right pays more for its norm",
                                   ("along the update", "α", "accuracy of W$_0$ + αΔW"),
                                   ("against the distance moved", "‖αΔW‖$_F$", "accuracy"))
    draw(left, study, lambda t: (xs, curve(t)))
    draw(right, study, lambda t: (xs * size(t), curve(t)))
    right.axvline(smallest, color="grey", linestyle=":", label="equal norm")
    right.axhline(target, color="grey", linestyle="--", linewidth=1, label="equal accuracy")
    right.legend()
    save(figure, study, "1_norm_scaling.png")
    at_norm = study.each(lambda t: float(np.interp(smallest, xs * size(t), curve(t))))
    at_accuracy = study.each(lambda t: crossing(xs * size(t), curve(t), target))
    return ({"norm": study.each(size), "equal_norm": smallest, "accuracy_at_equal_norm": at_norm,
             "equal_accuracy": target, "norm_to_equal_accuracy": at_accuracy, "alphas": xs.tolist(),
             "accuracy": {t.directory.as_posix(): curve(t) for t in study.trajectories}},
            "OPD gains more accuracy per unit of norm than RL",
            f"accuracy at norm {smallest:.2f}: {say(at_norm)}; norm to accuracy {target:.2f}: {say(at_accuracy)}")


def update_norms(study):
    shares = {pick: {t.first: norm_shares(study.weights, point[t.first]) for t in study.trajectories}
              for pick, point in study.picks.items()}
    layers = 1 + max((module_of(name)[0] for name in study.weights.gram if module_of(name)[0] is not None), default=-1)
    figure, axes = canvas(2, "Share of ‖ΔW‖² by layer and module, in %: where did each method put its update?",
                          *((label, "", "") for label in study.groups), height=1.6 + 0.16 * max(6, layers))
    for axis, group in zip(axes, study.groups.values()):
        def percent(key):
            return 100 * np.mean([shares["end"][t.first].get(key, 0.0) for t in group])
        table = np.array([[percent(f"{layer} {module}") for module in MODULES] for layer in range(layers)])
        image = axis.imshow(table, cmap="viridis", aspect="auto", vmin=0)
        axis.grid(False)
        axis.set_xticks(range(len(MODULES)), MODULES, rotation=90)
        axis.set_yticks(range(layers) if layers <= 12 else range(0, layers, 4))
        for (y, x), value in np.ndenumerate(table) if layers <= 12 else ():
            axis.annotate(f"{value:.0f}", (x, y), ha="center", va="center", fontsize=7,
                          color="black" if value > table.max() / 2 else "white")
        axis.set_xlabel(f"embedding {percent('embedding'):.1f}%, head {percent('head'):.1f}%")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="% of ‖ΔW‖²", shrink=0.8)
    save(figure, study, "2_update_norms.png")

    def in_mlp(share):
        return 100 * sum(v for key, v in share.items() if key.split()[-1] in ("gate", "up", "down"))

    mlp = {pick: study.each(lambda t: in_mlp(by_run[t.first])) for pick, by_run in shares.items()}
    embedding = study.each(lambda t: 100 * shares["end"][t.first].get("embedding", 0.0))
    count = {name: math.prod(shape) for name, shape in study.weights.shape.items()}
    null = 100 * sum(n for name, n in count.items() if module_of(name)[1] in ("gate", "up", "down")) / sum(count.values())
    return ({"share": {t.directory.as_posix(): shares["end"][t.first] for t in study.trajectories},
             "mlp_percent": mlp, "mlp_percent_of_parameters": null, "embedding_percent": embedding},
            "OPD moves the useful MLP blocks and hardly the embeddings",
            f"% of ‖ΔW‖² in the MLPs ({null:.0f} of the parameters): {say(mlp['end'], '{:.0f}')}; "
            f"in the embedding: {say(embedding, '{:.1f}')}")


def utility(study):
    layers = 1 + max(module_of(name)[0] for name in study.weights.svd)
    width = window_width(layers)
    names = {part: [[n for n in study.weights.svd if part_of(n) == part and abs(module_of(n)[0] - layer) <= width]
                    for layer in range(layers)] for part in ("mlp", "attention")}
    own = {part: [[n for n in study.weights.svd if part_of(n) == part and module_of(n)[0] == layer]
                  for layer in range(layers)] for part in ("mlp", "attention")}

    def gains(t, part):                                       # accuracy that the window alone adds to the base
        return [study.measured[t.first]["inject", part, layer][0] - study.base[0] for layer in range(layers)]

    def per_norm(t, part):
        return [gain / norm(study.weights, t.last, n) if norm(study.weights, t.last, n) else 0.0
                for gain, n in zip(gains(t, part), names[part])]

    def losses(t, part):                                      # accuracy that the trained model loses without it
        return [study.measured[t.first]["alpha", 1.0][0] - study.measured[t.first]["leave out", part, layer][0]
                for layer in range(layers)]

    figure, axes = canvas(3, f"Utility of windows of {2 * width + 1} layer(s): is there an inverted U, and is the MLP (solid) "
                          "above attention (dashed)?",
                          ("inject only", "centre of the window, layer", "accuracy gained"),
                          ("inject only, per unit of norm", "centre of the window, layer", "accuracy gained / ‖ΔW$_{window}$‖$_F$"),
                          ("leave one out", "centre of the window, layer", "accuracy lost"))
    for axis, f in zip(axes, (gains, per_norm, losses)):
        for part, dashed in (("mlp", False), ("attention", True)):
            draw(axis, study, lambda t: (range(layers), f(t, part)), dashed, name=not dashed)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(layers) if layers <= 12 else range(0, layers, 4))
    axes[0].legend()
    save(figure, study, "3_utility.png")
    # One ranking for all methods, so that a method cannot call low what it did not touch: mean utility over all runs.
    worth = {(part, layer): np.mean([per_norm(t, part)[layer] for t in study.trajectories])
             for part in names for layer in range(layers)}
    low = sorted(worth, key=worth.get)[:layers]               # the lower half of the 2 x layers windows

    def low_share(t):
        return 100 * (norm(study.weights, t.last, [n for part, layer in low for n in own[part][layer]])
                      / norm(study.weights, t.last, list(study.weights.svd))) ** 2

    low_shares = study.each(low_share)
    best = {part: study.each(lambda t: max(gains(t, part))) for part in names}
    return ({"window": 2 * width + 1, "low_utility_windows": low, "percent_in_low_utility_windows": low_shares,
             "runs": {t.directory.as_posix(): {part: {"inject": gains(t, part), "inject_per_norm": per_norm(t, part),
                                                      "leave_out": losses(t, part)} for part in names}
                      for t in study.trajectories}},
            "an inverted U over depth, MLP above attention; RL spends more of its norm where utility is low",
            f"best window, MLP: {say(best['mlp'])}; attention: {say(best['attention'])}; % of ‖ΔW‖² in the low-utility half: "
            f"{say(low_shares, '{:.0f}')}")


def embeddings(study):
    cosine = {pick: study.each(lambda t: study.weights.embedding_cosine[point[t.first]])
              for pick, point in study.picks.items()}
    panels = [("1 - cosine of base and trained rows", "optimiser step", "1 - cosine, mean over rows in use")]
    if study.measured:
        panels.append(("the base's embeddings put back", "", "accuracy (pale: as trained)"))
    figure, axes = canvas(4, "Embeddings: small on the left and equal bars on the right mean that they hardly matter", *panels)
    draw(axes[0], study, lambda t: (t.steps, [1 - study.weights.embedding_cosine[i] for i in t.points]))
    axes[0].set_xscale("log", base=2)
    axes[0].legend()
    numbers, here = {"cosine": cosine}, f"cosine {say(cosine['end'], '{:.4f}')}"
    if study.measured:
        as_trained = study.each(lambda t: study.measured[t.first]["alpha", 1.0][0])
        put_back = study.each(lambda t: study.measured[t.first]["embeddings back"][0])
        bars(axes[1], study, as_trained, offset=-0.2, width=0.4, alpha=0.4)
        bars(axes[1], study, put_back, offset=0.2, width=0.4)
        axes[1].axhline(study.base[0], color="grey", linestyle=":", label="base")
        axes[1].legend(loc="lower right")
        numbers |= {"accuracy_as_trained": as_trained, "accuracy_with_base_embeddings": put_back}
        here += f"; accuracy with the base's put back: {say(put_back)} (as trained: {say(as_trained)})"
    save(figure, study, "4_embeddings.png")
    return numbers, "putting them back costs OPD nothing; cosine RL .967 / OPD .985 (4B), .942 / .975 (8B)", here


def spectrum(study):
    gaussian = {shape: gaussian_sigma(shape) for shape in {study.weights.shape[name] for name in study.weights.svd}}
    tables = {pick: {t.first: spectra(study.weights, point[t.first], gaussian) for t in study.trajectories}
              for pick, point in study.picks.items()}
    grid = np.linspace(0, 1, 101)                             # so that matrices of all ranks can be averaged

    def level(sigma):
        sigma = np.asarray(sigma) / np.linalg.norm(sigma)
        return np.interp(grid, np.linspace(0, 1, len(sigma)), sigma)

    def mean_of(t, metric, pick="end", what="mean"):
        return tables[pick][t.first][metric][what]

    shapes = [study.weights.shape[name] for name in study.weights.svd]
    rank = float(np.mean([min(shape) for shape in shapes]))
    compared = "equal accuracy" if "equal accuracy" in tables else "end"
    figure, axes = canvas(5, "Spectra of ΔW: more concentrated is steeper on the left, higher in the middle, lower on the right",
                          ("mean singular values at the end", "i / r", "σ$_i$ / ‖ΔW‖$_F$"),
                          ("spectral ratio (pale: at equal accuracy)", "", "σ$_1$ / ‖ΔW‖$_F$"),
                          ("effective rank (pale: at equal accuracy)", "", f"exp(entropy of σ), of {rank:.0f}"))
    draw(axes[0], study, lambda t: (grid, np.mean([level(svds[t.last][1]) for svds in study.weights.svd.values()
                                                   if svds[t.last][1][0] > 0], axis=0)))
    for line in axes[0].lines:
        line.set_marker("")
    axes[0].plot(grid, np.mean([level(gaussian[shape]) for shape in shapes], axis=0), "k:", label="Gaussian")
    axes[0].set_yscale("log")
    axes[0].set_ylim(bottom=1e-3)
    axes[0].legend()
    for axis, metric, form in ((axes[1], "spectral_ratio", "{:.2f}"), (axes[2], "effective_rank", "{:.0f}")):
        bars(axis, study, study.each(lambda t: mean_of(t, metric)), form, offset=-0.2, width=0.4)
        bars(axis, study, study.each(lambda t: mean_of(t, metric, compared)), form, offset=0.2, width=0.4, alpha=0.4)
        axis.axhline(mean_of(study.trajectories[0], metric, what="gaussian"), color="black", linestyle=":", label="Gaussian")
        axis.legend()
    save(figure, study, "5_spectra.png")
    summary = {pick: {metric: {what: study.each(lambda t: mean_of(t, metric, pick, what)) for what in ("mean", "sd", "gaussian")}
                      for metric in METRICS} for pick in tables}
    end, null = summary["end"], next(iter(summary["end"]["effective_rank"]["gaussian"].values()))["mean"]
    return ({"mean_rank": rank} | summary, "OPD is more concentrated than RL: σ1/‖ΔW‖ 25.7% / 19.7%, effective rank 1587 / 1908 (4B)",
            f"σ1/‖ΔW‖ {say(end['spectral_ratio']['mean'])}; effective rank of {rank:.0f}: "
            f"{say(end['effective_rank']['mean'], '{:.0f}')} (Gaussian {null:.0f}); at {compared}: "
            f"{say(summary[compared]['effective_rank']['mean'], '{:.0f}')}")


def directions(study):
    gram = sum(study.weights.gram.values())
    by_k = {t.first: np.array([alignment(study.weights, i, t.last) for i in t.points]) for t in study.trajectories}  # (t, 20)
    longest = max(study.trajectories, key=lambda t: t.steps[-1])
    walk = walk_alignment(study.weights, longest.steps)                          # (t, 20)
    early = {t.first: early_index(t.steps) for t in study.trajectories}
    figure, axes = canvas(6, "Is the final direction there early? Above the random walk on the left, above 0 on the right (dashed)",
                          ("subspaces of ΔW$_t$ and ΔW$_T$, k = 1..20", "optimiser step t", "mean squared cosine"),
                          ("the same at some 10% of training", "k leading directions", "mean squared cosine"),
                          ("cosines (dashed: to the way not yet gone)", "optimiser step t", "cosine of ΔW$_t$"))
    draw(axes[0], study, lambda t: (t.steps, by_k[t.first].mean(1)))
    draw(axes[1], study, lambda t: (KS, by_k[t.first][early[t.first]]))
    draw(axes[2], study, lambda t: (t.steps, [cosines(gram, i, t.last)[0] for i in t.points]))
    draw(axes[2], study, lambda t: (t.steps[:-1], [cosines(gram, i, t.last)[1] for i in t.points[:-1]]), dashed=True, name=False)
    axes[0].plot(longest.steps, walk.mean(1), "k:", label="random walk")
    axes[1].plot(KS, walk[early_index(longest.steps)], "k:", label="random walk")
    axes[2].plot(longest.steps, np.sqrt(np.array(longest.steps) / longest.steps[-1]), "k:", label="random walk")
    axes[2].axhline(0, color="black", linewidth=0.8)
    for axis in (axes[0], axes[2]):
        axis.set_xscale("log", base=2)
    axes[0].legend()
    save(figure, study, "6_alignment.png")
    paper = study.each(lambda t: float(by_k[t.first][early[t.first]].mean()))
    end, rest = (study.each(lambda t: cosines(gram, t.points[early[t.first]], t.last)[i]) for i in (0, 1))
    step = longest.steps[early_index(longest.steps)]
    return ({"early_steps": {t.directory.as_posix(): t.steps[early[t.first]] for t in study.trajectories},
             "alignment": paper, "cosine_to_the_end": end, "cosine_to_the_rest": rest,
             "random_walk": {"steps": longest.steps, "alignment": walk.mean(1).tolist(),
                             "cosine_to_the_end": [(step / longest.steps[-1]) ** 0.5 for step in longest.steps]},
             "runs": {t.directory.as_posix(): {
                 "steps": t.steps, "alignment": by_k[t.first].mean(1).tolist(), "alignment_by_k": by_k[t.first].tolist(),
                 "cosine_to_the_end": [cosines(gram, i, t.last)[0] for i in t.points],
                 "cosine_to_the_rest": [cosines(gram, i, t.last)[1] for i in t.points]} for t in study.trajectories}},
            "OPD's subspace locks on to the final one early, RL's later",
            f"at some 10% of training (step {step}): alignment {say(paper)} (random walk "
            f"{walk[early_index(longest.steps)].mean():.2f}); cosine to the end {say(end)} (random walk "
            f"{(step / longest.steps[-1]) ** 0.5:.2f}), to the way not yet gone {say(rest)} (random walk 0)")


def low_rank_parts(study):
    def kept(t, sigmas):                                      # share of the norm in the top k%, mean over matrices
        return [np.mean([np.linalg.norm(s[:max(1, round(k / 100 * len(s)))]) / np.linalg.norm(s) for s in sigmas])
                for k in PERCENTS]

    def accuracy(t, end):
        return [study.measured[t.first][end, k][0] for k in PERCENTS]

    figure, axes = canvas(7, "Singular directions: does the top 10% of them do the work of all?",
                          ("top k%, scaled to one norm for all", "k, % of the singular directions", "accuracy"),
                          ("bottom k%, not scaled", "k, % of the singular directions", "accuracy"),
                          ("norm in the top k%", "k, % of the singular directions", "‖ΔW$_k$‖ / ‖ΔW‖"))
    for axis, end in zip(axes, ("top", "bottom")):
        draw(axis, study, lambda t: (PERCENTS, accuracy(t, end)))
        axis.axhline(study.base[0], color="grey", linestyle=":", label="base")
    axes[0].axhline(study.measured["Gaussian"][0], color="black", linestyle=":", label="Gaussian, same norm")
    draw(axes[2], study, lambda t: (PERCENTS, kept(t, [svds[t.last][1].numpy() for svds in study.weights.svd.values()])))
    axes[2].plot(PERCENTS, kept(None, [gaussian_sigma(study.weights.shape[n]).numpy() for n in study.weights.svd]), "k:",
                 label="Gaussian")
    axes[0].legend()
    axes[2].legend()
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(PERCENTS, PERCENTS)
    save(figure, study, "7_low_rank.png")

    def recovered(t):                                         # of the accuracy gained with 100% at the same norm
        top = dict(zip(PERCENTS, accuracy(t, "top")))
        gain = top[100] - study.base[0]
        return 100 * (top[10] - study.base[0]) / gain if gain > 0 else None

    top, bottom, share = (study.each(f) for f in (
        recovered, lambda t: dict(zip(PERCENTS, accuracy(t, "bottom")))[50], lambda t: 100 * accuracy(t, "top")[2] / accuracy(t, "top")[-1]))
    return ({"percents": PERCENTS, "gaussian_update_accuracy": study.measured["Gaussian"][0],
             "top_10_percent_of_gain": top, "top_10_percent_of_accuracy": share, "bottom_50_accuracy": bottom,
             "runs": {t.directory.as_posix(): {end: accuracy(t, end) for end in ("top", "bottom")} for t in study.trajectories}},
            "the top 10% recovers more than 95% of the accuracy",
            f"top 10% at equal norm, % of the accuracy: {say(share, '{:.0f}')}; of the gain: {say(top, '{:.0f}')}; "
            f"bottom 50%: accuracy {say(bottom)} (base {study.base[0]:.2f})")


def early_rescaled(study):
    def at(t, i, what):
        return [study.measured[t.first]["early", t.steps[i], beta][what] for beta in BETAS]

    def final(t, what):
        return study.measured[t.first]["alpha", 1.0][what]

    figure, axes = canvas(8, "An early update stretched to the final norm (β = 1): how much of the final accuracy is there?",
                          ("solid: ΔW at some 10% of training, dashed: at step 1", "β", "accuracy"),
                          ("solid: 10%, dashed: step 1, dotted: the end of training", "β", "KL to the teacher, nats a token"))
    for what, axis in enumerate(axes):
        draw(axis, study, lambda t: (BETAS, at(t, early_index(t.steps), what)))
        draw(axis, study, lambda t: (BETAS, at(t, 0, what)), dashed=True, name=False)
        for i, s in enumerate(study.each(lambda t: final(t, what)).values()):
            axis.axhline(s["mean"], color=f"C{i}", linestyle=":", linewidth=1)
    axes[1].set_yscale("log")
    axes[0].legend()
    save(figure, study, "8_early_rescaled.png")
    one, share = BETAS.index(1.0), {}
    for name, i in (("early", None), ("first", 0)):
        share[name] = study.each(lambda t: 100 * at(t, early_index(t.steps) if i is None else i, 0)[one] / final(t, 0))
    kl = study.each(lambda t: at(t, early_index(t.steps), 1)[one])
    return ({"betas": BETAS, "percent_of_final_accuracy_at_beta_1": share, "kl_at_beta_1": kl,
             "runs": {t.directory.as_posix(): {"final": study.measured[t.first]["alpha", 1.0]} | {
                 str(t.steps[i]): {"accuracy": at(t, i, 0), "kl": at(t, i, 1)} for i in {0, early_index(t.steps)}}
                 for t in study.trajectories}},
            "the update at 10% of training, at β = 1, has about 80% of the final accuracy; the KL falls",
            f"% of the final accuracy at β = 1, from 10% of training: {say(share['early'], '{:.0f}')}; from step 1: "
            f"{say(share['first'], '{:.0f}')}; KL {study.base[1]:.3f} before, then {say(kl, '{:.3f}')}")


def paths(study):
    gram = sum(study.weights.gram.values())

    def explained(t):
        points = list(t.points)
        return 100 * principal_components(with_base(gram[points][:, points]))[1][:2].sum().item()

    longest = max(study.trajectories, key=lambda t: t.steps[-1])
    steps = torch.tensor([0, *longest.steps]).double()
    null = 100 * principal_components(torch.minimum(steps[:, None], steps))[1][:2].sum().item()   # E<ΔW_s, ΔW_t> = min(s, t)
    coordinates, variance = principal_components(with_base(gram))                # of all runs together
    figure, (left, right) = canvas(
        9, "The paths: straight on the left, near 100% (and above the random walk) on the right",
        ("all runs, from the base (star)", f"first component ({100 * variance[0]:.0f}% of the variance)",
         f"second component ({100 * variance[1]:.0f}%)"), ("variance of a run's own path", "", "% in two components"), height=4.2)
    for i, (label, group) in enumerate(study.groups.items()):
        for n, t in enumerate(group):
            x, y = np.array([coordinates[[0, *(p + 1 for p in t.points)], axis].numpy() for axis in (0, 1)])
            left.plot(x, y, ".-", color=f"C{i}", label=None if n else label, alpha=0.8)
            left.plot(x[-1:], y[-1:], "o", color=f"C{i}")
    left.plot(*coordinates[0, :2].tolist(), "k*", markersize=12)
    left.legend()
    stats = study.each(explained)
    bars(right, study, stats, "{:.0f}")
    right.axhline(null, color="black", linestyle=":", label="random walk")
    right.legend(loc="lower right")
    save(figure, study, "9_paths.png")
    return ({"explained_percent": stats, "random_walk_percent": null,
             "coordinates": {t.directory.as_posix(): coordinates[[p + 1 for p in t.points], :2].tolist() for t in study.trajectories},
             "base": coordinates[0, :2].tolist()},
            "OPD's path is nearly a line, most of its variance is in two components",
            f"% of a path's variance in two components: {say(stats, '{:.0f}')} (random walk {null:.0f})")


# ----------------------------------------------------------------------------------------------------------------
# The command.

def parse_args(args):
    parser = argparse.ArgumentParser(prog="analyze.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = stop
    parser.add_argument("runs", nargs="*", help="run or race directories; none: the newest run of each method under runs/")
    parser.add_argument("--base", help="a Hugging Face checkpoint's directory: what the others were trained from")
    parser.add_argument("--checkpoints", nargs="+", default=[], help="directories of its later selves, the last one last")
    parser.add_argument("--out_dir", default="analysis", help="where the figures and analysis.json go (default: analysis)")
    parser.add_argument("--problems", type=int, default=400, help="problems in an accuracy (default: 400)")
    parser.add_argument("--cache_dir", default="", help="where the teacher is kept (default: the one that the runs used)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N, for the accuracies")
    args = parser.parse_args(args)
    if bool(args.base) != bool(args.checkpoints) or args.base and args.runs:
        stop("give run directories, or --base DIR with --checkpoints DIR1 DIR2 ..., or nothing")
    if args.problems < 1:
        stop(f"--problems must be 1 or more, got {args.problems}")
    return args


def stop(message):
    print(f"analyze.py: {message}", file=sys.stderr)
    sys.exit(2)


def step_of(directory, position) -> int:
    """The number at the end of a checkpoint's name (step_000008, checkpoint-500), else its position in the list."""
    digits = Path(directory).name.replace("-", "_").rpartition("_")[2]
    return int(digits) if digits.isdigit() and int(digits) > 0 else position


def study_checkpoints(args, out_dir) -> Study:
    """Weights alone: one trajectory."""
    base, points = Checkpoint(args.base), [Checkpoint(directory) for directory in args.checkpoints]
    steps = [step_of(directory, i) for i, directory in enumerate(args.checkpoints, start=1)]
    if steps != sorted(set(steps)):
        steps = list(range(1, len(points) + 1))
    t = Trajectory("these checkpoints", Path(args.checkpoints[-1]), tuple(steps), 0)
    return Study(read_weights(base, points), {t.label: [t]}, {}, (), {"end": {0: t.last}}, out_dir)


def study_runs(args, out_dir) -> Study:
    """Runs of train.py: the weights, then the accuracy of every intervention."""
    base, points, trajectories, config = load_runs(args.runs or newest_runs())
    for t in trajectories:
        print(f"{t.label}: {t.directory}")
    weights = read_weights(base, points, whole={t.last for t in trajectories})
    groups = {t.label: [other for other in trajectories if other.label == t.label] for t in trajectories}
    config.device, config.cache_dir = str(pick_device(args.device)), args.cache_dir or config.cache_dir
    task = Chains(config.num_ops, config.digits)
    _, teacher = make_models(config, task)
    model = GPT.from_pretrained(base.directory).to(config.device)
    measure = measure_with(model, teacher, task, evaluation_problems(config, task)[:args.problems])

    w_0 = {name: base.read(name) for name in base.slices}
    common_norm = min(norm(weights, t.last, weights.svd) for t in trajectories)
    rng = torch.Generator().manual_seed(0)
    noise = scaled_to({name: torch.randn(weights.shape[name], generator=rng) for name in weights.svd}, common_norm)
    at_base, measured = measure(w_0), {"Gaussian": measure(add(w_0, noise))}
    for t in trajectories:
        deltas = [{name: points[i].read(name) - w for name, w in w_0.items()} for i in t.points]
        jobs = interventions(w_0, deltas, {name: svds[t.last] for name, svds in weights.svd.items()}, t.steps,
                             common_norm, model.config.num_hidden_layers)
        measured[t.first] = {what: measure(make()) for what, make in tqdm(jobs.items(), desc=t.label, unit="accuracy",
                                                                          dynamic_ncols=True)}
    return Study(weights, groups, measured, at_base, compared_points(weights, groups, measured), out_dir)


def compared_points(weights, groups, measured) -> dict:
    """Which checkpoint of each run stands for it: the end, or the one nearest to what all of them reached."""
    trajectories = [t for group in groups.values() for t in group]

    def accuracy(t, i):
        return measured[t.first]["alpha", 1.0][0] if i == t.last else measured[t.first]["step", t.steps[i - t.first]][0]

    def nearest(value, target):
        return {t.first: min(t.points, key=lambda i: abs(value(t, i) - target)) for t in trajectories}

    return {
        "end": {t.first: t.last for t in trajectories},
        "equal steps": nearest(lambda t, i: t.steps[i - t.first], min(t.steps[-1] for t in trajectories)),
        "equal accuracy": nearest(accuracy, min(np.mean([accuracy(t, t.last) for t in group]) for group in groups.values())),
        "equal norm": nearest(lambda t, i: norm(weights, i), min(norm(weights, t.last) for t in trajectories))}


def main(args=None):
    args = parse_args(args)
    out_dir = Path(args.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        study = study_checkpoints(args, out_dir) if args.base else study_runs(args, out_dir)
    except (ValueError, OSError) as error:
        stop(" ".join(str(error).split()))
    if study.measured:
        questions = (norm_scaling, update_norms, utility, embeddings, spectrum, directions, low_rank_parts, early_rescaled, paths)
    else:
        questions = (update_norms, embeddings, spectrum) + ((directions, paths) if len(study.trajectories[0].steps) > 1 else ())
    results = {"compared": {pick: {t.directory.as_posix(): t.steps[point[t.first] - t.first] for t in study.trajectories}
                            for pick, point in study.picks.items()}, "base": study.base}
    print()
    for question in questions:
        numbers, paper, here = question(study)
        results[question.__name__] = numbers
        print(f"{question.__name__}\n  paper says: {paper}\n  these runs: {here}")
    write_json(out_dir / "analysis.json", results)
    print(f"\nFigures and analysis.json are in {out_dir}")


if __name__ == "__main__":
    main()
