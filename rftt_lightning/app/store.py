"""``rftt store list | show | export | merge``: look into stores of trees and trajectories, take parts out, put stores together."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rftt_lightning.app.command import Parser, refuse_malformed
from rftt_lightning.core.contracts import Rollout, Status, Trajectory, UserError
from rftt_lightning.core.tree import Tree
from rftt_lightning.search.store import manifest, merge, read_trajectories, read_trees

VERBS = {
    "list": "show how many nodes, rollouts and tokens the trees of a store have; or its trajectories, by problem",
    "show": "print the tree of one problem",
    "export": "write scored rollouts, or trajectories, as JSON lines",
    "merge": "put stores of one run, of many ranks say, into one",
}


@dataclass
class Filter:
    """Which paths (rollouts, or trajectories) are meant: ``Filter(problem="gsm8k/*", verdict="right", uses=["verify"])``.

    ``tags`` are all that were met so far: one that is asked for, was never met and is not in the grammar is misspelt.
    """

    problem: str = "*"
    verdict: str | None = None
    kind: str | None = None
    uses: Sequence[str] = ()
    lacks: Sequence[str] = ()
    min_version: int | None = None
    max_version: int | None = None
    tags: set[str] = field(default_factory=set)

    def refuse(self, folder: str, kind: str) -> None:
        """Raise :class:`UserError` if stores of this kind do not have what is asked for."""
        foreign = ["kind"] if kind == "trees" else ["verdict", "min_version", "max_version"]
        for name in foreign:
            if getattr(self, name) is not None:
                raise UserError(f"{folder} is a store of {kind}, which have no {name}; leave out --{name}")

    def refuse_unknown(self, folder: str) -> None:
        settings = manifest(folder)["settings"]
        origin = settings.get("trees", {}).get("settings") or settings  # of the trees, if it holds trajectories
        known = self.tags.union(origin.get("grammar", {}))
        for tag in (*self.uses, *self.lacks):
            if known and tag not in known:
                raise UserError(f"no path in {folder} has a tag {tag!r}; use one of {', '.join(sorted(known))}")

    def names(self, problem: str) -> bool:
        return fnmatchcase(problem, self.problem)

    def takes(self, path: Rollout | Trajectory) -> bool:
        tags = {step.tag for step in path.steps}
        self.tags |= tags
        if not tags.issuperset(self.uses) or not tags.isdisjoint(self.lacks):
            return False
        if isinstance(path, Trajectory):
            return self.kind in (None, path.kind)
        versions = [segment.version for segment in path.segments]
        return (
            (self.verdict is None or path.score is not None and path.score.verdict.status == self.verdict)
            and (self.min_version is None or min(versions, default=0) >= self.min_version)
            and (self.max_version is None or max(versions, default=0) <= self.max_version)
        )

    def trees(self, folder: str) -> Iterator[tuple[Tree, list[Rollout]]]:
        """Trees that have rollouts which are meant, with these."""
        for tree in read_trees(folder):
            if self.names(tree.problem.id) and (taken := [path for path in tree.rollouts() if self.takes(path)]):
                yield tree, taken

    def trajectories(self, folder: str) -> Iterator[Trajectory]:
        return (t for t in read_trajectories(folder) if self.names(t.problem.id) and self.takes(t))


def list_store(folder: str, where: Filter, limit: int) -> None:
    """A table with a row for each problem, ``limit`` at most, and the totals of all."""
    if limit < 0:
        raise UserError(f"limit is {limit}; it must be 0 (totals only) or more")
    kind = manifest(folder)["kind"]
    where.refuse(folder, kind)
    rows, totals, count = [], Counter[str](), 0
    for name, counts in _tree_counts(folder, where) if kind == "trees" else _trajectory_counts(folder, where):
        totals.update(counts)
        count += 1
        if count <= limit:
            rows.append((name, counts))
    where.refuse_unknown(folder)
    hidden = f"{len(rows)} of {count} problems shown; --limit shows more" if len(rows) < count else None
    table = Table(title=f"{kind} in {folder}", caption=hidden, show_footer=True)
    table.add_column("problem", f"all {count}", overflow="fold")
    columns = {column: total for column, total in totals.items() if total}
    for column, total in columns.items():
        table.add_column(column, str(total), justify="right")
    for name, counts in rows:
        table.add_row(Text(name), *(str(counts[column]) for column in columns))
    Console().print(table)


def _tree_counts(folder: str, where: Filter) -> Iterator[tuple[str, dict[str, int]]]:
    """Nodes and tokens of whole trees; rollouts as far as they are meant."""
    for tree, rollouts in where.trees(folder):
        written = [segment for segment in tree.segments if segment is not None]
        yield (
            tree.problem.id,
            {
                "nodes": len(written),
                "tokens": sum(len(segment.tokens) for segment in written),
                "rollouts": len(rollouts),
                **{status.value: sum(_status(rollout) == status for rollout in rollouts) for status in Status},
            },
        )


def _trajectory_counts(folder: str, where: Filter) -> Iterator[tuple[str, dict[str, int]]]:
    for name, group in groupby(where.trajectories(folder), lambda trajectory: trajectory.problem.id):
        paths = list(group)
        merged = sum(path.kind == "merged" for path in paths)
        steps = sum(len(path.steps) for path in paths)
        learned = sum(sum(path.train) for path in paths)
        yield name, {"trajectories": len(paths), "merged": merged, "steps": steps, "learned steps": learned}


def _status(rollout: Rollout) -> Status | None:
    return rollout.score.verdict.status if rollout.score else None


def show(folder: str, problem: str) -> None:
    """Print the tree of a problem, found by its id."""
    for tree in read_trees(folder):
        if tree.problem.id == problem:
            print(tree.render().encode("utf-8", "backslashreplace").decode())
            return
    raise UserError(f"{folder} has no tree of {problem!r}; `rftt store list {folder}` names those that it has")


def export(folder: str, where: Filter, out: str) -> None:
    """Write the paths that are meant as JSON lines. The file appears when it is whole."""
    kind = manifest(folder)["kind"]
    where.refuse(folder, kind)
    if kind == "trees":
        lines = (_rollout(rollout) for _, rollouts in where.trees(folder) for rollout in rollouts)
    else:
        lines = (_trajectory(trajectory) for trajectory in where.trajectories(folder))
    count = 0
    with _replacing(out) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
            count += 1
        where.refuse_unknown(folder)
    print(f"{count} {'rollouts' if kind == 'trees' else kind}: {out}")


def _rollout(rollout: Rollout) -> dict[str, Any]:
    score = rollout.score
    return {
        "problem": vars(rollout.problem),
        "steps": [step._asdict() for step in rollout.steps],
        "complete": rollout.complete,
        **({"verdict": score.verdict.status, "answer": score.verdict.answer} if score else {}),
        **({"value": score.value, "rewards": score.rewards, "step_scores": score.steps} if score else {}),
        "tokens": rollout.length,
        "versions": sorted({segment.version for segment in rollout.segments}),
        "lineage": {"tree": rollout.problem.id, "nodes": rollout.nodes},
    }


def _trajectory(trajectory: Trajectory) -> dict[str, Any]:
    pairs = zip(trajectory.steps, trajectory.train, strict=True)
    return {
        "problem": vars(trajectory.problem),
        "steps": [{**step._asdict(), "train": train} for step, train in pairs],
        "kind": trajectory.kind,
        "lineage": {"tree": trajectory.problem.id, **trajectory.lineage},
    }


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[TextIO]:
    """A file that replaces ``path`` when all is written, and leaves nothing behind otherwise."""
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:  # a lone surrogate as JSON writes it
            yield file
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path!r}: {error.strerror}; give another --out") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _parser() -> Parser:
    parser = Parser(prog="rftt store", description="Look into stores of trees and trajectories, and put them together.")
    verbs = {name: Parser(description=f"{text[0].upper()}{text[1:]}.") for name, text in VERBS.items()}
    for verb in verbs.values():
        verb.add_argument("--config", action="config", help="YAML file with options; may be repeated, later ones win")
    for name in ("list", "show", "export"):
        verbs[name].add_argument("folder", type=str, help="the store")
    for name in ("list", "export"):
        add = verbs[name].add_argument
        add("--problem", type=str, default="*", help="shell pattern of the problems' ids")
        add("--verdict", type=str, choices=[s.value for s in Status], help="of the rollout; trees that have such a one")
        add("--kind", type=str, choices=["plain", "merged"], help="of the trajectory")
        add("--uses", type=str, nargs="+", default=[], metavar="TAG", help="tags that the path has, all of them")
        add("--lacks", type=str, nargs="+", default=[], metavar="TAG", help="tags that the path has not, none of them")
        add("--min_version", type=int | None, default=None, help="of the policy, for every segment of the rollout")
        add("--max_version", type=int | None, default=None, help="of the policy, for every segment of the rollout")
    verbs["list"].add_argument("--limit", type=int, default=20, help="rows shown; totals are of all")
    verbs["show"].add_argument("--problem", type=str, required=True, help="id of the problem")
    verbs["export"].add_argument("--out", type=str, required=True, help="JSONL file to write")
    verbs["merge"].add_argument("out", type=str, help="folder of the new store")
    verbs["merge"].add_argument("folders", type=str, nargs="+", help="stores of one kind with the same settings")
    verbs["merge"].add_argument("--overwrite", type=bool, default=False, help="replace a store that is there")
    commands = parser.add_subcommands(dest="verb")
    for name, verb in verbs.items():
        commands.add_subcommand(name, verb, help=VERBS[name])
    return parser


def main(args: list[str]) -> int | None:
    refuse_malformed(args)
    parsed = _parser().parse_args(args)
    options: Mapping[str, Any] = vars(parsed[parsed.verb])
    if parsed.verb == "show":
        show(options["folder"], options["problem"])
    elif parsed.verb == "merge":
        count = merge(options["out"], options["folders"], options["overwrite"])
        print(f"{count} {manifest(options['out'])['kind']}: {options['out']}")
    else:
        where = Filter(**{f.name: options[f.name] for f in fields(Filter) if f.name in options})
        if parsed.verb == "list":
            list_store(options["folder"], where, options["limit"])
        else:
            export(options["folder"], where, options["out"])
    return 0
