"""The tables of README.md and docs/ are those of the JSON in assets/.

    python -m tests.extras.test_tables --write     # make them again

After <!-- accuracy FILE.json --at 8 --> or <!-- cost FILE.json --target .9 --> stands that table of
extras/sweep.py; after <!-- final FILE,FILE --> a column for each file, which is a gap; after
<!-- claims DIRECTORY,DIRECTORY --> the table of extras/foresight.py; after <!-- path FILE --> that of
extras/real_study.py.
"""

import re
import sys
from pathlib import Path

import pytest

from extras import foresight, real_study, sweep

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"<!-- (accuracy|cost|final|claims|path) (\S+)(.*?) -->\n(?:\|.*\n)*")


def with_tables(page: Path) -> str:
    """The page with its tables made from assets/ now."""
    def table(match):
        kind, files, options = match.groups()
        if kind == "claims":
            rows = foresight.table([ROOT / directory for directory in files.split(",")])
            return f"<!-- claims {files} -->\n{sweep.as_markdown(rows)}"
        if kind == "path":
            rows = real_study.table(sweep.read(ROOT / files))
            return f"<!-- path {files} -->\n{sweep.as_markdown(rows)}"
        tables = []
        for file in files.split(","):
            args, _ = sweep.parse_args(["--redraw", str(ROOT / file), *options.split()])
            numbers = sweep.tabulate(sweep.read(args.redraw), args.target, args.at)
            tables.append(sweep.chosen_rows(numbers, args))
        if kind == "accuracy":
            rows = sweep.accuracy_table(tables[0], args.at)
        elif kind == "cost":
            rows = sweep.cost_table(tables[0])
        else:                                                 # a column for each file, a gap
            names = [re.search(r"-(\w+)/", file)[1] for file in files.split(",")]
            rows = [["", *names], ["---"] * (1 + len(names))]
            for row in tables[0]:
                rows.append([row, *(sweep.cell(table[row]["final"], ".3f") for table in tables)])
        return f"<!-- {kind} {files}{options} -->\n{sweep.as_markdown(rows)}"

    return TABLE.sub(table, page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_data(page):
    assert with_tables(page) == page.read_text(), "python -m tests.extras.test_tables --write"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.extras.test_tables --write")
    for page in PAGES:
        page.write_text(with_tables(page))
