"""What a step of RL amounts to, in numbers: pure functions of its trees and its batch, over all ranks.

Nothing here hangs on the clock or on the machine, so a run that is repeated or resumed has the same numbers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from torch import Tensor

from rftt_lightning.core.contracts import Provenance, Rollout
from rftt_lightning.policy import objectives
from rftt_lightning.training.metrics import AnswerAccuracy
from rftt_lightning.training.rl import RLBatch

Sum = Callable[[float], float]
"""A number of this rank to the sum over all ranks."""


def right(rollout: Rollout) -> bool:
    return rollout.score is not None and rollout.score.verdict.right


def mixed(group: Sequence[Rollout]) -> bool:
    """Are some rollouts of the problem right, and some not? Others have nothing to tell by their outcome (arXiv 2503.14476,
    sec. 3.2)."""
    return len({right(rollout) for rollout in group}) == 2


def of_groups(groups: Sequence[Sequence[Rollout]], total: Sum) -> dict[str, float]:
    """How many problems were rolled out, and which share of them has nothing but right, or nothing but other, rollouts."""
    problems = total(len(groups))
    all_right = total(sum(bool(group) and all(map(right, group)) for group in groups))
    all_wrong = total(sum(bool(group) and not any(map(right, group)) for group in groups))
    return {
        "problems": problems,
        "dead_groups/all_right": all_right / problems,
        "dead_groups/all_wrong": all_wrong / problems,
    }


def of_rollouts(
    rollouts: Sequence[Rollout], tags: Sequence[str], metric: AnswerAccuracy, total: Sum
) -> dict[str, float]:
    """Accuracy, verdicts, length and use of tokens; by functional token the mean score of the segments that were scored."""
    # Rollouts of one tree share prefixes, so they are not independent: the true interval is wider than this one.
    scored = [r for r in rollouts if r.score]
    metric.update([r.score.verdict for r in scored], [r.problem for r in scored])  # type: ignore[union-attr]
    found = metric.compute()
    n = found["n"]
    metrics = {
        "accuracy": found["accuracy"],
        "accuracy_low": found["low"],
        "accuracy_high": found["high"],
        "rollouts": float(n),
        "length": total(sum(r.length for r in rollouts)) / n,
        "complete": total(sum(r.complete for r in rollouts)) / n,
    }
    use = Counter(segment.tag for rollout in rollouts for segment in rollout.segments)
    checked, correct = _step_scores(rollouts)
    for tag in tags:
        metrics[f"functional_tokens/{tag}"] = total(use[tag]) / n
        if count := total(checked[tag]):
            metrics[f"step_scores/{tag}"] = total(correct[tag]) / count
    return metrics | {f"verdicts/{status}": float(count) for status, count in found["verdicts"].items()}


def _step_scores(rollouts: Sequence[Rollout]) -> tuple[dict[str, float], dict[str, float]]:
    """By functional token: how many segments the reward scored, and the sum of their scores."""
    counts: dict[str, float] = defaultdict(float)
    sums: dict[str, float] = defaultdict(float)
    for rollout in rollouts:
        for segment, score in zip(rollout.segments, rollout.score.steps if rollout.score else (), strict=False):
            if score is not None:
                counts[segment.tag] += 1.0
                sums[segment.tag] += score
    return counts, sums


def of_batch(batch: RLBatch, learned: float, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Mean reward of the rollouts that are learned from, so many on all ranks; per token of theirs the KL from the reference and
    the gap between sampler and trainer."""
    tokens = reduce(batch.mask_BT.sum()).clamp(min=1)
    kl = reduce(((batch.old_BT - batch.reference_BT) * batch.mask_BT).sum()) / tokens
    sampled_BT = (batch.provenance_BT == int(Provenance.SAMPLED)) * batch.mask_BT
    gap = objectives.sampler_gap(batch.old_BT, batch.behaviour_BT, sampled_BT, reduce)
    reward = reduce(batch.rewards_BT.sum()) / max(learned, 1.0)
    return {"reward": float(reward), "kl": float(kl), "sampler_gap": float(gap)}
