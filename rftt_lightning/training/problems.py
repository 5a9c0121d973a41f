"""Problems for RL: which ones each step rolls out."""

from __future__ import annotations

import random

import lightning

from rftt_lightning.core.contracts import Problem, ProblemSource, UserError
from rftt_lightning.search.problems import refuse_overlap


class ProblemDataModule(lightning.LightningDataModule):
    """Problems to learn from and to validate on.

    Args:
        train: problems that rollouts are made of.
        validation: problems that the policy is validated on, greedily; must not overlap ``train``.
        held_out: benchmarks that must not overlap ``train`` either.
        batch_size: problems a step, over all ranks.
        allow_overlap: go on in spite of an overlap; nothing is compared then.
        seed: of the problems' order; null: seed_everything, or 0.
    """

    def __init__(
        self,
        train: ProblemSource,
        validation: ProblemSource,
        held_out: list[ProblemSource] = [],  # noqa: B006  jsonargparse shows the default
        batch_size: int = 16,
        allow_overlap: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= batch_size <= len(train.problems()):
            raise UserError(
                f"data.batch_size is {batch_size}; it must be in 1..{len(train.problems())}, the train problems"
            )
        for other in () if allow_overlap else (validation, *held_out):
            refuse_overlap(train.problems(), other.problems())
        self.train, self.validation, self.batch_size, self.seed = train, validation, batch_size, seed or 0

    def batch(self, step: int) -> list[Problem]:
        """The problems of a step: epoch after epoch, each in an order of its own. A function of seed and step alone."""
        problems = self.train.problems()
        per_epoch = len(problems) // self.batch_size
        epoch, index = divmod(step, per_epoch)
        order = random.Random(f"{self.seed} {epoch}").sample(range(len(problems)), len(problems))
        return [problems[i] for i in order[index * self.batch_size : (index + 1) * self.batch_size]]

    def further(self, step: int, start: int, count: int) -> list[Problem]:
        """``count`` problems that are not in the step's batch, after the first ``start`` of them, or as many as there are: those
        that a step takes where others have nothing to learn from. Also a function of seed and step alone."""
        batch = {problem.id for problem in self.batch(step)}
        others = [problem for problem in self.train.problems() if problem.id not in batch]
        stop = min(start + count, len(others))
        return random.Random(f"{self.seed} further {step}").sample(others, len(others))[start:stop]
