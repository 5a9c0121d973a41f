"""``rftt curate``: annotated trajectories for SFT from the trees of prompt-guided search."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from rftt_lightning.app.command import run_command
from rftt_lightning.core.contracts import Backend, ProblemSource, UserError
from rftt_lightning.core.tree import Tree
from rftt_lightning.search.curate import Curator, Report
from rftt_lightning.search.store import MANIFEST, describe, digest, manifest, read_trees, size, write_trajectories


def curate(
    trees: str,
    source: ProblemSource,
    backend: Backend,
    curator: Curator,
    out: str = "runs/curate",
    overwrite: bool = False,
) -> None:
    """Choose, cross-verify, merge and annotate paths, and report what was kept and rejected and why.

    Args:
        trees: store written by `rftt search`.
        source: the source that the trees were grown from (states answers as text).
        backend: the model that writes the verify texts.
        curator: how paths are chosen and merged.
        out: folder of the trajectories; an earlier result there is replaced, unless it came of the same trees and settings.
        overwrite: replace it even then.
    """
    settings = {
        "trees": {"folder": trees, "settings": manifest(trees, "trees")["settings"], "digest": digest(trees, "trees")},
        "source": type(source).__qualname__,
        "curator": describe(curator),
        "backend": getattr(backend, "name", type(backend).__qualname__),
    }
    earlier = manifest(out, "trajectories")["settings"] if (Path(out) / MANIFEST).exists() else None
    if earlier == json.loads(json.dumps(settings)) and not overwrite:
        print(f"trajectories: {out} (done before; --overwrite true makes them again)")
        return
    report, order = Report(), {problem.id: number for number, problem in enumerate(source.problems())}
    grown = track(_of_source(read_trees(trees), source), "trees", total=size(trees, "trees"))
    made = list(curator.curate(grown, source, backend, report))
    made.sort(key=lambda trajectory: order[trajectory.problem.id])  # whatever order trees were finished in
    summary = json.dumps(report_json(report), indent=2) + "\n"
    (Path(out) / "report.json").write_text(summary, encoding="utf-8")
    write_trajectories(out, made, settings)  # last: it makes the result whole
    Console().print(_table(report))
    print(f"trajectories: {out}")
    if not made:
        print("nothing was kept: no tree has a correct path that could be used; see report.json for the reasons")


def _of_source(trees: Iterable[Tree], source: ProblemSource) -> Iterator[Tree]:
    """The trees; UserError at the first one whose problem is none of the source's."""
    questions = {problem.id: problem.question for problem in source.problems()}
    for tree in trees:
        if questions.get(tree.problem.id) != tree.problem.question:
            raise UserError(
                f"the source has no problem {tree.problem.id!r} with the question that its tree has; give curate the "
                "source that the trees were grown from"
            )
        yield tree


def report_json(report: Report) -> dict[str, Any]:
    kept, used = report.kept.total(), report.tokens.total()
    return {
        "trees": report.trees,
        "kept": kept,
        "kinds": {kind: {"count": n, "share": n / kept} for kind, n in sorted(report.kept.items())},
        "tokens": {tag: {"count": n, "share": n / used} for tag, n in _ranked(report.tokens)},
        "rejected": dict(_ranked(report.rejected)),
    }


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """Most frequent first, equal ones by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _table(report: Report) -> Table:
    table = Table("", "count", "share", title=f"curation of {report.trees} trees")
    for kind, count in sorted(report.kept.items()):
        table.add_row(f"kept, {kind}", str(count), f"{count / report.kept.total():.1%}")
    for reason, count in _ranked(report.rejected):
        table.add_row(f"rejected, {reason}", str(count), style="dim")
    for tag, count in _ranked(report.tokens):
        table.add_row(f"<{tag}>", str(count), f"{count / report.tokens.total():.1%}")
    return table


def main(args: list[str]) -> int | None:
    return run_command(curate, args, "rftt curate")
