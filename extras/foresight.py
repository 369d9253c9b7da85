"""The paper's claims by gap, and foresight against the learning rate, out of analyze.py's numbers.

    bash extras/studies.sh foresight slip           # makes assets/analysis/slip/analysis.json, ...
    python -m extras.foresight assets/analysis/slip assets/analysis/habit assets/analysis/skill

Prints a table with a row for each claim and a column for each gap, which is a directory's name, and
draws foresight.png beside the directories.
"""

import argparse
import json
from pathlib import Path

from analyze import CHANCE, draw_curves, plt

# What a label of analyze.py says about a run, and what it is called here.
KINDS = {"RL": "RL", "optimizer muon": "Muon", "lr 0.0001,": "1e-4", "OPD": "tuned"}

# Claim: (question, numbers, of which runs). A number that is the same for all runs is a null.
CLAIMS = {
    "1. OPD gains more per norm than RL: accuracy at equal norm":
        ("norm_scaling", ["accuracy there"], ["1e-4", "tuned", "RL"]),
    "2. It moves the MLP and hardly the embedding: % of ‖ΔW‖² in MLP; in the embedding":
        ("update_norms", ["% in mlp", "% in embedding"], ["tuned", "RL"]),
    "3. MLP is of more use than attention: accuracy per norm of the best window of MLP; attention":
        ("utility", ["best utility of mlp", "best utility of attention"], ["tuned"]),
    "4. The embedding can be put back: accuracy before; after":
        ("embeddings", ["accuracy", "with the base's"], ["tuned", "RL"]),
    "5. The update has a low rank: effective rank; a Gaussian's":
        ("spectra", ["effective rank", "a Gaussian's"], ["tuned", "RL", "Muon"]),
    "6. The final subspace is there at 10% of training: cos²; a random walk's":
        ("alignment", ["near 10% of training, subspaces", "of a random walk"],
         ["1e-4", "tuned", "Muon", "RL"]),
    "6. It points to what is left, W_T - W_t: cosine at 10% of training; a random walk's":
        ("alignment", ["cosine to what is left", "a walk's"], ["1e-4", "tuned", "Muon", "RL"]),
    "7. The top 10% of directions do it all: accuracy of the other 90% alone; of the base":
        ("low_rank", ["the other 90% alone", "base"], ["1e-4", "tuned", "Muon", "RL"]),
    "8. ΔW at 10% of training, stretched, has the gain: % of it":
        ("early_rescaled", ["% of the gain over the base"], ["1e-4", "tuned", "Muon"]),
    "9. The path is a line: % of its variance in two components; a random walk's":
        ("paths", ["% of the variance in two components", "of a random walk"],
         ["1e-4", "tuned", "Muon"]),
    "Not asked: one temperature does what ΔW does: % of the gain in accuracy; of the fall in KL":
        ("one_scalar", ["% of the gain in accuracy", "% of the fall in KL"], ["1e-4", "tuned"]),
}


def read(directory: Path) -> dict:
    """{question: {kind of run: {number: interval}}} of an analysis, kinds as in KINDS."""
    answers = json.loads((directory / "analysis.json").read_text())
    return {question: {kind_of(label): numbers for label, numbers in runs.items()}
            for question, runs in answers.items()}


def kind_of(label: str) -> str:
    return next(kind for words, kind in KINDS.items() if words in label)


def cell(runs: dict, keys: list[str], kinds: list[str]) -> str:
    """ "tuned 31 ± 2; 52, RL 28 ± 3; 52" of the numbers `keys` of these kinds of runs."""
    words = []
    for kind in kinds:
        values = []
        for key in keys:
            mean, high = runs[kind][key]["mean"], runs[kind][key]["high"]
            form = ".0f" if abs(mean) >= 10 else ".2f"
            wide = high is not None and high - mean > 1e-6
            values.append(f"{mean:{form}}" + (f" ± {high - mean:.2g}" if wide else ""))
        words.append(f"{kind} " + "; ".join(values))
    return "<br>".join(words)


def table(directories: list[Path]) -> list[list[str]]:
    """Rows of cells, the head first: a claim, and what each gap says of it."""
    gaps = {directory.name: read(directory) for directory in directories}
    rows = [["claim: numbers", *(f"`{gap}`" for gap in gaps)], ["---"] * (1 + len(gaps))]
    for claim, (question, keys, kinds) in CLAIMS.items():
        rows.append([claim, *(cell(answers[question], keys, kinds) for answers in gaps.values())])
    return rows


def draw(directories: list[Path], path: Path):
    """cos(ΔW_t, W_T - W_t) against t / T: a panel a gap, a curve a learning rate."""
    figure, axes = plt.subplots(1, len(directories), figsize=(9, 3.4), layout="constrained",
                                sharey=True, squeeze=False)
    names = {"1e-4": "AdamW, lr 1e-4: too small", "tuned": "AdamW, tuned", "Muon": "Muon, tuned"}
    for axis, directory in zip(axes[0], directories):
        numbers = read(directory)["alignment"]
        draw_curves(axis, {names[kind]: numbers[kind] for kind in names}, "progress", "to rest")
        null = numbers["tuned"]
        axis.plot(null["progress"]["mean"][:-1], null["walk to rest"]["mean"][:-1], **CHANCE,
                  label="AdamW on random gradients")
        axis.set(title=directory.name, xlabel="t / T")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("cos(ΔW$_t$, W$_T$ - W$_t$)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle("At a tuned rate, the way so far says little more about the rest than noise "
                    "would")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args=None):
    parser = argparse.ArgumentParser(prog="python -m extras.foresight", allow_abbrev=False)
    parser.add_argument("directories", nargs="+", type=Path, help="with an analysis.json each")
    args = parser.parse_args(args)
    for directory in args.directories:
        if not (directory / "analysis.json").is_file():
            parser.error(f"{directory} has no analysis.json: bash extras/studies.sh foresight GAP")
    for row in table(args.directories):
        print("| " + " | ".join(row) + " |")
    draw(args.directories, args.directories[0].parent / "foresight.png")


if __name__ == "__main__":
    main()
