"""Runs that train.py has no setting for: what a search along Δ is to be compared with.

    python -m extras.controls --only update,random,top,tail --seeds 5 --gap habit
    python -m extras.controls --only range_test,prodigy --lr 1e-5 [any setting of train.py]

    update, random, top, tail   EffOPD by batch KL along Δ, or along another direction (`redirect`)
    range_test                  one search after step 1 that moves the learning rate, but not W_1
    prodigy                     OPD with an optimiser that has no rate (pip install prodigyopt)
    batch_kl, heldout_kl, rollout_kl, accuracy_50, accuracy_200
                                the finder, judged by each of these

Writes OUT_DIR/sweep.json, which `python -m extras.sweep --redraw` prints and draws, and goes on
where it was stopped.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch

import train
from effopd import EffOPD, reverse_kl
from extras.sweep import in_short, keep, settings_of
from train import evaluate, pack

LINE = dict(method="effopd", score="batch_kl", candidates="line", num_candidates=14)
FINDER = LINE | dict(scope="all", move_lr=True)


# ------------------------------------------------------------------------------------------------
# Other directions.

def redirect(delta, kind: str):
    """Another direction of Δ's Frobenius norm, for a matrix Δ = U Σ Vᵀ (m, n).

    "random": Gaussian, of torch's random state; "top": the leading tenth of the singular directions
    alone; "tail": the others alone. A vector stays as it is.
    """
    if delta.ndim != 2 or not delta.any():
        return delta
    if kind == "random":
        other = torch.randn_like(delta)
    else:
        U, sigma, Vh = torch.linalg.svd(delta.float(), full_matrices=False)
        k = max(1, round(len(sigma) / 10))
        part = slice(0, k) if kind == "top" else slice(k, None)
        other = (U[:, part] * sigma[part] @ Vh[part]).to(delta.dtype)            # (m, n)
    return other * (delta.norm() / other.norm())


class RangeTest(EffOPD):
    """Moves the learning rate as the finder does, but undoes the jump."""

    @torch.no_grad()
    def step(self, t):
        before = self.copy_weights()
        record = super().step(t)
        if record:
            for name, p in self.parameters.items():
                p.copy_(before[name])
                self.previous[name].copy_(p)
        return record


# ------------------------------------------------------------------------------------------------
# Another judge.

def heldout_kl():
    """-KL(π || π*) on answers to D_v, sampled from W_t once a search, for all its candidates."""
    known = {}

    def score(judge, model):
        seed = torch.initial_seed()                           # the search's own
        if seed not in known:                                 # W_t is scored first
            known.clear()
            _, answers = evaluate(model, judge.task, judge.problems, seed)
            (part,), num_tokens = pack(judge.task, judge.problems, answers, model.device)
            part.target = judge.teacher(part.inputs)                             # (B, T, V)
            known[seed] = part, num_tokens
            judge.sampled += num_tokens
        part, num_tokens = known[seed]
        judge.scored += num_tokens
        return -reverse_kl(model(part.inputs), part.target, part.mask, num_tokens)
    return score


def prodigy(config, student):
    from prodigyopt import Prodigy
    return [Prodigy(student.parameters(), lr=1.0)]


def controls() -> dict:
    """{name: (settings of train.py, further arguments of train.train)}, new ones for each run."""
    directions = {kind: (LINE, dict(direction=lambda delta, kind=kind: redirect(delta, kind)))
                  for kind in ("random", "top", "tail")}
    return {"update": (LINE, {}), **directions,
            "range_test": (FINDER | dict(searches=1), dict(cls=RangeTest)),
            "prodigy": (dict(method="opd"), {}),
            "batch_kl": (FINDER, {}),
            "heldout_kl": (FINDER, dict(scores={"batch_kl": heldout_kl()})),
            "rollout_kl": (FINDER | dict(score="rollout_kl"), {}),
            "accuracy_50": (FINDER | dict(score="accuracy", dv_size=50), {}),
            "accuracy_200": (FINDER | dict(score="accuracy", dv_size=200), {})}


# ------------------------------------------------------------------------------------------------
# The command.

def run_one(name: str, seed: int, words: list[str], directory: Path) -> dict:
    """Train one control; its summary."""
    settings, options = controls()[name]
    words = [*words, "--seed", str(seed)]
    for setting, value in settings.items():
        words += [f"--{setting}", str(value)]
    config = train.parse(words)
    task, student, teacher, control = train.load(config)
    directory.mkdir(parents=True)
    optimizers = prodigy if name == "prodigy" else train.make_optimizers
    with mock.patch.object(train, "make_optimizers", optimizers):
        summary = train.train(config, task, student, teacher, directory, name, **options)
    shutil.rmtree(directory / "checkpoints")
    return summary | {"control": control}


def main(args=None):
    parser = argparse.ArgumentParser(prog="python -m extras.controls", allow_abbrev=False)
    parser.add_argument("--only", default=",".join(controls()), help="names, see above")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each, seeds 0, 1, 2, ...")
    parser.add_argument("--out_dir", type=Path, default=Path("runs/controls"))
    args, words = parser.parse_known_args(args)
    names = args.only.split(",")
    unknown = sorted(set(names) - set(controls()))
    if unknown:
        parser.error(f"no control is called {unknown[0]}; there are {', '.join(controls())}")
    file, settings = args.out_dir / "sweep.json", settings_of(words)
    kept = dict(grids=[], shared=settings, control=None, versions=train.versions(), runs={})
    if file.exists():
        kept = json.loads(file.read_text())
    if kept["shared"] != settings:
        parser.error(f"{args.out_dir} has runs with other settings; name another --out_dir")
    for seed in range(args.seeds):
        for name in names:
            run = f"{name} {seed}"
            if run in kept["runs"]:
                continue
            directory = args.out_dir / run.replace(" ", "-")
            shutil.rmtree(directory, ignore_errors=True)      # it was stopped in the midst
            summary = run_one(name, seed, words, directory)
            own = dict(label=name, seed=str(seed))
            row = dict(settings=own, row=name.replace("_", " "), reference=None)
            kept["runs"][run] = row | in_short(summary)
            kept["control"] = summary["control"]
            keep(args.out_dir, kept)
            print(f"{run}: final accuracy {summary['final_accuracy']:.3f}", file=sys.stderr)


if __name__ == "__main__":
    main()
