"""From the rollouts of a problem to one answer, without looking at the gold one; and intervals of accuracies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
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


def score_of(rollout: Rollout) -> float:
    """Mean step score of a process reward if the path has one, else the policy's own confidence."""
    steps = [s for s in rollout.score.steps if s is not None] if rollout.score else []
    return sum(steps) / len(steps) if steps and rollout.complete else rollout.confidence


def answer_of(rollout: Rollout) -> str | None:
    """What equal answers share: the normal form if the judge gave one, else the extracted text."""
    if rollout.score is None:
        return None
    verdict = rollout.score.verdict
    return verdict.forms[1] if verdict.forms else verdict.answer


def vote(rollouts: Sequence[Rollout], weight: Callable[[Rollout], float] = lambda rollout: 1.0) -> Rollout | None:
    """The first rollout of the answer with the greatest total weight (ties: the earliest answer); None if none answers.

    ``vote(rollouts)`` is majority voting, ``vote(rollouts, score_of)`` the reward-weighted vote (arXiv 2203.11171).
    """
    totals: dict[str, float] = defaultdict(float)
    first: dict[str, Rollout] = {}
    for rollout in rollouts:
        answer = answer_of(rollout)
        if answer is not None:
            totals[answer] += weight(rollout)
            first.setdefault(answer, rollout)
    return first[max(totals, key=totals.__getitem__)] if totals else None


def best(rollouts: Sequence[Rollout]) -> Rollout | None:
    """Best of n: the rollout with an answer and the highest :func:`score_of`."""
    answered = [r for r in rollouts if answer_of(r) is not None]
    return max(answered, key=score_of) if answered else None
