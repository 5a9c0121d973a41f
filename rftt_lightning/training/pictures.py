"""Pictures for TensorBoard: functional-token transitions, repairs, shapes of trees, paths in their tokens' colours."""

from __future__ import annotations

import itertools
import textwrap
from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rftt_lightning.core.contracts import QUESTION, Rollout
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Tree

GREY = "#e8e8e8"


def transitions(trees: Sequence[Tree], table: TokenTable) -> Figure:
    """Which functional token follows which, in % of a row's rollouts; grey where the grammar allows none."""
    pairs: Counter[tuple[str, str]] = Counter()
    for tree in trees:
        for rollout in tree.rollouts():
            tags = [QUESTION, *(segment.tag for segment in rollout.segments)]
            pairs.update(itertools.pairwise(tags))
    rows = [QUESTION, *(name for name in table.names if not table.terminal(name))]
    totals = {row: sum(count for (after, _), count in pairs.items() if after == row) for row in rows}
    shares = [
        [pairs[row, name] / max(totals[row], 1) if name in table.legal(row) else float("nan") for name in table.names]
        for row in rows
    ]
    figure = Figure(figsize=(1.5 + 0.8 * len(table.names), 1.6 + 0.5 * len(rows)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor(GREY)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share == share:  # not NaN
                axes.text(
                    x, y, f"{100 * share:.0f}", ha="center", va="center", color="white" if share > 0.6 else "black"
                )
    axes.set_xticks(range(len(table.names)), table.names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [f"{row}  ({totals[row]:,})" for row in rows])
    axes.set(title="what follows, % of the row (grey: not allowed)", xlabel="next", ylabel="after (how often)")
    return figure


def repairs(net: Sequence[float], mended: Sequence[float], broken: Sequence[float], checks: Sequence[float]) -> Figure:
    """Curves over steps: repairs in % of the rollouts, and verify segments a rollout."""
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    left = figure.add_subplot()
    for values, name, color in (
        (mended, "wrong→right", "#59a14f"),
        (broken, "right→wrong", "#e15759"),
        (net, "net", "black"),
    ):
        left.plot([100 * value for value in values], label=name, color=color, lw=2.2 if name == "net" else 1.2)
    left.set(xlabel="step", ylabel="% of the rollouts", title="repairs by verify and refine")
    left.axhline(0, color="black", lw=0.5)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(alpha=0.3)
    right = left.twinx()
    right.plot(checks, color="#4e79a7", ls="--", label="verify a rollout")
    right.set_ylabel("verify segments a rollout", color="#4e79a7")
    right.set_ylim(bottom=0)
    lines = [*left.get_lines()[:3], *right.get_lines()]
    figure.legend(lines, [str(line.get_label()) for line in lines], loc="outside lower center", ncols=4)
    return figure


def shapes(trees: Sequence[Tree]) -> Figure:
    """Histograms: segments and tokens of a rollout, and visited children of the nodes that have any."""
    rollouts = [rollout for tree in trees for rollout in tree.rollouts()]
    depths = [len(rollout.segments) for rollout in rollouts]
    children = [
        count
        for tree in trees
        for kids in tree.children
        if (count := sum(tree.segments[kid] is not None for kid in kids))
    ]
    figure = Figure(figsize=(9.5, 3.2), dpi=110, layout="constrained")
    depth, branch, length = figure.subplots(1, 3)
    _bars(depth, depths, "depth: segments of a rollout", "rollouts")
    _bars(branch, children, "branching: visited children", "nodes")
    length.hist([rollout.length for rollout in rollouts], bins=25, color="#4e79a7")
    length.set(title="length: tokens of a rollout", ylabel="rollouts")
    return figure


def _bars(axes: Axes, values: Sequence[int], title: str, unit: str) -> None:
    counts = Counter(values)
    axes.bar(list(counts), list(counts.values()), color="#4e79a7", width=0.85)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, ylabel=unit)


def path(rollout: Rollout, table: TokenTable, width: int = 104, lines: int = 60) -> Figure:
    """A path, a row for each segment in its token's colour; what is longer than ``lines`` of ``width`` characters is cut."""
    rows: list[tuple[str, str, str]] = []  # colour, tag (of the segment's first row), text
    for segment in rollout.segments:
        text = " ".join([*segment.text.split(), *([] if segment.closed else ["… (cut)"])])
        first, *others = textwrap.wrap(text, width) or [""]
        color = table[segment.tag].color if segment.tag in table.names else "#777777"
        rows += [(color, segment.tag, first), *((color, "", other) for other in others)]
    if len(rows) > lines:
        rows = [*rows[: lines - 1], ("#777777", "", f"… {len(rows) - lines + 1} lines more")]
    question = textwrap.wrap(" ".join(rollout.problem.question.split()), width + 14)[:6]
    verdict = rollout.score.verdict.status.value.replace("_", " ") if rollout.score else "not judged"
    height = len(question) + len(rows) + 2
    figure = Figure(figsize=(11, 0.24 * height + 0.2), dpi=100)
    axes = figure.add_axes((0.01, 0, 0.98, 1))
    axes.set(xlim=(0, 1), ylim=(height, 0))
    axes.axis("off")
    for y, line in enumerate(question):
        _write(axes, 0.0, y, line, weight="bold")
    for y, (color, tag, text) in enumerate(rows, len(question)):
        axes.axhspan(y + 0.04, y + 0.96, color=color, alpha=0.16, lw=0)
        axes.axhspan(y + 0.04, y + 0.96, xmax=0.14, color=color, alpha=0.55, lw=0)
        _write(axes, 0.01, y, tag, weight="bold", color="white" if _dark(color) else "black")
        _write(axes, 0.15, y, text)
    right = bool(rollout.score and rollout.score.verdict.right)
    _write(axes, 0.0, height - 1.4, verdict, color="#2e7d32" if right else "#c62828", weight="bold")
    return figure


def _write(axes: Axes, x: float, y: float, text: str, **style: str) -> None:
    axes.text(x, y + 0.5, text.replace("$", r"\$"), va="center", family="monospace", fontsize=9.5, **style)


def _dark(color: str) -> bool:
    red, green, blue = to_rgb(color)
    return 0.3 * red + 0.6 * green + 0.1 * blue < 0.3
