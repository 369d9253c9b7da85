"""How many problems must D_v have? The searches of EffOPD runs again, by D_v of many sizes.

    python -m extras.dv_size runs/effopd-s0 runs/effopd-s1 --problems 4000

A search goes by the accuracy of a few answers, 50 in the paper. How often does it take a candidate
that is no better, or leave one that is, and what does that cost? Here all candidates that a search
might have tried are scored on many problems under the same random numbers, and that is the truth.
Then searches go by the scores on a few of these problems, drawn at random a thousand times.
"""

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from analyze import Checkpoint, expand, interval, read_run
from effopd import EffOPD
from train import evaluate, first_line, load, pick_device, rewards_of, write_json

SIZES = (10, 25, 50, 100, 200, 400)                           # problems in D_v
RATES = {  # words: what over what of `decisions`
    "no better, but accepted": ("worse_accepted", "worse_asked"),
    "better, but rejected": ("better_rejected", "better_asked"),
    "accuracy lost by wrong decisions": ("lost", "draws"),
    "winner's score above a fresh one": ("curse", "jumps"),
}


def decisions(right, size, draws=1000) -> Counter:
    """What a search decides by a D_v of this size, drawn `draws` times from N problems: counts.

    right (1 + candidates, N): 1.0 where the answer of W_t, of each candidate, is right, under the
    same random numbers. A candidate must score strictly higher than the one before.
    """
    N = right.shape[1]
    truth = right.mean(1)                                                        # (1 + c,)
    order = np.random.default_rng(0).random((draws, N))
    drawn = order.argpartition(size, axis=1)[:, :size]                           # (draws, size)
    scores = right[:, drawn].mean(-1)                                            # (1 + c, draws)
    counts = Counter(draws=draws)
    goes_on = np.ones(draws, dtype=bool)
    kept = np.zeros(draws, dtype=int)                                            # 0: W_t
    for k in range(1, len(right)):
        higher = scores[k] > scores[k - 1]
        if truth[k] > truth[k - 1]:
            counts["better_asked"] += goes_on.sum()
            counts["better_rejected"] += (goes_on & ~higher).sum()
        else:
            counts["worse_asked"] += goes_on.sum()
            counts["worse_accepted"] += (goes_on & higher).sum()
        goes_on &= higher
        kept[goes_on] = k

    ideal = np.logical_and.accumulate(truth[1:] > truth[:-1]).sum()              # by all N problems
    counts["lost"] = (truth[ideal] - truth[kept]).sum()
    jumped = kept > 0
    score = scores[kept, np.arange(draws)]
    fresh = (right.sum(1)[kept] - size * score) / (N - size)                     # on the others
    counts["jumps"] = jumped.sum()
    counts["curse"] = (score - fresh)[jumped].sum()
    return counts


def settings_of(directory: Path):
    """Of a run that can be asked: W_t is in a checkpoint, Δ can be made again. Else ValueError."""
    config, _ = read_run(directory)
    needed = dict(method="effopd", task="chains", score="accuracy", candidates="linear",
                  search_every=0, utility_gate=False, alignment_gate=0.0)
    found = {name: getattr(config, name) for name in needed}
    if found != needed or config.first_trigger.bit_count() != 1:
        raise ValueError(f"{directory}: this needs an EffOPD run of the built-in task by accuracy, "
                         "linear candidates along Δ at the powers of two, no gates")
    return config


def searches_of(directory: Path, effopd: EffOPD):
    """A run's searches again, bit for bit: (its record, W_t of all, Δ of the weights in scope)."""
    checkpoints = directory / "checkpoints"
    previous = Checkpoint(checkpoints / "step_000000").weights()                 # W_prev
    for line in (directory / "search.jsonl").read_text().splitlines():
        record = json.loads(line)
        current = Checkpoint(checkpoints / f"step_{record['step']:06d}").weights()   # before a jump
        delta = {name: current[name] - previous[name] for name in effopd.parameters}
        yield record, current, delta
        previous = current
        if record["multiple"]:
            previous = {name: current[name] + record["multiple"] * d for name, d in delta.items()}


@torch.no_grad()
def score_run(directory: Path, num_problems: int, device: str) -> dict:
    """{size: `decisions` of all its searches}."""
    config = settings_of(directory)
    config.device = device
    task, model, _, _ = load(config)
    effopd = EffOPD(model, None, scope=config.scope)
    problems = task.problems(num_problems, random.Random("large D_v"))
    totals = {size: Counter() for size in SIZES}
    for record, current, delta in tqdm(searches_of(directory, effopd), str(directory)):
        model.load_state_dict(current, strict=False)          # the tied head has no entry
        right = []
        for k in range(config.num_candidates + 1):
            effopd.place(current, delta, 2 * k)                                  # W_t + 2kΔ
            _, answers = evaluate(model, task, problems, seed=record["step"] * 1_000_003)
            right.append(rewards_of(task, problems, answers))                    # (N,)
        for size in SIZES:
            totals[size].update(decisions(np.array(right), size))
    return totals


def tabulate(scored) -> dict:
    """{words: {size: interval over runs}}."""
    table = {}
    for words, (part, whole) in RATES.items():
        table[words] = {}
        for size in SIZES:
            totals = [run[size] for run in scored]
            rates = [float(of[part] / of[whole]) if of[whole] else None for of in totals]
            table[words][str(size)] = interval(rates)
    return table


def print_table(table):
    print(f"| problems in D_v | {' | '.join(map(str, SIZES))} |\n|---{'|---' * len(SIZES)}|")
    for words, by_size in table.items():
        cells = []
        for s in by_size.values():
            cell = "" if s["mean"] is None else f"{s['mean']:.3f}"
            cells.append(cell + (f" ± {s['high'] - s['mean']:.3f}" if s["n"] > 1 else ""))
        print(f"| {words} | {' | '.join(cells)} |")


def stop(message):
    print(f"dv_size: {message}", file=sys.stderr)
    sys.exit(2)


def main(args=None):
    parser = argparse.ArgumentParser(prog="python -m extras.dv_size", allow_abbrev=False,
                                     description=__doc__.split("\n\n")[0])
    parser.error = stop
    parser.add_argument("runs", nargs="+", type=Path, help="directories of EffOPD runs, its seeds")
    parser.add_argument("--problems", type=int, default=4000, help="in all (default: 4000)")
    parser.add_argument("--out_dir", type=Path, default="analysis", help="(default: analysis)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(args)
    if args.problems <= max(SIZES):
        stop(f"--problems must be above {max(SIZES)}")
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        runs = [run for directory in args.runs for run in expand(directory)]
        for run in runs:
            settings_of(run)                                  # before the first takes its minutes
        table = tabulate([score_run(run, args.problems, pick_device(args.device)) for run in runs])
        write_json(args.out_dir / "dv.json",
                   dict(problems=args.problems, runs=[run.as_posix() for run in runs], table=table))
        print_table(table)
    except (ValueError, OSError) as error:
        stop(first_line(error))


if __name__ == "__main__":
    main()
