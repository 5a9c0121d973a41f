"""``rftt evaluate``: accuracy of a model on any problem source, greedy and by search, with intervals and costs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from rftt_lightning.app.command import paper, run_command
from rftt_lightning.app.search import harvest
from rftt_lightning.core.contracts import Backend, ProblemSource, Reward, Rollout, Status, UserError
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Tree
from rftt_lightning.search.expand import Expander
from rftt_lightning.search.vote import Accuracy, answer_of, best, vote, worth
from rftt_lightning.training import measures
from rftt_lightning.training.metrics import AnswerAccuracy

VOTES: dict[str, Callable[[Sequence[Rollout], Mapping[str, str]], Rollout | None]] = {
    "majority": vote,
    "weighted": lambda rollouts, same: vote(rollouts, same, worth),
    "best": lambda rollouts, same: best(rollouts),
}
"""From rollouts, and which answers are the same, to one of them."""


def evaluate(
    source: ProblemSource,
    backend: Backend,
    reward: Reward,
    greedy: Expander | None = None,
    search: Expander | None = None,
    rollouts: list[int] = [1, 2, 4, 8, 16],  # noqa: B006  jsonargparse shows the default
    tokens: str | None = None,
    checks: list[str] = ["verify", "refine"],  # noqa: B006
    out: str = "runs/evaluate",
    seed: int = 0,
    concurrency: int = 128,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Answer every problem of a source, greedily and by search, and report accuracies with 95 % intervals; of the greedy
    answers also by level and by subject, where the problems have them.

    Writes ``results.json``, ``table.txt`` and ``accuracy.png`` to ``out``; the trees are kept beside them, so an interrupted
    evaluation goes on where it was.

    Args:
        source: the problems, and the judge of the answers.
        backend: the model.
        reward: what search backs up; must not look at the gold answer (Confidence does not).
        greedy: how the single answer is made (rollouts 1, temperature 0); null leaves it out.
        search: how n rollouts are made; null leaves them out.
        rollouts: the n to report; the first n rollouts of one search serve for each.
        tokens: functional-token table; null is the paper's.
        checks: functional tokens at the first of which an answer's first attempt ends (repairs are counted from there).
        out: folder of the results.
        seed: of all sampling.
        concurrency: trees that grow together.
        overwrite: begin anew instead of continuing.
    """
    table = TokenTable.from_yaml(resolve(tokens) if tokens else None)
    _check(reward, greedy, search, rollouts, checks, table)
    results: dict[str, Any] = {"problems": len(source.problems())}
    for name, expander in (("greedy", greedy), ("search", search)):
        if expander is None:
            continue
        trees, seconds = harvest(
            source, backend, expander, reward, Path(out) / name, seed=seed, concurrency=concurrency, overwrite=overwrite
        )
        if name == "greedy":
            results[name] = _greedy(trees, seconds, source, table, checks)
        else:
            same = [source.same([a for r in tree.rollouts() if (a := answer_of(r)) is not None]) for tree in trees]
            results["rollouts"] = {str(n): _n_rollouts(trees, same, n, seconds) for n in sorted(rollouts)}
    folder = Path(out)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = _table(results)
    (folder / "table.txt").write_text(text, encoding="utf-8")
    print(text)
    if "rollouts" in results:
        plot_rollouts(results, folder / "accuracy.png")
    print(f"results: {folder / 'results.json'}")
    return results


def _check(
    reward: Reward,
    greedy: Expander | None,
    search: Expander | None,
    rollouts: Sequence[int],
    checks: Sequence[str],
    table: TokenTable,
) -> None:
    """Raises :class:`UserError` where figures would not be what they are called."""
    if greedy is None and search is None:
        raise UserError("nothing to evaluate: give greedy, search, or both")
    for name in checks:
        if name not in table.names:
            raise UserError(f"checks names {name!r}, which is not among the tokens {', '.join(table.names)}")
    if greedy and (greedy.rollouts > 1 or greedy.sampling.temperature > 0):
        raise UserError(
            f"greedy.rollouts is {greedy.rollouts} and greedy.sampling.temperature {greedy.sampling.temperature}; a greedy "
            "answer has 1 and 0, anything else is a search"
        )
    if search is None:
        return
    if not rollouts or min(rollouts) < 1:
        raise UserError(f"rollouts is {list(rollouts)}; give one n or more, each at least 1")
    if max(rollouts) > search.rollouts:
        raise UserError(
            f"rollouts asks for n = {max(rollouts)}, the search makes {search.rollouts}; raise search.rollouts"
        )
    if reward.uses_gold:
        raise UserError(
            f"the value of {type(reward).__name__} knows the gold answer and would steer the search to it; use Confidence, "
            "or a reward with uses_gold = False"
        )


def _greedy(
    trees: Sequence[Tree], seconds: float, source: ProblemSource, table: TokenTable, checks: Sequence[str]
) -> dict[str, Any]:
    answers = [tree.rollouts()[0] for tree in trees]
    n = len(answers)
    accuracy = AnswerAccuracy()
    accuracy.update([r.score.verdict for r in answers if r.score], [r.problem for r in answers if r.score])
    use = Counter(segment.tag for r in answers for segment in r.segments)
    return {
        **accuracy.compute(),
        "tokens_per_problem": sum(r.length for r in answers) / n,
        "seconds_per_problem": seconds / n,
        "complete": sum(r.complete for r in answers) / n,
        "functional_tokens_per_answer": {
            name or "no tag": use[name] / n for name in (*table.names, *(set(use) - set(table.names)))
        },
        **_repairs(answers, source, table, checks),
    }


def _repairs(
    answers: Sequence[Rollout], source: ProblemSource, table: TokenTable, checks: Sequence[str]
) -> dict[str, float]:
    """Share of answers whose attempt before the first check was wrong and whose end is right, and the reverse."""
    found = measures.attempts(answers, source, table, checks)
    return {
        "wrong_to_right": found.count((False, True)) / len(answers),
        "right_to_wrong": found.count((True, False)) / len(answers),
    }


def _n_rollouts(trees: Sequence[Tree], same: Sequence[Mapping[str, str]], n: int, seconds: float) -> dict[str, Any]:
    """Accuracies by the first ``n`` rollouts; ``same`` tells which answers of a tree are counted as one. A tree that was spent
    earlier counts with the rollouts it has. Tokens are those newly written; seconds are the search's, shared out by tokens."""
    chosen, verdicts = dict.fromkeys((*VOTES, "any"), 0), Counter[Status]()
    for tree, equal in zip(trees, same, strict=True):
        first = tree.rollouts()[:n]
        for name, choose in VOTES.items():
            winner = choose(first, equal)
            chosen[name] += bool(winner and winner.score and winner.score.verdict.right)
        chosen["any"] += any(r.score.verdict.right for r in first if r.score)
        verdicts.update(r.score.verdict.status for r in first if r.score)
    tokens, everything = (
        sum(_written(tree, n) for tree in trees),
        sum(_written(tree, len(tree.leaves)) for tree in trees),
    )
    return {
        **{name: Accuracy.of(right, len(trees)).to_json() for name, right in chosen.items()},
        "verdicts": {status.value: verdicts[status] for status in Status},
        "tokens_per_problem": tokens / len(trees),
        "seconds_per_problem": seconds * tokens / max(everything, 1) / len(trees),
    }


def _written(tree: Tree, n: int) -> int:
    """Tokens that the first ``n`` rollouts wrote: each node counts once."""
    nodes = {node for leaf, _ in tree.leaves[:n] for node in tree.path(leaf)}
    return sum(len(segment.tokens) for node in nodes if (segment := tree.segments[node]))


def _table(results: dict[str, Any]) -> str:
    table = Table(title=f"accuracy, % with 95 % interval, {results['problems']} problems")
    for column in ("", "majority", "weighted", "best of n", "any", "tokens", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    if "greedy" in results:
        row = results["greedy"]
        table.add_row("greedy", _cell(row), "", "", "", *_costs(row))
    for n, row in results.get("rollouts", {}).items():
        table.add_row(f"{n} rollouts", *(_cell(row[name]) for name in (*VOTES, "any")), *_costs(row))
    console = paper()
    console.print(table)
    for name in ("level", "subject"):
        groups = results.get("greedy", {}).get(f"by_{name}", {})
        if len(groups) > 1:
            console.print(_groups(name, groups))
    return console.export_text()


def _groups(name: str, groups: dict[str, dict[str, Any]]) -> Table:
    table = Table(name, "problems", "greedy", title=f"by {name}")
    for group, row in groups.items():
        table.add_row(escape(group), str(row["n"]), _cell(row))
    return table


def _cell(row: dict[str, Any]) -> str:
    return str(Accuracy(row["accuracy"], row["low"], row["high"], row["n"]))


def _costs(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['tokens_per_problem']:.0f}", f"{row['seconds_per_problem']:.3f}"


def plot_rollouts(results: dict[str, Any], path: Path) -> None:
    """Accuracy against the number of rollouts, one line a vote, shaded 95 % intervals; the greedy answer as a level line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=150)
    counts = [int(n) for n in results["rollouts"]]
    for name in (*VOTES, "any"):
        rows = [row[name] for row in results["rollouts"].values()]
        line = axes.plot(
            counts, [100 * r["accuracy"] for r in rows], marker="o", label=name, ls=":" if name == "any" else "-"
        )
        band = ([100 * r["low"] for r in rows], [100 * r["high"] for r in rows])
        axes.fill_between(counts, *band, alpha=0.12, color=line[0].get_color())
    if "greedy" in results:
        axes.axhline(100 * results["greedy"]["accuracy"], color="black", ls="--", lw=1, label="greedy")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set(xlabel="rollouts a problem", ylabel="accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(args: list[str]) -> int | None:
    return run_command(evaluate, args, "rftt evaluate")
