"""What was decided, by (gold, answer) and by (gold, response): groups of rollouts give few different answers."""

from __future__ import annotations

from collections.abc import Hashable

from rftt_lightning.core.contracts import Status, Verdict

REMEMBERED = 50_000
"""Verdicts that are kept."""
LONG = 500
"""Characters of a key's texts; longer ones are decided anew."""


class Memory:
    """Two generations of verdicts: when the young one is full it becomes the old one. No step needs a lock."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.young: dict[Hashable, Verdict] = {}
        self.old: dict[Hashable, Verdict] = {}

    def get(self, key: tuple[Hashable, ...]) -> Verdict | None:
        return self.young.get(key) or self.old.get(key)

    def put(self, key: tuple[Hashable, ...], verdict: Verdict) -> Verdict:
        """Keep a verdict, but for one that timed out: that is no knowledge."""
        if verdict.status is not Status.TIMED_OUT and sum(len(str(part)) for part in key[:2]) <= LONG:
            if len(self.young) >= REMEMBERED // 2:
                self.old, self.young = self.young, {}
            self.young[key] = verdict
        return verdict


MEMORY = Memory()
