"""How many problems must D_v have? Searches of EffOPD runs again, by D_v of many sizes.

    python -m extras.dv_size runs/effopd-s0 runs/effopd-s1 --problems 4000
    python -m extras.dv_size --redraw analysis/dv.json

A search goes by the accuracy of a few answers, 50 in the paper. How often does it take a candidate
that is no better, or leave one that is, and what does that cost? Here all candidates that a search
might have tried are scored on many problems under the same random numbers, and that is the truth.
Then searches go by the scores on a few of these problems, drawn at random a thousand times.
"""

import argparse
import json
import operator
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from analyze import Checkpoint, canvas, expand, interval, read_run
from effopd import SEARCHES, EffOPD
from train import evaluate, first_line, load, pick_device, rewards_of, write_json

SIZES = (10, 25, 50, 100, 200, 400)                           # problems in D_v
RATES = {  # words: (what over what of `decisions`, the panel that shows it)
    "no better, but accepted": ("worse_accepted", "worse_asked", 0),
    "better, but rejected": ("better_rejected", "better_asked", 0),
    "W_t itself, scored again, is higher": ("null_higher", "draws", 0),
    "accuracy lost by wrong decisions": ("lost", "draws", 1),
    "winner's score above a fresh one": ("curse", "jumps", 1),
}


def decisions(right, again, size, draws=1000) -> Counter:
    """What a search decides by a D_v of this size, drawn `draws` times from N problems: counts.

    right (1 + candidates, N): 1.0 where the answer of W_t, of each candidate, is right, under the
    same random numbers; again (N,): of W_t under others. A candidate must score strictly higher.
    """
    N, truth = right.shape[1], right.mean(1)                                     # (1 + candidates,)
    keys = np.random.default_rng(0).random((draws, N))
    drawn = keys.argpartition(size, axis=1)[:, :size]                            # (draws, size)
    scores = right[:, drawn].mean(-1)                                            # (1 + c, draws)
    higher = scores[1:] > scores[:-1]                                            # (c, draws)
    better = (truth[1:] > truth[:-1])[:, None]                                   # (c, 1)
    accepted = np.logical_and.accumulate(higher)                                 # (c, draws)
    asked = np.vstack([np.ones((1, draws), dtype=bool), accepted[:-1]])          # scored at all
    kept = accepted.sum(0)                                                       # (draws,) 0: W_t
    ideal = np.logical_and.accumulate(better).sum()                              # by all N problems
    score = scores[kept, np.arange(draws)]
    fresh = (right.sum(1)[kept] - size * score) / (N - size)                     # on the others
    return Counter(
        worse_asked=(asked & ~better).sum(), worse_accepted=(asked & ~better & higher).sum(),
        better_asked=(asked & better).sum(), better_rejected=(asked & better & ~higher).sum(),
        null_higher=(again[drawn].mean(-1) > scores[0]).sum(), draws=draws, jumps=(kept > 0).sum(),
        lost=(truth[ideal] - truth[kept]).sum(), curse=(score - fresh)[kept > 0].sum())


def settings_of(directory: Path):
    """Of a run that can be asked: W_t is in a checkpoint, Δ can be made again. Else ValueError."""
    config, _ = read_run(directory)
    asked_for = (config.method == "effopd" and config.score == "accuracy"
                 and config.task == "chains" and config.candidates in ("linear", "doubling"))
    rebuilt = (config.first_trigger.bit_count() == 1 and not config.search_every
               and not config.utility_gate and not config.alignment_gate)
    if not (asked_for and rebuilt):
        raise ValueError(f"{directory}: this needs an EffOPD run of the built-in task by accuracy, "
                         "linear or doubling candidates along Δ at the powers of two, no gates")
    return config


def all_multiples(config) -> list:
    """0, and what a search would try if every candidate were better than the last."""
    tried = []

    def score_at(multiple):
        tried.append(multiple)
        return len(tried)

    SEARCHES[config.candidates](score_at, operator.gt, 0, config.num_candidates)
    return tried


def searches_of(directory: Path, effopd: EffOPD):
    """A run's searches again, bit for bit: (its record, W_t of all, Δ of the weights in scope)."""
    kept = Checkpoint(directory / "checkpoints" / "step_000000").weights()
    for line in (directory / "search.jsonl").read_text().splitlines():
        record = json.loads(line)
        saved = directory / "checkpoints" / f"step_{record['step']:06d}"         # before the jump
        current = Checkpoint(saved).weights()
        delta = {name: current[name] - kept[name] for name in effopd.parameters}
        yield record, current, delta
        kept = {name: current[name] + record["multiple"] * d if record["multiple"]
                else current[name] for name, d in delta.items()}


@torch.no_grad()
def score_run(directory: Path, num_problems: int, device: str) -> tuple[dict, float | None]:
    """{size: `decisions` of all its searches}, and by how much the run overrated its winners."""
    config = settings_of(directory)
    config.device = device
    task, model, _, _ = load(config)
    effopd = EffOPD(model, None, scope=config.scope)
    problems = task.problems(num_problems, random.Random("large D_v"))
    multiples, counts, overrated = all_multiples(config), {size: Counter() for size in SIZES}, []

    def marks(seed):                                          # (N,) 1.0 where an answer is right
        _, answers = evaluate(model, task, problems, seed)
        return np.array(rewards_of(task, problems, answers))

    for record, current, delta in tqdm(searches_of(directory, effopd), str(directory)):
        model.load_state_dict(current, strict=False)          # the tied head has no entry
        seed, right = record["step"] * 1_000_003, []
        again = marks(seed + 500_000_000)
        for multiple in multiples:
            effopd.place(current, delta, multiple)                               # W_t + mΔ
            right.append(marks(seed))
        for size in SIZES:
            counts[size].update(decisions(np.array(right), again, size))
        if record["multiple"]:
            own = record["scores"][record["multiples"].index(record["multiple"])]
            overrated.append(own - right[multiples.index(record["multiple"])].mean())
    return counts, float(np.mean(overrated)) if overrated else None


def tabulate(scored) -> dict:
    """{words: {size: interval over runs}}."""
    table = {}
    for words, (part, whole, _) in RATES.items():
        table[words] = {}
        for size in SIZES:
            totals = [counts[size] for counts, _ in scored]
            rates = [float(of[part] / of[whole]) if of[whole] else None for of in totals]
            table[words][str(size)] = interval(rates)
    return table


def cell(s) -> str:
    if s["mean"] is None:
        return ""
    return f"{s['mean']:.3f}" + (f" ± {s['high'] - s['mean']:.3f}" if s["n"] > 1 else "")


def show(results, out_dir):
    """Print the table, draw the figure."""
    print(f"| problems in D_v | {' | '.join(map(str, SIZES))} |\n|---{'|---' * len(SIZES)}|")
    for words, by_size in results["table"].items():
        print(f"| {words} | {' | '.join(map(cell, by_size.values()))} |")
    print(f"\nIn the runs themselves, winner's score above a fresh one: "
          f"{cell(results['overrated'])} (n = {results['overrated']['n']})")
    with canvas(out_dir / "dv.png", "How many problems must D$_v$ have? Low is good",
                ("problems in D$_v$", "share of these"),
                ("problems in D$_v$", "accuracy")) as axes:
        for i, (words, (_, _, panel)) in enumerate(RATES.items()):
            known = {size: s for size, s in results["table"][words].items() if s["n"]}
            half = [s["high"] - s["mean"] if s["n"] > 1 else 0.0 for s in known.values()]
            axes[panel].errorbar(list(map(int, known)), [s["mean"] for s in known.values()], half,
                                 fmt=".-", color=f"C{i}", capsize=3, label=words)
        for axis in axes:
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set(xscale="log", xticks=SIZES, xticklabels=SIZES)
            axis.minorticks_off()


def stop(message):
    print(f"dv_size: {message}", file=sys.stderr)
    sys.exit(2)


def main(args=None):
    parser = argparse.ArgumentParser(prog="python -m extras.dv_size", allow_abbrev=False,
                                     description=__doc__.split("\n\n")[0])
    parser.error = stop
    parser.add_argument("runs", nargs="*", type=Path, help="directories of EffOPD runs, its seeds")
    parser.add_argument("--problems", type=int, default=4000, help="in all (default: 4000)")
    parser.add_argument("--out_dir", type=Path, default="analysis", help="(default: analysis)")
    parser.add_argument("--redraw", type=Path, help="a dv.json, whose figure to draw again")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(args)
    if bool(args.runs) == bool(args.redraw) or args.problems <= max(SIZES):
        stop(f"give EffOPD runs, or --redraw dv.json; --problems above {max(SIZES)}")
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        if args.redraw:
            return show(json.loads(args.redraw.read_text()), args.out_dir)
        runs = [run for directory in args.runs for run in expand(directory)]
        for run in runs:
            settings_of(run)                                  # before the first takes its minutes
        scored = [score_run(run, args.problems, pick_device(args.device)) for run in runs]
        results = dict(problems=args.problems, runs=[run.as_posix() for run in runs],
                       table=tabulate(scored), overrated=interval([rate for _, rate in scored]))
        write_json(args.out_dir / "dv.json", results)
        show(results, args.out_dir)
    except (ValueError, OSError) as error:
        stop(first_line(error))
    except (KeyError, TypeError):
        if not args.redraw:
            raise
        stop(f"{args.redraw} has no numbers of this script")


if __name__ == "__main__":
    main()
