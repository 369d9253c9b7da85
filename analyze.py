"""See the foresight: where an update goes, how concentrated it is, when its direction settles.

    python analyze.py                                     # the newest run of each method in runs/
    python analyze.py runs/opd runs/opd-2 runs/rl         # these; alike but for the seed: a mean
    python analyze.py --base DIR --checkpoints DIR1 DIR2  # any checkpoints in Hugging Face format
    python analyze.py --redraw analysis/analysis.json     # the figures again, from their numbers

Nine questions of "Learning to Foresee" (arXiv:2605.11739, sections 3 and 4), and a tenth that it
does not ask; `QUESTIONS` lists them. Each measures a run, which gives a dict of numbers, and draws
them beside what chance would give: Gaussian matrices, random walks.

ΔW_t = W_t - W_0 is the update since the start, T the last step. Checkpoints that are no runs of
train.py have no task and no teacher here: their weights alone answer five of the questions.
"""

import argparse
import filecmp
import json
import math
import os
import re
import sys
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean

os.environ.setdefault("GOMP_SPINCOUNT", "1000")               # before torch: see train.py

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from effopd import METRICS, SCOPES, basis_alignment, module_of, reverse_kl, spectral_metrics
from model import weight_files
from train import (TEMPERATURES, Config, evaluate, evaluation_problems, first_line, load, pack,
                   write_json)

plt.switch_backend("Agg")                                     # draws into files, without a screen

BLOCK = 2 ** 24                                               # numbers read at a time: 300 MB
KL_ANSWERS = 100                                              # so many of the answers give the KL
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)                       # fractions of an update
KS = range(1, 21)                                             # leading directions, as in the paper
TOP = (1, 5, 10, 25, 50, 100)                                 # % of a matrix's directions
BOTTOM = (50, 75, 90, 95, 99)
BETAS = (0.0, 0.4, 0.8, 1.0, 1.2, 1.6)                        # 1: an early update at ΔW_T's norm
T_95 = (12.706, 4.303, 3.182, 2.776)                          # Student's t, 1 to 4 degrees


# ------------------------------------------------------------------------------------------------
# Statistics.

def interval(values) -> dict:
    """Mean and 95% Student t interval of n values: {mean, low, high, n}.

    values: numbers or lists of them, where None is no value; dicts of these give {key: interval}.
    low and high are None where n < 2.
    """
    if values and isinstance(values[0], dict):
        return {key: interval([value[key] for value in values]) for key in values[0]}
    values = np.array([value for value in values if value is not None], dtype=float)
    n = len(values)
    if n < 2:
        return dict(mean=values[0].tolist() if n else None, low=None, high=None, n=n)
    df = n - 1
    expansion = 1.96 + 2.372 / df + 2.823 / df ** 2 + 2.556 / df ** 3            # right to .2%
    t = T_95[df - 1] if df <= len(T_95) else expansion
    mean, half = values.mean(0), t * values.std(0, ddof=1) / n ** 0.5
    return dict(mean=mean.tolist(), low=(mean - half).tolist(), high=(mean + half).tolist(), n=n)


def say(numbers: dict, key: str) -> str:
    """ "OPD 0.52 ± 0.03, RL 0.47" of {label: {key: interval}}; one number if all are the same."""
    words = {}
    for label, stats in numbers.items():
        s = stats[key]
        words[label] = "-" if s["mean"] is None else f"{s['mean']:.3g}"
        if s["n"] > 1 and s["high"] > s["mean"]:
            words[label] += f" ± {s['high'] - s['mean']:.2g}"
    if len(set(words.values())) == 1:
        return words.popitem()[1]
    return ", ".join(f"{label} {word}" for label, word in words.items())


def percent(a, b) -> float | None:
    """a in % of b; None where b is not positive."""
    return 100 * a / b if b > 0 else None


# ------------------------------------------------------------------------------------------------
# Checkpoints.

class Checkpoint:
    """A checkpoint in Hugging Face format. Its files are mapped: rows are read when they are used.

    shapes: {name: shape} of its tensors; a head that is the embedding stored again is left out.
    matrices: names of the two-dimensional weights of attention and MLP. embedding: that of tokens.
    """

    def __init__(self, directory):
        self.directory, self.tensors = Path(directory), {}
        for path in weight_files(self.directory):
            try:
                self.tensors |= load_file(path)
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {first_line(error)}") from None
        self.shapes = {name: tuple(w.shape) for name, w in self.tensors.items() if w.ndim}
        self.matrices = [name for name, shape in self.shapes.items()
                         if len(shape) == 2 and role_of(name) in ("attention", "mlp")]
        embeddings = [name for name in self.shapes if role_of(name) == "embedding"]
        self.embedding = next((name for name in embeddings if "wpe" not in name), None)
        for head in [name for name in self.shapes if role_of(name) == "head"]:
            same_shape = self.shapes[head] == self.shapes.get(self.embedding)
            if same_shape and torch.equal(self.read(head), self.read(self.embedding)):
                del self.shapes[head]                         # one entry per storage

    def read(self, name, rows=slice(None)):
        """Rows of a tensor, in float32."""
        return self.tensors[name][rows].float()

    def weights(self) -> dict:
        return {name: self.read(name) for name in self.shapes}


def role_of(name: str) -> str:
    """attention, mlp, embedding, head, norm or other, by the name of a weight or a bias."""
    kind = module_of(re.sub("bias$", "weight", name))[1]      # a bias has its matrix's role
    if kind in ("norm", "embedding", "head"):
        return kind
    for role, scope in (("mlp", "mlp"), ("attention", "attention+mlp")):
        if any(word in name.lower() for word in SCOPES[scope]):
            return role
    return "other"


def check(base, points):
    """ValueError unless all have the same tensors; warnings of what makes numbers doubtful."""
    for point in points:
        for name in sorted(base.shapes.keys() | point.shapes.keys()):
            a, b = base.shapes.get(name, "missing"), point.shapes.get(name, "missing")
            if a != b:
                raise ValueError(f"{name} is {a} in {base.directory} and {b} in {point.directory}")
    if not base.matrices:
        raise ValueError(f"{base.directory} has no attention or MLP weights with names we know")
    types = {w.dtype for point in (base, *points) for w in point.tensors.values()}
    if any(dtype.is_floating_point and dtype.itemsize < 4 for dtype in types):
        warn("these checkpoints are in half precision or less: where updates are small, ΔW is "
             "mostly rounding; analyse float32 checkpoints")
    unknown = [name for name in base.shapes if role_of(name) == "other"]
    if unknown:
        warn(f"{len(unknown)} names are not understood, counted as \"other\", such as "
             f"{', '.join(unknown[:5])}")


# ------------------------------------------------------------------------------------------------
# One pass over the weights of a run's checkpoints.

class Trajectory:
    """A run's S checkpoints after W_0, at steps t = steps[i], and what is kept of their ΔW_t.

    points, steps     the checkpoints, and after how many steps each was written
    gram              <ΔW_s, ΔW_t>, (S, S) float64
    norms, progress   ‖ΔW_t‖_F and t / T: S numbers each
    early             index of the checkpoint nearest to 10% of training
    squares           {name: ‖ΔW_T‖² of this tensor}
    sigmas            {name of a matrix: S times its singular values (r,)}, of those that moved
    alignment         `alignment` of ΔW_t with ΔW_T, mean over matrices: S numbers
    embedding_cosine  cosine of W_0's and W_T's embedding rows, mean over those that moved
    end               [accuracy, KL to the teacher] of W_T; `Study` finds it

    In memory at once: a block of rows of all checkpoints, or the SVDs of one matrix.
    """

    def __init__(self, base: Checkpoint, points: list, steps: list):
        check(base, points)
        self.points, self.steps, self.end = points, steps, None
        self.gram, self.squares, self.sigmas = 0.0, {}, {}
        aligned, embedding_cosines = [[] for _ in points], []
        for name, shape in tqdm(base.shapes.items(), f"weights of {points[-1].directory}"):
            gram = 0.0
            height = max(1, BLOCK // (len(points) * math.prod(shape[1:])))       # rows in a block
            for start in range(0, shape[0], height):
                rows = slice(start, start + height)
                w_0 = base.read(name, rows)                                      # (rows, ...)
                deltas = torch.stack([point.read(name, rows) - w_0 for point in points])
                flat = deltas.flatten(1).double()                                # (S, numbers)
                gram += flat @ flat.T                                            # (S, S)
                if name == base.embedding:
                    in_use = deltas[-1].any(-1)                                  # (rows,)
                    cosine = F.cosine_similarity(w_0, w_0 + deltas[-1], dim=-1)  # (rows,)
                    embedding_cosines += cosine[in_use].tolist()
            self.gram += gram
            self.squares[name] = gram[-1, -1].item()
            if name in base.matrices and self.squares[name]:
                w_0 = base.read(name)
                svds = [leading(point.read(name) - w_0) for point in points]
                self.sigmas[name] = [sigma for _, sigma, _ in svds]
                for values, svd in zip(aligned, svds):
                    values.append(alignment(svd, svds[-1]))
        if not self.sigmas:
            raise ValueError(f"{points[-1].directory} has the base's matrices: they did not move")
        self.alignment = [fmean(values) for values in aligned]
        self.embedding_cosine = fmean(embedding_cosines or [1.0])
        self.norms = self.gram.diagonal().sqrt()                                 # ‖ΔW_t‖_F: (S,)
        self.progress = [step / steps[-1] for step in steps]                     # t / T
        from_10_percent = [abs(progress - 0.1) for progress in self.progress]
        self.early = int(np.argmin(from_10_percent))          # the checkpoint near 10% of training


def leading(matrix):
    """Its SVD: U (m, 20), all singular values (r,), V (n, 20)."""
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :max(KS)].clone(), sigma, Vh[:max(KS)].T.clone()     # clones: the rest is freed


def alignment(a, b) -> float:
    """Question 6: ‖U_kᵀU_k'‖_F² / k of two SVDs, mean over k = 1..20 and left and right vectors."""
    return (basis_alignment(a[0], b[0], KS) + basis_alignment(a[2], b[2], KS)) / 2


def cosines(gram):
    """Question 6: cos(ΔW_t, ΔW_T), which rises anyhow, and cos(ΔW_t, W_T - W_t): (S,) each."""
    squares, products, end = gram.diagonal(), gram[:, -1], gram[-1, -1]          # (S,), (S,), ()
    remaining = (squares - 2 * products + end).clamp(min=0)                      # ‖W_T - W_t‖²
    to_end = products / (squares * end).sqrt().clamp(min=1e-30)
    to_rest = (products - squares) / (squares * remaining).sqrt().clamp(min=1e-30)
    return to_end, to_rest.where(remaining > 1e-12 * end, 0.0)


def in_two_components(gram) -> float:
    """Question 9: % of the variance of W_0 and the W_t in their first two principal components."""
    gram = F.pad(gram, (1, 0, 1, 0))                          # W_0, whose update is 0
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    variances = torch.linalg.eigvalsh(centred)
    return 100 * (variances[-2:].sum() / variances.sum()).item()


@cache
def gaussian_sigma(shape):
    """Singular values (r,) of a Gaussian matrix of norm 1: what no structure looks like."""
    sigma = torch.linalg.svdvals(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return sigma / sigma.norm()


def walk_gram(steps, momentum=0.9):
    """<ΔW_s, ΔW_t> of a random walk at S steps, up to a factor: (S, S) float64.

    It goes as AdamW does on random gradients of one size: its momentum makes steps alike.
    """
    weights = torch.zeros(len(steps), steps[-1], dtype=torch.float64)            # (S, T)
    for row, t in zip(weights, steps):                        # of each step's gradient in ΔW_t
        weight = 0.0
        for s in range(t, 0, -1):
            weight = momentum * weight + (1 - momentum) / (1 - momentum ** s)
            row[s - 1] = weight
    return weights @ weights.T


@cache
def walk_alignment(shape, steps) -> list:
    """Question 6: `alignment` with its end of a random walk of these steps, in such matrices."""
    noise = torch.randn(len(steps), *shape, generator=torch.Generator().manual_seed(0))
    mix = torch.linalg.cholesky(walk_gram(steps)).float()     # (S, S): makes them covary like that
    svds = [leading(torch.tensordot(row, noise, 1)) for row in mix]
    return [alignment(svd, svds[-1]) for svd in svds]


# ------------------------------------------------------------------------------------------------
# What the questions are asked of, and interventions: weights and updates are dicts by name.

class Study:
    """methods: {label: its Trajectories, one for each seed}. Without a task: from weights alone.

    w_0: W_0's weights. colder: its [accuracy, KL to the teacher] at all TEMPERATURES; start: at 1.
    """

    def __init__(self, base, methods, task=None, model=None, teacher=None, problems=()):
        self.base, self.methods, self.task = base, methods, task
        self.model, self.teacher, self.problems = model, teacher, problems
        self.runs = [run for runs in methods.values() for run in runs]
        if task:
            self.w_0 = base.weights()
            self.colder = [self.assess({}, temperature=T) for T in TEMPERATURES]
            self.start = self.colder[0]
            for run in self.runs:
                run.end = self.assess(self.update(run))

    def update(self, run, i=-1) -> dict:
        """ΔW_t of one of a run's checkpoints, read from disk."""
        return {name: w - self.w_0[name] for name, w in run.points[i].weights().items()}

    @torch.no_grad()
    def assess(self, update, alpha=1.0, temperature=1.0) -> list:
        """[accuracy, KL(π || π*) in nats a token] of W_0 + α update; what it does not name stays.

        Always under the same random numbers. The temperature divides the student's logits.
        """
        for name, p in self.model.named_parameters():
            p.copy_(self.w_0[name])
            if name in update:
                p += alpha * update[name].to(p.device)                           # W_0 + αΔW
        right, answers = evaluate(self.model, self.task, self.problems, temperature=temperature)
        (part,), num_tokens = pack(self.task, self.problems[:KL_ANSWERS], answers[:KL_ANSWERS],
                                   self.model.device)
        logits = self.model(part.inputs) / max(temperature, 1e-3)                # (b, T, V)
        kl = reverse_kl(logits, self.teacher(part.inputs), part.mask, num_tokens)
        return [right, kl.item()]

    def accuracy(self, update, alpha=1.0) -> float:
        return self.assess(update, alpha)[0]


def truncated(svds, k, end) -> dict:
    """Question 7: Σ σ_i u_i v_iᵀ over the leading ("top") or the last ("bottom") k% of them."""
    kept = {}
    for name, (U, sigma, Vh) in svds.items():
        num = max(1, round(k / 100 * len(sigma)))
        part = slice(0, num) if end == "top" else slice(-num, None)
        kept[name] = U[:, part] * sigma[part] @ Vh[part]
    return kept


def rescaled(early, final, beta) -> dict:
    """Question 8: ΔW_t [1 + β (‖ΔW_T‖ / ‖ΔW_t‖ - 1)], tensor by tensor."""
    stretched = {}
    for name, d in early.items():
        ratio = final[name].norm() / d.norm() if d.any() else 1.0
        stretched[name] = d * (1 + beta * (ratio - 1))
    return stretched


# ------------------------------------------------------------------------------------------------
# The questions. Measured of a run: numbers are said, lists and dicts drawn, as means over seeds.

def measure_norm_scaling(study, run):
    """Accuracy of W_0 + αΔW_T by its distance from W_0, and at the distance that all runs reach."""
    update, norm = study.update(run), run.norms[-1].item()
    norms = [alpha * norm for alpha in ALPHAS]                                   # ‖αΔW_T‖_F
    accuracies = [study.accuracy(update, alpha) for alpha in ALPHAS]             # W_0 + αΔW_T
    smallest = min(other.norms[-1].item() for other in study.runs)
    return {"norms": norms, "accuracies": accuracies, "equal norm": smallest,
            "accuracy there": float(np.interp(smallest, norms, accuracies))}


def draw_norm_scaling(numbers, path):
    with canvas(path, "1. Which method gains more accuracy for the distance it moves?",
                ("‖αΔW$_T$‖$_F$", "accuracy of W$_0$ + αΔW$_T$")) as (axis,):
        draw_curves(axis, numbers, "norms", "accuracies")
        axis.axvline(common(numbers, "equal norm"), **CHANCE, label="equal norm")


def measure_update_norms(study, run):
    """% of ‖ΔW_T‖² and of the parameters by role; by module and by layer the ratio of the two."""
    sizes = {name: math.prod(shape) for name, shape in study.base.shapes.items()}
    own, by_chance = shares(run.squares, role_of), shares(sizes, role_of)
    numbers = {f"% in {role}": share for role, share in own.items()}
    numbers |= {f"% of parameters in {role}": share for role, share in by_chance.items()}
    for i, key in enumerate(("layers", "modules")):
        own = shares(run.squares, lambda name: module_of(name)[i])
        by_chance = shares(sizes, lambda name: module_of(name)[i])
        numbers[key] = {"outside" if group is None else str(group): own[group] / by_chance[group]
                        for group in own}
    return numbers


def shares(values: dict, group_of) -> dict:
    """% of the sum of {name: value} that each group of names has."""
    groups, whole = defaultdict(float), sum(values.values())
    for name, value in values.items():
        groups[group_of(name)] += 100 * value / whole
    return groups


def draw_update_norms(numbers, path):
    with canvas(path, "2. Where is the update? Its share of ‖ΔW$_T$‖² over that of the parameters",
                ("module", "density"), ("layer", "density")) as axes:
        for axis, groups in zip(axes, ("modules", "layers")):
            draw_bars(axis, numbers, groups)
            axis.axhline(1, **CHANCE, label="by chance")


def measure_utility(study, run):
    """Of windows of layers: utility, the accuracy gained for their ‖ΔW‖_F, and accuracy lost."""
    layer_of = {name: module_of(name)[0] for name in study.base.matrices}
    num_layers = 1 + max(layer_of.values())
    reach = round((0.45 * num_layers - 1) / 2)                # the paper's: 8, of 28 to 48 layers
    update, values = study.update(run), defaultdict(list)
    for role in ("mlp", "attention"):
        for layer in range(num_layers):
            window = {name: update[name] for name in layer_of if role_of(name) == role
                      and abs(layer_of[name] - layer) <= reach}
            rest = {name: d for name, d in update.items() if name not in window}
            gained = study.accuracy(window) - study.start[0]                     # W_0 + ΔW_window
            lost = run.end[0] - study.accuracy(rest)                             # W_T - ΔW_window
            norm = get_total_norm(window.values()).item()
            values[f"{role} utility"].append(gained / norm if norm else 0.0)
            values[f"{role} lost"].append(lost)
        values[f"best utility of {role}"] = max(values[f"{role} utility"])
    return values | {"layers": list(range(num_layers)), "layers in a window": 2 * reach + 1}


def draw_utility(numbers, path):
    x = f"layer: the middle of a window of {common(numbers, 'layers in a window'):.0f}"
    with canvas(path, "3. Which layers' update is of use? (solid: MLP, dashed: attention)",
                (x, "accuracy gained by it alone / ‖ΔW‖$_F$"),
                (x, "accuracy lost without it")) as axes:
        for axis, what in zip(axes, ("utility", "lost")):
            draw_curves(axis, numbers, "layers", f"mlp {what}")
            draw_curves(axis, numbers, "layers", f"attention {what}", style="--")
            axis.axhline(0, color="black", linewidth=0.8)
            axis.xaxis.get_major_locator().set_params(integer=True)


def measure_embeddings(study, run):
    """How far rows have turned; accuracy of W_T with W_0's embedding and head put back."""
    turned = 1 - run.embedding_cosine
    numbers = {"1 - cosine": turned, "turned": {"": turned}}
    if study.task:
        rest = {name: d for name, d in study.update(run).items()
                if role_of(name) not in ("embedding", "head")}
        put_back = study.accuracy(rest)
        numbers |= {"accuracy": run.end[0], "with the base's": put_back, "base": study.start[0],
                    "accuracies": {"as trained": run.end[0], "base's put back": put_back}}
    return numbers


def draw_embeddings(numbers, path):
    panels = [("", "1 - cosine of embedding rows in use, mean")]
    if "accuracies" in next(iter(numbers.values())):
        panels.append(("", "accuracy"))
    with canvas(path, "4. Do the embeddings matter? Not if putting the base's back costs nothing",
                *panels) as axes:
        draw_bars(axes[0], numbers, "turned", form="{:.2g}")
        for axis in axes[1:]:
            draw_bars(axis, numbers, "accuracies", form="{:.2f}")
            axis.axhline(common(numbers, "base"), **CHANCE, label="base")


def measure_spectra(study, run):
    """`spectral_metrics` of every ΔW_t, mean over matrices, and those of Gaussian matrices."""
    def mean_metrics(sigmas):
        rows = [spectral_metrics(sigma) for sigma in sigmas]
        return {metric: fmean(row[metric] for row in rows) for metric in METRICS}

    points = [mean_metrics(sigmas) for sigmas in zip(*run.sigmas.values())]      # of every ΔW_t
    null = mean_metrics([gaussian_sigma(study.base.shapes[name]) for name in run.sigmas])
    numbers = {metric: [point[metric] for point in points] for metric in METRICS}
    return numbers | {
        "norms": run.norms.tolist(), "σ1/‖ΔW‖": points[-1]["spectral_ratio"],
        "of a Gaussian": null["spectral_ratio"], "effective rank": points[-1]["effective_rank"],
        "a Gaussian's": null["effective_rank"]}


def draw_spectra(numbers, path):
    with canvas(path, "5. How concentrated is the update? The more, the farther below the Gaussian",
                ("distance moved, ‖ΔW$_t$‖$_F$", "effective rank of ΔW$_t$, mean over matrices")
                ) as (axis,):
        draw_curves(axis, numbers, "norms", "effective_rank")
        axis.axhline(common(numbers, "a Gaussian's"), **CHANCE, label="Gaussian matrix")


def measure_alignment(study, run):
    """`alignment` and `cosines` of every ΔW_t, and those of a random walk."""
    to_end, to_rest = cosines(run.gram)
    walks = [walk_alignment(study.base.shapes[name], tuple(run.steps)) for name in run.sigmas]
    walk = np.mean(walks, axis=0).tolist()
    walk_to_end, walk_to_rest = cosines(walk_gram(run.steps))
    return {"progress": run.progress, "subspaces": run.alignment, "walk subspaces": walk,
            "to end": to_end.tolist(), "walk to end": walk_to_end.tolist(),
            "to rest": to_rest[:-1].tolist(), "walk to rest": walk_to_rest.tolist(),
            "near 10% of training, subspaces": run.alignment[run.early],
            "of a random walk": walk[run.early],
            "cosine to what is left": to_rest[run.early].item(),
            "a walk's": walk_to_rest[run.early].item()}


def draw_alignment(numbers, path):
    with canvas(path, "6. Is the final direction there early? What is above the random walk counts",
                ("t / T", "leading subspaces of ΔW$_t$ and ΔW$_T$: cos²"),
                ("t / T", "cos(ΔW$_t$, W$_T$ - W$_t$), what is left"),
                ("t / T", "cos(ΔW$_t$, ΔW$_T$), rises anyhow")) as axes:
        for axis, what in zip(axes, ("subspaces", "to rest", "to end")):
            draw_curves(axis, numbers, "progress", what)
            known = slice(len(common(numbers, what)))         # at the end nothing is left
            axis.plot(common(numbers, "progress")[known], common(numbers, f"walk {what}")[known],
                      **CHANCE, label="random walk with AdamW's momentum")
            axis.set_xscale("log", base=2)


def measure_low_rank(study, run):
    """Accuracy of W_0 and some of the directions; the top k% are scaled to one norm for all."""
    norm = min(math.sqrt(sum(other.squares[name] for name in other.sigmas)) for other in study.runs)
    update, generator = study.update(run), torch.Generator().manual_seed(0)
    svds = {name: torch.linalg.svd(update[name], full_matrices=False) for name in run.sigmas}
    noise = {name: torch.randn(update[name].shape, generator=generator) for name in run.sigmas}

    def at_one_norm(piece):
        return study.accuracy(piece, norm / get_total_norm(piece.values()).item())

    top = [at_one_norm(truncated(svds, k, "top")) for k in TOP]
    bottom = [study.accuracy(truncated(svds, k, "bottom")) for k in BOTTOM]
    return {"top": top, "bottom": bottom, "top k": TOP, "bottom k": BOTTOM, "at norm": norm,
            "top 10% in % of all": percent(top[TOP.index(10)], top[-1]),
            "the other 90% alone": bottom[BOTTOM.index(90)], "base": study.start[0],
            "Gaussian": at_one_norm(noise)}


def draw_low_rank(numbers, path):
    norm = common(numbers, "at norm")
    with canvas(path, "7. Do a few singular directions do it all?",
                ("leading directions, %", f"accuracy, scaled to norm {norm:.2f}"),
                ("trailing directions, %", "accuracy, not scaled")) as axes:
        draw_curves(axes[0], numbers, "top k", "top")
        draw_curves(axes[1], numbers, "bottom k", "bottom")
        axes[0].axhline(common(numbers, "Gaussian"), **CHANCE,
                        label="Gaussian of this norm (left), base (right)")
        axes[1].axhline(common(numbers, "base"), **CHANCE)
        axes[0].set(xscale="log", xticks=TOP, xticklabels=TOP)
        axes[0].minorticks_off()


def measure_early_rescaled(study, run):
    """Accuracy and KL of W_0 + `rescaled` ΔW_t, for t near 10% of training."""
    early, final = study.update(run, run.early), study.update(run)
    accuracy, kl = zip(*(study.assess(rescaled(early, final, beta)) for beta in BETAS))
    (start, _), (end, end_kl), at_one = study.start, run.end, accuracy[BETAS.index(1.0)]
    return {"betas": BETAS, "accuracy": accuracy, "KL": kl, "end": dict(accuracy=end, KL=end_kl),
            "% of the final accuracy at β = 1": percent(at_one, end),
            "% of the gain over the base": percent(at_one - start, end - start)}


def draw_early_rescaled(numbers, path):
    with canvas(path, "8. ΔW at 10% of training, stretched (β = 1: to the final norm): as good as "
                "the end (dotted)?", ("β", "accuracy"), ("β", "KL to the teacher, nats a token")
                ) as axes:
        axes[1].set_yscale("log")
        for axis, what in zip(axes, ("accuracy", "KL")):
            draw_curves(axis, numbers, "betas", what)
            draw_ends(axis, numbers, what, style=":")


def measure_paths(study, run):
    """W_t's place along the straight line from W_0 to W_T, and its distance from that line."""
    along = run.gram[:, -1] / run.norms[-1]                   # <ΔW_t, ΔW_T> / ‖ΔW_T‖_F
    aside = (run.gram.diagonal() - along ** 2).clamp(min=0).sqrt()
    explained = in_two_components(run.gram)
    return {"along": [0.0, *along.tolist()], "aside": [0.0, *aside.tolist()],
            "% of the variance in two components": explained, "explained": {"": explained},
            "of a random walk": in_two_components(walk_gram(run.steps))}


def draw_paths(numbers, path):
    with canvas(path, "9. Is the path from W$_0$ to W$_T$ a line? Then it stays at distance 0",
                ("distance along the line from W$_0$ to W$_T$", "distance from the line"),
                ("", "% of its variance in two components")) as axes:
        draw_curves(axes[0], numbers, "along", "aside")
        axes[0].set_aspect("equal", adjustable="datalim")
        draw_bars(axes[1], numbers, "explained", form="{:.0f}")
        axes[1].axhline(common(numbers, "of a random walk"), **CHANCE, label="random walk")


def measure_one_scalar(study, run):
    """W_0 with its logits divided by a temperature, and its answers sampled at it, beside W_T.

    What one scalar does needs no direction: the update may be no more than "sharper".
    """
    accuracy, kl = zip(*study.colder)
    (start, start_kl), (end, end_kl) = study.start, run.end
    return {"temperatures": TEMPERATURES, "accuracy": accuracy, "KL": kl,
            "end": dict(accuracy=end, KL=end_kl),
            "% of the gain in accuracy": percent(max(accuracy) - start, end - start),
            "% of the fall in KL": percent(start_kl - min(kl), start_kl - end_kl)}


def draw_one_scalar(numbers, path):
    x = "temperature of W$_0$"
    with canvas(path, "10. Does one scalar do what ΔW does? It does where black reaches the others",
                (x, "accuracy"), (x, "KL to the teacher, nats a token")) as axes:
        axes[1].set_yscale("log")
        for axis, what in zip(axes, ("accuracy", "KL")):
            axis.plot(common(numbers, "temperatures"), common(numbers, what), "k.-",
                      label="W$_0$, untrained")
            axis.invert_xaxis()
            draw_ends(axis, numbers, what)


QUESTIONS = {  # name: (how to measure it, how to draw it, what the paper says)
    "norm_scaling": (measure_norm_scaling, draw_norm_scaling,
                     "OPD gains more accuracy per unit of norm than RL"),
    "update_norms": (measure_update_norms, draw_update_norms,
                     "OPD moves the useful MLP blocks and hardly the embeddings"),
    "utility": (measure_utility, draw_utility, "an inverted U over depth, MLP above attention"),
    "embeddings": (measure_embeddings, draw_embeddings,
                   "putting them back costs OPD nothing; 1 - cosine RL .033, OPD .015 (4B)"),
    "spectra": (measure_spectra, draw_spectra,
                "OPD is more concentrated: σ1/‖ΔW‖ RL .20, OPD .26; rank 1908, 1587 (4B)"),
    "alignment": (measure_alignment, draw_alignment,
                  "OPD's subspace locks on to the final one early, RL's later"),
    "low_rank": (measure_low_rank, draw_low_rank,
                 "the top 10% of directions recover more than 95% of the accuracy"),
    "early_rescaled": (measure_early_rescaled, draw_early_rescaled,
                       "ΔW at 10% of training has some 80% of the final accuracy at β = 1"),
    "paths": (measure_paths, draw_paths,
              "OPD's path is nearly a line: most of its variance is in two components"),
    "one_scalar": (measure_one_scalar, draw_one_scalar, "nothing, it does not ask"),
}
OF_WEIGHTS = ("update_norms", "embeddings", "spectra", "alignment", "paths")
OF_PATHS = ("alignment", "early_rescaled", "paths")           # one checkpoint is no path


def ask(study) -> dict:
    """{question: {label: numbers}}."""
    answers, several = {}, all(len(run.steps) > 1 for run in study.runs)
    for name, (measure, _, _) in QUESTIONS.items():
        if (study.task or name in OF_WEIGHTS) and (several or name not in OF_PATHS):
            answers[name] = {label: interval([measure(study, run) for run in tqdm(runs, name)])
                             for label, runs in study.methods.items()}
    return answers


def show(answers, out_dir):
    """Print what the paper says and what these runs say, draw the figures."""
    for i, (name, (_, draw, paper)) in enumerate(QUESTIONS.items(), start=1):
        if name in answers:
            numbers = answers[name]
            said = [f"{key} {say(numbers, key)}" for key, s in next(iter(numbers.values())).items()
                    if "mean" in s and not isinstance(s["mean"], list)]
            print(f"\n{name}\n  paper says: {paper}\n  these runs: {'; '.join(said)}")
            draw(numbers, out_dir / f"{i}_{name}.png")
    print(f"\nThe figures are in {out_dir}")


def saved_answers(path) -> dict:
    """What `ask` gave, from analysis.json. ValueError if the file holds something else."""
    with suppress(ValueError):
        answers = json.loads(path.read_text())
        if isinstance(answers, dict) and answers.keys() <= QUESTIONS.keys():
            return answers
    raise ValueError(f"{path} has no numbers of this analyze.py")


# ------------------------------------------------------------------------------------------------
# Drawing.

CHANCE = dict(color="black", linestyle=":")                   # what chance, or the base, would give


@contextmanager
def canvas(path, title, *panels):
    """The axes to draw in, one for each (x label, y label); saved under path afterwards."""
    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.6), layout="constrained",
                                squeeze=False)
    figure.suptitle(title, fontsize=10.5, fontweight="bold")
    for axis, (x, y) in zip(axes[0], panels):
        axis.set(xlabel=x, ylabel=y)
    yield axes[0]
    legend = {}                                               # one for all panels, below them
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            legend.setdefault(label, handle)
    num_rows = math.ceil(sum(8 + len(label) for label in legend) / 150)          # of characters
    figure.legend(legend.values(), legend, loc="outside lower center", fontsize=8,
                  ncols=math.ceil(len(legend) / num_rows))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def common(numbers, key):
    """The first method's: for what is the same for all."""
    return next(iter(numbers.values()))[key]["mean"]


def draw_curves(axis, numbers, x, y, style="-"):
    """Each method's mean as a line, its interval as a band."""
    for i, (label, stats) in enumerate(numbers.items()):
        mean = np.array(stats[y]["mean"])
        xs = stats[x]["mean"][:len(mean)]
        axis.plot(xs, mean, style, marker=".", color=f"C{i}", label=label)
        if stats[y]["n"] > 1:
            low = np.array(stats[y]["low"])
            if axis.get_yscale() == "log":
                low = np.maximum(low, mean / 10)              # a band has to end somewhere
            axis.fill_between(xs, low, stats[y]["high"], color=f"C{i}", alpha=0.15, linewidth=0)


def draw_ends(axis, numbers, what, style="-"):
    for i, (label, stats) in enumerate(numbers.items()):
        axis.axhline(stats["end"][what]["mean"], color=f"C{i}", linestyle=style, label=label)


def draw_bars(axis, numbers, key, form=None):
    """A bar for each method in each group of {group: interval}. form: of the values above them."""
    width = 0.8 / len(numbers)
    for i, (label, stats) in enumerate(numbers.items()):
        groups, intervals = zip(*stats[key].items())
        mean = [s["mean"] for s in intervals]
        error = [s["high"] - s["mean"] if s["n"] > 1 else 0.0 for s in intervals]
        xs = np.arange(len(groups)) + (i - (len(numbers) - 1) / 2) * width
        bars = axis.bar(xs, mean, width, yerr=error, color=f"C{i}", label=label, capsize=2)
        if form:
            axis.bar_label(bars, fmt=form, fontsize=8, padding=2)
    axis.set_xticks(range(len(groups)), groups, rotation=45 if len(groups) > 5 else 0)
    axis.margins(y=0.12)


# ------------------------------------------------------------------------------------------------
# Which runs they are asked of, and the command.

METHODS = {"opd": "OPD", "effopd": "EffOPD", "rl": "RL", "sft": "SFT"}           # in this order
TASK = ("task", "gap", "num_ops", "digits", "hidden_size", "num_hidden_layers",
        "num_attention_heads", "base_steps", "teacher_steps", "base_lr", "teacher_lr", "eval_size")
MAY_DIFFER = ("seed", "device", "out_dir", "resume", "save_every", "cache_dir", "eval_every",
              "micro_batch_size", "rollout_batch_size")       # between seeds of one setting


def read_run(directory: Path) -> tuple[Config, str]:
    """Settings of a finished run, and what its summary calls it. ValueError if it is none."""
    try:
        stored = json.loads((directory / "config.json").read_text())
        label = json.loads((directory / "summary.json").read_text())["label"]
        del stored["versions"]
        return Config(**stored | dict(device="cpu")), METHODS.get(label, label)
    except (OSError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory} is no finished run of train.py ({first_line(error)}); "
                         "--base and --checkpoints compare weights alone") from None


def difference(a: Path, b: Path) -> str | None:
    """Why two runs are not comparable: another task, teacher or start."""
    (config_a, _), (config_b, _) = read_run(a), read_run(b)
    for name in TASK:
        if getattr(config_a, name) != getattr(config_b, name):
            return f"have --{name} {getattr(config_a, name)} and {getattr(config_b, name)}"
    starts = [run / "checkpoints" / "step_000000" / "model.safetensors" for run in (a, b)]
    return None if filecmp.cmp(*starts, shallow=False) else "start from different weights"


def expand(directory: Path) -> list[Path]:
    """A run's directory, or those of the runs inside a race's or a sweep's."""
    starts = directory.rglob("checkpoints/step_000000")       # not of a run that kept only the end
    return sorted(path.parents[1] for path in starts) or [directory]


def newest_runs() -> list[Path]:
    """The newest run of each method in runs/ that can be compared with the newest of all."""
    found = [run for run in expand(Path("runs")) if (run / "summary.json").exists()]
    found.sort(key=lambda run: (run / "summary.json").stat().st_mtime, reverse=True)
    newest = {}
    for run in found:
        with suppress(ValueError):                            # a run of other models and data
            label = read_run(run)[1]
            first = next(iter(newest.values()), run)
            if label not in newest and not difference(run, first):
                newest[label] = run
    if not newest:
        raise ValueError("there is no finished run in runs/; python train.py makes four")
    if "RL" not in newest:
        print("To compare with RL, as the paper does: python train.py --method rl --lr 3e-4")
    return list(newest.values())


def labels_of(runs: dict) -> dict:
    """{directory: label} of {directory: (config, name)}; equal labels are seeds of one setting.

    A label is the name, and the settings in which the runs of this name differ.
    """
    labels = {}
    for directory, (config, name) in runs.items():
        alike = [other for other, its_name in runs.values() if its_name == name]
        for setting, value in vars(config).items():
            differs = any(getattr(other, setting) != value for other in alike)
            if differs and setting not in MAY_DIFFER:
                name += f", {setting} {value}"
        labels[directory] = name
    return labels


def study_runs(directories, device, num_problems) -> Study:
    runs = {run: read_run(run) for path in directories for run in expand(path)}
    labels, methods = labels_of(runs), defaultdict(list)
    first = next(iter(runs))
    base = Checkpoint(first / "checkpoints" / "step_000000")
    for run in sorted(runs, key=lambda run: list(METHODS).index(runs[run][0].method)):
        different = difference(run, first)
        if different:
            raise ValueError(f"{run} and {first} {different}: analyse them apart")
        print(f"{labels[run]}: {run}")
        end = runs[run][0].steps
        steps = sorted(int(path.name[5:]) for path in run.glob("checkpoints/step_??????"))
        steps = [step for step in steps if 0 < step < end]
        names = [*(f"step_{step:06d}" for step in steps), "final"]
        points = [Checkpoint(run / "checkpoints" / name) for name in names]
        methods[labels[run]].append(Trajectory(base, points, [*steps, end]))
    config = replace(runs[first][0], device=device)
    task, model, teacher, _ = load(config)
    if any((p.cpu() != base.read(name)).any() for name, p in model.named_parameters()):
        warn(f"{config.cache_dir} has another student than these runs, and another teacher: read "
             "the KLs with care")
    problems = evaluation_problems(config, task)[:num_problems]
    return Study(base, methods, task, model, teacher, problems)


def study_checkpoints(directory, directories) -> Study:
    """Weights alone, as one run; its steps are the numbers that end the names, if these rise."""
    base, points = Checkpoint(directory), [Checkpoint(path) for path in directories]
    steps = [int("0" + re.search(r"\d*$", Path(path).name)[0]) for path in directories]
    if steps[0] == 0 or steps != sorted(set(steps)):
        steps = list(range(1, len(points) + 1))
    return Study(base, {"checkpoints": [Trajectory(base, points, steps)]})


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def stop(message):
    print(f"analyze.py: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def parse(args):
    parser = argparse.ArgumentParser(prog="analyze.py", allow_abbrev=False,
                                     description=__doc__.split("\n\n")[0])
    parser.error = stop
    parser.add_argument("runs", nargs="*", type=Path, help="directories of runs, races or sweeps "
                        "(default: the newest of each method in runs/)")
    parser.add_argument("--base", help="a checkpoint's directory: what others were trained from")
    parser.add_argument("--checkpoints", nargs="+", help="its later selves, the last one last")
    parser.add_argument("--redraw", type=Path, help="an analysis.json, whose figures to draw again")
    parser.add_argument("--out_dir", type=Path, default="analysis", help="(default: analysis)")
    parser.add_argument("--problems", type=int, default=400, help="in an accuracy (default: 400)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(args)
    if bool(args.base) != bool(args.checkpoints):
        stop("--base DIR and --checkpoints DIR1 DIR2 ... go together")
    if sum(map(bool, (args.runs, args.base, args.redraw))) > 1 or args.problems < 1:
        stop("give runs, or --base and --checkpoints, or --redraw, or nothing; --problems above 0")
    return args


def main(args=None):
    args = parse(args)
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        if args.redraw:
            return show(saved_answers(args.redraw), args.out_dir)
        if args.base:
            study = study_checkpoints(args.base, args.checkpoints)
        else:
            study = study_runs(args.runs or newest_runs(), args.device, args.problems)
        answers = ask(study)
        write_json(args.out_dir / "analysis.json", answers)
        show(answers, args.out_dir)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        stop(first_line(error))


if __name__ == "__main__":
    main()
