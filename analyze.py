"""See the foresight: where an update goes, how concentrated it is, and when its direction settles.

    python analyze.py                                       # the newest run of each method under runs/
    python analyze.py runs/opd-s0 runs/opd-s1 runs/rl-s0    # these; runs alike but for the seed: mean, 95% interval
    python analyze.py --base DIR --checkpoints DIR1 DIR2    # any Hugging Face checkpoints, from their weights alone
    python analyze.py --dv runs/effopd-s0 runs/effopd-s1    # a tenth question: how many problems must D_v have?

Nine questions of "Learning to Foresee" (arXiv:2605.11739, sections 3 and 4): a figure each in analysis/, the numbers in
analysis/analysis.json, and on the screen what the paper says and what these runs say. ΔW_t = W_t - W_0, T is the last
step, "matrices" are the two-dimensional weights of attention and MLP.

    1 accuracy of W_0 + αΔW_T                     6 alignment of ΔW_t with ΔW_T over training
    2 ‖ΔW_T‖² by layer and module                 7 leading or trailing singular directions only
    3 utility of a window of layers               8 an early ΔW_t, scaled to the final norm
    4 the base's embeddings put back              9 the paths, in their two principal components
    5 spectra of ΔW_T

Beside them: Gaussian matrices (5, 7) and random walks (6, 9) as the null, and comparisons at equal norm and accuracy,
since methods stop at different places. Weights alone answer 2, the cosine of 4, 5, 6 and 9.

The appendix reads, measures, draws, asks the tenth question, and has the command. N counts the checkpoints of all runs;
r = min(m, n) for a matrix (m, n).
"""

import argparse
import filecmp
import json
import math
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")              # before torch is imported: see train.py

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from effopd import EffOPD, basis_alignment, module_of, spectral_metrics
from train import (Chains, Config, bootstrap, evaluate, evaluation_problems, has_use, kl_of, load, load_models, pack,
                   pick_device, split, spread, states, write_json)

plt.switch_backend("Agg")                                    # draws into files, without a screen

ALPHAS = (0.1, 0.2, 0.4, 0.6, 0.8)                           # 1: fractions of the update, beside 0 and 1
KS = range(1, 21)                                            # 6: the paper averages the alignment over these
TOP, BOTTOM = (1, 5, 10, 25, 50, 100), (25, 50, 75, 90, 95, 99)      # 7: percent of the singular directions
BETAS = (0.4, 0.8, 1.0, 1.2, 1.6)                            # 8: 0 is the early update, 1 is the final norm
METRICS = ("spectral_norm", "spectral_ratio", "effective_rank", "stable_rank", "top1_ratio")
MODULES = ("q", "k", "v", "o", "gate", "up", "down", "norm")
MLP = ("gate", "up", "down")


# ----------------------------------------------------------------------------------------------------------------
# Metrics, from the weights alone.

class Weights(NamedTuple):
    """What `read_weights` keeps of the updates ΔW_i = W_i - W_0 of N checkpoints i."""
    gram: dict                 # name: (N, N) float64, <ΔW_i, ΔW_j>; norms, cosines and PCA come from it
    svd: dict                  # matrix name: for each i (U (m, k), σ (r,), Vᵀ (k, n)), k = 20; at a run's end r
    embedding_cosine: list     # for each i: mean cosine of base and trained embedding rows, of rows that moved
    shape: dict                # name: shape

    @property
    def num_layers(self):
        return 1 + max(module_of(name)[0] for name in self.svd)

    def norm(self, i, names=None) -> float:
        """‖ΔW_i‖_F, of all tensors or of these."""
        return sum(self.gram[name][i, i].item() for name in (self.gram if names is None else names)) ** 0.5

    def norm_shares(self, i) -> Counter:
        """2: ‖ΔW_i of a (layer, module)‖² / ‖ΔW_i‖², of each; together 1."""
        shares, whole = Counter(), self.norm(i) ** 2
        for name, gram in self.gram.items():
            shares[module_of(name)] += gram[i, i].item() / whole
        return shares

    def sigmas(self, i) -> dict:
        """name: singular values (r,) of ΔW_i, of the matrices that moved."""
        return {name: svds[i][1] for name, svds in self.svd.items() if svds[i][1][0] > 0}

    def gaussians(self) -> dict:
        """The same of Gaussian matrices of norm 1: what no structure looks like."""
        return {name: gaussian_sigma(self.shape[name]) for name in self.svd}

    def spectra(self, i) -> dict:
        """5: METRICS, mean and standard deviation over ΔW_i's matrices, mean over Gaussian ones of the same norms."""
        sigmas, null = self.sigmas(i), self.gaussians()
        rows = [spectral_metrics(sigma) for sigma in sigmas.values()]
        gaussian = [spectral_metrics(null[name] * sigma.norm()) for name, sigma in sigmas.items()]
        return {m: {"mean": float(np.mean([row[m] for row in rows])), "sd": float(np.std([row[m] for row in rows])),
                    "gaussian": float(np.mean([row[m] for row in gaussian]))} for m in METRICS}

    def alignment(self, i, j):
        """6: ‖U_k(i)ᵀ U_k(j)‖_F² / k at k = 1..20, mean over matrices and over left and right vectors: (20,)."""
        pairs = [(svds[i], svds[j]) for svds in self.svd.values() if svds[i][1][0] > 0 and svds[j][1][0] > 0]
        return np.mean([[(basis_alignment(U_i, U_j, k) + basis_alignment(Vh_i.T, Vh_j.T, k)) / 2 for k in KS]
                        for (U_i, _, Vh_i), (U_j, _, Vh_j) in pairs], axis=0)


def cosines(gram, i, j) -> tuple[float, float]:
    """6: cos(ΔW_i, ΔW_j), which rises by construction, and cos(ΔW_i, W_j - W_i), the way not yet gone; 0 if none is."""
    rest = gram[j, j] - 2 * gram[i, j] + gram[i, i]          # ‖W_j - W_i‖²
    return ((gram[i, j] / (gram[i, i] * gram[j, j]).sqrt()).item(),
            ((gram[i, j] - gram[i, i]) / (gram[i, i] * rest).sqrt()).item() if rest > 1e-12 * gram[j, j] else 0.0)


def principal_components(gram):
    """9: PCA of points given by their inner products (n, n) -> coordinates (n, n), shares of the variance (n,)."""
    gram = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()        # as if the points had been centred
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    return vectors * values.sqrt(), values / values.sum()


# ----------------------------------------------------------------------------------------------------------------
# Runs, and interventions on them: weights and updates as dicts of tensors by name.

@dataclass(eq=False)
class Run:
    label: str                 # the same for all seeds
    directory: Path
    steps: list                # of its checkpoints, the base left out
    points: range              # their places among the N
    measured: dict = field(default_factory=dict)             # intervention: (accuracy, KL)

    @property
    def last(self):
        return self.points[-1]

    @property
    def early(self):           # the checkpoint nearest to 10% of training
        return min(range(len(self.steps)), key=lambda i: abs(self.steps[i] - 0.1 * self.steps[-1]))

    def at(self, i):           # (accuracy, KL) of the run's checkpoint i
        return self.measured["step", self.steps[i]]

    def accuracy(self, *what):
        return self.measured[what][0]

    @property
    def final(self):
        return self.at(-1)[0]


def add(base, update, alpha=1.0) -> dict:
    """1: base + α update; what the update does not name stays at the base."""
    return {name: w + alpha * update[name] if name in update else w for name, w in base.items()}


def in_window(name, layer, reach, part) -> bool:
    """3: whether a matrix is of this part ("mlp" or "attention") of layers layer - reach .. layer + reach."""
    own = "attention" if "attn" in name or "attention" in name else "mlp"
    return own == part and abs(module_of(name)[0] - layer) <= reach


def window(update, layer, reach, part) -> dict:
    return {name: d for name, d in matrices(update).items() if in_window(name, layer, reach, part)}


def truncated(svds, percent, end) -> dict:
    """7: Σ σ_i u_i v_iᵀ over the leading ("top") or trailing ("bottom") percent of each matrix's directions."""
    kept = {}
    for name, (U, sigma, Vh) in svds.items():
        k = directions_in(percent, sigma)
        part = slice(0, k) if end == "top" else slice(len(sigma) - k, None)
        kept[name] = U[:, part] * sigma[part] @ Vh[part]
    return kept


def rescaled(early, final, beta) -> dict:
    """8: ΔW_early · [1 + β (‖ΔW_T‖ / ‖ΔW_early‖ - 1)], tensor by tensor."""
    return {name: d * (1 + beta * (final[name].norm() / d.norm() - 1)) if d.any() else d for name, d in early.items()}


def interventions(base, delta_at, svds, run, common_norm, num_layers) -> dict:
    """{what: function that makes the weights to be measured}. delta_at(i): reads ΔW of the run's checkpoint i."""
    final = delta_at(len(run.steps) - 1)                     # the only one that stays in memory
    trained = add(base, final)
    jobs = {("step", step): lambda i=i: add(base, delta_at(i)) for i, step in enumerate(run.steps)}
    jobs |= {("alpha", alpha): partial(add, base, final, alpha) for alpha in ALPHAS}             # 1: W_0 + αΔW_T
    for part in ("mlp", "attention"):
        for layer in range(num_layers):                                                          # 3: W_0 + ΔW_window
            piece = window(final, layer, window_reach(num_layers), part)
            jobs["inject", part, layer] = partial(add, base, piece)
            jobs["leave out", part, layer] = partial(add, trained, piece, -1.0)                  # W_T - ΔW_window
    rest = {name: d for name, d in final.items() if module_of(name)[1] not in ("embedding", "head")}
    jobs["embeddings back",] = partial(add, base, rest)                                          # 4
    jobs |= {("top", k): lambda k=k: add(base, scaled_to(truncated(svds, k, "top"), common_norm)) for k in TOP}    # 7
    jobs |= {("bottom", k): lambda k=k: add(base, truncated(svds, k, "bottom")) for k in BOTTOM}
    jobs |= {("early", run.steps[i], beta): lambda i=i, beta=beta: add(base, rescaled(delta_at(i), final, beta))
             for i in {0, run.early} for beta in BETAS}                                          # 8
    return jobs


# ----------------------------------------------------------------------------------------------------------------
# A study: all that the questions are asked of.

class Study(NamedTuple):
    """`study_runs` makes it: reads the weights, measures every intervention, picks checkpoints to compare."""
    weights: Weights
    runs: list                 # of Run
    base: tuple                # (accuracy, KL) of the base; () from weights alone
    noise: tuple               # the same of a Gaussian update, of the norm that 7 scales to
    picks: dict                # "end", "equal steps", "equal norm", "equal accuracy": {run: the point nearest to it}
    out_dir: Path

    @property
    def groups(self) -> dict:
        """{label: its Runs}, in order."""
        labels = dict.fromkeys(run.label for run in self.runs)
        return {label: [run for run in self.runs if run.label == label] for label in labels}

    @property
    def longest(self) -> Run:
        return max(self.runs, key=lambda run: run.steps[-1])

    def each(self, f) -> dict:
        """{label: {mean, half of the 95% interval, n} of f(run) over seeds}."""
        return {label: interval([f(run) for run in group]) for label, group in self.groups.items()}

    @property
    def target(self) -> float:
        """An accuracy that all methods reach."""
        return min(s["mean"] for s in self.each(lambda run: run.final).values())

    def compared(self, f) -> dict:
        """{pick: `each` of f(point)}."""
        return {pick: self.each(lambda run: f(point[run])) for pick, point in self.picks.items()}

    def every(self, f) -> dict:
        """{directory: f(run)}, for analysis.json."""
        return {run.directory.as_posix(): f(run) for run in self.runs}


# ----------------------------------------------------------------------------------------------------------------
# The nine questions. Each draws its figure and returns (numbers, what these runs say).

def norm_scaling(study):
    """1: accuracy of W_0 + αΔW_T, against α and against ‖αΔW_T‖_F."""
    alphas, size = np.array([0.0, *ALPHAS, 1.0]), {run: study.weights.norm(run.last) for run in study.runs}
    smallest, target = min(size.values()), study.target

    def ys(run):
        return [study.base[0], *(run.accuracy("alpha", alpha) for alpha in ALPHAS), run.final]

    figure, axes = canvas("1. Accuracy per unit of update norm: the higher on the right, the more for its norm",
                          ("along the update", "α", "accuracy of W$_0$ + αΔW"),
                          ("against the distance moved", "‖αΔW‖$_F$", "accuracy"))
    draw(axes[0], study, lambda run: (alphas, ys(run)))
    draw(axes[1], study, lambda run: (alphas * size[run], ys(run)), named=True)
    axes[1].axvline(smallest, color="grey", linestyle=":", label="equal norm")
    axes[1].axhline(target, color="grey", linestyle="--", linewidth=1, label="equal accuracy")
    save(figure, study.out_dir / "1_norm_scaling.png")
    at_norm = study.each(lambda run: float(np.interp(smallest, alphas * size[run], ys(run))))
    to_accuracy = study.each(lambda run: crossing(alphas * size[run], ys(run), target))
    return (dict(norm=study.each(size.get), equal_norm=smallest, equal_accuracy=target, accuracy_at_equal_norm=at_norm,
                 norm_to_equal_accuracy=to_accuracy),
            f"accuracy at norm {smallest:.2f}: {say(at_norm)}; norm to accuracy {target:.2f}: {say(to_accuracy)}")


def update_norms(study):
    """2: ‖ΔW_T of a layer's module‖² / ‖ΔW_T‖²; by chance, as many % as it has of the parameters."""
    weights, layers = study.weights, study.weights.num_layers
    shares = {run: weights.norm_shares(run.last) for run in study.runs}
    top = 100 * max(share for of in shares.values() for (layer, _), share in of.items() if layer is not None)
    figure, axes = canvas("2. Share of ‖ΔW‖² by layer and module, in %: where did each method put its update?",
                          *((label.replace(", ", "\n"), "", "layer") for label in study.groups),
                          height=1.8 + 0.16 * max(6, layers))
    for axis, group in zip(axes, study.groups.values()):
        table = np.array([[100 * np.mean([shares[run][layer, module] for run in group]) for module in MODULES]
                          for layer in range(layers)])
        image = heatmap(axis, table, top)
        axis.set_xlabel(f"embedding {100 * np.mean([shares[run][None, 'embedding'] for run in group]):.1f}%")
    figure.colorbar(image, ax=axes, label="% of ‖ΔW‖²", shrink=0.8)
    save(figure, study.out_dir / "2_update_norms.png")
    in_mlp = study.compared(lambda i: 100 * sum(v for (_, m), v in weights.norm_shares(i).items() if m in MLP))
    embedding = study.compared(lambda i: 100 * weights.norm_shares(i)[None, "embedding"])
    sizes = {name: math.prod(shape) for name, shape in weights.shape.items()}
    null = 100 * sum(n for name, n in sizes.items() if module_of(name)[1] in MLP) / sum(sizes.values())
    share = study.every(lambda run: {f"{layer} {m}".removeprefix("None "): v for (layer, m), v in shares[run].items()})
    return (dict(mlp_percent=in_mlp, mlp_percent_of_parameters=null, embedding_percent=embedding, share=share),
            f"% of ‖ΔW‖² in the MLPs ({null:.0f} of the parameters): {say(in_mlp['end'], '{:.0f}')}; in the embedding: "
            f"{say(embedding['end'], '{:.1f}')}")


def utility(study):
    """3: gain, accuracy of W_0 + ΔW_window less that of W_0; gain / ‖ΔW_window‖_F; loss, from W_T to W_T - ΔW_window.

    And the share of ‖ΔW_T‖² that sits in the half of the windows with the lowest gain per norm.
    """
    weights, layers = study.weights, study.weights.num_layers
    reach, places = window_reach(layers), [(part, layer) for part in ("mlp", "attention") for layer in range(layers)]

    def sizes(run, reach):                                    # (places,)
        return np.array([weights.norm(run.last, [name for name in weights.svd if in_window(name, layer, reach, part)])
                         for part, layer in places])

    def accuracies(run, what):                                # (places,)
        return np.array([run.accuracy(what, *place) for place in places])

    gain = {run: accuracies(run, "inject") - study.base[0] for run in study.runs}
    worth = {run: gain[run] / np.maximum(sizes(run, reach), 1e-30) for run in study.runs}         # 0: not moved
    loss = {run: run.final - accuracies(run, "leave out") for run in study.runs}
    span = f"{2 * reach + 1} layers" if reach else "one layer"
    figure, axes = canvas(f"3. Utility of windows of {span}: inverted U? MLP (solid) above attention (dashed)?",
                          *((name, "centre of the window, layer", y) for name, y in (
                              ("inject only", "accuracy gained"), ("the same, per norm", "accuracy / ‖ΔW‖$_F$"),
                              ("leave one out", "accuracy lost"))))
    for axis, of in zip(axes, (gain, worth, loss)):
        draw(axis, study, lambda run: (range(layers), of[run][:layers]), named=of is gain)
        draw(axis, study, lambda run: (range(layers), of[run][layers:]), dashed=True)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(0, layers, 1 if layers <= 12 else 4))
    save(figure, study.out_dir / "3_utility.png")
    low = np.mean(list(worth.values()), axis=0).argsort(kind="stable")[:layers]       # one ranking for all methods
    in_low = study.each(lambda run: 100 * sum(sizes(run, 0)[low] ** 2) / weights.norm(run.last, weights.svd) ** 2)
    mlp, attention = study.each(lambda run: max(gain[run][:layers])), study.each(lambda run: max(gain[run][layers:]))
    return (dict(window=2 * reach + 1, percent_in_low_utility=in_low, best_mlp=mlp, best_attention=attention,
                 low_utility=[places[i] for i in low], gain_per_norm=study.every(lambda run: worth[run].tolist())),
            f"best window, MLP: {say(mlp)}; attention: {say(attention)}; % of ‖ΔW‖² in the low-utility half: "
            f"{say(in_low, '{:.0f}')}")


def embeddings(study):
    """4: 1 - cos(row of E_0, row of E_t), mean over rows that moved; accuracy of W_T with W_0's embedding and head."""
    cosine = study.weights.embedding_cosine
    numbers = dict(cosine=study.compared(lambda i: cosine[i]))
    here = f"cosine {say(numbers['cosine']['end'], '{:.4f}')}"
    panels = [("base and trained rows", "optimiser step", "1 - cosine, mean over rows in use"),
              ("the base's embeddings put back (pale: as trained)", "", "accuracy")]
    figure, axes = canvas("4. Embeddings: they hardly matter if the left is small and the bars on the right are equal",
                          *panels[:2 if study.base else 1])
    draw(axes[0], study, lambda run: (run.steps, [1 - cosine[i] for i in run.points]), named=True)
    axes[0].set_xscale("log", base=2)
    if study.base:
        trained, back = study.each(lambda run: run.final), study.each(lambda run: run.accuracy("embeddings back"))
        bars(axes[1], trained, offset=-0.2, alpha=0.4)
        bars(axes[1], back, offset=0.2)
        axes[1].axhline(study.base[0], color="grey", linestyle=":", label="base")
        numbers |= dict(accuracy_as_trained=trained, accuracy_with_base_embeddings=back)
        here += f"; accuracy with the base's put back: {say(back)} (as trained: {say(trained)})"
    save(figure, study.out_dir / "4_embeddings.png")
    return numbers, here


def spectrum(study):
    """5: ΔW_T's singular values σ, σ1 / ‖ΔW_T‖_F and effective rank exp(-Σ p log p), p = σ / Σσ; mean over matrices."""
    weights, gaussian, grid = study.weights, study.weights.gaussians(), np.linspace(0, 1, 101)
    rank = float(np.mean([len(sigma) for sigma in gaussian.values()]))
    rows = {i: weights.spectra(i) for point in study.picks.values() for i in point.values()}
    table = {metric: {what: study.compared(lambda i: rows[i][metric][what]) for what in ("mean", "sd", "gaussian")}
             for metric in METRICS}

    def level(of):                                            # mean over matrices of any rank: (101,)
        return np.mean([np.interp(grid, np.linspace(0, 1, len(s)), s / s.norm()) for s in of.values()], axis=0)

    other = list(study.picks)[-1]                             # equal accuracy; from weights alone the end itself
    figure, axes = canvas("5. Spectra of ΔW, concentrated: steep on the left, high in the middle, low on the right",
                          ("singular values, mean over matrices", "i / r", "σ$_i$ / ‖ΔW‖$_F$"),
                          (f"spectral ratio (pale: {other})", "", "σ$_1$ / ‖ΔW‖$_F$"),
                          (f"effective rank (pale: {other})", "", f"exp(entropy of σ), of {rank:.0f}"))
    axes[0].set_yscale("log")
    draw(axes[0], study, lambda run: (grid, level(weights.sigmas(run.last))), named=True, marker="")
    axes[0].plot(grid, level(gaussian), "k:", label="Gaussian")
    axes[0].set_ylim(bottom=1e-3)
    null = {metric: table[metric]["gaussian"]["end"][study.runs[0].label]["mean"] for metric in METRICS}
    for axis, metric, form in ((axes[1], "spectral_ratio", "{:.2f}"), (axes[2], "effective_rank", "{:.0f}")):
        bars(axis, table[metric]["mean"]["end"], form, offset=-0.2)
        bars(axis, table[metric]["mean"][other], form, offset=0.2, alpha=0.4)
        axis.axhline(null[metric], color="black", linestyle=":", label="Gaussian")
    save(figure, study.out_dir / "5_spectra.png")
    ratio, effective = table["spectral_ratio"]["mean"], table["effective_rank"]["mean"]
    return (dict(mean_rank=rank) | table,
            f"σ1/‖ΔW‖ {say(ratio['end'])}; effective rank of {rank:.0f}: {say(effective['end'], '{:.0f}')} (Gaussian "
            f"{null['effective_rank']:.0f}); at {other}: {say(ratio[other])}; {say(effective[other], '{:.0f}')}")


def directions(study):
    """6: `alignment` of ΔW_t with ΔW_T, and the two `cosines`, at every checkpoint t; beside a random walk's."""
    weights, gram = study.weights, sum(study.weights.gram.values())
    by_k = {run: np.array([weights.alignment(i, run.last) for i in run.points]) for run in study.runs}   # (steps, 20)
    end, rest = ({run: [cosines(gram, i, run.last)[to] for i in run.points] for run in study.runs} for to in (0, 1))
    longest, early = study.longest, study.longest.early
    walk = walk_alignment([weights.shape[name] for name in weights.svd], longest.steps)                  # (steps, 20)
    walk_end = np.sqrt(np.array(longest.steps) / longest.steps[-1])              # a random walk's E cos = sqrt(t / T)
    figure, axes = canvas("6. Is the final direction there early? Yes if above the random walk, and dashed above 0",
                          ("subspaces of ΔW$_t$ and ΔW$_T$, k = 1..20", "optimiser step t", "mean squared cosine"),
                          ("the same at 10% of training", "k leading directions", "mean squared cosine"),
                          ("to the end (dashed: to what is left)", "optimiser step t", "cosine of ΔW$_t$"))
    draw(axes[0], study, lambda run: (run.steps, by_k[run].mean(1)), named=True)
    draw(axes[1], study, lambda run: (KS, by_k[run][run.early]))
    draw(axes[2], study, lambda run: (run.steps, end[run]))
    draw(axes[2], study, lambda run: (run.steps[:-1], rest[run][:-1]), dashed=True)
    axes[0].plot(longest.steps, walk.mean(1), "k:", label="random walk")
    axes[1].plot(KS, walk[early], "k:")
    axes[2].plot(longest.steps, walk_end, "k:")
    axes[2].axhline(0, color="black", linewidth=0.8)
    for axis in axes[::2]:
        axis.set_xscale("log", base=2)
    save(figure, study.out_dir / "6_alignment.png")
    aligned, to_end, to_rest = (study.each(lambda run: float(np.mean(of[run][run.early]))) for of in (by_k, end, rest))
    runs = study.every(lambda run: dict(steps=run.steps, alignment_by_k=by_k[run].tolist(),
                                        cosine_to_the_end=end[run], cosine_to_the_rest=rest[run]))
    null = dict(steps=longest.steps, alignment_by_k=walk.tolist(), cosine_to_the_end=walk_end.tolist())
    return (dict(alignment=aligned, cosine_to_the_end=to_end, cosine_to_the_rest=to_rest, random_walk=null, runs=runs),
            f"near 10% of training (step {longest.steps[early]}): alignment {say(aligned)} (random walk "
            f"{walk[early].mean():.2f}); cosine to the end {say(to_end)} (random walk {walk_end[early]:.2f}), to what "
            f"is left {say(to_rest)} (random walk 0)")


def low_rank(study):
    """7: accuracy of W_0 + Σ σ_i u_i v_iᵀ over each matrix's leading k% (at the runs' smallest norm) or trailing k%."""
    def kept(of):                                             # share of the norm in the top k%, mean over matrices
        return [float(np.mean([s[:directions_in(k, s)].norm() / s.norm() for s in of.values()])) for k in TOP]

    def gained(run, k):
        return run.accuracy("top", k) - study.base[0]

    figure, axes = canvas("7. Singular directions: do the top 10% of them do the work of all, and the others none?",
                          ("top k%, scaled to one norm for all", "k, % of the directions", "accuracy"),
                          ("bottom k%, not scaled", "k, % of the directions", "accuracy"),
                          ("norm in the top k%", "k, % of the directions", "‖ΔW$_k$‖ / ‖ΔW‖"))
    draw(axes[0], study, lambda run: (TOP, [run.accuracy("top", k) for k in TOP]), named=True)
    draw(axes[1], study, lambda run: (BOTTOM, [run.accuracy("bottom", k) for k in BOTTOM]))
    draw(axes[2], study, lambda run: (TOP, kept(study.weights.sigmas(run.last))))
    axes[2].plot(TOP, kept(study.weights.gaussians()), "k:", label="Gaussian")
    axes[0].axhline(study.noise[0], color="black", linestyle=":", label="Gaussian")
    axes[1].axhline(study.base[0], color="grey", linestyle="--", linewidth=1, label="base")
    log_ticks(axes[::2], TOP)
    save(figure, study.out_dir / "7_low_rank.png")
    share = study.each(lambda run: 100 * run.accuracy("top", 10) / max(run.accuracy("top", 100), 1e-9))
    gain = study.each(lambda run: 100 * gained(run, 10) / gained(run, 100) if gained(run, 100) > 0 else None)
    rest = study.each(lambda run: run.accuracy("bottom", 90))
    return (dict(gaussian_update=study.noise[0], top_10_of_accuracy=share, top_10_of_gain=gain, bottom_90=rest),
            f"top 10% at equal norm, % of the accuracy: {say(share, '{:.0f}')}; of the gain: {say(gain, '{:.0f}')}; "
            f"the other 90% alone: accuracy {say(rest)} (base {study.base[0]:.2f})")


def early_rescaled(study):
    """8: accuracy and KL(π || π*) of W_0 + ΔW_t [1 + β (‖ΔW_T‖ / ‖ΔW_t‖ - 1)], t near 10% of training, or the first."""
    betas, one = [0.0, *BETAS], 1 + BETAS.index(1.0)

    def ys(run, i, what):                                     # what: 0 accuracy, 1 KL
        return [run.at(i)[what], *(run.measured["early", run.steps[i], beta][what] for beta in BETAS)]

    figure, axes = canvas("8. An early update stretched to the final norm (β = 1): is it as good as the end (dotted)?",
                          ("solid: ΔW at 10% of training; dashed: at step 1", "β", "accuracy"),
                          ("the same (bands end at a tenth of the mean)", "β", "KL to the teacher, nats a token"))
    axes[1].set_yscale("log")
    for what, axis in enumerate(axes):
        draw(axis, study, lambda run: (betas, ys(run, run.early, what)), named=what == 0)
        draw(axis, study, lambda run: (betas, ys(run, 0, what)), dashed=True)
        for i, s in enumerate(study.each(lambda run: run.at(-1)[what]).values()):
            axis.axhline(s["mean"], color=f"C{i}", linestyle=":")
    save(figure, study.out_dir / "8_early_rescaled.png")
    share = study.each(lambda run: 100 * ys(run, run.early, 0)[one] / max(run.final, 1e-9))
    first = study.each(lambda run: 100 * ys(run, 0, 0)[one] / max(run.final, 1e-9))
    best = study.each(lambda run: betas[int(np.argmax(ys(run, run.early, 0)))])
    kl = study.each(lambda run: ys(run, run.early, 1)[one])
    runs = study.every(lambda run: dict(final=run.at(-1)) | {
        str(run.steps[i]): dict(accuracy=ys(run, i, 0), kl=ys(run, i, 1)) for i in {0, run.early}})
    return (dict(betas=betas, percent_of_final_accuracy=share, from_step_1=first, best_beta=best, kl=kl, runs=runs),
            f"% of the final accuracy at β = 1, from 10% of training: {say(share, '{:.0f}')}; from step 1: "
            f"{say(first, '{:.0f}')}; best β {say(best, '{:.1f}')}; KL {study.base[1]:.3f} at the base, then "
            f"{say(kl, '{:.3f}')}")


def paths(study):
    """9: PCA of W_0 and the W_t of all runs; and of each run's own, the variance in its first two components."""
    gram = F.pad(sum(study.weights.gram.values()), (1, 0, 1, 0))                 # with the base, ΔW = 0
    on = {run: [0, *(i + 1 for i in run.points)] for run in study.runs}

    def in_two(gram):
        return 100 * principal_components(gram)[1][:2].sum().item()

    steps = torch.tensor([0, *study.longest.steps]).double()
    null = in_two(torch.minimum(steps[:, None], steps))                          # E <ΔW_s, ΔW_t> of a random walk
    explained = study.each(lambda run: in_two(gram[on[run]][:, on[run]]))
    coordinates, variance = principal_components(gram)                           # of all runs together
    figure, axes = canvas("9. The paths: straight on the left, near 100% and above the random walk on the right",
                          ("all runs, from the base (star)", f"first component ({100 * variance[0]:.0f}% of variance)",
                           f"second component ({100 * variance[1]:.0f}%)"),
                          ("variance of a run's own path", "", "% in two components"))
    for i, group in enumerate(study.groups.values()):
        for run in group:
            axes[0].plot(*coordinates[on[run], :2].T, ".-", color=f"C{i}", label=run.label if run is group[0] else None)
            axes[0].plot(*coordinates[run.last + 1, :2], "o", color=f"C{i}")
    axes[0].plot(*coordinates[0, :2], "k*", markersize=12)
    bars(axes[1], explained, "{:.0f}", width=0.8)
    axes[1].axhline(null, color="black", linestyle=":", label="random walk")
    save(figure, study.out_dir / "9_paths.png")
    return (dict(explained_percent=explained, random_walk_percent=null,
                 coordinates=study.every(lambda run: coordinates[on[run], :2].tolist())),
            f"% of a path's variance in two components: {say(explained, '{:.0f}')} (random walk {null:.0f})")


# ================================================================================================================
# Appendix. The story ends here; what follows is to look things up in.
# ================================================================================================================

METHODS = {"opd": "OPD", "effopd": "EffOPD", "rl": "RL", "sft": "SFT"}                   # in the paper's order
SEEDS = {"seed", "out_dir", "resume", "cache_dir", "device", "preset", "save_every", "keep_last", "eval_every",
         "offload", "compile", "micro_batch_size", "rollout_batch_size", "gradient_checkpointing"}  # seeds may differ
BLOCK = 2 ** 24                                              # numbers read at a time: some 300 MB
KL_ANSWERS = 100                                             # a KL is measured on so many of an accuracy's answers
DV_SIZES = (10, 25, 50, 100, 200, 400)                       # 10: problems in D_v


# ----------------------------------------------------------------------------------------------------------------
# Reading checkpoints and runs, and measuring.

class Checkpoint:
    """A Hugging Face checkpoint on disk, in one file or several: a tensor's rows are read when they are asked for."""

    def __init__(self, directory):
        self.directory, slices = Path(directory), {}
        if not self.directory.is_dir():
            raise ValueError(f"there is no directory {directory}")
        for path in sorted(self.directory.glob("model*.safetensors")):
            try:
                file = safe_open(path, framework="pt")       # maps the file, reads nothing yet
            except SafetensorError as error:
                raise ValueError(f"{path}: {error}") from None
            slices |= {name: file.get_slice(name) for name in file.keys()}
        if not slices:
            raise ValueError(f"{directory} holds no model*.safetensors: not a Hugging Face checkpoint")
        config = self.directory / "config.json"
        if config.is_file() and json.loads(config.read_text()).get("tie_word_embeddings"):
            slices.pop("lm_head.weight", None)               # one entry per storage: the embedding is the head
        self.slices = {name: s for name, s in slices.items() if s.get_dtype() in ("F32", "F64", "BF16", "F16")}
        self.half = any(s.get_dtype() in ("BF16", "F16") for s in self.slices.values())

    def shape(self, name):
        return tuple(self.slices[name].get_shape()) if name in self.slices else "missing"

    def read(self, name, start=0, stop=None):
        """Rows start .. stop - 1 of a tensor, in float32."""
        return self.slices[name][start:stop].float()

    def weights(self) -> dict:
        return {name: self.read(name) for name in self.slices}


def read_weights(base: Checkpoint, points: list[Checkpoint], whole=()) -> Weights:
    """One pass over all tensors, in the memory of two matrices and an SVD or of 300 MB. whole: points with k = r.

    ValueError where a checkpoint's tensors or shapes are not the base's, or where it did not move at all.
    """
    check_alike(base, points)
    weights = Weights({}, {}, [], {name: base.shape(name) for name in base.slices})
    cosine, moved = torch.zeros(len(points), dtype=torch.float64), torch.zeros(len(points))     # of embedding rows
    for name, shape in tqdm(weights.shape.items(), desc="weights", unit="tensor", dynamic_ncols=True):
        gram = torch.zeros(len(points), len(points), dtype=torch.float64)
        for w_0, deltas in blocks(base, points, name):
            if module_of(name)[1] == "embedding":
                rows = (deltas != 0).any(-1)                                     # (N, rows): of tokens in use
                cosine += (F.cosine_similarity(w_0 + deltas, w_0[None], dim=-1).double() * rows).sum(1)
                moved += rows.sum(1)
            deltas = deltas.flatten(1).double()
            gram += deltas @ deltas.T
        weights.gram[name] = gram
        if is_matrix(name, shape):
            w_0, weights.svd[name] = base.read(name), []
            for i, point in enumerate(points):
                U, sigma, Vh = torch.linalg.svd(point.read(name) - w_0, full_matrices=False)
                k = len(sigma) if i in whole else max(KS)
                weights.svd[name].append((U[:, :k].clone(), sigma, Vh[:k].clone()))      # clones: the rest is freed
    if not weights.svd:
        raise ValueError(f"{base.directory} has no matrices in layers: no transformer in Hugging Face's names")
    for i, point in enumerate(points):
        if weights.norm(i) == 0:
            raise ValueError(f"{point.directory} holds the base's weights: it did not move")
    weights.embedding_cosine.extend(torch.where(moved > 0, cosine / moved.clamp(min=1), 1.0).tolist())
    return weights


def check_alike(base, points):
    for point in points:
        for name in sorted(base.slices.keys() | point.slices.keys()):
            if base.shape(name) != point.shape(name):
                raise ValueError(f"{name} is {base.shape(name)} in {base.directory} and {point.shape(name)} in "
                                 f"{point.directory}")
    if any(checkpoint.half for checkpoint in (base, *points)):
        print("warning: these checkpoints are in half precision: where updates are small, ΔW is mostly rounding; "
              "analyse float32 checkpoints", file=sys.stderr)


def blocks(base, points, name):
    """A tensor, some rows at a time: W_0's (rows, ...), and every ΔW_i's (N, rows, ...)."""
    height, *row = base.shape(name)
    step = max(1, BLOCK // len(points) // math.prod(row))
    for start in range(0, height, step):
        w_0 = base.read(name, start, start + step)
        yield w_0, torch.stack([point.read(name, start, start + step) - w_0 for point in points])


def read_config(directory: Path) -> Config:
    stored = json.loads((directory / "config.json").read_text())
    return Config(**{f.name: stored[f.name] for f in fields(Config) if f.name in stored} | {"device": "cpu"})


def method_of(config) -> str:
    score = f" {config.score}" if config.method == "effopd" and config.score != "accuracy" else ""
    return METHODS[config.method] + score


def labels_of(configs) -> dict:
    """{run: its method, and the settings that the runs of this method differ in}; equal labels are seeds."""
    labels = {}
    for run, c in configs.items():
        alike = [other for other in configs.values() if method_of(other) == method_of(c)]
        names = [f.name for f in fields(Config) if f.name not in SEEDS and has_use(c.method, f.name, c.data)]
        labels[run] = ", ".join([method_of(c), *(f"{name} {getattr(c, name)}" for name in names
                                                 if any(getattr(other, name) != getattr(c, name) for other in alike))])
    return labels


def same_base(a, b) -> bool:
    return filecmp.cmp(*(run / "checkpoints/step_000000/model.safetensors" for run in (a, b)), shallow=False)


def newest_runs() -> list[Path]:
    """The newest finished run of each method in runs/* and runs/race*/*; says what is missing and how to make it."""
    found = [p.parents[1] for p in (*Path("runs").glob("*/checkpoints/final"),
                                    *Path("runs").glob("race*/*/checkpoints/final"))]
    found.sort(key=lambda run: (run / "checkpoints" / "final").stat().st_mtime)
    if not found:
        raise ValueError("no finished run under runs/; python train.py --method opd makes one")
    newest = {method_of(read_config(run)): run for run in found if same_base(run, found[-1])}
    for method, options in [("OPD", ""), ("EffOPD", ""), ("RL", " --lr 3e-4"), ("SFT", "")]:
        if method not in newest:
            print(f"no {method} run from this base under runs/; to have one: "
                  f"python train.py --method {method.lower()}{options}")
    return list(newest.values())


def expand(directory: Path) -> list[Path]:
    """A run's directory, or those inside a race's or a sweep's. ValueError if it is none, or a run did not finish."""
    if not directory.is_dir():
        raise ValueError(f"there is no directory {directory}")
    runs = [p.parent for p in (*directory.glob("checkpoints"), *sorted(directory.glob("*/checkpoints")))]
    for run in runs or [directory]:
        if not (run / "checkpoints" / "final").is_dir():
            raise ValueError(f"{run} holds no finished run (config.json and checkpoints/final)")
    return runs


def load_runs(directories):
    """-> the base's Checkpoint, the N Checkpoints, the Runs, a Config: of a run with a teacher, if there is one."""
    configs = {run: read_config(run) for directory in directories for run in expand(Path(directory))}
    first, labels, order, runs, points = next(iter(configs)), labels_of(configs), list(METHODS), [], []
    for run, c in sorted(configs.items(), key=lambda item: (order.index(item[1].method), item[1].score, item[1].lr)):
        if not same_base(run, first):
            raise ValueError(f"{run} and {first} start from different weights: not comparable")
        steps = sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step_??????"))
        steps = [*(step for step in steps if 0 < step < c.steps), c.steps]
        for other in runs:
            if other.label == labels[run] and other.steps != steps:
                raise ValueError(f"{run} and {other.directory}, seeds of {other.label}, have checkpoints of different "
                                 "steps (--keep_last?), so no mean")
        runs.append(Run(labels[run], run, steps, range(len(points), len(points) + len(steps))))
        points += [Checkpoint(run / "checkpoints" / name) for name in (*(f"step_{s:06d}" for s in steps[:-1]), "final")]
    taught = next((c for c in configs.values() if c.teacher or not c.data), configs[first])
    return Checkpoint(first / "checkpoints" / "step_000000"), points, runs, taught


@torch.no_grad()
def put(model, weights):
    """Copy weights into the model by name; a tied head is no entry of its own."""
    for name, p in model.named_parameters():
        p.copy_(weights[name])


def measure_with(model, teacher, task, problems):
    """-> measure(weights) = (accuracy, KL(π || π*) in nats a token), always under the same random numbers."""
    prompts = [task.encode(p) for p in problems[:KL_ANSWERS]]

    @torch.no_grad()
    def measure(weights):
        put(model, weights)
        right, answers = evaluate(model, task, problems)
        batch = pack(prompts, answers[:KL_ANSWERS], model.device)
        parts, n = split(batch, 8), int(batch.mask.sum())    # never all logits of a large vocabulary at once
        return right, sum(kl_of(model, teacher, states(model, b), states(teacher, b), n).item() for b in parts)
    return measure


# ----------------------------------------------------------------------------------------------------------------
# Statistics and drawing, small helpers, and what chance looks like.

T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)    # two-sided quantiles of t, 1 to 9 degrees of freedom


def interval(values):
    """{mean, half: half the 95% t interval of the mean (None for a single value), n}; None without values."""
    values = [v for v in values if v is not None]
    if not (n := len(values)):
        return None
    half = None if n == 1 else float((T_95[n - 2] if n < 11 else 2.2) * np.std(values, ddof=1) / n ** 0.5)
    return {"mean": float(np.mean(values)), "half": half, "n": n}


def say(stats, form="{:.2f}") -> str:
    return ", ".join(f"{label} " + ("±".join(form.format(s[what]) for what in ("mean", "half") if s[what] is not None)
                                    if s else "-") for label, s in stats.items())


def canvas(title, *panels, height=3.6):
    """A figure of README width (9 inches) and its panels: (title, x label, y label) each."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.grid": True, "grid.alpha": 0.3})
    figure, axes = plt.subplots(1, len(panels), figsize=(9, height), layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=10.5, fontweight="bold")
    for axis, (name, x, y) in zip(axes[0], panels):
        axis.set(title=name, xlabel=x, ylabel=y)
    return figure, axes[0]


def save(figure, path):
    """With one legend for all panels, below them: there it covers no curve."""
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", fontsize=8,
                      ncols=max(1, 150 // (8 + max(map(len, handles)))))         # some 150 characters fit in a row
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(axis, study, f, dashed=False, named=False, marker="."):
    """f(run) = (xs, ys) of every method: the mean over seeds as a line, its 95% interval as a band."""
    for i, (label, group) in enumerate(study.groups.items()):
        seeds = list(map(f, group))
        xs, stats = np.mean([x for x, _ in seeds], axis=0), [interval(column) for column in zip(*(y for _, y in seeds))]
        mean, half = (np.array([s[what] or 0 for s in stats]) for what in ("mean", "half"))
        low = np.maximum(mean - half, mean / 10) if axis.get_yscale() == "log" else mean - half
        axis.plot(xs, mean, "--" if dashed else "-", color=f"C{i}", marker=marker, label=label if named else None)
        axis.fill_between(xs, low, mean + half, color=f"C{i}", alpha=0.15, linewidth=0)


def bars(axis, stats, form="{:.2f}", offset=0.0, width=0.4, alpha=1.0):
    for i, s in enumerate(stats.values()):
        axis.bar(i + offset, s["mean"], width, yerr=s["half"], color=f"C{i}", capsize=3, alpha=alpha)
        axis.text(i + offset, s["mean"] + (s["half"] or 0), "  " + form.format(s["mean"]), rotation=90, ha="center",
                  va="bottom", fontsize=7)
    axis.set_xticks(range(len(stats)), [label.split(",")[0].replace(" ", "\n") for label in stats], fontsize=7)
    axis.margins(y=0.25)


def heatmap(axis, table, top):
    """table (layers, modules), in %; the colours go from 0 to top. -> the image, for a colour bar."""
    image, small = axis.imshow(table, aspect="auto", vmin=0, vmax=top), len(table) <= 12
    axis.grid(False)
    axis.set_xticks(range(len(MODULES)), MODULES, rotation=90)
    axis.set_yticks(range(0, len(table), 1 if small else 4))
    for (y, x), value in np.ndenumerate(table) if small else ():
        axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7,
                  color="black" if value > top / 2 else "white")
    return image


def log_ticks(axes, ticks):
    for axis in axes:
        axis.set(xscale="log", xticks=ticks, xticklabels=ticks)
        axis.minorticks_off()


def crossing(xs, ys, target):
    """Where the line through the points first reaches the target; None if it never does."""
    return next((float(x0 + (x1 - x0) * (target - y0) / (y1 - y0))
                 for x0, y0, x1, y1 in zip(xs, ys, xs[1:], ys[1:]) if y0 < target <= y1), None)


def is_matrix(name, shape) -> bool:
    return len(shape) == 2 and module_of(name)[0] is not None


def matrices(update) -> dict:
    return {name: d for name, d in update.items() if is_matrix(name, d.shape)}


def window_reach(num_layers) -> int:
    """3: the paper's windows have 17 of 28 to 48 layers: here too they span some 45% of the depth."""
    return max(0, round((0.45 * num_layers - 1) / 2))


def directions_in(percent, sigma) -> int:
    """7: so many percent of a matrix's singular directions, at least one."""
    return max(1, round(percent / 100 * len(sigma)))


def frobenius(update) -> float:
    return sum(d.square().sum().item() for d in update.values()) ** 0.5


def scaled_to(update, size) -> dict:
    factor = size / frobenius(update)
    return {name: factor * d for name, d in update.items()}


@cache
def gaussian_sigma(shape):
    """Singular values (r,) of a Gaussian matrix of Frobenius norm 1."""
    sigma = torch.linalg.svdvals(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return sigma / sigma.norm()


def walk_alignment(shapes, steps):
    """`alignment` of random walks of equal Gaussian steps in matrices of these shapes with their ends: (steps, 20)."""
    rng, by_shape = torch.Generator().manual_seed(0), {}
    for shape in dict.fromkeys(shapes):
        at, svds = torch.zeros(shape), []
        for before, now in zip([0, *steps], steps):
            at += torch.randn(shape, generator=rng) * (now - before) ** 0.5
            svds.append(torch.linalg.svd(at, full_matrices=False))
        walk = Weights({}, {shape: svds}, [], {})
        by_shape[shape] = [walk.alignment(i, len(steps) - 1) for i in range(len(steps))]
    return np.mean([by_shape[shape] for shape in shapes], axis=0)


# ----------------------------------------------------------------------------------------------------------------
# 10: what would a D_v of another size have decided? All candidates of a run's searches, scored on a large one.

def searches_of(directory: Path, moved):
    """Each search of an EffOPD run again, exactly: (its record, W_t, Δ of what it moved), weights as dicts by name."""
    kept = Checkpoint(directory / "checkpoints" / "step_000000").weights()
    for line in (directory / "search.jsonl").read_text().splitlines():
        record = json.loads(line)
        now = Checkpoint(directory / "checkpoints" / f"step_{record['step']:06d}").weights()     # saved before the jump
        delta = {name: now[name] - kept[name] for name in moved}
        yield record, now, delta
        kept = add(now, delta, record["multiple"])


def decisions(right, again, size, draws=1000) -> dict:
    """What a search decides by a D_v of this size, drawn `draws` times from N problems: counts, to be added up.

    right (1 + candidates, N): 1.0 where W_t's, and each candidate's, answer is right, under the same random numbers;
    again (N,): W_t's under others. The truth is the score on all N; strictly higher is accepted.
    """
    N, truth = right.shape[1], right.mean(1)
    drawn = np.random.default_rng(0).random((draws, N)).argpartition(size, axis=1)[:, :size]         # (draws, size)
    scores = right[:, drawn].mean(-1)                                            # (1 + candidates, draws)
    higher, better = scores[1:] > scores[:-1], (truth[1:] > truth[:-1])[:, None]           # (candidates, draws or 1)
    asked = np.vstack([np.ones((1, draws), dtype=bool), np.logical_and.accumulate(higher)[:-1]])     # scored at all
    kept = (asked & higher).sum(0)                                               # (draws,) 0: W_t
    ideal = np.logical_and.accumulate(better).sum()                              # what all N problems keep
    score = scores[kept, np.arange(draws)]
    fresh = (right.sum(1)[kept] - size * score) / (N - size)                     # on the problems not in D_v
    return dict(worse_asked=(asked & ~better).sum(), worse_accepted=(asked & ~better & higher).sum(),
                better_asked=(asked & better).sum(), better_rejected=(asked & better & ~higher).sum(),
                jumps=(kept > 0).sum(), curse=(score - fresh)[kept > 0].sum(), draws=draws,
                lost=(truth[ideal] - truth[kept]).sum(), null_higher=(again[drawn].mean(-1) > scores[0]).sum())


RATES = {  # name: (what over what of `decisions`, what it is in the figure, in the table)
    "false_accepts": ("worse_accepted", "worse_asked", "no better, accepted",
                      "of the candidates that are no better, accepted"),
    "false_rejects": ("better_rejected", "better_asked", "better, rejected", "of those that are better, rejected"),
    "accuracy_lost": ("lost", "draws", "accuracy lost", "accuracy that a search ends below the one by all problems"),
    "curse": ("curse", "jumps", "winning score too high", "score of what was kept, minus its score on fresh problems"),
    "null_accepted": ("null_higher", "draws", "W$_t$ itself, accepted",
                      "of candidates that are W_t itself, accepted under other random numbers")}


def score_run(directory: Path, args):
    """-> {size: `decisions` of all its searches}, and how much too high each jump's score was in the run itself."""
    config = read_config(directory)
    if config.data or config.method != "effopd" or config.search_every or config.first_trigger.bit_count() > 1 or (
            config.utility_gate or config.direction != "update" or config.candidates == "line"):
        raise ValueError(f"{directory}: --dv needs an EffOPD run of the built-in task, along Δ, at the powers of two")
    config.device, config.cache_dir = str(pick_device(args.device)), args.cache_dir or config.cache_dir
    task = Chains(config.num_ops, config.digits)
    model, _ = load_models(config, task)
    problems = task.problems(args.problems, random.Random("large D_v"))
    effopd = EffOPD(model, None, scope=config.scope, candidates=config.candidates, num_candidates=config.num_candidates)
    counts, curse = {size: Counter() for size in DV_SIZES}, []

    def marks(weights, seed):                                 # (N,) 1.0 where an answer is right
        put(model, weights)
        _, answers = evaluate(model, task, problems, seed * 1_000_003)
        return np.array([task.is_correct(p, task.decode(a)) for p, a in zip(problems, answers)], dtype=float)

    for record, now, delta in tqdm(searches_of(directory, effopd.parameters), desc=str(directory), unit="search"):
        right = np.array([marks(add(now, delta, multiple), record["step"]) for multiple in (0, *effopd.multiples)])
        again = marks(now, record["step"] + 500_000)
        for size in DV_SIZES:
            counts[size].update(decisions(right, again, size))
        if record["accepted"]:
            curse.append(record["scores"][record["accepted"]] - right[record["accepted"]].mean())
    return counts, curse


def dv_size(args, out_dir):
    """10: dv.json, 10_dv_size.png and a table. The runs are seeds of each other; all their candidates are scored."""
    table, scored = {}, [score_run(run, args) for given in args.runs for run in expand(Path(given))]
    for name, (part, whole, *_) in RATES.items():
        rates = {size: [float(of[size][part] / of[size][whole]) for of, _ in scored if of[size][whole]]
                 for size in DV_SIZES}
        table[name] = {size: bootstrap(values) for size, values in rates.items() if values}
    in_run = [float(np.mean(curse)) for _, curse in scored if curse]
    in_run = bootstrap(in_run) if in_run else None
    write_json(out_dir / "dv.json", dict(problems=args.problems, runs=args.runs, table=table, curse_in_run=in_run))
    draw_dv(table, out_dir / "10_dv_size.png")
    print("| problems in D_v | " + " | ".join(map(str, DV_SIZES)) + " |\n|" + "---|" * (1 + len(DV_SIZES)))
    for name, by_size in table.items():
        print(f"| {RATES[name][3]} | " + " | ".join(spread(stats, ".3f") for stats in by_size.values()) + " |")
    if in_run:
        print(f"\nIn the runs themselves, winning score minus fresh score: {spread(in_run, '.3f')}, n = {in_run['n']}")


def draw_dv(table, path):
    """table: of dv.json."""
    figure, axes = canvas("10. How many problems must D$_v$ have? Low is good",
                          ("wrong decisions", "problems in D$_v$", "share"),
                          ("their price", "problems in D$_v$", "accuracy"))
    for i, (name, by_size) in enumerate(table.items()):
        mean, low, high = (np.array([s[what] for s in by_size.values()], dtype=float)      # NaN: no interval of one run
                           for what in ("mean", "low", "high"))
        axes[int(name in ("accuracy_lost", "curse"))].errorbar(
            list(map(int, by_size)), mean, None if np.isnan(low).all() else (mean - low, high - mean), fmt=f"C{i}.-",
            capsize=3, label=RATES[name][2])
    log_ticks(axes, DV_SIZES)
    for axis in axes:
        axis.axhline(0, color="black", linewidth=0.8)
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------------
# The command.

def parse_args(args):
    parser = argparse.ArgumentParser(prog="analyze.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = stop
    parser.add_argument("runs", nargs="*", help="directories of runs, races or sweeps (default: each method's newest)")
    parser.add_argument("--base", help="a Hugging Face checkpoint's directory: what the others were trained from")
    parser.add_argument("--checkpoints", nargs="+", default=[], help="its later selves' directories, the last one last")
    parser.add_argument("--out_dir", default="analysis", help="for figures and analysis.json (default: analysis)")
    parser.add_argument("--dv", action="store_true", help="answer the tenth question, of these EffOPD runs, instead")
    parser.add_argument("--problems", type=int, help="problems in an accuracy (default: 400; with --dv: 4000)")
    parser.add_argument("--cache_dir", default="", help="where the teacher is kept (default: the runs' own)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N, for the accuracies")
    args = parser.parse_args(args)
    if bool(args.base) != bool(args.checkpoints) or args.base and args.runs:
        stop("give run directories, or --base DIR with --checkpoints DIR1 DIR2 ..., or nothing")
    if args.dv and not args.runs:
        stop("--dv needs the directories of EffOPD runs")
    least = max(DV_SIZES) + 1 if args.dv else 1
    args.problems = (4000 if args.dv else 400) if args.problems is None else args.problems
    if args.problems < least:
        stop(f"--problems must be {least} or more, got {args.problems}")
    return args


def stop(message):
    print(f"analyze.py: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def study_checkpoints(args, out_dir) -> Study:
    """Weights alone: one run, its steps the numbers at the ends of the directories' names, if these rise."""
    base, points = Checkpoint(args.base), [Checkpoint(directory) for directory in args.checkpoints]
    ends = [Path(directory).name.replace("-", "_").rpartition("_")[2] for directory in args.checkpoints]
    steps = [int(end) if end.isdecimal() else 0 for end in ends]
    if steps[0] < 1 or steps != sorted(set(steps)):
        steps = list(range(1, len(points) + 1))
    run = Run("checkpoints", Path(args.checkpoints[-1]), steps, range(len(points)))
    return Study(read_weights(base, points), [run], (), (), {"end": {run: run.last}}, out_dir)


def study_runs(args, out_dir) -> Study:
    """Runs of train.py: their weights, then the accuracy of every intervention."""
    base, points, runs, config = load_runs(args.runs or newest_runs())
    print(*(f"{run.label}: {run.directory}" for run in runs), sep="\n")
    if config.data and not config.teacher:
        raise ValueError("none of these runs has a teacher to measure the KL to; --base and --checkpoints need none")
    weights = read_weights(base, points, whole={run.last for run in runs})
    config.device, config.cache_dir = str(pick_device(args.device)), args.cache_dir or config.cache_dir
    task, model, teacher = load(config)
    w_0 = base.weights()
    if not all(torch.equal(p.cpu(), w_0[name]) for name, p in model.named_parameters()):
        print("warning: --cache_dir holds another base than these runs', so another teacher: read the KLs with care",
              file=sys.stderr)
    measure = measure_with(model, teacher, task, evaluation_problems(config, task)[:args.problems])
    common_norm = min(weights.norm(run.last, weights.svd) for run in runs)       # the smallest
    rng = torch.Generator().manual_seed(0)
    noise = scaled_to({name: torch.randn(weights.shape[name], generator=rng) for name in weights.svd}, common_norm)
    study = Study(weights, runs, measure(w_0), measure(add(w_0, noise)), {}, out_dir)
    for run in runs:
        jobs = interventions(w_0, lambda i: add(points[run.points[i]].weights(), w_0, -1.0),
                             {name: svds[run.last] for name, svds in weights.svd.items()}, run, common_norm,
                             weights.num_layers)
        bar = tqdm(jobs.items(), desc=run.label, unit="accuracy", dynamic_ncols=True)
        run.measured = {what: tuple(measure(make())) for what, make in bar}
    return study._replace(picks=picks(study))


def picks(study) -> dict:
    """{"end", "equal steps", ...: {run: its point, or the one nearest to what all runs reach}}."""
    runs, norm = study.runs, study.weights.norm

    def nearest(value, target):
        return {run: run.points[min(range(len(run.steps)), key=lambda i: abs(value(run, i) - target))] for run in runs}

    return {"end": {run: run.last for run in runs},
            "equal steps": nearest(lambda run, i: run.steps[i], min(run.steps[-1] for run in runs)),
            "equal norm": nearest(lambda run, i: norm(run.points[i]), min(norm(run.last) for run in runs)),
            "equal accuracy": nearest(lambda run, i: run.at(i)[0], study.target)}


CLAIMS = {  # question: what the paper says
    norm_scaling: "OPD gains more accuracy per unit of norm than RL",
    update_norms: "OPD moves the useful MLP blocks and hardly the embeddings",
    utility: "an inverted U over depth, MLP above attention; RL has more of its norm where utility is low",
    embeddings: "putting them back costs OPD nothing; cosine RL .967, OPD .985 (4B), .942 and .975 (8B)",
    spectrum: "OPD is more concentrated: σ1/‖ΔW‖ RL 19.7%, OPD 25.7%, effective rank 1908 and 1587 (4B)",
    directions: "OPD's subspace locks on to the final one early, RL's later",
    low_rank: "the top 10% of the directions recovers more than 95% of the accuracy",
    early_rescaled: "ΔW at 10% of training has some 80% of the final accuracy at β = 1, less above 1.2; the KL falls",
    paths: "OPD's path is nearly a line: most of its variance is in two components",
}


def main(args=None):
    args = parse_args(args)
    out_dir = Path(args.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if args.dv:
            dv_size(args, out_dir)
            return print(f"\nThe figure and dv.json are in {out_dir}")
        study = study_checkpoints(args, out_dir) if args.base else study_runs(args, out_dir)
    except (ValueError, OSError) as error:
        stop(error)
    questions = list(CLAIMS)
    if not study.base:                                        # weights alone; and one checkpoint is no path
        questions = [update_norms, embeddings, spectrum] + ([directions, paths] if len(study.runs[0].steps) > 1 else [])
    results = {"compared_steps": {pick: study.every(lambda run: run.steps[run.points.index(point[run])])
                                  for pick, point in study.picks.items()}, "base": study.base,
               "measured": study.every(lambda run: {" ".join(map(str, what)): both
                                                    for what, both in run.measured.items()})}
    for question in questions:
        results[question.__name__], here = question(study)
        print(f"\n{question.__name__}\n  paper says: {CLAIMS[question]}\n  these runs: {here}")
    write_json(out_dir / "analysis.json", results)
    print(f"\nFigures and analysis.json are in {out_dir}")


if __name__ == "__main__":
    main()
