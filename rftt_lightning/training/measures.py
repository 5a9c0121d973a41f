"""What a step's trees say of the policy, as named numbers. No torch.

First :func:`count`: sums with the same names on every rank, which may be added; then :func:`rates` of the added sums. All counts
are of rollouts unless they say nodes, which count once however many rollouts pass through them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rftt_lightning.core.contracts import Problem, ProblemSource, Rollout, Status
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Tree

CHECKS = ("verify", "refine")
"""Functional tokens at the first of which a path's first attempt ends."""

_PLAIN = (
    *("rollouts", "complete", "tokens", "segments", "unclosed", "checked", "wrong_to_right", "right_to_wrong"),
    *("problems", "all_right", "all_wrong", "mixed", "duplicates", "planned", "visited", "inner"),
    *("boundaries", "entropy"),
)
_BY_TOKEN = ("used", "scored", "score", "reward", "boundaries", "entropy")


def count(trees: Sequence[Tree], table: TokenTable, source: ProblemSource) -> dict[str, float]:
    """Sums over the trees of a step, which :func:`rates` names; the keys hang on the table alone, also without trees."""
    sums = dict.fromkeys([*_PLAIN, *(f"{kind}/{name}" for kind in _BY_TOKEN for name in table.names)], 0.0)
    rollouts = [tree.rollouts() for tree in trees]
    for tree, paths in zip(trees, rollouts, strict=True):
        _count_paths(sums, paths)
        _count_nodes(sums, tree)
    for found in attempts([path for paths in rollouts for path in paths], source, table):
        sums["wrong_to_right"] += found == (False, True)
        sums["right_to_wrong"] += found == (True, False)
    return sums


def _count_paths(sums: dict[str, float], paths: Sequence[Rollout]) -> None:
    for path in paths:
        sums["rollouts"] += 1
        sums["complete"] += path.complete
        sums["checked"] += any(segment.tag in CHECKS for segment in path.segments)
        sums["tokens"] += path.length
        sums["segments"] += len(path.segments)
        sums["unclosed"] += sum(not segment.closed for segment in path.segments)
        steps = path.score.steps if path.score else ()
        rewards = path.score.rewards if path.score else ()
        for i, segment in enumerate(path.segments):
            if f"used/{segment.tag}" not in sums:  # tags are text, and what stands here is none
                continue
            sums[f"used/{segment.tag}"] += 1
            sums[f"reward/{segment.tag}"] += rewards[i] if i < len(rewards) else 0.0
            if i < len(steps) and (score := steps[i]) is not None:
                sums[f"scored/{segment.tag}"] += 1
                sums[f"score/{segment.tag}"] += score
    sums["duplicates"] += len(paths) - len({tuple(segment.tokens for segment in path.segments) for path in paths})
    verdicts = [path.score.verdict for path in paths if path.score]
    right = [verdict.right for verdict in verdicts if verdict.status is not Status.TIMED_OUT]
    if right:
        sums["problems"] += 1
        sums["all_right" if all(right) else "mixed" if any(right) else "all_wrong"] += 1


def _count_nodes(sums: dict[str, float], tree: Tree) -> None:
    sums["planned"] += len(tree) - 1
    sums["inner"] += len({tree.parent[node] for node, segment in enumerate(tree.segments) if segment})
    for segment in filter(None, tree.segments):
        sums["visited"] += 1
        if len(segment.priors) > 1:
            spread = uncertainty(segment.priors)
            for name in ("", f"/{segment.tag}"):
                sums[f"boundaries{name}"] += 1
                sums[f"entropy{name}"] += spread


def mixed(rollouts: Sequence[Rollout]) -> bool:
    """Are some rollouts of a problem right, and some not? Others have nothing to tell by their outcome (arXiv 2503.14476,
    sec. 3.2)."""
    return len({rollout.score is not None and rollout.score.verdict.right for rollout in rollouts}) == 2


def uncertainty(priors: Mapping[str, float]) -> float:
    """Entropy of two or more probabilities as a share of the greatest possible one: 0 certain, 1 uniform."""
    return -sum(p * math.log(p) for p in priors.values() if p > 0) / math.log(len(priors))


def attempts(
    rollouts: Sequence[Rollout], source: ProblemSource, table: TokenTable, checks: Sequence[str] = CHECKS
) -> list[tuple[bool | None, bool]]:
    """For each rollout that checks itself: was the attempt before the first of ``checks`` right (None: there was none that had come
    to an answer, :meth:`ProblemSource.attempted`), and is the end? Attempts that are the same are judged once, all in one batch.
    A rollout of which either verdict timed out is left out: nothing is known of it."""
    asked: dict[tuple[str, str], tuple[Problem, str]] = {}
    pairs: list[tuple[tuple[str, str] | None, bool]] = []
    for rollout in rollouts:
        first = next((i for i, segment in enumerate(rollout.segments) if segment.tag in checks), None)
        verdict = rollout.score.verdict if rollout.score else None
        if first is None or (verdict and verdict.status is Status.TIMED_OUT):
            continue
        key, steps = None, rollout.steps[:first]
        if source.attempted(rollout.problem, steps):
            key = rollout.problem.id, table.render(steps)
            asked[key] = rollout.problem, key[1]
        pairs.append((key, bool(verdict and verdict.right)))
    judged = dict(zip(asked, source.judge_many(list(asked.values())), strict=True)) if asked else {}
    late = {key for key, verdict in judged.items() if verdict.status is Status.TIMED_OUT}
    return [(judged[key].right if key else None, after) for key, after in pairs if key not in late]


def rates(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics that the sums of :func:`count` amount to. Raises ZeroDivisionError if there were no rollouts.

    ============================  ==========================================================================================
    ``length``, ``complete``      tokens of a rollout; share of rollouts that end in a closed terminal segment
    ``malformed``                 share of segments that are not closed
    ``functional_tokens/<tag>``   segments a rollout
    ``rewards/<tag>``             reward put on segments of the tag, a rollout
    ``step_scores/<tag>``         mean score of the scored segments, absent if none was
    ``boundary/entropy``          of the policy's functional-token priors after closed segments with a choice, as a share of
                                  the greatest possible: 0 certain, 1 uniform; ``boundary_entropy/<tag>`` after segments of the
                                  tag; absent if there were none
    ``repair/…``                  shares of rollouts: ``checked`` themselves, ``wrong_to_right``, ``right_to_wrong`` between the
                                  attempt before the first check and the end (neither if a verdict of the two timed out), and
                                  ``net``, the difference of these
    ``groups/…``                  shares of problems: ``all_right``, ``all_wrong``, ``mixed`` (of verdicts in time; absent if
                                  there were none)
    ``tree/…``                    ``depth``: segments of a rollout; ``branching``: visited children of a node that has any;
                                  ``visited``: share of planned nodes; ``duplicates``: share of rollouts that repeat another
    ============================  ==========================================================================================
    """
    n = sums["rollouts"]
    names = [key.removeprefix("used/") for key in sums if key.startswith("used/")]
    found = {
        "length": sums["tokens"] / n,
        "complete": sums["complete"] / n,
        "malformed": sums["unclosed"] / max(sums["segments"], 1),
        "repair/checked": sums["checked"] / n,
        "repair/wrong_to_right": sums["wrong_to_right"] / n,
        "repair/right_to_wrong": sums["right_to_wrong"] / n,
        "repair/net": (sums["wrong_to_right"] - sums["right_to_wrong"]) / n,
        **{
            f"groups/{kind}": sums[kind] / sums["problems"]
            for kind in ("all_right", "all_wrong", "mixed")
            if sums["problems"]
        },
        "tree/depth": sums["segments"] / n,
        "tree/branching": sums["visited"] / max(sums["inner"], 1),
        "tree/visited": sums["visited"] / max(sums["planned"], 1),
        "tree/duplicates": sums["duplicates"] / n,
    }
    if sums["boundaries"]:
        found["boundary/entropy"] = sums["entropy"] / sums["boundaries"]
    for name in names:
        found[f"functional_tokens/{name}"] = sums[f"used/{name}"] / n
        found[f"rewards/{name}"] = sums[f"reward/{name}"] / n
        if scored := sums[f"scored/{name}"]:
            found[f"step_scores/{name}"] = sums[f"score/{name}"] / scored
        if boundaries := sums[f"boundaries/{name}"]:
            found[f"boundary_entropy/{name}"] = sums[f"entropy/{name}"] / boundaries
    return found
