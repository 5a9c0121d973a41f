"""``rftt search``: grow a tree for every problem of a source, into a store that can be interrupted and resumed."""

from __future__ import annotations

import copy
import json
import math
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rftt_lightning.app.command import interruptible, run_command, write_json
from rftt_lightning.app.plan import PLAN, Costs, predict, table
from rftt_lightning.core.contracts import Backend, Problem, ProblemSource, Reward, Status, UserError
from rftt_lightning.core.tree import Tree
from rftt_lightning.search import driver
from rftt_lightning.search.expand import Expander
from rftt_lightning.search.problems import refuse_overlap
from rftt_lightning.search.store import Store, describe, read_trees

SUMMARY = "summary.json"
"""Name of a search's counts and costs in the folder of its store."""


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
    limits: driver.Limits = driver.Limits(),
    overwrite: bool = False,
    plan: bool = False,
    plan_seconds: float = 60.0,
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
        limits: tokens and seconds after which a tree begins no further rollout; null: none but the expander's rollouts.
        overwrite: begin anew instead of continuing.
        plan: predict calls, tokens, memory and time from a short calibration, and grow nothing; the search itself then shows what
            was predicted beside what it took.
        plan_seconds: for how long the calibration begins rollouts.
    """
    for other in held_out:
        refuse_overlap(source.problems(), other.problems(), allow_overlap=allow_overlap)
    settings: dict[str, Any] = {"seed": seed, "concurrency": concurrency, "parallel": parallel, "limits": limits}
    folder, count = Path(out), len(source.problems())
    planned = {**_settings(source, expander, reward, backend, seed, parallel, limits), "trees": count}
    if plan:
        predicted, found = predict(source, backend, expander, reward, seconds=plan_seconds, **settings)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN, {"settings": planned, **predicted.to_json()})
        Console().print(table(f"plan of a search of {count} problems", calibration=found, predicted=predicted))
        return
    costs = grow_into(out, source, backend, expander, reward, overwrite=overwrite, **settings)
    summary = {**summarise(stored(out, source)), **costs.to_json()}
    write_json(folder / SUMMARY, summary)
    found_table = Table("", "", title=f"search of {summary['problems']} problems", show_header=False)
    for name, value in summary.items():
        if name != "costs":
            found_table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(found_table)
    known = {"predicted": predicted} if (predicted := Costs.read(folder / PLAN, planned)) else {}
    Console().print(table("costs", **known, real=costs))
    print(f"trees: {out}")


def harvest(
    source: ProblemSource, backend: Backend, expander: Expander, reward: Reward, folder: str | Path, **settings: Any
) -> tuple[list[Tree], float]:
    """:func:`grow_into`, and then all the trees, in the order of the source, and the seconds that growing them took. Trees whose
    costs were lost by a kill count as much as the others; if those of all were, nan."""
    costs = grow_into(folder, source, backend, expander, reward, **settings)
    order = {problem.id: number for number, problem in enumerate(source.problems())}
    trees = sorted(stored(folder, source), key=lambda tree: order[tree.problem.id])
    return trees, costs.seconds * len(trees) / costs.trees if costs.trees else math.nan


def grow_into(
    folder: str | Path,
    source: ProblemSource,
    backend: Backend,
    expander: Expander,
    reward: Reward,
    *,
    seed: int,
    concurrency: int,
    parallel: int = 1,
    limits: driver.Limits = driver.Limits(),
    overwrite: bool = False,
) -> Costs:
    """Grow the trees that a store still lacks, and store each as soon as it is finished. SIGTERM stops it as Ctrl-C does.
    Returns the costs over all runs, interrupted ones included, and killed ones up to the last tree that they stored."""
    problems, progress, summary = source.problems(), driver.Progress(), Path(folder) / SUMMARY
    before = copy.deepcopy(backend.usage)
    settings = _settings(source, expander, reward, backend, seed, parallel, limits)
    store = Store(folder, "trees", settings, overwrite, backend.version)
    todo = [problem for problem in problems if not _known(problem, store)]
    if overwrite:
        summary.unlink(missing_ok=True)
    known, had = Costs.read(summary) or Costs(), len(store.done)

    def note() -> Costs:
        """Write down the costs so far, if there are any."""
        if not progress.rollouts:
            return known
        costs = known + replace(Costs.of(progress, backend.usage, before), trees=len(store.done) - had)
        write_json(summary, costs.to_json())
        return costs

    with _bar() as bar, interruptible(signal.SIGTERM), closing(store):
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
            limits=limits,
            progress=progress,
            tick=lambda p: bar.update(task, rates=_rates(p)),
        )
        try:
            for _, tree in grown:
                store.add(tree.problem.id, tree.to_json())
                bar.advance(task)
                note()
        finally:
            costs = note()
    return costs


def _known(problem: Problem, store: Store) -> bool:
    """Does the store have the tree of this problem? UserError if it is that of another one with the same id."""
    if problem.id not in store.done:
        return False
    if store.done[problem.id] != json.loads(json.dumps(asdict(problem))):
        raise UserError(
            f"{store.folder} has a tree of another problem with the id {problem.id!r}; give another --out, or "
            "--overwrite true to begin anew"
        )
    return True


def stored(folder: str | Path, source: ProblemSource) -> Iterator[Tree]:
    """The trees of a source's problems that a store has, in the order in which they were finished."""
    wanted = {problem.id for problem in source.problems()}
    return (tree for tree in read_trees(folder) if tree.problem.id in wanted)


def _settings(
    source: ProblemSource,
    expander: Expander,
    reward: Reward,
    backend: Backend,
    seed: int,
    parallel: int,
    limits: driver.Limits,
) -> dict[str, Any]:
    """What the trees of one store must have in common; which problems they are of may differ."""
    return {
        "seed": seed,
        "parallel": parallel,
        "limits": asdict(limits),
        "source": type(source).__qualname__,
        "expander": describe(expander),
        "reward": describe(reward),
        "backend": getattr(backend, "name", type(backend).__qualname__),
        "grammar": describe(backend.tokens.grammar),
    }


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rates]}"),
    )


def _rates(progress: driver.Progress) -> str:
    seconds = max(progress.seconds, 1e-9)
    return (
        f"{progress.trees / seconds:.1f} trees/s  {progress.tokens / seconds:.0f} tokens/s  "
        f"{100 * progress.accuracy:.1f} % of {progress.rollouts} rollouts right"
    )


def summarise(trees: Iterable[Tree]) -> dict[str, Any]:
    """Counts of a search; every rollout is in exactly one of the verdicts."""
    verdicts: Counter[Status] = Counter()
    problems = solved = nodes = tokens = 0
    for tree in trees:
        found = [score.verdict.status for _, score in tree.leaves]
        written = [segment for segment in tree.segments if segment is not None]
        verdicts.update(found)
        problems += 1
        solved += Status.RIGHT in found
        nodes += len(written)
        tokens += sum(len(segment.tokens) for segment in written)
    rollouts = sum(verdicts.values())
    return {
        "problems": problems,
        "rollouts": rollouts,
        "rollout_accuracy": verdicts[Status.RIGHT] / max(rollouts, 1),
        "any_right": solved / max(problems, 1),
        **{status.value: verdicts[status] for status in Status},
        "nodes": nodes,
        "generated_tokens": tokens,
    }


def main(args: list[str]) -> int | None:
    return run_command(search, args, "rftt search")
