"""What runs of extras/real.py did on the way, and four KLs along one Δ.

    python -m extras.real_study assets/sweeps/real            # a sweep of extras.real: path.png
    python -m extras.real_study --along runs/probe            # a probe's kls.jsonl: along.png
    python -m extras.real ... --searches 0 --move_lr false
        --candidates extras.real_study:probe --score extras.real_study:four_kls

A probe looks along Δ after each trigger until the score is worse than that of W_t, keeps nothing,
and leaves four mean KLs(π || π*) of each candidate in the run's kls.jsonl: on the batch just
trained on, computed in float32 and as the run computes; on answers that W_t gave to D_v; and on the
candidate's own answers to D_v.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from analyze import interval, plt
from extras.real import batch_kl, in_float32, kl_of, rollout_kl, states
from extras.sweep import as_markdown, cell, points_of, read
from train import append_json, evaluate, pack

KLS = {"batch": "on the batch just trained on", "batch, as run": "the same, in bfloat16",
       "held out": "on W$_t$'s answers to D$_v$", "own": "on its own answers to D$_v$"}


# ------------------------------------------------------------------------------------------------
# A score and a search for extras.real.

held_out = {}                                                 # {seed of a search: its answers}


def heldout_kl(judge, model):
    """-KL(π || π*) on answers to D_v, sampled from W_t once a search, for all its candidates."""
    seed = torch.initial_seed()                               # the search's own
    if seed not in held_out:                                  # W_t is scored first
        held_out.clear()
        _, answers = evaluate(model, judge.task, judge.problems, seed)
        parts, num_tokens = pack(judge.task, judge.problems, answers, model.device,
                                 len(judge.parts[0].ids))
        for part in parts:
            part.target = states(judge.teacher, part)                            # (N, C)
        held_out[seed] = parts, num_tokens
        judge.sampled += num_tokens
    parts, num_tokens = held_out[seed]
    judge.scored += num_tokens
    with in_float32(model):
        return minus_kl(judge, model, parts, num_tokens)


def minus_kl(judge, model, parts, num_tokens):
    return -sum(kl_of(model, judge.teacher, states(model, part), part.target, num_tokens)
                for part in parts)


def four_kls(judge, model):
    """`batch_kl`; it and three others are left in the run's kls.jsonl."""
    as_run = minus_kl(judge, model, judge.parts, judge.num_tokens)
    scores = [batch_kl(judge, model), as_run, heldout_kl(judge, model), rollout_kl(judge, model)]
    line = {name: -float(score) for name, score in zip(KLS, scores)}
    append_json(Path(judge.task.config.out_dir) / "kls.jsonl", line)
    return scores[0]


def probe(score_at, improves, last):
    """Look at 0, 1, 2, 4, 8, ... until the score is worse than at 0; keep 0."""
    start = score_at(0)
    for k in range(12):
        if not score_at(2 ** k) > start:
            break
    return 0


# ------------------------------------------------------------------------------------------------
# The table and the figures.

def table(kept: dict) -> list[list[str]]:
    """Rows of cells, the head first: KLs by quarters of a run, accuracies, tokens, last rate."""
    rows = {}
    for run in kept["runs"].values():
        rows.setdefault(run["row"], []).append(run)
    lines = []
    for row, runs in rows.items():
        stats = interval([numbers_of(run) for run in runs])
        tokens = " + ".join(f"{stats.pop(key)['mean']:,.0f}" for key in ("sampled", "scored"))
        rates = [run["searches"][-1][2] for run in runs if run["searches"]]
        ends = " to ".join(sorted({f"{rate:.1e}" for rate in rates})) or "-"
        cells = [cell(numbers, ".2f") for numbers in stats.values()]
        lines.append([row, str(len(runs)), *cells, tokens, ends])
    head = ["", "n", *stats, "tokens sampled + only scored", "rate in the end"]
    return [head, ["---"] * len(head), *lines]


def numbers_of(run: dict) -> dict:
    kls, points = [kl for kl, _ in run["log"]], points_of(run)
    quarter = len(kls) // 4
    numbers = {f"KL, steps {i + 1}–{i + quarter}": fmean(kls[i:i + quarter])
               for i in range(0, 4 * quarter, quarter)}
    numbers |= {f"accuracy at {point['step']}": point["accuracy"] for point in points[1:]}
    return numbers | {key: points[-1][key] for key in ("sampled", "scored")}


def draw_path(kept: dict, names: list[str], path: Path, title: str):
    """Mean KL of each step's answers, and accuracy, against steps and against tokens."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex="col",
                                sharey="row")
    for name in names:
        runs = [run for run in kept["runs"].values() if run["row"] == name]
        if not runs:
            raise ValueError(f"--rows: there is no {name!r}")
        kls, tokens = np.array([run["log"] for run in runs]).mean(0).T           # (steps,) each
        points = [points_of(run) for run in runs]
        steps = [point["step"] for point in points[0]]
        accuracy = np.mean([[point["accuracy"] for point in run] for run in points], axis=0)
        spent = np.concatenate(([0], tokens))                 # a step's KL is of answers before it
        axes[0, 0].plot(range(len(kls)), kls, label=name)
        axes[0, 1].plot(spent[:-1] / 1000, kls)
        axes[1, 0].plot(steps, accuracy, marker=".")
        axes[1, 1].plot(spent[steps] / 1000, accuracy, marker=".")
    axes[0, 0].set_ylabel("KL to the teacher, nats a token")
    axes[1, 0].set(ylabel="accuracy", xlabel="optimiser steps")
    axes[1, 1].set_xlabel("thousands of tokens, searches included")
    axes[1, 0].set_ylim(-0.01, max(0.1, axes[1, 0].get_ylim()[1]))      # noise near 0 stays small
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_along(directory: Path, title: str):
    """A panel a probe: the KLs against the learning rate that would have led to each candidate."""
    lines, searches = (read_lines(directory / name) for name in ("kls.jsonl", "search.jsonl"))
    figure, axes = plt.subplots(1, len(searches), figsize=(5 + 1.7 * len(searches), 4),
                                layout="constrained", sharex=True, sharey=True, squeeze=False)
    for axis, search in zip(axes[0], searches):
        candidates = [lines.pop(0) for _ in search["multiples"]]
        rates = [search["lr"] * (1 + multiple) for multiple in search["multiples"]]
        for name, style in zip(KLS, ("o-", "o:", "s-", "^-")):
            kls = [line[name] for line in candidates]
            if name != "batch, as run" or kls != [line["batch"] for line in candidates]:
                axis.plot(rates, kls, style, markersize=4, label=KLS[name])
        axis.set_xscale("log")
        axis.set(title=f"after step {search['step']}", xlabel="lr · (1 + m)")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("KL to the teacher, nats a token")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  fontsize=8)
    figure.suptitle(title)
    figure.savefig(directory / "along.png", dpi=120)
    plt.close(figure)


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------
# The command.

def main(args=None):
    parser = argparse.ArgumentParser(prog="python -m extras.real_study", allow_abbrev=False)
    parser.add_argument("sweep", nargs="?", type=Path, help="directory of a sweep of extras.real")
    parser.add_argument("--rows", default="", help="rows to draw, comma between them; empty: all")
    parser.add_argument("--along", type=Path, help="directory with a probe's kls.jsonl")
    parser.add_argument("--title", default="", help="of the figure")
    args = parser.parse_args(args)
    if bool(args.sweep) == bool(args.along):
        parser.error("give the directory of a sweep, or --along with that of a probe")
    try:
        if args.along:
            return draw_along(args.along, args.title)
        kept = read(args.sweep / "sweep.json")
        rows = dict.fromkeys(run["row"] for run in kept["runs"].values())
        print(as_markdown(table(kept)), end="")
        chosen = args.rows.replace("_", " ").split(",") if args.rows else list(rows)
        draw_path(kept, chosen, args.sweep / "path.png", args.title)
    except (ValueError, OSError, KeyError) as error:
        parser.error(f"this is no sweep or probe of extras.real ({error})")


if __name__ == "__main__":
    main()
