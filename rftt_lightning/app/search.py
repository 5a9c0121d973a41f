"""``rftt search``: grow a tree for every problem of a source, into a store that can be interrupted and resumed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rftt_lightning.app.command import run_command
from rftt_lightning.core.contracts import Backend, ProblemSource, Reward, Status
from rftt_lightning.core.tree import Tree
from rftt_lightning.search import driver
from rftt_lightning.search.expand import Expander
from rftt_lightning.search.problems import refuse_overlap
from rftt_lightning.search.store import Store, read_trees


def search(
    source: ProblemSource,
    backend: Backend,
    expander: Expander,
    reward: Reward,
    held_out: list[ProblemSource] = [],  # noqa: B006  jsonargparse shows the default
    allow_overlap: bool = False,
    out: str = "runs/search",
    seed: int = 0,
    concurrency: int = 128,
    parallel: int = 1,
    overwrite: bool = False,
) -> None:
    """Grow one search tree per problem and store it.

    Args:
        source: the problems, and the judge of the answers.
        backend: the model.
        expander: how trees grow (PromptExpander in phase 1, TokenExpander with functional tokens).
        reward: what a finished path is worth.
        held_out: benchmarks that must not overlap the source.
        allow_overlap: go on in spite of an overlap.
        out: folder of the store; an interrupted search goes on there.
        seed: of all sampling; a tree depends on it and on its problem alone.
        concurrency: trees that grow together.
        parallel: rollouts under way in one tree.
        overwrite: begin anew instead of continuing.
    """
    for other in held_out:
        refuse_overlap(source.problems(), other.problems(), allow_overlap=allow_overlap)
    trees = harvest(
        source, backend, expander, reward, out, seed=seed, concurrency=concurrency, parallel=parallel, overwrite=overwrite
    )
    summary = summarise(trees)
    (Path(out) / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    table = Table("", "", title=f"search of {len(trees)} problems", show_header=False)
    for name, value in summary.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
    print(f"trees: {out}")


def harvest(
    source: ProblemSource,
    backend: Backend,
    expander: Expander,
    reward: Reward,
    folder: str | Path,
    *,
    seed: int,
    concurrency: int,
    parallel: int = 1,
    overwrite: bool = False,
) -> list[Tree]:
    """Trees of all problems, in the order of the source; those that the store has already are not grown again. Each is stored
    as soon as it is finished."""
    problems = source.problems()
    store = Store(folder, "trees", _settings(expander, reward, backend, seed), overwrite)
    todo = [problem for problem in problems if problem.id not in store.done]
    progress = driver.Progress()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rates]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("trees", total=len(problems), completed=len(problems) - len(todo), rates="")
        grown = driver.grow(
            todo,
            expander,
            backend,
            reward,
            source,
            seed=seed,
            concurrency=concurrency,
            parallel=parallel,
            progress=progress,
            tick=lambda p: bar.update(task, rates=_rates(p)),
        )
        try:
            for _, tree in grown:
                store.add(tree.problem.id, tree.to_json())
                bar.advance(task)
        finally:
            store.close()
    order = {problem.id: number for number, problem in enumerate(problems)}
    trees = [tree for tree in read_trees(folder) if tree.problem.id in order]
    return sorted(trees, key=lambda tree: order[tree.problem.id])


def _settings(expander: Expander, reward: Reward, backend: Backend, seed: int) -> dict[str, Any]:
    """What the trees of one store must have in common."""
    return {
        "seed": seed,
        "expander": _text(expander),
        "reward": _text(reward),
        "backend": getattr(backend, "name", type(backend).__name__),
        "grammar": {after: list(row) for after, row in backend.tokens.grammar.items()},
    }


def _text(thing: object) -> str:
    """Class and settings; equal in every process, which ``repr`` of an object is not if it shows an address."""
    if type(thing).__repr__ is not object.__repr__:
        return repr(thing)
    settings = {name: _text(value) for name, value in sorted(vars(thing).items()) if not name.startswith("_")}
    return f"{type(thing).__name__} {settings}"


def _rates(progress: driver.Progress) -> str:
    seconds = max(progress.seconds, 1e-9)
    return (
        f"{progress.trees / seconds:.1f} trees/s  {progress.tokens / seconds:.0f} tokens/s  "
        f"{100 * progress.accuracy:.1f} % of {progress.rollouts} rollouts right"
    )


def summarise(trees: list[Tree]) -> dict[str, Any]:
    """Counts of a search; every rollout is in exactly one of the verdicts."""
    scores = [[score for _, score in tree.leaves] for tree in trees]
    verdicts = Counter(score.verdict.status for tree in scores for score in tree)
    rollouts = sum(verdicts.values())
    return {
        "problems": len(trees),
        "rollouts": rollouts,
        "rollout_accuracy": verdicts[Status.RIGHT] / max(rollouts, 1),
        "any_right": sum(any(s.verdict.right for s in tree) for tree in scores) / max(len(trees), 1),
        **{status.value: verdicts[status] for status in Status},
        "nodes": sum(segment is not None for tree in trees for segment in tree.segments),
        "generated_tokens": sum(len(segment.tokens) for tree in trees for segment in tree.segments if segment),
    }


def main(args: list[str]) -> int | None:
    return run_command(search, args, "rftt search")
