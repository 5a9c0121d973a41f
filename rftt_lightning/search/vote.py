"""From the rollouts of a problem to one answer, without looking at the gold one; and intervals of accuracies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from scipy.stats import binomtest

from rftt_lightning.core.contracts import Rollout


@dataclass(frozen=True)
class Accuracy:
    """``Accuracy.of(180, 500)``: share of right answers with its Wilson 95 % interval, all in [0, 1]."""

    accuracy: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, right: int, n: int) -> Accuracy:
        """Raises ValueError when ``n`` < 1."""
        interval = binomtest(right, n).proportion_ci(0.95, method="wilson")
        return cls(right / n, interval.low, interval.high, n)

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def scores(rollouts: Sequence[Rollout]) -> list[float]:
    """The mean step score of each path if a process reward scored any of them, 0 for those that it did not; else the policy's own
    confidence in each. The two are no numbers to compare."""
    steps = [[s for s in r.score.steps if s is not None] if r.score and r.complete else [] for r in rollouts]
    if any(steps):
        return [sum(some) / len(some) if some else 0.0 for some in steps]
    return [rollout.confidence for rollout in rollouts]


def answer_of(rollout: Rollout) -> str | None:
    """The final answer as it was written, None if there is none."""
    return rollout.score.verdict.answer if rollout.score else None


def vote(
    rollouts: Sequence[Rollout], same: Mapping[str, str] = {}, weights: Sequence[float] | None = None
) -> Rollout | None:
    """The first rollout of the answer with the greatest total weight (ties: the earliest answer); None if none answers.

    ``vote(rollouts, same)`` is majority voting, ``vote(rollouts, same, scores(rollouts))`` the reward-weighted vote (arXiv
    2203.11171). ``same`` maps answers to the one that they are counted as, see :meth:`ProblemSource.same`; any other is its own.
    """
    totals: dict[str, float] = defaultdict(float)
    first: dict[str, Rollout] = {}
    for rollout, weight in zip(rollouts, weights or [1.0] * len(rollouts), strict=True):
        answer = answer_of(rollout)
        if answer is not None:
            answer = same.get(answer, answer)
            totals[answer] += weight
            first.setdefault(answer, rollout)
    return first[max(totals, key=totals.__getitem__)] if totals else None


def best(rollouts: Sequence[Rollout]) -> Rollout | None:
    """Best of n: the rollout with an answer and the highest of :func:`scores`."""
    answered = [(score, r) for score, r in zip(scores(rollouts), rollouts, strict=True) if answer_of(r) is not None]
    return max(answered, key=lambda pair: pair[0])[1] if answered else None
