"""Grids of runs: a table with intervals over seeds, and a figure.

    python -m extras.sweep "lr=1e-5,1e-3 method=opd,effopd seed=0:2" --steps 6
    python -m extras.sweep "label=OPD+method=opd,finder+method=effopd+move_lr=1 seed=0:5" --gap slip
    python -m extras.sweep --redraw assets/sweeps/main-habit.json --target 0.8

A word of the grid is a setting of train.py with its values; a:b counts from a to b - 1. A value may
bring others along with +; `label` is no setting but a name for what follows it. Further options are
settings that all runs share. Each run is a process, one thread each, two at a time. What is done is
kept in OUT_DIR/sweep.json, and the same command goes on where it was stopped.

Each row of the table is a setting, over its seeds: mean and 95% Student t interval. Costs are those
to a target accuracy, searches included: --target, or else what the reference ends with, seed by
seed. The reference of a run is the grid's first OPD run with the same values on all other axes. A
run that does not get there counts with all it spent, so its row has lower bounds (>=).
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

import train
from analyze import interval
from train import Config, first_at, write_json

UNITS = ("step", "sampled", "scored", "seconds")
POINT = ("step", "accuracy", "sampled", "scored", "seconds")   # of a curve, as it is kept
OWN = ("out_dir", "cache_dir", "resume", "device")            # of a run, not of a grid


# ------------------------------------------------------------------------------------------------
# The grid.

def parse_axis(word: str) -> list[dict]:
    """"method=opd,effopd+accept=ge" -> [{method: opd}, {method: effopd, accept: ge}]."""
    axis, _, text = word.partition("=")
    span = re.fullmatch(r"(\d+):(\d+)", text)
    values = [str(i) for i in range(int(span[1]), int(span[2]))] if span else text.split(",")
    parts = []
    for value in values:
        pairs = re.split(r"\+(?=\w+=)", f"{axis}={value}")    # the + of 1e+3 is none
        parts.append(dict(pair.split("=", 1) for pair in pairs))
    names = {f.name for f in fields(Config)} - set(OWN) | {"label"}
    for part in parts:
        if not part.keys() <= names or "" in part.values():
            raise ValueError(f"cannot read {word!r}: a grid is SETTING=VALUE,VALUE,... or "
                             "SETTING=FIRST:END, with settings of train.py")
    return parts


def parse_grid(text: str) -> dict:
    """The runs of a grid, the first axis slowest: {name: {settings, row, reference}}."""
    axes = [parse_axis(word) for word in text.split()]
    if not axes:
        raise ValueError('give a grid, for example "lr=1e-4,1e-3 method=opd,effopd seed=0:5"')
    runs = {}
    for parts in itertools.product(*axes):
        settings = merged(parts)
        if settings.get("method", "race") == "race":
            raise ValueError("a grid needs the methods of single runs, as in method=opd,effopd")
        row = " ".join(row_of(part) for part in parts if "seed" not in part)
        runs[name_of(settings)] = dict(settings=settings, row=row,
                                       reference=reference_of(parts, axes))
    return runs


def merged(parts) -> dict:
    """The settings of a run, as text, from its value on each axis."""
    return {name: value for part in parts for name, value in part.items()}


def name_of(settings: dict) -> str:
    return ",".join(f"{name}={value}" for name, value in settings.items()).replace("/", "_")


def row_of(part: dict) -> str:
    """What a value is called in the table: its label, or all that it sets."""
    pairs = [f"{name}={value}" for name, value in part.items()]
    return part.get("label", " ".join(pairs)).replace("_", " ")


def reference_of(parts, axes) -> str | None:
    """The first OPD run with these values on all axes but the one that chooses the method."""
    choices = [axis if "method" in part else [part] for axis, part in zip(axes, parts)]
    for others in itertools.product(*choices):
        if merged(others)["method"] == "opd":
            return name_of(merged(others))
    return None


# ------------------------------------------------------------------------------------------------
# Running it.

def run_all(runs: dict, shared: list[str], args, kept: dict) -> dict:
    """Do the runs that `kept` lacks; {name: the last line that it said} of those that failed."""
    todo = [name for name in runs if name not in kept["runs"]]
    failed = {}
    pool = ThreadPoolExecutor(args.jobs)
    try:
        results = pool.map(lambda name: run_one(name, runs[name]["settings"], shared, args), todo)
        for name, said in zip(todo, tqdm(results, "sweep", len(todo), unit="run")):
            if said:
                failed[name] = said
                continue
            summary = json.loads((args.out_dir / name / "summary.json").read_text())
            kept["runs"][name] = runs[name] | in_short(summary)
            kept["control"] = summary.get("control")
            keep(args.out_dir, kept)
            if not args.keep_checkpoints:
                shutil.rmtree(args.out_dir / name / "checkpoints", ignore_errors=True)
    finally:
        pool.shutdown(cancel_futures=True)                    # stopped: no more runs begin
    return failed


def run_one(name: str, settings: dict, shared: list[str], args) -> str | None:
    """One run, or the rest of it, in a process of its own; what it complained of, if it failed."""
    directory = args.out_dir / name
    if (directory / "summary.json").exists():
        return None
    words = ["--resume", str(directory)]
    if not (directory / "config.json").exists():
        shutil.rmtree(directory, ignore_errors=True)
        words = words_of(settings) + shared + ["--out_dir", str(directory)]
    script = ["-m", args.module] if args.module else ["train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, *script, *words], capture_output=True, text=True,
                          env=environment)
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return (said or [f"exit status {done.returncode}"])[-1] if done.returncode else None


def words_of(settings: dict) -> list[str]:
    pairs = [(f"--{name}", value) for name, value in settings.items() if name != "label"]
    return [word for pair in pairs for word in pair]


def in_short(summary: dict) -> dict:
    """What sweep.json keeps of a run's summary."""
    curve = [[round(point[name], 4) for name in POINT] for point in summary["curve"]]
    searches = [[search[name] for name in ("step", "multiple", "lr")]
                for search in summary["searches"]]
    final = round(summary["final_accuracy"], 6)
    return dict(final_accuracy=final, curve=curve, searches=searches)


def keep(out_dir: Path, kept: dict):
    """Write sweep.json, a run a line."""
    with train.replacing(out_dir / "sweep.json") as scratch:
        lines = [f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in kept["runs"].items()]
        head = json.dumps(kept | {"runs": {}}, indent=1).removesuffix("{}\n}")
        scratch.write_text(head + "{\n" + ",\n".join(lines) + "\n }\n}\n")


# ------------------------------------------------------------------------------------------------
# The table.

def tabulate(kept: dict, target: float, at: list[int]) -> dict:
    """{row: {number: its `interval` over seeds}}: the final accuracy, that after the steps in `at`,
    costs to the target, and how many times fewer steps these are than the reference's.
    """
    rows = {}
    for name, run in kept["runs"].items():
        reference = kept["runs"].get(run["reference"])
        goal = target or (reference["final_accuracy"] if reference else 0.8)
        curve = [dict(zip(POINT, point)) for point in run["curve"]]
        reached = first_at(curve, goal)
        own = dict(final=run["final_accuracy"], goal=goal, reached=float(reached is not None))
        own |= {unit: (reached or curve[-1])[unit] for unit in UNITS}
        own |= {f"at {step}": point["accuracy"] for step in at for point in curve
                if point["step"] == step}
        if reference:
            theirs = first_at([dict(zip(POINT, point)) for point in reference["curve"]], goal)
            both = reached and theirs
            own["times"] = theirs["step"] / reached["step"] if both else None
        rows.setdefault(run["row"], []).append(own)
    table = {}
    for row, runs in rows.items():
        table[row] = {key: interval([run.get(key) for run in runs]) for key in runs[0]}
    return table


def cell(stats: dict, form: str) -> str:
    """mean [low, high]; of one value the mean alone."""
    if stats["mean"] is None:
        return "-"
    if stats["low"] is None:
        return f"{stats['mean']:{form}}"
    return f"{stats['mean']:{form}} [{stats['low']:{form}}, {stats['high']:{form}}]"


def print_table(head: list[str], lines: list[list[str]]):
    for line in [head, ["---"] * len(head), *lines]:
        print("| " + " | ".join(line) + " |")


def print_tables(kept: dict, table: dict, at: list[int]):
    if kept["control"]:
        words = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in kept["control"].items()]
        print("\nAccuracies without distillation: " + ", ".join(words))
    print("\nAccuracy: mean [95% interval] over seeds\n")
    columns = [f"at {step}" for step in at]
    print_table(["", "n", "final", *columns],
                [[row, str(stats["final"]["n"]), cell(stats["final"], ".3f"),
                  *(cell(stats[column], ".3f") for column in columns)]
                 for row, stats in table.items()])
    print("\nCosts to the target accuracy, searches included\n")
    lines = []
    for row, stats in table.items():
        n = stats["final"]["n"]
        reached = round(stats["reached"]["mean"] * n)
        bound = "" if reached == n else ">= "
        lines.append([row, f"{reached} of {n}, {stats['goal']['mean']:.3f}",
                      bound + cell(stats["step"], ".1f"),
                      bound + f"{stats['sampled']['mean']:,.0f} + {stats['scored']['mean']:,.0f}",
                      bound + cell(stats["seconds"], ".1f"),
                      cell(stats["times"], ".1f") if reached == n and "times" in stats else "-"])
    print_table(["", "reached, target", "steps", "tokens sampled + only scored", "seconds",
                 "times fewer steps"], lines)


# ------------------------------------------------------------------------------------------------
# The figure.

def draw(kept: dict, table: dict, path: Path, title: str):
    """Final accuracy and steps to the target: by learning rate where it varies, else in rows."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = [run["settings"] for run in kept["runs"].values()]
    by_lr = all("lr=" in row for row in table) and len({run["lr"] for run in runs}) > 1
    size = (10, 4.5 if by_lr else 1.2 + 0.32 * len(table))
    figure, panels = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=not by_lr)
    names = {"final": "final accuracy", "step": "steps to the target"}
    for panel, (key, name) in zip(panels, names.items()):
        if by_lr:
            draw_lines(panel, table, key)
            panel.set(xscale="log", xlabel="learning rate", ylabel=name)
        else:
            draw_rows(panel, table, key)
            panel.set(xlabel=name)
        panel.grid(alpha=0.3)
    if kept["control"]:
        mark = panels[0].axhline if by_lr else panels[0].axvline
        mark(kept["control"]["student_at_best_temperature"], color="grey", linestyle=":",
             label="untrained, at its best temperature")
        mark(kept["control"]["teacher"], color="black", linewidth=0.8, label="teacher")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title or "Mean and 95% interval over seeds (hollow: not every seed got there)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_lines(panel, table, key):
    """A line for each row name without its learning rate."""
    lines = {}
    for row, stats in table.items():
        rate = re.search(r"\blr=(\S+)", row)[1]
        lines.setdefault(row.replace(f"lr={rate}", "").strip(), []).append((float(rate), stats))
    for i, (name, points) in enumerate(lines.items()):
        for x, stats in sorted(points, key=lambda point: point[0]):
            draw_point(panel, (x, stats[key]["mean"]), stats, key, f"C{i}", upright=True)
        points = sorted((x, stats[key]["mean"]) for x, stats in points)
        panel.plot(*zip(*points), color=f"C{i}", label=name)


def draw_rows(panel, table, key):
    for i, (row, stats) in enumerate(table.items()):
        draw_point(panel, (stats[key]["mean"], i), stats, key, "C0", upright=False)
    panel.set_yticks(range(len(table)), table)
    panel.set_ylim(len(table) - 0.5, -0.5)


def draw_point(panel, at, stats, key, color, upright):
    hollow = key == "step" and stats["reached"]["mean"] < 1
    half = [[0.0 if stats[key]["low"] is None else stats[key]["mean"] - stats[key]["low"]]] * 2
    bars = dict(yerr=half) if upright else dict(xerr=half)
    panel.errorbar(*at, **bars, fmt="o", color=color, capsize=3,
                   markerfacecolor="white" if hollow else color)


# ------------------------------------------------------------------------------------------------
# The command.

def stop(message):
    print(f"sweep: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(args):
    parser = argparse.ArgumentParser(prog="python -m extras.sweep", allow_abbrev=False,
                                     description=__doc__.split("\n\n")[0])
    parser.error = stop
    parser.add_argument("grid", nargs="?", default="", help="see above")
    parser.add_argument("--out_dir", type=Path, default=Path("runs/sweep"), help="what it keeps")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count()), help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--module", default="", help="extras.real for models of your own")
    parser.add_argument("--target", type=float, default=0.0, help="accuracy to count costs to")
    parser.add_argument("--at", default="", help="steps whose accuracy is a column: 8,16")
    parser.add_argument("--title", default="", help="of the figure")
    parser.add_argument("--keep_checkpoints", action="store_true", help="of finished runs")
    parser.add_argument("--redraw", type=Path, help="a sweep.json: only print and draw it")
    return parser.parse_known_args(args)


def check(runs: dict, shared: list[str]):
    """Stops at a setting that train.py would refuse; makes students and teachers beforehand."""
    gaps = set()
    for run in runs.values():
        config = train.parse(words_of(run["settings"]) + shared)
        if config.gap not in gaps:
            train.load(config)
            gaps.add(config.gap)


def sweep(args, shared: list[str]) -> tuple[dict, dict]:
    """Do the grid's runs: (all that sweep.json holds, what the failed runs complained of)."""
    runs, file = parse_grid(args.grid), args.out_dir / "sweep.json"
    if not args.module:
        check(runs, shared)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    pairs = list(zip(shared[::2], shared[1::2]))
    same_for_all = [list(pair) for pair in pairs if pair[0].removeprefix("--") not in OWN]
    kept = dict(grids=[], shared=same_for_all, control=None, versions=train.versions(), runs={})
    if file.exists():
        kept = json.loads(file.read_text())
    if kept["shared"] != same_for_all:
        settings = " ".join(sum(kept["shared"], [])) or "default settings"
        raise ValueError(f"{args.out_dir} has runs with {settings}; name another --out_dir")
    kept["grids"] = list(dict.fromkeys([*kept["grids"], args.grid]))
    keep(args.out_dir, kept)
    return kept, run_all(runs, shared, args, kept)


def main(args=None):
    args, shared = parse_args(args)
    failed, picture = {}, args.out_dir / "sweep.png"
    try:
        if args.redraw:
            kept, picture = json.loads(args.redraw.read_text()), args.redraw.with_suffix(".png")
        else:
            kept, failed = sweep(args, shared)
        if kept["runs"]:
            at = [int(step) for step in args.at.split(",") if step]
            table = tabulate(kept, args.target, at)
            print_tables(kept, table, at)
            draw(kept, table, picture, args.title)
            print(f"\nThe figure is {picture}")
    except (ValueError, OSError) as error:
        stop(error)
    except KeyboardInterrupt:
        stop("stopped; the same command goes on")
    for name, said in failed.items():
        print(f"sweep: {name} failed: {said}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
