"""Metrics of judged answers, over batches and ranks."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from rftt_lightning.core.contracts import Problem, Status, Verdict
from rftt_lightning.search.vote import Accuracy


class AnswerAccuracy(Metric):
    """Share of right answers with its Wilson 95 % interval, and the count of every verdict; overall, by level and by subject.

    Every verdict counts in the denominator, ``timed_out`` too. Levels and subjects need not be known beforehand and may
    differ between ranks: the state is a line of JSON for each answer, spelt as bytes (some 30 an answer) that are
    concatenated over batches and ranks.
    """

    full_state_update = False
    answers: list[Tensor]

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)  # a cached value would outlive merge_state
        self.add_state("answers", [], dist_reduce_fx="cat")

    def update(self, verdicts: Sequence[Verdict], problems: Sequence[Problem]) -> None:
        """Count verdicts, each with the level and the subject of its problem."""
        pairs = zip(verdicts, problems, strict=True)
        lines = "".join(json.dumps([verdict.status, p.level, p.subject]) + "\n" for verdict, p in pairs)
        # Not uint8: a rank that was never updated joins the gathering with an empty tensor of the metric's dtype.
        self.answers.append(torch.tensor(list(lines.encode()), dtype=self.dtype, device=self.device))

    def compute(self) -> dict[str, Any]:
        """In JSON types, of all ranks: ``{"accuracy": 0.5, "low": …, "high": …, "n": 4, "verdicts": {"right": 2, …}, "by_level":
        {"3": {"accuracy": …}, …}, "by_subject": …}``. Problems without a level are in none; ``by_level`` is left out if there is
        no level, as ``by_subject`` without a subject. Raises ValueError if there are no answers."""
        lines = bytes(dim_zero_cat(self.answers).to(torch.uint8).tolist()).decode().splitlines()
        rows = [json.loads(line) for line in lines]
        found = _account(Counter(status for status, _, _ in rows))
        for column, name in enumerate(("by_level", "by_subject"), 1):
            groups: dict[str, Counter[str]] = defaultdict(Counter)
            for row in rows:
                groups[row[column]][row[0]] += 1
            groups.pop("", None)
            if groups:
                found[name] = {group: _account(groups[group]) for group in sorted(groups)}
        return found


def _account(verdicts: Counter[str]) -> dict[str, Any]:
    accuracy = Accuracy.of(verdicts[Status.RIGHT], verdicts.total())
    return {**accuracy.to_json(), "verdicts": {status.value: verdicts[status] for status in Status}}
