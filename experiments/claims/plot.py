"""A picture of recorded tables, one panel a world: ``python experiments/claims/plot.py experiments/claims/results/*.json``.

Each claim's gain with its 95 % interval and its seeds; diamonds are what the paper says (arXiv 2502.13389, Qwen2.5-7B-Instruct on
MATH-500) where it took the same part out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.lines import Line2D

COLOURS = {
    "supports": "tab:blue",
    "contradicts": "tab:red",
    "no difference seen": "0.5",
    "not shown": "0.5",
    "one seed": "0.8",
}

PAPER = {
    "RL needs the warm-up": 79.8 - 74.8,
    "the tree beats plain sampling": 79.8 - 75.2,
    "outcome and process reward beat the outcome alone": 79.8 - 77.2,
    "verify and refine help, masked at inference": 79.8 - 72.8,  # verify alone; refine alone 7.2
}
"""Points that it lost without."""


def draw(tables: dict[str, dict[str, dict]]) -> pyplot.Figure:
    """``tables``: world -> text of a claim -> what is recorded of it."""
    texts = list(dict.fromkeys(text for table in tables.values() for text in table))
    size = (5 + 2.6 * len(tables), 0.6 + 0.24 * len(texts))
    figure, axes = pyplot.subplots(1, len(tables), figsize=size, dpi=110, sharex=True, sharey=True, squeeze=False)
    for axis, (world, table) in zip(axes[0], tables.items(), strict=True):
        axis.axvline(0, color="black", lw=0.8)
        for place, text in enumerate(texts):
            if text not in table:
                continue
            if text in PAPER:
                axis.plot(PAPER[text], place, "D", color="none", markeredgecolor="tab:orange", ms=6)
            claim = table[text]
            colour = COLOURS[claim["verdict"]]
            axis.plot([100 * claim["low"], 100 * claim["high"]], [place, place], color=colour, lw=2)
            axis.plot([100 * gain for gain in claim["seeds"]], [place] * len(claim["seeds"]), "|", color=colour, ms=5)
            axis.plot(100 * claim["mean"], place, "o", color=colour, ms=5)
        axis.set_xscale("symlog", linthresh=10)  # 2 and 90 points are both to be read
        axis.set_xticks((-50, -10, -5, 0, 5, 10, 50), ("-50", "-10", "-5", "0", "5", "10", "50"), fontsize=8)
        axis.set(title=world, xlabel="gain, points")
        axis.set_yticks(range(len(texts)), texts, fontsize=8)
        axis.grid(axis="y", lw=0.3)
    axes[0, 0].invert_yaxis()
    marks = [Line2D([], [], color=COLOURS[name], marker="o", label=name) for name in list(COLOURS)[:3]]
    marks.append(
        Line2D([], [], color="none", marker="D", markeredgecolor="tab:orange", label="the paper, 7B, MATH-500")
    )
    figure.legend(handles=marks, loc="lower left", fontsize=8, frameon=False)
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", type=Path, nargs="+", help="what table.py wrote, named after its world")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("claims.png"))
    options = parser.parse_args()
    found = {path.stem: json.loads(path.read_text(encoding="utf-8"))["claims"] for path in options.tables}
    draw({world: {claim["text"]: claim for claim in claims} for world, claims in found.items()}).savefig(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
