"""``rftt curate``: annotated trajectories for SFT from the trees of prompt-guided search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from rftt_lightning.app.command import run_command
from rftt_lightning.core.contracts import Backend, ProblemSource
from rftt_lightning.search.curate import Curator, Report
from rftt_lightning.search.store import manifest, read_trees, write_trajectories


def curate(
    trees: str,
    source: ProblemSource,
    backend: Backend,
    curator: Curator,
    out: str = "runs/curate",
) -> None:
    """Choose, cross-verify, merge and annotate paths, and report what was kept and rejected and why.

    Args:
        trees: store written by `rftt search`.
        source: the source of its problems (states answers as text).
        backend: the model that writes the verify texts.
        curator: how paths are chosen and merged.
        out: folder of the trajectories; an earlier result there is replaced.
    """
    settings = {"trees": manifest(trees, "trees")["settings"]}
    grown = list(read_trees(trees))
    report = Report()
    made = list(curator.curate(track(grown, "trees"), source, backend, report))
    write_trajectories(out, made, settings)
    summary = report_json(report)
    (Path(out) / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    Console().print(_table(report))
    print(f"trajectories: {out}")
    if not made:
        print("nothing was kept: no tree has a correct path that could be used; see report.json for the reasons")


def report_json(report: Report) -> dict[str, Any]:
    kept, used = sum(report.kept.values()), sum(report.tokens.values())
    return {
        "trees": report.trees,
        "kept": kept,
        "kinds": {kind: {"count": n, "share": n / kept} for kind, n in sorted(report.kept.items())},
        "tokens": {tag: {"count": n, "share": n / used} for tag, n in report.tokens.most_common()},
        "rejected": dict(report.rejected.most_common()),
    }


def _table(report: Report) -> Table:
    table = Table("", "count", title=f"curation of {report.trees} trees")
    for kind, count in sorted(report.kept.items()):
        table.add_row(f"kept, {kind}", str(count))
    for reason, count in report.rejected.most_common():
        table.add_row(f"rejected, {reason}", str(count), style="dim")
    for tag, count in report.tokens.most_common():
        table.add_row(f"<{tag}>", str(count))
    return table


def main(args: list[str]) -> int | None:
    return run_command(curate, args, "rftt curate")
