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
seed (.8 where a grid has none). The reference of a run is the grid's first OPD run with the same
values on all other axes. A run that does not get there counts with all it spent, so its row has
lower bounds (>=). How much more accurate a run ends than its reference, and how many times fewer
steps and tokens it takes, are means over seeds of the differences and ratios.
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
from train import Config, first_at

UNITS = ("step", "sampled", "scored", "seconds")              # of cost
POINT = ("step", "accuracy", "sampled", "scored", "seconds")   # of a curve, as it is kept
OWN = ("out_dir", "cache_dir", "resume", "device")            # of a run, not of a grid


# ------------------------------------------------------------------------------------------------
# The grid.

def parse_axis(word: str, config_class) -> list[dict]:
    """"method=opd,effopd+accept=ge" -> [{method: opd}, {method: effopd, accept: ge}]."""
    axis, _, text = word.partition("=")
    span = re.fullmatch(r"(\d+):(\d+)", text)
    values = [str(i) for i in range(int(span[1]), int(span[2]))] if span else text.split(",")
    parts = []
    for value in values:
        pairs = re.split(r"\+(?=\w+=)", f"{axis}={value}")    # the + of 1e+3 is none
        parts.append(dict(pair.split("=", 1) for pair in pairs if "=" in pair))
    names = {f.name for f in fields(config_class)} - set(OWN) | {"label"}
    if not parts or any(not part.keys() <= names or "" in part.values() for part in parts):
        raise ValueError(f"cannot read {word!r}: the grid comes first, in quotes, with words like "
                         "SETTING=VALUE,VALUE or SETTING=FIRST:END")
    return parts


def parse_grid(text: str, config_class=Config) -> dict:
    """The runs of a grid, the first axis slowest: {name: {settings, row, reference}}."""
    axes = [parse_axis(word, config_class) for word in text.split()]
    if not axes:
        raise ValueError('give a grid, for example "lr=1e-4,1e-3 method=opd,effopd seed=0:5"')
    runs = {}
    for parts in itertools.product(*axes):
        settings = merged(parts)
        if len(settings) < sum(map(len, parts)):
            raise ValueError(f"two words of the grid set the same: {name_of(settings)}")
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
            if args.module:                                   # extras.real_study wants each step
                kept["runs"][name]["log"] = log_in_short(args.out_dir / name / "log.jsonl")
            control = summary.get("control")
            if kept["control"] not in (None, control):
                control = {}                                  # two gaps: no one line for all
            kept["control"] = control
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
        words = shared + words_of(settings) + ["--out_dir", str(directory)]
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
    curve = [[round(point[name], 6) for name in POINT] for point in summary["curve"]]
    searches = [[search[name] for name in ("step", "multiple", "lr")]
                for search in summary["searches"]]
    final = round(summary["final_accuracy"], 6)
    return dict(final_accuracy=final, curve=curve, searches=searches)


def log_in_short(file: Path) -> list:
    """[mean KL of the step's answers (None but for opd and effopd), tokens so far] of each step."""
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return [[round(entry["kl"], 5) if "kl" in entry else None, entry["tokens"]]
            for entry in entries]


def keep(out_dir: Path, kept: dict):
    """Write sweep.json, a run a line."""
    with train.replacing(out_dir / "sweep.json") as scratch:
        lines = [f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in kept["runs"].items()]
        head = json.dumps(kept | {"runs": {}}, indent=1).removesuffix("{}\n}")
        scratch.write_text(head + "{\n" + ",\n".join(lines) + "\n }\n}\n")


# ------------------------------------------------------------------------------------------------
# The table.

def tabulate(kept: dict, target: float, at: list[int]) -> dict:
    """{row: {number: its `interval` over seeds}}, the numbers of `numbers_of`."""
    rows = {}
    for run in kept["runs"].values():
        numbers = numbers_of(run, kept["runs"], target, at)
        rows.setdefault(run["row"], []).append(numbers)
    return {row: interval(runs) for row, runs in rows.items()}


def numbers_of(run: dict, runs: dict, target: float, at: list[int]) -> dict:
    """Final accuracy, after the steps in `at`, above the reference's; costs to the target.

    None: not known.
    """
    curve, reference = points_of(run), runs.get(run["reference"])
    accuracies = {point["step"]: point["accuracy"] for point in curve}
    numbers = dict(final=run["final_accuracy"], **{f"at {s}": accuracies.get(s) for s in at})
    numbers |= dict.fromkeys(["goal", "reached", *UNITS, "fewer steps", "fewer tokens"])
    numbers["above reference"] = None
    if reference:
        numbers["above reference"] = run["final_accuracy"] - reference["final_accuracy"]
    if run["reference"] and not reference and not target:     # it failed, or is still to come
        return numbers
    goal = target or (reference["final_accuracy"] if reference else 0.8)
    reached = first_at(curve, goal)
    spent = reached or curve[-1]
    numbers |= dict(goal=goal, reached=float(reached is not None))
    numbers |= {unit: spent[unit] for unit in UNITS}
    theirs = first_at(points_of(reference), goal) if reference else None
    if reached and theirs:
        tokens = [point["sampled"] + point["scored"] for point in (theirs, reached)]
        numbers["fewer steps"] = theirs["step"] / reached["step"]
        numbers["fewer tokens"] = tokens[0] / tokens[1]
    return numbers


def points_of(run: dict) -> list[dict]:
    return [dict(zip(POINT, point)) for point in run["curve"]]


def cell(stats: dict, form: str, mean_only=False) -> str:
    """mean [low, high]; of one value the mean alone."""
    if stats["mean"] is None:
        return "-"
    if mean_only or stats["low"] is None:
        return f"{stats['mean']:{form}}"
    return f"{stats['mean']:{form}} [{stats['low']:{form}}, {stats['high']:{form}}]"


def accuracy_table(table: dict, at: list[int]) -> list[list[str]]:
    """Rows of cells: n, the final accuracy, after the steps in `at`, above the reference's."""
    forms = {"final": ".3f"} | {f"at {step}": ".3f" for step in at} | {"above reference": "+.3f"}
    if not any(stats["above reference"]["mean"] for stats in table.values()):
        del forms["above reference"]                          # none, or only itself
    rows = [["", "n", *forms], ["---"] * (2 + len(forms))]
    for name, stats in table.items():
        cells = [cell(stats[column], form) for column, form in forms.items()]
        rows.append([name, str(stats["final"]["n"]), *cells])
    return rows


def cost_table(table: dict) -> list[list[str]]:
    """Rows of cells: seeds that reached the target, steps and tokens to it, ratios of those."""
    head = ["", "reached, target", "steps", "tokens sampled + only scored", "times fewer steps",
            "times fewer tokens"]
    rows = [head, ["---"] * len(head)]
    for name, stats in table.items():
        n = stats["reached"]["n"]
        reached = round(n and stats["reached"]["mean"] * n)
        bound = "" if reached == n else ">= "
        tokens = [cell(stats[key], ",.0f", mean_only=True) for key in ("sampled", "scored")]
        ratios = [stats["fewer steps"], stats["fewer tokens"]]
        rows.append([name, f"{reached} of {n}, {cell(stats['goal'], '.3f', mean_only=True)}",
                     bound + cell(stats["step"], ".1f"), bound + " + ".join(tokens),
                     *(cell(ratio, ".1f") if ratio["n"] == n else "-" for ratio in ratios)])
    return rows


def as_markdown(rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def print_tables(kept: dict, table: dict, at: list[int]):
    if kept["control"]:
        print(f"\nAccuracies without distillation: {train.in_words(kept['control'])}")
    print("\nAccuracy: mean [95% interval] over seeds\n")
    print(as_markdown(accuracy_table(table, at)))
    print("Costs to the target accuracy, searches included\n")
    print(as_markdown(cost_table(table)), end="")


# ------------------------------------------------------------------------------------------------
# The figure.

def draw(kept: dict, table: dict, path: Path, title: str):
    """Final accuracy and steps to the target: against the grid's first axis if it is a number's
    (the learning rate), else in rows.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    axis, lines = lines_of(table)
    size = (10, 4.5 if lines else 1.2 + 0.32 * len(table))
    figure, panels = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=not lines)
    names = {"final": "final accuracy", "step": "steps to the target (hollow: not all seeds)"}
    for panel, (key, name) in zip(panels, names.items()):
        if lines:
            draw_lines(panel, lines, key)
            panel.set(xlabel="learning rate" if axis == "lr" else axis, ylabel=name)
            panel.set_xscale("log" if panel.dataLim.xmin > 0 else "linear")
        else:
            draw_rows(panel, table, key)
            panel.set(xlabel=name)
        panel.grid(alpha=0.3)
    mark = panels[0].axhline if lines else panels[0].axvline
    control = kept["control"] or {}
    if "student_at_best_temperature" in control:              # extras.real: only with --control
        mark(control["student_at_best_temperature"], color="grey", linestyle=":",
             label="not distilled, at its best temperature")
    if "teacher" in control:
        mark(control["teacher"], color="black", linewidth=0.8, label="teacher")
    means = [stats["final"]["mean"] for stats in table.values()]
    lowest = min([*means, control.get("student_at_best_temperature", 1.0)])
    panels[0].set(**{"ylim" if lines else "xlim": (lowest - 0.05, 1.05)})    # intervals may pass 1
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title or "Mean and 95% interval over seeds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


NUMBER = re.compile(r"([\w ]+)=(\d*\.?\d+(?:e[+-]?\d+)?)(?: (.*))?")


def lines_of(table: dict) -> tuple[str, dict]:
    """(axis, {rest of the row's name: [(number, stats)]}) if all rows begin like lr=1e-3."""
    found = [NUMBER.fullmatch(row) for row in table]
    one_axis = all(found) and len({match[1] for match in found}) == 1
    if not one_axis or len({match[2] for match in found}) < 2:
        return "", {}
    lines = {}
    for match, stats in zip(found, table.values()):
        lines.setdefault(match[3] or "", []).append((float(match[2]), stats))
    return found[0][1], lines


def draw_lines(panel, lines, key):
    for i, (name, points) in enumerate(lines.items()):
        for x, stats in points:
            draw_point(panel, (x, stats[key]["mean"]), stats, key, f"C{i}", upright=True)
        known = [(x, stats[key]["mean"]) for x, stats in points if stats[key]["n"]]
        panel.plot(*zip(*sorted(known)), color=f"C{i}", label=name or None)


def draw_rows(panel, table, key):
    for i, (row, stats) in enumerate(table.items()):
        draw_point(panel, (stats[key]["mean"], i), stats, key, "C0", upright=False)
    panel.set_yticks(range(len(table)), table)
    panel.set_ylim(len(table) - 0.5, -0.5)


def draw_point(panel, at, stats, key, color, upright):
    if None in at:
        return
    hollow = key == "step" and stats["reached"]["mean"] < 1
    half = [[0.0 if stats[key]["low"] is None else stats[key]["mean"] - stats[key]["low"]]] * 2
    bars = dict(yerr=half) if upright else dict(xerr=half)
    panel.errorbar(*at, **bars, fmt="o", color=color, capsize=3,
                   markerfacecolor="white" if hollow else color)


# ------------------------------------------------------------------------------------------------
# The command.

def stop(message, status=2):
    print(f"sweep: {message}", file=sys.stderr)
    sys.exit(status)


def steps(text: str) -> list[int]:
    return [int(step) for step in text.split(",")]


def parse_args(args):
    parser = argparse.ArgumentParser(prog="python -m extras.sweep", allow_abbrev=False,
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop
    parser.add_argument("grid", nargs="?", default="", help="see above")
    parser.add_argument("--out_dir", type=Path, default=Path("runs/sweep"), help="what it keeps")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count()), help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--module", choices=["extras.real"], help="for models of your own")
    parser.add_argument("--target", type=float, default=0.0, help="accuracy to count costs to")
    parser.add_argument("--at", type=steps, default=[], help="steps to show accuracies at: 8,16")
    parser.add_argument("--rows", default="", help="rows to show, comma between them; empty: all")
    parser.add_argument("--title", default="", help="of the figure")
    parser.add_argument("--keep_checkpoints", action="store_true", help="of finished runs")
    parser.add_argument("--redraw", type=Path, help="a sweep.json: only print and draw it")
    return parser.parse_known_args(args)


def sweep(args, shared: list[str]) -> tuple[dict, dict]:
    """Do the grid's runs: (all that sweep.json holds, what the failed runs complained of)."""
    config_class = Config
    if args.module:
        from extras.real import RealConfig as config_class
    runs, configs = parse_grid(args.grid, config_class), {}
    for name, run in runs.items():                            # a wrong setting stops it here
        configs[name] = train.parse(shared + words_of(run["settings"]), config_class)
    kept = begin(args, shared, runs)
    for name, config in configs.items():
        if name not in kept["runs"] and not args.module:
            train.load(config)                                # makes student and teacher, once
    return kept, run_all(runs, shared, args, kept)


def begin(args, shared: list[str], runs: dict) -> dict:
    """What sweep.json holds; it is there from now on. ValueError if it has other settings."""
    settings = settings_of(shared) + [["--module", args.module]] * bool(args.module)
    kept = dict(grids=[], shared=settings, control=None, versions=train.versions(), runs={})
    if (args.out_dir / "sweep.json").exists():
        kept = read(args.out_dir / "sweep.json")
    if dict(kept["shared"]) != dict(settings):
        words = " ".join(word for pair in kept["shared"] for word in pair) or "default settings"
        raise ValueError(f"{args.out_dir} has runs with {words}; name another --out_dir")
    rows = {}
    for run in (kept["runs"] | runs).values():
        own = {k: v for k, v in run["settings"].items() if k not in ("seed", "label")}
        if rows.setdefault(run["row"], own) != own:
            raise ValueError(f"{run['row']!r} names both {name_of(rows[run['row']])} and "
                             f"{name_of(own)}; choose another label, or another --out_dir")
    kept["grids"] = list(dict.fromkeys([*kept["grids"], args.grid]))
    args.out_dir.mkdir(parents=True, exist_ok=True)
    keep(args.out_dir, kept)
    return kept


def settings_of(words: list[str]) -> list[list[str]]:
    """[["--steps", "6"], ["--move_lr", "True"]] of --steps=6 --move_lr; a run's OWN left out."""
    pairs = []
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            pairs.append([name, value or "True"])
        else:
            pairs[-1][1] = word
    return [pair for pair in pairs if pair[0].removeprefix("--") not in OWN]


def read(file: Path) -> dict:
    kept = json.loads(file.read_text())
    if not isinstance(kept, dict) or "runs" not in kept:
        raise ValueError(f"{file} is not what a sweep keeps")
    return kept


def chosen_rows(table: dict, args) -> dict:
    """Those of --rows; _ stands for a blank, and a row may go without its first word, lr=1e-3."""
    if not args.rows:
        return table
    chosen = {}
    for name in args.rows.replace("_", " ").split(","):
        found = [row for row in table if name in (row, row.partition(" ")[2])]
        if not found:
            raise ValueError(f"--rows: there is no {name!r} but {', '.join(table)}")
        chosen |= {row: table[row] for row in found}
    return chosen


def show(kept: dict, args, picture: Path):
    """Print the tables and draw the figure."""
    table = chosen_rows(tabulate(kept, args.target, args.at), args)
    print_tables(kept, table, args.at)
    draw(kept, table, picture, args.title)
    print(f"\nThe figure is {picture}")


def main(args=None):
    args, shared = parse_args(args)
    if not 0 <= args.target <= 1:
        stop(f"--target is an accuracy, 0 to 1, got {args.target}")
    if args.redraw and (args.grid or shared):
        stop(f"--redraw runs nothing: leave out {' '.join([args.grid, *shared]).strip()}")
    failed, picture = {}, args.out_dir / "sweep.png"
    try:
        if args.redraw:
            file = args.redraw / "sweep.json" if args.redraw.is_dir() else args.redraw
            kept, picture = read(file), file.with_suffix(".png")
        else:
            kept, failed = sweep(args, shared)
        if kept["runs"]:
            show(kept, args, picture)
    except (ValueError, OSError) as error:
        stop(error)
    except KeyboardInterrupt:
        print("sweep: stopped; the same command goes on", file=sys.stderr, flush=True)
        os._exit(130)     # under -m, Python overrides sys.exit's status if the Ctrl-C hit an exec()
    for name, said in failed.items():
        print(f"sweep: {name} failed: {said}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
