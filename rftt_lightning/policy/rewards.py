"""What a path is worth: outcome, process, blend (arXiv 2502.13389, section 3.3)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from rftt_lightning.core.contracts import ProblemSource, Reward, Rollout, Score, Status, UserError, Verdict
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable


class OutcomeReward(Reward):
    """Is the answer right? Search backs up 1 or 0; training puts the reward on the last segment, 0 on all others.

    Args:
        right: reward of a right answer.
        wrong: of an answer that is there and wrong (the paper's 0.1).
        none: of a path without an answer, whose budget was spent, or whose verdict timed out (the trainer drops the latter, see
            its ``drop_timed_out``).
        tokens: functional-token table; None is the paper's.
    """

    def __init__(self, right: float = 1.0, wrong: float = 0.1, none: float = 0.0, tokens: str | None = None) -> None:
        self.right, self.wrong, self.none = right, wrong, none
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        return [self._score(r, v) for r, v in zip(rollouts, judge(source, rollouts, self.table), strict=True)]

    def _score(self, rollout: Rollout, verdict: Verdict) -> Score:
        last = {Status.RIGHT: self.right, Status.WRONG: self.wrong}.get(verdict.status, self.none)
        rewards = (*[0.0] * (len(rollout.segments) - 1), last)
        return Score(verdict, float(verdict.right), rewards)


class Confidence(Reward):
    """For inference: search backs up the policy's own confidence, never the gold answer, which only the verdict knows."""

    uses_gold = False

    def __init__(self, tokens: str | None = None) -> None:
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        verdicts = judge(source, rollouts, self.table)
        return [Score(v, r.confidence, (0.0,) * len(r.segments)) for r, v in zip(rollouts, verdicts, strict=True)]


class ProcessReward(Reward):
    """The domain's exact step checker as a process reward: each scored segment is paid ``weight * (score - center)``.

    Centring matters: positive step scores summed over a path pay for length, and scores that are never positive pay for
    leaving steps (checks, above all) out. Segments that compute nothing are not scored. Search backs up 1 or 0 for the answer.

    Args:
        weight: of a step's score.
        center: what is taken off a score in [0, 1]; None is the mean score, among the paths scored together, of the segments that
            are the n-th of the same tag in their path, so that a tag's use is neither paid nor punished, only its being right
            (a third attempt is harder than a first; one mean for all of them would teach to give up).
        credit: ``"path"``: scores add up, so that a segment's return holds those of all that follow it (the paper);
            ``"segment"``: a segment's return is its own score, which neither pays for length nor blames a step for later ones.
            The rewards are then differences of neighbouring scores: with gamma 1 their sums telescope.
        tokens: functional-token table; None is the paper's.
    """

    def __init__(
        self, weight: float = 1.0, center: float | None = None, credit: str = "path", tokens: str | None = None
    ) -> None:
        if credit not in ("path", "segment"):
            raise UserError(f"reward.credit is {credit!r}; use path or segment")
        self.weight, self.center, self.credit = weight, center, credit
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        checked = [tuple(source.check_steps(rollout.problem, rollout.steps)) for rollout in rollouts]
        numbered = [turns(rollout) for rollout in rollouts]
        centers = self._centers(numbered, checked)
        scores = []
        verdicts = judge(source, rollouts, self.table)
        for path, steps, verdict in zip(numbered, checked, verdicts, strict=True):
            pairs = zip(path, steps, strict=True)
            rewards = [0.0 if s is None else self.weight * (s - centers[turn]) for turn, s in pairs]
            if self.credit == "segment":
                rewards = [now - later for now, later in zip(rewards, [*rewards[1:], 0.0], strict=True)]
            scores.append(Score(verdict, float(verdict.right), tuple(rewards), steps))
        return scores

    def _centers(
        self, numbered: Sequence[list[tuple[str, int]]], checked: Sequence[tuple[float | None, ...]]
    ) -> dict[tuple[str, int], float]:
        scores: dict[tuple[str, int], list[float]] = defaultdict(list)
        for path, steps in zip(numbered, checked, strict=True):
            for turn, step in zip(path, steps, strict=True):
                if step is not None:
                    scores[turn].append(step)
        return {turn: sum(v) / len(v) if self.center is None else self.center for turn, v in scores.items()}


def turns(rollout: Rollout) -> list[tuple[str, int]]:
    """For each segment, its tag and how many of that tag the path holds before it."""
    before: Counter[str] = Counter()
    numbered = []
    for segment in rollout.segments:
        numbered.append((segment.tag, before[segment.tag]))
        before[segment.tag] += 1
    return numbered


class Blend(Reward):
    """Sum of an outcome and a process reward with weights (the released code: 0.6 and 0.4); search backs up the outcome's
    value, the verdict is the outcome's."""

    def __init__(
        self, outcome: Reward, process: Reward, outcome_weight: float = 0.6, process_weight: float = 0.4
    ) -> None:
        self.outcome, self.process = outcome, process
        self.outcome_weight, self.process_weight = outcome_weight, process_weight

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        pairs = zip(self.outcome.score(source, rollouts), self.process.score(source, rollouts), strict=True)
        return [replace(a, rewards=self._sum(a, b), steps=b.steps) for a, b in pairs]

    @property
    def uses_gold(self) -> bool:  # type: ignore[override]
        return self.outcome.uses_gold

    def _sum(self, outcome: Score, process: Score) -> tuple[float, ...]:
        pairs = zip(outcome.rewards, process.rewards, strict=True)
        return tuple(self.outcome_weight * a + self.process_weight * b for a, b in pairs)


def judge(source: ProblemSource, rollouts: Sequence[Rollout], table: TokenTable) -> list[Verdict]:
    """Verdicts of all paths in one batch; an incomplete path has no answer and is not asked about."""
    asked = [i for i, rollout in enumerate(rollouts) if rollout.complete]
    given = source.judge_many([(rollouts[i].problem, table.render(rollouts[i].steps)) for i in asked])
    verdicts = [Verdict(Status.NO_ANSWER, rule="path is incomplete")] * len(rollouts)
    for i, verdict in zip(asked, given, strict=True):
        verdicts[i] = verdict
    return verdicts
