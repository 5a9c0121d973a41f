"""From the rollouts of a problem to one answer, without looking at the gold one; and intervals of accuracies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from scipy.stats import binomtest

from rftt_lightning.core.contracts import Rollout, Status


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


def worth(rollout: Rollout) -> float:
    """What search backed up of a path, in [0, 1]: the policy's confidence, or what a process reward makes of its step scores; 0 for
    a path that is not complete."""
    return rollout.score.value if rollout.score and rollout.complete else 0.0


def answer_of(rollout: Rollout) -> str | None:
    """The final answer as it was written, None if there is none."""
    return rollout.score.verdict.answer if rollout.score else None


def vote(
    rollouts: Sequence[Rollout], same: Mapping[str, str] = {}, weight: Callable[[Rollout], float] = lambda rollout: 1.0
) -> Rollout | None:
    """The first rollout of the answer with the greatest total weight (ties: the earliest answer), the first whose verdict came in
    time if there is one; None if none answers.

    ``vote(rollouts, same)`` is majority voting, ``vote(rollouts, same, worth)`` the reward-weighted vote (arXiv 2203.11171).
    ``same`` maps answers to the one that they are counted as, see :meth:`ProblemSource.same`; any other is its own.
    """
    totals: dict[str, float] = defaultdict(float)
    first: dict[str, Rollout] = {}
    for rollout in rollouts:
        answer = answer_of(rollout)
        if answer is not None:
            answer = same.get(answer, answer)
            totals[answer] += weight(rollout)
            if answer not in first or _late(first[answer]) > _late(rollout):
                first[answer] = rollout
    return first[max(totals, key=totals.__getitem__)] if totals else None


def _late(rollout: Rollout) -> bool:
    return rollout.score is not None and rollout.score.verdict.status is Status.TIMED_OUT


def best(rollouts: Sequence[Rollout]) -> Rollout | None:
    """Best of n: the rollout with an answer that is :func:`worth` most."""
    answered = [r for r in rollouts if answer_of(r) is not None]
    return max(answered, key=worth) if answered else None
