"""One table of several runs of the demo: ``python experiments/countdown/table.py runs/countdown-*/results.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rftt_lightning.search.vote import Accuracy


def cell(row: dict[str, Any]) -> str:
    return str(Accuracy(row["accuracy"], row["low"], row["high"], row["n"]))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line an arm, a column a run; then majority of n rollouts of the RL model."""
    first = next(iter(results.values()))
    arms = [name for name, row in first.items() if isinstance(row, dict) and "accuracy" in row]
    lines = [["", *results], ["---"] * (1 + len(results))]
    lines += [[arm, *(cell(r[arm]) for r in results.values())] for arm in arms]
    lines += [[f"rl, majority of {n}", *(cell(r["rollouts"][n]) for r in results.values())] for n in first["rollouts"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    options = parser.parse_args()
    runs = {p.parent.name if p.stem == "results" else p.stem: json.loads(p.read_text()) for p in options.results}
    print(table(runs))


if __name__ == "__main__":
    main()
