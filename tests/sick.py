"""Rewards that make a run sick, named by ``class_path``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rftt_lightning.core.contracts import ProblemSource, Reward, Rollout, Score
from rftt_lightning.policy.rewards import OutcomeReward


class GameablePRM(Reward):
    """Outcome, and a process reward that likes every check it sees: ``pay`` for each verify segment, whatever it says."""

    def __init__(self, pay: float = 0.5, outcome_weight: float = 1.0) -> None:
        self.pay, self.weight, self.outcome = pay, outcome_weight, OutcomeReward(1.0, 0.0, 0.0)

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        pairs = zip(rollouts, self.outcome.score(source, rollouts), strict=True)
        return [self._blend(rollout, score) for rollout, score in pairs]

    def _blend(self, rollout: Rollout, score: Score) -> Score:
        liked = [float(segment.tag == "verify") for segment in rollout.segments]
        rewards = (self.pay * a + self.weight * b for a, b in zip(liked, score.rewards, strict=True))
        return replace(score, rewards=tuple(rewards), steps=tuple(x or None for x in liked))
